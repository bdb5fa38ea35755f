"""Learning rates of their own for PST's scores and for a new head, as parameter groups for an optimizer.

Scores and weights live on different scales. Movement pruning wants 1e-2 for its scores beside 3e-5 for the weights
(arXiv 2005.07683) and collapses to chance with one rate for both. A classification head starts at random, and in a
short run may learn little at a rate that pretrained weights stand.
"""

from __future__ import annotations

from typing import Any

from torch import nn

SCORE_FACTORS = ("pst_S", "pst_A", "pst_B", "pst_R", "pst_C")
WEIGHT_FACTORS = ("pst_U", "pst_V", "pst_D")


def pst_param_groups(
    model: nn.Module, lr: float, score_lr: float, weight_decay: float = 0.0, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of a model with PST adapters, for the `optimizers` of an unchanged Trainer.

    Args:
        model: with PST layers.
        lr: learning rate of the weight updates (`pst_U`, `pst_V`, `pst_D`).
        score_lr: learning rate of the scores (`pst_S`, `pst_A`, `pst_B`, `pst_R`, `pst_C`).
        weight_decay: for parameters with two or more dimensions that are not PST's, whose decay would pull weights
            back to the base model and scores to a tie.
        head_lr: learning rate of all other trainable parameters, such as a new classification head; None: `lr`.

    Returns:
        Groups named "scores", "weights", "others" and "others_without_decay", empty ones left out, in the order of
        `model.named_parameters()`.

    Raises:
        ValueError: if a rate or the weight decay is no number from 0 up, the model has no trainable PST parameter, or
            `head_lr` is given and nothing else is trained.

    Examples:
        >>> # optimizer = torch.optim.AdamW(pst_param_groups(model, lr=5e-5, score_lr=1.5e-4))
        >>> # trainer = Trainer(model, args, optimizers=(optimizer, None), callbacks=[SparsityCallback()], ...)
    """
    rates = {
        "lr": lr,
        "score_lr": score_lr,
        "weight_decay": weight_decay,
        "head_lr": 0 if head_lr is None else head_lr,
    }
    for name, value in rates.items():
        if not hasattr(value, "__float__") or not 0 <= float(value) < float("inf"):
            raise ValueError(f"`{name}` is a number from 0 up, got {value!r}.")
    groups: dict[str, dict[str, Any]] = {
        "scores": {"lr": score_lr, "weight_decay": 0.0},
        "weights": {"lr": lr, "weight_decay": 0.0},
        "others": {"lr": lr if head_lr is None else head_lr, "weight_decay": weight_decay},
        "others_without_decay": {"lr": lr if head_lr is None else head_lr, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[_group_of(name, parameter)]
            group.setdefault("params", []).append(parameter)
    if "params" not in groups["scores"] and "params" not in groups["weights"]:
        raise ValueError(
            f"`pst_param_groups` sorts the trainable parameters of PST, got {type(model).__name__} without any; call "
            "`get_peft_model(model, PstConfig(...))` first."
        )
    if head_lr is not None and "params" not in groups["others"] and "params" not in groups["others_without_decay"]:
        raise ValueError(
            "`head_lr` (`head_learning_rate` in a recipe) is of what is trained beside PST, such as a new head, got "
            f"{head_lr} for a model that trains nothing else; leave it out, or name the head in `modules_to_save`."
        )
    return [{"name": name, **group} for name, group in groups.items() if "params" in group]


def named_rates(optimizer: Any) -> dict[str, float]:
    """The learning rates of an optimizer with the groups of [`pst_param_groups`], called as recipes call them; {} for
    another one."""
    rates = {group.get("name"): float(group["lr"]) for group in getattr(optimizer, "param_groups", [])}
    if not rates.keys() & {"scores", "weights"}:
        return {}
    head = rates.get("others", rates.get("others_without_decay"))
    named = {
        "learning_rate": rates.get("weights"),
        "score_learning_rate": rates.get("scores"),
        "head_learning_rate": head,
    }
    return {name: rate for name, rate in named.items() if rate is not None}


def _group_of(name: str, parameter: nn.Parameter) -> str:
    parts = name.split(".")
    if any(factor in parts for factor in SCORE_FACTORS):
        return "scores"
    if any(factor in parts for factor in WEIGHT_FACTORS):
        return "weights"
    return "others" if parameter.dim() > 1 else "others_without_decay"
