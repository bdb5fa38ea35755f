"""Distillation: a sparse model learns from the outputs of a dense one besides the labels (Hinton et al., arXiv
1503.02531).

    L = (1 - weight) L_labels + weight D,   D = T^2 KL(softmax(z_teacher / T) || softmax(z / T)),

the mean over the examples, or over the tokens that are learned. The teacher of a PST model can be the model itself
with its adapter off: the dense one that it came from, whose weights are there anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_sparse.linears import zero_gathered
from peft_sparse.pruning.token_inputs import vocabulary_size
from peft_sparse.training.mask_log import has_pst_layers

IGNORED = -100  # the label of a token that is not learned


@contextmanager
def distill(
    model: nn.Module, teacher: nn.Module | None = None, weight: float = 0.5, temperature: float = 1.0
) -> Iterator[None]:
    """While this context is open, the loss that `model` returns in training mode is that of the labels and a teacher.

    It is (1 - weight) times the model's own loss plus weight times the divergence of its outputs from the teacher's,
    T^2 KL(softmax(z_teacher / T) || softmax(z / T)); where outputs are regressed, their mean squared difference. In
    evaluation mode nothing is changed.

    Args:
        model: one of transformers, or PEFT's around it; called with keywords.
        teacher: a model with the same outputs, on the same device; put into evaluation mode. None: `model` with its
            adapters off, which for PST is the dense model. Its head has to be trained for the task.
        weight: above 0; 1 leaves the labels out.
        temperature: T, above 0. A higher one shows more of what the teacher finds unlikely.

    Raises:
        TypeError: for a teacher that is no model.
        ValueError: for a weight or temperature out of range, a model that is no teacher of its own, a teacher that has
            modules of the model, and, in its forward, for tokens or outputs that do not fit.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from peft_sparse import PstConfig, distill
        >>> sizes = dict(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> model = get_peft_model(BertForSequenceClassification(BertConfig(**sizes)), PstConfig(sparsity=0.5)).train()
        >>> with distill(model, weight=0.9):
        ...     loss = model(input_ids=torch.arange(10).view(2, 5), labels=torch.tensor([0, 1])).loss
    """
    check_distillation(weight, temperature, teacher)
    with teaching(model, teacher, weight, temperature):
        yield


@contextmanager
def teaching(
    model: nn.Module, teacher: nn.Module | None, weight: float, temperature: float, training: Any = None
) -> Iterator[Distillation]:
    """[`distill`], whose numbers were checked.

    Args:
        training: the state of the Trainer whose callback opens it, and may not get to close it: [`stop_teachers`].
    """
    if teacher is not None:
        _check_teacher(model, teacher)
        teacher.eval()
    elif not isinstance(model, PeftModel) or not has_pst_layers(model):
        raise ValueError(
            "Without a teacher it is the model with its adapters off, the dense model for a PeftModel with PST, got "
            f"{type(model).__name__}{' without PST' if isinstance(model, PeftModel) else ''}; name a `teacher`."
        )
    distillation = Distillation(teacher, weight, temperature)
    handle = model.register_forward_hook(distillation, with_kwargs=True)
    if training is not None:
        distillation.training = training, handle
    try:
        yield distillation
    finally:
        handle.remove()


def stop_teachers(model: nn.Module, training: Any) -> None:
    """Take off the teachers of trainings that an error or Ctrl-C has ended: Trainer tells no callback of that, so that
    the next training would have them too.

    Args:
        training: the state of the one that begins.
    """
    for hook in list(model._forward_hooks.values()):
        if isinstance(hook, Distillation) and hook.training is not None:
            state, handle = hook.training
            if state is not training:
                handle.remove()


def _check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """Raises:
    ValueError: if the teacher is the model itself, as the dense one is that was given an adapter."""
    own = {id(module) for module in model.modules()}
    if any(id(module) in own for module in teacher.modules()):
        raise ValueError(
            f"A `teacher` is a model of its own, got {type(teacher).__name__}, which is the one that learns, or has a "
            "part of it: `get_peft_model` puts adapters into the model that it is given. Leave `teacher` out for the "
            "model with its adapters off (PST), or load the dense one once more."
        )


def check_distillation(weight: float, temperature: float, teacher: nn.Module | None = None) -> None:
    """Raises:
    TypeError: for a teacher that is no model.
    ValueError: for numbers out of range."""
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise TypeError(f"A `teacher` is a model, got {teacher!r}; load it first, with `from_pretrained`.")
    if not 0 < weight <= 1:
        raise ValueError(f"The teacher's `weight` is above 0 and at most 1, got {weight}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"The `temperature` is above 0, got {temperature}.")


def divergence(
    logits: torch.Tensor, target: torch.Tensor, temperature: float = 1.0, problem_type: str | None = None
) -> torch.Tensor:
    """How far outputs are from a teacher's, for each row.

    Args:
        logits, target: the student's and the teacher's, (rows, outputs).
        temperature: T.
        problem_type: transformers' name. "regression": the mean squared difference; "multi_label_classification":
            the mean of T^2 KL over the labels, each of which is a choice of two; all else: T^2 KL of one choice.

    Returns:
        (rows,), float32 or float64.

    Examples:
        >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.])
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, target = logits.to(dtype), target.to(dtype)
    if problem_type == "regression":
        return (logits - target).square().mean(-1)
    logits, target = logits / temperature, target / temperature
    if problem_type == "multi_label_classification":
        wanted = target.sigmoid()
        terms = wanted * (F.logsigmoid(target) - F.logsigmoid(logits))
        terms = terms + (1 - wanted) * (F.logsigmoid(-target) - F.logsigmoid(-logits))
        return temperature**2 * terms.mean(-1)
    terms = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True)
    return temperature**2 * terms.sum(-1)


