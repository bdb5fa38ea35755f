"""Models that do not fit on the accelerator: weights that accelerate keeps elsewhere, and blocks moved one at a time.

With `cpu_offload`, `disk_offload` or a device_map, accelerate leaves empty weights (on the meta device) in the modules
and hooks bring the real ones in for each forward. So a pruner has to ask the hooks for a weight, and has to put the
pruned one where the hooks look for it. In CPU memory that is the tensor itself. On disk the files stay as they are,
since they may be the user's checkpoint or serve another process: the pruned weight gets a new file, and the index that
the hooks read in this process points to it.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader, find_device, send_to_device
from safetensors.torch import save_file
from torch import nn

from peft_sparse.linears import get_weight, holder_of, offload_hook, set_weight, unprefixed


def execution_device(model: nn.Module) -> torch.device:
    """Where inputs of a model belong: with its first weight, or where hooks bring that."""
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    devices = (hook.execution_device for m in model.modules() if (hook := offload_hook(m)) is not None)
    return torch.device(next((device for device in devices if device is not None), first))


class OffloadableWeight:
    """The weight of one linear of a model, wherever it is kept.

    Args:
        model: the whole model.
        name: full name of the linear.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.linear = model.get_submodule(name)
        self._hook, self._holder, path = holder_of(model, name)
        self._maps: Any = None if self._hook is None else unprefixed(self._hook.weights_map, f"{path}weight")
        self._before: Any = None

    @property
    def in_memory(self) -> bool:
        """Whether there are numbers behind it: not so for a model on the meta device without hooks."""
        return self._hook is not None or not self.linear.get_parameter("weight").is_meta

    @contextmanager
    def loaded(self) -> Iterator[torch.Tensor]:
        """The weight as (out, in), in the module and on the device where the module's forward runs. Changes last only
        with [`OffloadableWeight.keep`]."""
        if self._hook is None:
            yield get_weight(self.linear)
            return
        self._hook.pre_forward(self._holder)
        try:
            yield get_weight(self.linear)
        finally:
            self._hook.post_forward(self._holder, None)

    def remember(self) -> None:
        """Note the weight as it is, for [`OffloadableWeight.restore`]: a copy in CPU memory, or for one on disk where
        it is."""
        with self.loaded() as weight:
            if self._on_disk:
                mapping, key = self._maps
                self._before = mapping.index[key]
            else:
                self._before = weight.detach().to("cpu", copy=True)

    def restore(self) -> None:
        """Put the remembered weight back."""
        if self._on_disk:
            mapping, key = self._maps
            _remove_own_file(mapping.index[key], but=self._before)
            mapping.index[key] = self._before
            return
        with self.loaded():
            set_weight(self.linear, self._before)
            self.keep()

    def forget(self) -> None:
        """Let go of what was remembered."""
        if self._on_disk and self._before is not None:
            mapping, key = self._maps
            _remove_own_file(self._before, but=mapping.index[key])
        self._before = None

    def keep(self) -> None:
        """To be called within [`OffloadableWeight.loaded`]: what the weight is now lasts."""
        if self._hook is None:
            return
        mapping, key = self._maps
        weight = self.linear.get_parameter("weight").detach()
        if not self._on_disk:
            tensors = mapping.state_dict if isinstance(mapping, OffloadedWeightsLoader) else mapping
            tensors[key].copy_(weight)  # in place, so that tied weights stay tied
            return
        file = _folder_of(mapping) / f"{key}.{uuid.uuid4().hex}{OWN_SUFFIX}"
        save_file({key: weight.to("cpu").contiguous()}, file)
        _remove_own_file(mapping.index[key], but=self._before)
        dtype = str(weight.dtype).removeprefix("torch.")
        mapping.index[key] = {"safetensors_file": str(file), "weight_name": key, "dtype": dtype}

    @property
    def _on_disk(self) -> bool:
        if self._hook is None:
            return False
        mapping, key = self._maps
        return isinstance(mapping, OffloadedWeightsLoader) and key not in mapping.state_dict


OWN_SUFFIX = ".pruned.safetensors"


def _remove_own_file(entry: dict[str, Any], but: dict[str, Any] | None) -> None:
    file = str(entry.get("safetensors_file") or "")
    if entry != but and file.endswith(OWN_SUFFIX):
        Path(file).unlink(missing_ok=True)


def _folder_of(loader: OffloadedWeightsLoader) -> Path:
    """Where pruned weights go: the offload folder, or a temporary one that lives as long as the hooks."""
    if loader.save_folder is not None:
        return Path(loader.save_folder)
    if not hasattr(loader, "_pruned_folder"):
        loader._pruned_folder = tempfile.TemporaryDirectory(prefix="peft-sparse-")
    return Path(loader._pruned_folder.name)


class BlockMover:
    """Moves one block at a time to an accelerator and back.

    Args:
        model: none of whose weights is kept by accelerate's hooks.
        device: where blocks run; None: where they are.

    Raises:
        ValueError: for a device that is not there, or a model with such hooks.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None) -> None:
        self.device = None if device is None else _existing(device)
        self._there: set[nn.Module] = set()
        if self.device is not None and any(offload_hook(module) is not None for module in model.modules()):
            raise ValueError(
                f"`device` moves the blocks of a model in memory, got device={str(device)!r} for a model whose "
                "weights accelerate moves already (an offload, or a device_map); leave `device` out."
            )

    def check_blocks(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """Raises:
        ValueError: if a block has a parameter in common with a module outside of the blocks, which would move too."""
        inside = {module for block in blocks for module in block.modules()}
        outside = {
            id(parameter): name
            for name, module in model.named_modules()
            if module not in inside
            for parameter in module.parameters(recurse=False)
        }
        for block in blocks if self.device is not None else ():
            shared = [outside[id(parameter)] for parameter in block.parameters() if id(parameter) in outside]
            if shared:
                raise ValueError(
                    f"`device` moves blocks one at a time, got a block that shares a parameter with `{shared[0]}` "
                    "outside of the blocks; leave `device` out, or move the whole model."
                )

    @contextmanager
    def moved(self, block: nn.Module) -> Iterator[None]:
        """The block is on the device, and back where it was afterwards."""
        first = next(block.parameters(), None)
        if self.device is None or block in self._there or first is None or first.device == self.device:
            yield
            return
        home = first.device
        self._there.add(block)
        try:
            block.to(self.device)
            yield
        finally:
            self._there.discard(block)
            block.to(home)

    def forward_of(self, block: nn.Module) -> Callable[..., Any]:
        """The block's forward, run on the device; what it returns is where its inputs are, with the rest of the
        model."""
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            outside = find_device([args, kwargs])
            with self.moved(block):
                output = forward(*send_to_device(args, self.device), **send_to_device(kwargs, self.device))
            return output if outside is None else send_to_device(output, outside)

        return run


def _existing(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`device` is one that torch can use here, such as 'cuda:0', got {device!r} ({error}); leave it out to "
            "prune where the model is."
        ) from error
    if found.type == "meta":
        raise ValueError("`device` is where blocks run, got 'meta', which holds no numbers; take 'cuda' or 'cpu'.")
    if found.type != "cpu" and found.index is None:
        return torch.empty(1, device=found).device
    return found
