"""The rows of the causal language models' table: what recovers a pruned model.

All adapt the same linears, those of the repeated blocks, and those with a size have it set so that they train about as
many parameters as SPP with 16 row groups, r * in + out for each linear: LoRA and HiRA of rank 8 train
8 * (in + out), and Super-Tuning is given the same share of the weights, no more than are not zero.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import HiraConfig, IA3Config, LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.leaderboard import tuned
from benchmarks.leaderboard.settings import Unsupported
from benchmarks.leaderboard.tuned import Tuned
from peft_sparse import SppConfig
from peft_sparse.linears import block_linear_names, block_linears, get_weight, unwrap, weight_parameter

ROW_GROUPS, RANK = 16, 8


class Method(NamedTuple):
    """A row.

    Attributes:
        title: in the table.
        adapt: from a model to what is trained; None: the row is not trained.
        start: the first learning rates of the search, one for each that it searches.
        dense: it starts from the dense model: a ceiling, or what adaptation to the text alone gives.
        taught: half of its loss is from a teacher, the dense model that the row `dense_lora` tuned with its first rate
            on the same batches.
    """

    title: str
    adapt: Callable[[nn.Module], Tuned] | None
    start: tuple[float, ...] = ()
    dense: bool = False
    taught: bool = False


def _peft(model: nn.Module, config) -> Tuned:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that are not pruned, and fan_in_fan_out, which PEFT sets itself
        try:
            return tuned.peft_tuned(get_peft_model(model, config))
        except TypeError as error:
            raise Unsupported(str(error)) from error


def _names(model: nn.Module) -> list[str]:
    return sorted(block_linear_names(model))


def _is_transposed(model: nn.Module) -> bool:
    return any(isinstance(linear, Conv1D) for linear in block_linears(model).values())


def spp(model: nn.Module, r: int = ROW_GROUPS, scaling: float = 2.0, **options: Any) -> Tuned:
    """Ours."""
    return _peft(model, SppConfig(r=r, spp_alpha=scaling * r, task_type=TaskType.CAUSAL_LM, **options))


def spp_swapped(model: nn.Module, scaling: float = 2.0) -> Tuned:
    """Ours, with the other start. The larger the scaling, the longer the gradients, and the more are clipped."""
    return spp(model, scaling=scaling, init_weights="ones")


def hira(model: nn.Module, r: int = RANK) -> Tuned:
    """W + W * (B A)."""
    names = _names(model)
    return _peft(model, HiraConfig(r=r, target_modules=names, fan_in_fan_out=_is_transposed(model)))


def lora(model: nn.Module, r: int = RANK) -> Tuned:
    """W + s B A: fills the zeros when merged."""
    names = _names(model)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=names, fan_in_fan_out=_is_transposed(model))
    return _peft(model, config)


def lora_then_remask(model: nn.Module, r: int = RANK) -> Tuned:
    """LoRA, and after merging the zeros are put back: what people do who find them gone."""
    masks = {name: get_weight(linear) != 0 for name, linear in block_linears(model).items()}

    def remask(merged: nn.Module) -> None:
        with torch.no_grad():
            for name, linear in block_linears(merged).items():
                get_weight(linear).mul_(masks[name])

    found = lora(model, r)
    return tuned.peft_tuned(found.model, remask)


def masked_lora(model: nn.Module, r: int = RANK) -> Tuned:
    """W + M * (s B A)."""
    return tuned.masked_lora(model, r, 2 * r)


def ia3(model: nn.Module) -> Tuned:
    """A factor for each output of a linear, for each input of the feed-forward's last one."""
    names = _names(model)
    last = [name for name in names if name.rpartition(".")[2] in ("down_proj", "c_proj") and "attn" not in name]
    config = IA3Config(target_modules=names, feedforward_modules=last, fan_in_fan_out=_is_transposed(model))
    return _peft(model, config)


def supertuning(model: nn.Module, r: int = ROW_GROUPS) -> Tuned:
    """The largest weights are trained, such a share of all as SPP has parameters, and none that is zero."""
    from peft import SupertuningConfig  # PEFT 0.21 and later

    weights = block_weights(model)
    budget = sum(r * weight.shape[1] + weight.shape[0] for weight in weights) / sum(w.numel() for w in weights)
    # PEFT's one share holds for every layer; above a layer's share of non-zeros it would write into zeros.
    density = min(float((weight != 0).float().mean()) for weight in weights)
    config = SupertuningConfig(target_modules=_names(model), sparsity=1 - 0.99 * min(budget, density))
    return _peft(model, config)


METHODS: dict[str, Method] = {
    "dense": Method("dense, as it is", None, dense=True),
    "dense_lora": Method("dense, LoRA r=8 on the same data", lora, (5e-3,), dense=True),
    "dense_full": Method("dense, all linears on the same data", lambda m: tuned.full(m, False), (1e-3,), dense=True),
    "pruned": Method("pruned, untuned", None),
    "spp": Method("SPP r=16 (ours)", spp, (2e-2,)),
    "spp_swapped": Method("SPP r=16, A = 0 and B = 1 at the start (ours)", spp_swapped, (2e-2,)),
    # whose search begins where its first step scales a weight as much as that of the row above
    "spp_swapped_s8": Method("SPP r=16, A = 0, B = 1, spp_alpha = 8 r (ours)", lambda m: spp_swapped(m, 8.0), (5e-3,)),
    "hira": Method("HiRA r=8 (PEFT)", hira, (1e-2,)),
    "supertuning": Method("Super-Tuning (PEFT)", supertuning, (1e-3,)),
    "ia3": Method("IA3 (PEFT)", ia3, (1e-2,)),
    "masked_lora": Method("masked LoRA r=8", masked_lora, (5e-3,)),
    "lora_remask": Method("LoRA r=8, zeros put back after merging", lora_then_remask, (5e-3,)),
    "full": Method("full sparse fine-tuning", lambda m: tuned.full(m, True), (1e-3,)),
}  # fmt: skip
OURS = "spp"


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the blocks' weights: the same in every row that started from the same checkpoint."""
    digest = hashlib.sha256()
    for linear in block_linears(model).values():
        digest.update(weight_parameter(unwrap(linear)).detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def block_weights(model: nn.Module) -> list[torch.Tensor]:
    """Weights of the blocks' linears, (out, in) each."""
    return [get_weight(linear) for linear in block_linears(model).values()]


def sparsity(model: nn.Module) -> float:
    """Share of zeros in the blocks' linears."""
    weights = block_weights(model)
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
