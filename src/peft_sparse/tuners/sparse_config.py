"""The config fields that every method of this package has: PEFT's usual ones for choosing modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from peft_sparse.storage.files import SafetensorsFile


@dataclass
class SparseConfig(PeftConfig):
    """Base of `PstConfig` and `SppConfig`; see those."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the linears to adapt, or a regex, or 'all-linear'. None: every linear inside the "
            "model's repeated transformer blocks (never embeddings, pooler or head)."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules to leave alone, or a regex."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules besides the adapter that are trained and saved with it, such as a new classification "
            "head. PEFT adds the head by itself for task types such as SEQ_CLS."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt. None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of blocks that `layers_to_transform` counts, such as 'layers'."},
    )

    # Whether PEFT read this config from a folder and has not loaded the weights beside it yet. Not a field: not saved.
    _awaits_weights = False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> SparseConfig:
        """Read a config from a folder or the Hub, see PEFT's PeftConfig.

        Raises:
            ValueError: if the adapter's file beside it is damaged or cut short, so that loading it ends before
                anything is changed.
        """
        _check_adapter_file(*args, **kwargs)
        config = super().from_pretrained(*args, **kwargs)
        config._awaits_weights = True
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment] # PEFT's habit
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` names the list of blocks that `layers_to_transform` counts, got layers_pattern="
                f"{self.layers_pattern!r} without `layers_to_transform`; set both or neither."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` selects among a list of names, got a string in `target_modules` "
                f"({self.target_modules!r}); put the block numbers into the regex, or list the names."
            )


def _check_adapter_file(pretrained_model_name_or_path: Any, subfolder: str | None = None, **_: Any) -> None:
    file = Path(str(pretrained_model_name_or_path), subfolder or "", SAFETENSORS_WEIGHTS_NAME)
    if file.is_file():
        SafetensorsFile(file)


def check_positive_int(name: str, value: int) -> None:
    """Raises:
    ValueError: if `value` is not an integer above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"`{name}` should be a positive integer, got {value!r}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises:
    ValueError: if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` should be one of {', '.join(map(repr, choices))}, got {value!r}.")
