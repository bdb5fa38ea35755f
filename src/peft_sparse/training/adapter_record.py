"""What a resumed run's adapter is compared with: checksums of its tensors in the checkpoint's trainer_state.json.

PEFT reads adapter_model.safetensors into an adapter that is there already without a look at the config, and so at the
checksum in it; that is what Trainer does when it resumes and when it takes the best model. No callback is told from
which folder. But the state that was saved with the adapter reaches all callbacks, so that is where the checksums are:
of the tensors themselves, whatever file they came from.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from peft_sparse.linears import is_share
from peft_sparse.storage.files import crc32
from peft_sparse.tuners.adapter_files import PICKLED, WEIGHTS, pickled_weights

logger = logging.getLogger(__name__)

_COUNTS = ".pst_pruned."  # what SparsityCallback sets anew when a run is resumed, maybe for another number of steps


def adapter_checksums(model: nn.Module) -> dict[str, dict[str, str]]:
    """CRC-32 of what is saved of each adapter of a model, by its name; none where it is not whole in this process.

    Returns:
        For each adapter the checksum of its "tensors", the one of PST's "counts" of pruned weights, and "dtypes".
    """
    if not isinstance(model, PeftModel):
        return {}
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    if any(is_share(tensor) or (tensor.requires_grad and tensor.is_meta) for tensor in tensors.values()):
        return {}
    checksums = {}
    for name, config in model.peft_config.items():
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "a method without parameters of its own")
        of_adapter = re.compile(rf"\.({prefix}\w*|modules_to_save)\.{re.escape(name)}(\.|$)")
        checksums[name] = _checksums({key: t for key, t in tensors.items() if of_adapter.search(key)})
    return checksums


def _checksums(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    lines: dict[str, list[str]] = {"tensors": [], "counts": []}
    for key, tensor in sorted(tensors.items()):
        lines["counts" if _COUNTS in key else "tensors"].append(f"{key} {crc32(tensor.detach().cpu())}")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return {kind: crc32("\n".join(those).encode()) for kind, those in lines.items()} | {
        "dtypes": " ".join(sorted(dtypes))
    }


class AdapterRecord(ExportableState):
    """What a callback is that has a checkpoint hold the adapter's checksums, and compares them where it is loaded."""

    # Set by Trainer too, where it restores callbacks; never read.
    adapter_checksums: dict[str, dict[str, str]] = {}
    _trained: nn.Module | None = None

    def arguments(self) -> dict[str, Any]:
        """Of `__init__`, with which Trainer makes the callback anew where it restores callbacks."""
        return {}

    def state(self) -> dict[str, Any]:
        """What Trainer writes into trainer_state.json when it saves a checkpoint."""
        found = {} if self._trained is None else adapter_checksums(self._trained)
        return {"args": self.arguments(), "attributes": {"adapter_checksums": found}}

    def begin_record(self, args: TrainingArguments, state: TrainerState, model: nn.Module, counts: bool) -> None:
        """For `on_train_begin`, before the adapter is changed.

        Args:
            counts: whether PST's counts are still as they were loaded.

        Raises:
            ValueError: if this is a resumed run and its adapter is not the one that was saved.
        """
        self._trained = model
        name = type(self).__name__
        if state.global_step > 0:
            _refuse_pickled(args.resume_from_checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            where = f"the checkpoint of step {state.global_step}"
            _compare(model, _recorded(state.stateful_callbacks), where, counts)
        if name not in state.stateful_callbacks:  # resumed from a run without it; Trainer takes it for granted
            state.stateful_callbacks[name] = self.state()

    def end_record(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """For `on_train_end`.

        Raises:
            ValueError: if the best model was loaded and is not the one that was saved.
        """
        self._trained = None
        best = state.best_model_checkpoint
        file = Path(best or "") / "trainer_state.json"
        if args.load_best_model_at_end and best is not None and file.is_file():
            _refuse_pickled(best)
            callbacks = json.loads(file.read_text(encoding="utf-8")).get("stateful_callbacks", {})
            _compare(model, _recorded(callbacks), repr(best), counts=True)


def _recorded(callbacks: Any) -> dict[str, dict[str, str]]:
    """What any of the callbacks in a saved state has of an adapter; of several of one class there is a list."""
    for data in callbacks.values():
        for one in data if isinstance(data, list) else [data]:
            if found := one.get("attributes", {}).get("adapter_checksums"):
                return found
    return {}


def _compare(model: nn.Module, recorded: dict[str, dict[str, str]], where: str, counts: bool) -> None:
    loaded = adapter_checksums(model)
    for name in sorted(loaded.keys() - recorded.keys()):
        logger.warning(f"The adapter {name!r} was not compared with {where}, which has no checksum of it.")
    for name in sorted(loaded.keys() & recorded.keys()):
        found, expected = loaded[name], recorded[name]
        if found["dtypes"] != expected["dtypes"]:
            logger.warning(
                f"The adapter {name!r} was not compared with {where}: it was saved in {expected['dtypes']} and is in "
                f"{found['dtypes']}."
            )
            continue
        for kind in ("tensors", "counts") if counts else ("tensors",):
            if found[kind] != expected[kind]:
                raise ValueError(
                    f"An adapter is trained on as it was saved (CRC-32 {expected[kind]}), got {found[kind]} for "
                    f"the {kind} of {name!r} in {where}: its {WEIGHTS} is damaged, or was changed. Take another "
                    "checkpoint (`last_complete_checkpoint` finds one), or load the adapter with "
                    "`PeftModel.from_pretrained` and train it as a new run if you changed it on purpose."
                )


def _refuse_pickled(folder: str | Path) -> None:
    pickled = pickled_weights(folder)
    if pickled is not None:
        raise ValueError(
            f"A checkpoint's adapter is in {WEIGHTS}, got only {PICKLED} in {str(pickled)!r}, a pickle; take another "
            "checkpoint (`last_complete_checkpoint` finds one)."
        )
