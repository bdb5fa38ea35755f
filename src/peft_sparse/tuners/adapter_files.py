"""The folder of a saved adapter, looked at before PEFT reads the weights in it.

PEFT writes and reads adapter_model.safetensors, which has no checksum: one flipped bit is another model. And where
that file is missing, PEFT reads a pickled adapter_model.bin. Neither can be seen later, so both are looked at when
a config is read, and `_peft.py` has that done wherever an adapter is loaded.

Only folders are checked. What comes from the Hub is checked by its client.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from peft_sparse.storage.files import SafetensorsFile

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_CHUNK = 1 << 24
_HEADS = {"classifier", "score"}  # PEFT adds them for a `task_type`, whether a model has them or not


def weights_crc32(folder: str | os.PathLike[str]) -> str | None:
    """CRC-32 of the bytes of an adapter's weights; None where there are none."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        return None
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return f"{found:08x}"


def pickled_weights(folder: str | os.PathLike[str]) -> Path | None:
    """Where, in a folder or in those of its other adapters, weights are there as a pickle only; None: nowhere."""
    files = sorted([*Path(folder).glob(PICKLED), *Path(folder).glob(f"*/{PICKLED}")])
    return next((file.parent for file in files if not (file.parent / WEIGHTS).is_file()), None)


def check_folder(
    folder: str | os.PathLike[str], subfolder: str | None, expected: str | None, whole: Sequence[str] | None = None
) -> None:
    """Check the weights beside a config, if there are any. Nothing is checked of a repository on the Hub.

    Args:
        expected: the CRC-32 that the config has for them; None: it has none.
        whole: the config's `modules_to_save`.

    Raises:
        ValueError: if they are pickled, damaged, or those of another save, or without any of `whole`.
    """
    place = Path(folder) / (subfolder or "")
    path = place / WEIGHTS
    if not (place / CONFIG).is_file():  # it came from the Hub
        return
    refuse_pickled(place)
    if not path.is_file():
        if expected is not None:
            raise ValueError(
                f"The adapter_config.json was saved with {WEIGHTS}, got no such file in {str(place)!r}; save or "
                "download the adapter again."
            )
        return
    names = SafetensorsFile(path).header  # raises if it is none, or is cut short
    _check_whole(names, whole, place)
    if expected is not None and (found := weights_crc32(place)) != expected:
        raise ValueError(
            f"{WEIGHTS} is as it was saved (CRC-32 {expected}), got {found} in {str(place)!r}: it is damaged, or of "
            "another save; save or download the adapter again, or remove `checksums` from adapter_config.json if you "
            "changed it on purpose."
        )


def refuse_pickled(place: Path) -> None:
    """Raises:
    ValueError: if the weights in a folder are there as a pickle only."""
    if (place / PICKLED).is_file() and not (place / WEIGHTS).is_file():
        raise ValueError(
            f"An adapter's weights are in {WEIGHTS}, got only {PICKLED} in {str(place)!r}: a pickle, which can run "
            "code when it is read and is not opened here; save the adapter again with `safe_serialization=True`, or, "
            "if you know where it is from, convert it with `safetensors.torch.save_file(torch.load(..., "
            "weights_only=True), ...)`."
        )


def _check_whole(names: Iterable[str], whole: Sequence[str] | None, place: Path) -> None:
    wanted = sorted(set(whole or ()) - _HEADS)
    parts = [name.split(".") for name in names if ".spp_" not in name and ".pst_" not in name]
    modules = {".".join(part[:end]) for part in parts for end in range(1, len(part))}
    if wanted and not any(module.endswith(tuple(wanted)) for module in modules):
        raise ValueError(
            f"An adapter has the weights of its `modules_to_save`, got {wanted} in {CONFIG} and none of them in "
            f"{WEIGHTS} in {str(place)!r}; save or download the adapter again."
        )