class Distillation:
    """A hook behind the student's forward.

    Attributes:
        gave: whether a forward, one that is not compiled, has had a loss of it.
        taught: whether such a loss has had a gradient: whoever trains may have another loss.
        training: the state of the Trainer whose callback has put it there, if one has, and what takes it off.
    """

    training: tuple[Any, RemovableHandle] | None = None

    def __init__(self, teacher: nn.Module | None, weight: float, temperature: float) -> None:
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.gave = self.taught = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return output
        names, loss = _names_of_logits(output), getattr(output, "loss", None)
        if not names or (loss is None and self.weight < 1):
            raise ValueError(
                "Distillation takes the `logits` that a model returns (or `start_logits` and `end_logits`), and its "
                f"`loss` where `weight` is below 1, got {type(output).__name__} without; give labels with each batch, "
                "and leave out what replaces either (TRL's SFTTrainer has its own loss: use transformers' Trainer)."
            )
        target = self._target(model, args, kwargs)
        means = [self._mean(model, output[name], getattr(target, name, None), kwargs) for name in names]
        mean = torch.stack(means).mean()
        output.loss = mean if loss is None or self.weight == 1 else (1 - self.weight) * loss + self.weight * mean
        if not torch.compiler.is_compiling() and output.loss.requires_grad:
            self.gave = True
            output.loss.register_hook(self._see_gradient)
        return output

    def _see_gradient(self, gradient: torch.Tensor) -> None:
        self.taught = True

    def _mean(
        self, model: nn.Module, logits: torch.Tensor, target: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """The divergence of all rows that count, as a mean."""
        if target is None or target.shape != logits.shape:
            got = "none" if target is None else f"logits of shape {tuple(target.shape)}"
            raise ValueError(
                f"A teacher has the student's outputs, got {got} for {tuple(logits.shape)}; take one with the same "
                "tokenizer and labels."
            )
        rows = _learned(model, logits, kwargs)
        found = divergence(
            logits[rows], target[rows].to(logits.device), self.temperature, self._problem(model, logits)
        )
        items = kwargs.get("num_items_in_batch")  # Trainer's, of all batches of an optimizer step
        return found.sum() / (max(1, found.numel()) if items is None or not _is_causal(model) else items)

    def _problem(self, model: nn.Module, logits: torch.Tensor) -> str | None:
        """transformers' name for what is learned; None: one choice. A forward notes it in a model's config when it has
        labels, which the student's may have none of."""
        configs = [getattr(one, "config", None) for one in (model, self.teacher)]
        named = next((name for config in configs if (name := getattr(config, "problem_type", None))), None)
        return "regression" if named is None and logits.shape[-1] == 1 else named

    @torch.no_grad()
    def _target(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The teacher's outputs."""
        config: Any = model.config
        self._check_tokens(model, kwargs.get("input_ids"))
        unused = {"num_items_in_batch"} | (set() if config.is_encoder_decoder else {"labels"})
        kwargs = {name: value for name, value in kwargs.items() if name not in unused}
        if self.teacher is not None:
            with zero_gathered(self.teacher.parameters()):  # DeepSpeed does it for the model that it trains alone
                return self.teacher(*args, **kwargs)
        with _adapters_off(model):
            return model.forward(*args, **kwargs)  # not called: this hook stands behind its forward

    def _check_tokens(self, model: nn.Module, ids: torch.Tensor | None) -> None:
        """Before the teacher looks for their embeddings, where it has fewer than the student."""
        size, own = (None if one is None else vocabulary_size(one) for one in (self.teacher, model))
        if ids is None or size is None or own is None or size >= own or torch.compiler.is_compiling():
            return
        highest = int(ids.max())
        if highest >= size:
            raise ValueError(
                f"A teacher reads the student's tokens, got token id {highest} for {type(self.teacher).__name__} with "
                f"embeddings of {size}, and {own} in the student; take one with the same tokenizer."
            )


def _names_of_logits(output: Any) -> tuple[str, ...]:
    """Of a model's outputs; () if it has none. Two for question answering: where an answer starts and ends."""
    for names in (("logits",), ("start_logits", "end_logits")):
        if all(getattr(output, name, None) is not None for name in names):
            return names
    return ()


def _learned(model: nn.Module, logits: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """Which rows of the logits count: an index for all but the last dimension."""
    labels, seen = kwargs.get("labels"), kwargs.get("attention_mask")
    if logits.dim() == 2:
        return slice(None)
    if labels is not None and labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Each token's outputs have a label, got labels of shape {tuple(labels.shape)} for logits of shape "
            f"{tuple(logits.shape)}."
        )
    if labels is None:
        return seen.bool() if seen is not None and seen.shape == logits.shape[:-1] else slice(None)
    learned = labels != IGNORED
    return F.pad(learned[..., 1:], (0, 1)) if _is_causal(model) else learned  # whose outputs are of the next token


def _is_causal(model: nn.Module) -> bool:
    """Whether a token's outputs are of the next one: in language models, those that see images or hear too."""
    name = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForCausalLM"):
        return True
    config: Any = model.config
    return name.endswith("ForConditionalGeneration") and not config.is_encoder_decoder


@contextmanager
def _adapters_off(model: PeftModel) -> Iterator[None]:
    """The model without its adapters, in evaluation mode. PEFT has all of them trained when they are back: frozen
    factors stay frozen here."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        with model.disable_adapter():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
