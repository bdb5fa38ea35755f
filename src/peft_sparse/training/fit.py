"""Whether model, tokenizer, examples and Hub fit each other: found before anything is pruned or trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub import whoami
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from peft_sparse.evaluation.metrics import check_metrics_of_numbers, load_metric
from peft_sparse.evaluation.perplexity import check_causal
from peft_sparse.pruning.calibration import evaluation_mode
from peft_sparse.pruning.checks import padding_of_positions
from peft_sparse.pruning.offload import execution_device
from peft_sparse.pruning.token_inputs import vocabulary_size
from peft_sparse.training.data import Examples
from peft_sparse.training.metrics import Metrics
from peft_sparse.training.recipe import Recipe

_ENCODER_DECODERS = {
    *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
} - {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}


def check_hub(arguments: TrainingArguments) -> None:
    """Raises:
    ValueError: if a run is to be pushed to the Hub, and the Hub does not answer or does not know who asks."""
    if not arguments.push_to_hub:
        return
    try:
        whoami(token=arguments.hub_token)
    except Exception as error:  # those of the client behind huggingface_hub depend on its version
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            "`training.push_to_hub` takes a Hub that answers and a token that it knows, got none of that "
            f"({type(error).__name__}: {reason}); log in with `hf auth login`, or leave it out."
        ) from error


def check_fit(recipe: Recipe, model: Any, tokenizer: Any, examples: Examples) -> None:
    """Raises:
    ValueError: if the tokenizer, which `make_examples` has seen, cannot pad a batch, or the model counts positions
        from another padding token; if the model has weights that are no numbers, does not take the examples, is no
        causal language model where one is asked for, or gives nothing that the recipe's metrics compare."""
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "A batch is padded with a tokenizer's pad, eos or unk token, got one without any of them in "
            f"{tokenizer.name_or_path!r}; add a `pad_token` of its vocabulary to the tokenizer_config.json there."
        )
    padding = padding_of_positions(model)
    if padding not in (None, tokenizer.pad_token_id):  # Trainer would write the tokenizer's into the model's config
        raise ValueError(
            f"Positions are counted from behind the model's padding token, {padding}, got {tokenizer.pad_token_id} as "
            f"that of the tokenizer in {tokenizer.name_or_path!r}; name the one that the model came with in "
            "`model.tokenizer`."
        )
    if recipe.model.task == "sequence_classification" and model.config.num_labels == 1:
        check_metrics_of_numbers(recipe.evaluation.metrics)
    metrics = {name: load_metric(name) for name in recipe.evaluation.metrics}
    Metrics(metrics, recipe.model.task == "causal_lm").check(model.config.num_labels)
    _check_finite(model)
    size = vocabulary_size(model)
    if size is not None:
        _check_ids(recipe, size, tokenizer, examples)
    if recipe.model.task == "causal_lm":
        _check_language_model(model, examples)
    elif model.config.is_encoder_decoder:
        _check_ends(model, tokenizer, examples)


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not bool(parameter.isfinite().all()):
            found = int((~parameter.isfinite()).sum())
            raise ValueError(
                f"A model's weights are finite, got {found} NaN or infinite of {parameter.numel()} in `{name}`, from "
                "which nothing is learned; load or download it again."
            )


def _check_language_model(model: Any, examples: Examples) -> None:
    saved_as = (getattr(model.config, "architectures", None) or [""])[0]
    if saved_as in _ENCODER_DECODERS:
        raise ValueError(
            f"`model.task: causal_lm` is of a model without an encoder, got {saved_as}, of which the decoder alone "
            "would be left; name the task that it has, or tune it in a script."
        )
    if _is_whole(model):
        rows = examples.validation if examples.train is None else examples.train
        check_causal(model, torch.tensor(next(iter(rows))["input_ids"]))


def _check_ends(model: Any, tokenizer: Any, examples: Examples) -> None:
    """A classifier of an encoder-decoder (BART, T5) reads the output at a text's end token. Not all do, so it is tried
    on a text without one."""
    rows = examples.validation if examples.train is None else examples.train
    ids, end = next(iter(rows))["input_ids"], model.config.eos_token_id
    if end in ids or not _is_whole(model):
        return
    try:
        with evaluation_mode(model), torch.no_grad():
            model(input_ids=torch.tensor([ids], device=execution_device(model)))
    except (ValueError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"{type(model).__name__} classifies by the output at a text's end token, {end}, got a tokenizer in "
            f"{tokenizer.name_or_path!r} that writes none ({ids[-3:]} at the end of the first text); name the one "
            "that the model came with in `model.tokenizer`, or add the token in its tokenizer.json."
        ) from error


def _is_whole(model: Any) -> bool:
    """Whether a process has all weights before training: not with ZeRO-3, or as FSDP loads."""
    return not is_deepspeed_zero3_enabled() and not any(parameter.is_meta for parameter in model.parameters())


def _check_ids(recipe: Recipe, size: int, tokenizer: Any, examples: Examples) -> None:
    highest = {"the training examples": _highest_id(examples.train)}
    highest["the validation examples"] = _highest_id(examples.validation)
    if recipe.model.task != "causal_lm" or recipe.data.text is None:  # windows are of one length
        highest["a padded batch"] = tokenizer.pad_token_id
    for where, index in highest.items():
        if index >= size:
            raise ValueError(
                f"Token ids are those of the model's vocabulary, from 0 to {size - 1}, got {index} in {where}, of the "
                f"tokenizer in {tokenizer.name_or_path!r}; name the one that the model came with in `model.tokenizer`."
            )


def _highest_id(examples: Any) -> int:
    """Of all examples; of a stream's first one; -1 for none."""
    import datasets
    from pyarrow import compute

    if examples is None:
        return -1
    if not isinstance(examples, datasets.Dataset):
        return max(next(iter(examples))["input_ids"])
    tables: Iterable[Any] = examples.with_format("arrow").iter(1000)
    return max(compute.max(compute.list_flatten(table["input_ids"])).as_py() for table in tables)
