"""The folder of a saved adapter, looked at before PEFT reads the weights in it.

PEFT writes and reads adapter_model.safetensors, which has no checksum: one flipped bit is another model. And where
that file is missing, PEFT reads a pickled adapter_model.bin. Neither can be seen later, so both are looked at when
a config is read, and `_peft.py` has that done wherever an adapter is loaded.

Only folders are checked. What comes from the Hub is checked by its client.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from peft_sparse.storage.files import SafetensorsFile

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_CHUNK = 1 << 24


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


def check_folder(folder: str | os.PathLike[str], subfolder: str | None, expected: str | None) -> set[str] | None:
    """Check the weights beside a config, if there are any. Nothing is checked of a repository on the Hub.

    Args:
        expected: the CRC-32 that the config has for them; None: it has none.

    Returns:
        The modules that have weights there besides the adapter's, by full name; None where there is no file here.

    Raises:
        ValueError: if they are pickled, damaged, or those of another save.
    """
    place = Path(folder) / (subfolder or "")
    path = place / WEIGHTS
    if not (place / CONFIG).is_file():  # it came from the Hub
        return None
    refuse_pickled(place)
    if not path.is_file():
        if expected is not None:
            raise ValueError(
                f"The adapter_config.json was saved with {WEIGHTS}, got no such file in {str(place)!r}; save or "
                "download the adapter again."
            )
        return None
    names = SafetensorsFile(path).header  # raises if it is none, or is cut short
    if expected is not None and (found := weights_crc32(place)) != expected:
        raise ValueError(
            f"{WEIGHTS} is as it was saved (CRC-32 {expected}), got {found} in {str(place)!r}: it is damaged, or of "
            "another save; save or download the adapter again, or remove `checksums` from adapter_config.json if you "
            "changed it on purpose."
        )
    parts = [name.split(".") for name in names if ".spp_" not in name and ".pst_" not in name]
    return {".".join(part[:end]) for part in parts for end in range(1, len(part))}


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
