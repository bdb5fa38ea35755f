"""The files of a saved adapter: checksums that are written with it, and the folder looked at before PEFT reads it.

PEFT writes and reads adapter_model.safetensors, which has no checksum: one flipped bit is another model. And where
that file is missing, PEFT reads a pickled adapter_model.bin. There are two checksums of the weights:

- of the whole file, in the config beside it. It is compared when PEFT reads the config ([`check_folder`]): before
  anything is read, and as a pair. Only folders are checked: what comes from the Hub is not here yet.
- of each tensor, in the file itself, as one more tensor ([`seal`]). It is compared when PEFT has read the weights
  ([`check_seal`]): also where no config is read, since the adapter is there already, as when Trainer resumes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_sparse.storage.files import SafetensorsFile, crc32, insert_tensor

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# The tensor that holds the checksums of the others. PEFT wants names that begin so.
SEAL = "base_model.model.peft_sparse_crc32"
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


def seal(folder: str | os.PathLike[str]) -> None:
    """Write the checksums of an adapter's tensors into the file that PEFT has just saved, if there is one."""
    path = Path(folder) / WEIGHTS
    if path.is_file() and SEAL not in (file := SafetensorsFile(path)).header:
        insert_tensor(file, SEAL, _crc32s(file.read(name) for name in file.header))


def _crc32s(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """int64 (tensors,), in increasing order: names change on the way from a file to a model."""
    return torch.tensor(sorted(int(crc32(tensor), 16) for tensor in tensors), dtype=torch.int64)


def check_seal(loaded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compare tensors that were read from an adapter's file with the checksums among them.

    Returns:
        The tensors without the checksums. Those of an adapter that was saved by PEFT alone have none.

    Raises:
        ValueError: if they differ.
    """
    tensors = {key: tensor for key, tensor in loaded.items() if key != SEAL}
    if SEAL not in loaded:
        return tensors
    expected, found = loaded[SEAL].tolist(), _crc32s(tensors.values()).tolist()
    if expected != found:
        known = set(expected)
        changed = [key for key, tensor in tensors.items() if int(crc32(tensor), 16) not in known]
        raise ValueError(
            f"The tensors of an adapter are as they were saved, got others than the checksums in `{SEAL}` tell of, "
            f"`{min(changed, default=SEAL)}` for one: {WEIGHTS} is damaged; save or download it again, or, if you "
            f"changed them on purpose, leave `{SEAL}` out. Nothing was loaded."
        )
    return tensors


def take_seal(tuner: nn.Module, state_dict: dict[str, torch.Tensor], *_: Any) -> None:
    """[`check_seal`] as a hook before `load_state_dict`: for PEFT 0.20, which does not ask a tuner before it loads."""
    check_seal(state_dict)
    state_dict.pop(SEAL, None)


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
    if not path.is_file():
        if (place / PICKLED).is_file():
            raise ValueError(
                f"An adapter's weights are in {WEIGHTS}, got only {PICKLED} in {str(place)!r}: a pickle, which can "
                "run code when it is read and is not opened here; save the adapter again with "
                "`safe_serialization=True`, or, if you know where it is from, convert it with `safetensors.torch."
                "save_file(torch.load(..., weights_only=True), ...)`."
            )
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
            "another save; save or download the adapter again, or, if you changed it on purpose, remove `checksums` "
            f"from adapter_config.json and `{SEAL}` from the tensors."
        )


def _check_whole(names: Iterable[str], whole: Sequence[str] | None, place: Path) -> None:
    wanted = sorted(set(whole or ()) - _HEADS)
    parts = [name.split(".") for name in names if ".spp_" not in name and ".pst_" not in name and name != SEAL]
    modules = {".".join(part[:end]) for part in parts for end in range(1, len(part))}
    if wanted and not any(module.endswith(tuple(wanted)) for module in modules):
        raise ValueError(
            f"An adapter has the weights of its `modules_to_save`, got {wanted} in {CONFIG} and none of them in "
            f"{WEIGHTS} in {str(place)!r}; save or download the adapter again."
        )
