"""The config fields that every method of this package has: PEFT's usual ones for choosing modules.

A saved config also holds checksums, of its own fields and of the adapter's weights beside it, so that a damaged folder
is an error and not another model: PEFT and safetensors have none.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedModel

from peft_sparse.linears import PackedLinear, unwrap
from peft_sparse.storage.files import crc32
from peft_sparse.tuners.adapter_files import CONFIG, check_folder, refuse_pickled, weights_crc32
from peft_sparse.tuners.field_checks import check_bool, check_indices, check_names, check_tokens

# What may be edited in a file without changing what the adapter computes.
_UNCHECKED = {
    "auto_mapping",
    "base_model_name_or_path",
    "checksums",
    "inference_mode",
    "labels",
    "peft_version",
    "revision",
    "task_type",
}

# What rooms above do with the folder of each adapter that a PeftModel has saved.
AFTER_SAVE: list[Callable[[Path], None]] = []


@dataclass
class SparseConfig(PeftConfig):
    """Base of `PstConfig` and `SppConfig`; see those."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the linears to adapt, or a regex, or 'all-linear'. None: every linear inside the "
            "model's repeated transformer blocks (never embeddings, pooler, head or routers)."
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
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings are trained and saved with the adapter, such as new ones of a chat "
            "template; or a list of tokens for each embedding that is named."
        },
    )

    labels: list[str] | None = field(
        default=None,
        metadata={
            "help": "What a classifier's labels are called, in the order of their numbers. None: what the model's "
            "config has when the adapter is added, which is saved without that config; `peft-sparse merge` and "
            "`evaluate` give them back to the model."
        },
    )
    checksums: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Written when an adapter is saved, and not by hand: CRC-32 of these settings and of "
            "adapter_model.safetensors. Remove it from adapter_config.json to load files that were changed on purpose."
        },
    )

    # The fields that decide what given weights compute; others say how their training starts and goes on.
    function_fields: ClassVar[tuple[str, ...]] = ()
    # Not annotated, so no fields, and not saved: whether PEFT read this config from a folder and has not loaded the
    # weights beside it yet.
    awaits_weights = False
    # That folder, or repository of the Hub.
    _read_from = cast("Path | None", None)
    # The modules besides the adapter that have weights beside a config that was read from a folder.
    _modules_there = cast("set[str] | None", None)
    # The entries of `modules_to_save` that name a module of the model which the adapter was added to.
    names_found = cast("tuple[str, ...]", ())
    # The labels that the model before gave: a config may be used again, for one with others.
    labels_found = cast("list[str] | None", None)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SparseConfig:
        """Read a config from a folder or the Hub, see PEFT's PeftConfig.

        Raises:
            ValueError: if the config is not as it was saved, or the weights beside it (in a folder) are not, or are
                pickled, which PEFT would read.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, SparseConfig):  # the folder is that of another method's adapter
            return config
        expected, config.checksums = (config.checksums or {}).get("weights"), None
        config._modules_there = check_folder(pretrained_model_name_or_path, subfolder, expected)
        config._read_from = Path(pretrained_model_name_or_path, subfolder or "")
        config.awaits_weights = True
        return config

    @contextmanager
    def awaiting(self, folder: str | os.PathLike[str], subfolder: str | None = None, **_: Any) -> Iterator[None]:
        """While this context is open the adapter is made for the weights in a folder, or a repository of the Hub:
        if they do not fit, it goes again."""
        self.awaits_weights, self._read_from = True, Path(folder, subfolder or "")
        try:
            yield
        finally:
            self.awaits_weights, self._read_from = False, None

    def check_saved(self, folder: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any) -> None:
        """Check a folder, before its weights are read into an adapter that is there already and has this config.

        Args:
            folder: or a repository of the Hub, whose config alone is compared: its client checks files.
            **kwargs: for the Hub, such as `revision`.

        Raises:
            ValueError: see `from_pretrained`; or if the weights would compute something else under this config.
        """
        place = Path(folder, subfolder or "")
        if place != self._read_from:  # then the adapter was made for its own sake, and stays if nothing is loaded
            self.awaits_weights = False
        if (place / CONFIG).is_file() or not Path(folder).exists():
            saved = self.from_pretrained(os.fspath(folder), subfolder=subfolder, **kwargs)
            if isinstance(saved, type(self)):  # else no tensor has its name
                self._check_same_function(saved, place)
                saved.check_whole_modules(self.names_found)
        refuse_pickled(place)

    def check_again(self) -> None:
        """Check the fields as they are now: they may have been changed since the config was made.

        Raises:
            ValueError: as when it is made.
        """
        self.checksums = None  # they are of the fields as they were in a file
        self.__post_init__()

    def _check_same_function(self, saved: SparseConfig, place: Path) -> None:
        names = (*self.function_fields, "trainable_token_indices")
        other = [name for name in names if getattr(saved, name) != getattr(self, name)]
        if other:
            theirs, ours = (", ".join(f"{name}={getattr(c, name)!r}" for name in other) for c in (saved, self))
            raise ValueError(
                f"Weights are loaded under the settings that they were saved with, got {theirs} in {str(place)!r} and "
                f"{ours} in the adapter that is there, which would compute something else; make that adapter with "
                f"{theirs}, or load the folder under a new adapter name, which takes its settings. Nothing was loaded."
            )

    def check_whole_modules(self, names: Sequence[str]) -> None:
        """Raises:
        ValueError: if the weights beside a config that was read from a folder have none of a module that is trained
            and saved whole. `names` are the entries of `modules_to_save` that the model has."""
        there = self._modules_there
        missing = [name for name in names if there is not None and not any(m.endswith(name) for m in there)]
        if missing:
            raise ValueError(
                f"An adapter has the weights of its `modules_to_save`, got {missing} in the model and none of them in "
                "the adapter_model.safetensors beside the config; save or download the adapter again. Nothing was "
                "loaded."
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, see PEFT's PeftConfig; when PeftModel saves an adapter, with checksums.

        It writes the weights first (and says how a model is found, by which it is known here). Models of transformers
        write the config first, beside weights that may be those of an earlier save.
        """
        weights = weights_crc32(save_directory) if "auto_mapping_dict" in kwargs else None
        self.checksums = {"config": self._crc32(), "weights": weights} if weights else None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.checksums = None
        if weights:
            for action in AFTER_SAVE:
                action(Path(save_directory))

    def _crc32(self) -> str:
        """Of the settings that are not at their default: a field that a later version adds, here or in PEFT, is at its
        own, so that what was saved before stays as it was saved."""
        settings = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name not in _UNCHECKED and getattr(self, entry.name) != _default(entry)
        }
        plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
        if isinstance(plain.get("modules_to_save"), list):  # PEFT adds to it, in any order
            plain["modules_to_save"] = sorted(plain["modules_to_save"])
        return crc32(json.dumps(plain, sort_keys=True, default=str).encode())

    def _check_checksums(self) -> None:
        """Last in a method's `__post_init__`, when all fields have the form in which they were saved."""
        if self.checksums is None:
            return
        if not isinstance(self.checksums, dict) or not self.checksums.keys() == {"config", "weights"}:
            raise ValueError(
                "`checksums` is what saving an adapter wrote, a dict with 'config' and 'weights', got "
                f"{self.checksums!r}; save or download the adapter again, or remove it from adapter_config.json."
            )
        expected = self.checksums["config"]
        if expected != self._crc32():
            raise ValueError(
                f"An adapter_config.json is as it was saved (CRC-32 {expected}), got {self._crc32()}: it is damaged, "
                "or has a setting that only a later version of peft_sparse or peft knows; save or download it again, "
                "upgrade, or remove `checksums` from it if you changed it on purpose."
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("target_modules", self.target_modules, empty=False)
        check_names("exclude_modules", self.exclude_modules)
        check_names("modules_to_save", self.modules_to_save, regex=False)
        check_names("layers_pattern", self.layers_pattern)
        check_names("labels", self.labels, regex=False)
        check_indices("layers_to_transform", self.layers_to_transform)
        check_tokens("trainable_token_indices", self.trainable_token_indices)
        check_bool("inference_mode", self.inference_mode)
        self._take_forms_of_files()
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

    def _take_forms_of_files(self) -> None:
        """Give lists, tuples and sets of names or numbers one form each, which a file gives back: it knows lists."""
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple, frozenset)):
                setattr(self, name, set(value))  # PEFT's habit
        for name in ("modules_to_save", "layers_to_transform", "layers_pattern", "labels"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset)):
                setattr(self, name, sorted(value))
            elif isinstance(value, tuple):
                setattr(self, name, list(value))


def _default(entry: Any) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def include_all_linear(config: Any, model: nn.Module) -> None:
    """PEFT's "all-linear", with PackedLinears beside the linears that PEFT knows."""
    wanted = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if not isinstance(wanted, str) or wanted.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    modules = dict(model.named_modules())
    packed = {name for name, m in modules.items() if isinstance(unwrap(m), PackedLinear) and m is not head}
    config.target_modules |= packed - {f"{name}.base_layer" for name in packed}
