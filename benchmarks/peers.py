"""The peers of a comparison, as training steps on one linear layer or on a whole model.

Each is what its users get: PEFT's methods and ours through `get_peft_model`, the authors' as modules in place of the
linears. A step is forward, backward and AdamW over the trainable parameters; for PST also the schedule, which the
Trainer's callback sets in every step, so that the mask is selected anew in every step (the factors have changed).

`floor` is no method: the three matmuls Y = X W^T, dX = dY W, G = dY^T X of a linear, and nothing else.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import nn

from benchmarks import memory
from benchmarks.authors import AuthorsPst, AuthorsSpp
from peft_sparse import PstConfig, SppConfig, ops
from peft_sparse.sparsity import select_mask

RANK, SPARSITY, LEARNING_RATE = 16, 0.5, 1e-4
TOTAL_STEPS = 1 << 30  # of a schedule that is constant
LAYER_PEERS = (
    "floor", "full", "lora", "hira",
    "spp", "spp_reference", "spp_authors", "spp_authors_checkpoint",
    "pst", "pst_reference", "pst_authors",
)  # fmt: skip
MODEL_PEERS = tuple(name for name in LAYER_PEERS if name != "floor")
# How to compute, by the last part of a peer's name.
IMPLEMENTATIONS: dict[str, Callable[[], AbstractContextManager]] = {
    "reference": ops.use_reference,
    "dense": lambda: ops.use_csr(False),
    "csr": lambda: ops.use_csr(True),
}
AUTHORS = {"spp": "spp_authors", "pst": "pst_authors"}  # of ours, the formulation to compare with


def authors_of(peer: str) -> str | None:
    """The authors' formulation of the method that a peer computes, if there is one."""
    return AUTHORS.get(peer.partition("_")[0])


def adapt(model: nn.Module, peer: str, names: Iterable[str], sparsity: float = SPARSITY) -> nn.Module:
    """Make a model train as `peer` does.

    Args:
        model: changed in place; in training mode afterwards.
        names: full names of its linears to adapt.
        sparsity: of the pruned model that they start from; PST's own.
    """
    names = list(names)
    if peer == "full":
        return model.requires_grad_(True).train()
    model.requires_grad_(False)
    if not peer.startswith("pst"):  # SPP's users have a pruned model, and so its competitors start from one
        for name in names:
            _prune(model.get_submodule(name).weight, sparsity)
    if peer in ("spp_authors", "spp_authors_checkpoint"):
        _replace(model, names, lambda linear: AuthorsSpp(linear, RANK, checkpointed=peer.endswith("checkpoint")))
    elif peer == "pst_authors":
        _replace(model, names, lambda linear: AuthorsPst(linear, sparsity=sparsity))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about models that are not transformers', or not pruned
            model = get_peft_model(model, _config(peer, names, sparsity))
    return model.train()


def _config(peer: str, names: list[str], sparsity: float):
    configs = {
        "lora": lambda: LoraConfig(r=RANK, target_modules=names),
        "hira": lambda: HiraConfig(r=RANK, target_modules=names),
        "spp": lambda: SppConfig(r=RANK, target_modules=names),
        "pst": lambda: PstConfig(sparsity=sparsity, schedule="constant", target_modules=names),
    }
    method, _, implementation = peer.partition("_")
    if method not in configs or (implementation and implementation not in IMPLEMENTATIONS):
        raise ValueError(f"A peer is one of {', '.join(LAYER_PEERS)}, got {peer!r}.")
    return configs[method]()


@torch.no_grad()
def _prune(weight: torch.Tensor, sparsity: float) -> None:
    scores = weight.abs().float()
    weight.mul_(select_mask(scores, int(sparsity * scores.numel()), scores.numel()))


def _replace(model: nn.Module, names: list[str], make: Callable[[nn.Linear], nn.Module]) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))


class TrainingStep:
    """Forward, backward and optimizer step of a peer; calling it does one.

    Args:
        peer: its name, which may end in one of [`IMPLEMENTATIONS`].
        model: from [`adapt`].
        inputs: tensors that exist before the step.
        forward: from the model to a tensor to differentiate: a loss, or the output of a layer with `dy`.
        dy: the gradient of that tensor; None for a loss.
    """

    def __init__(
        self,
        peer: str,
        model: nn.Module,
        inputs: tuple[torch.Tensor, ...],
        forward: Callable[[], torch.Tensor],
        dy: torch.Tensor | None = None,
    ) -> None:
        self.peer, self.model, self.inputs, self.forward, self.dy = peer, model, inputs, forward, dy
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)
        self.done = 0
        self._set_sparsity_step()

    def _set_sparsity_step(self) -> None:
        if self.peer in ("pst", "pst_reference"):
            self.model.base_model.set_sparsity_step(self.done, TOTAL_STEPS)

    def _implementation(self) -> AbstractContextManager:
        return IMPLEMENTATIONS.get(self.peer.rpartition("_")[2], contextlib.nullcontext)()

    def __call__(self) -> None:
        with self._implementation():
            self.forward().backward(self.dy)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for tensor in self.inputs:
            tensor.grad = None
        self.done += 1
        self._set_sparsity_step()

    def saved_bytes(self) -> int:
        """Bytes saved for backward beyond inputs, parameters and buffers."""
        with self._implementation():
            own = (*self.inputs, *self.model.parameters(), *self.model.buffers())
            return memory.saved_bytes(self.forward, own)

    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.trained)


class _OneLinear(nn.Module):
    def __init__(self, out: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, out, bias=False, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class FloorStep:
    """The three matmuls of a linear with weight (out, in) that is frozen, none of whose results is kept."""

    def __init__(self, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> None:
        self.weight, self.x, self.dy = weight, x, dy

    def __call__(self) -> None:
        self.x @ self.weight.T
        self.dy @ self.weight
        self.dy.T @ self.x


def layer_step(
    peer: str,
    out: int,
    columns: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    sparsity: float = SPARSITY,
) -> TrainingStep | FloorStep:
    """The step of one linear without bias, with an input that needs a gradient as inside a network.

    Args:
        peer: one of [`LAYER_PEERS`], or a method of ours and one of [`IMPLEMENTATIONS`].
        out, columns: of the weight.
        tokens: rows of the input.
        sparsity: see [`adapt`].
    """
    torch.manual_seed(0)
    model = _OneLinear(out, columns, dtype, device)
    x = torch.randn(tokens, columns, dtype=dtype, device=device)
    dy = torch.randn(tokens, out, dtype=dtype, device=device)
    if peer == "floor":
        return FloorStep(model.linear.weight.detach(), x, dy)
    model = adapt(model, peer, ["linear"], sparsity)
    x.requires_grad_()
    return TrainingStep(peer, model, (x, dy), lambda: model(x), dy)
