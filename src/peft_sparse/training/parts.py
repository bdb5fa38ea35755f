"""The parts of a recipe as values, and what has to hold in each; see recipe.py."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_sparse.checkpoint.lookup import PRUNED
from peft_sparse.checkpoint.tasks import TASKS
from peft_sparse.pruning.sources import reader_of
from peft_sparse.training.distillation import check_distillation
from peft_sparse.training.result import ADAPTER, RESULT

TEMPLATES = ("alpaca",)


@dataclass(frozen=True)
class ModelPart:
    """`path` is a folder, dense or packed, or a name on the Hub; `num_labels` is the number of classes (None: that
    of `data.labels`, or of the checkpoint's own labels); `config` changes fields of the model's config, and
    `new_head` starts a classifier anew whose saved head has another number of labels."""

    path: str
    task: str = "causal_lm"
    tokenizer: str | None = None
    dtype: str | None = None
    num_labels: int | None = None
    gguf_file: str | None = None
    packed: bool = False
    new_head: bool = False
    trust_remote_code: bool = False
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataPart:
    """Rows, and what of them is used: `text` (a column, or two for pairs) and `label`; or templates such as
    "{question}" for `prompt` and `completion`; or a named `template`.

    `path` is a file, a folder, a loader's name ("json", "text", "csv", "parquet") with `files`, or a name on the
    Hub; `options` are further arguments of `load_dataset`. Text and labels of a CSV file are taken as they are
    written. `labels` are the names of the classes in the order of their numbers, see `Labels`. `separator` stands
    between documents in a causal language model's text (None: the end-of-sequence token).
    """

    path: str
    name: str | None = None
    files: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    train_split: str = "train"
    validation_split: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    text: str | list[str] | None = None
    label: str | None = None
    labels: list[Any] | None = None
    prompt: str | None = None
    completion: str | None = None
    template: str | None = None
    train_on_prompt: bool = False
    separator: str | None = None
    max_length: int = 128
    train_examples: int | None = None
    validation_examples: int | None = None


@dataclass(frozen=True)
class EvaluationPart:
    """Metrics, ours or those of the package `evaluate`, computed whenever Trainer evaluates and at the end. A
    language model has `loss` and `perplexity` besides: exp of the loss, which is the mean over all tokens that are
    learned, without label smoothing and without what a router adds."""

    metrics: list[str] = field(default_factory=list)
    at_end: bool = True


@dataclass(frozen=True)
class DistillationPart:
    """A dense model whose outputs are learned besides the labels, see [`peft_sparse.distill`]: `teacher` is a folder
    or a name on the Hub (None: the model that PST makes sparse, with the adapter off)."""

    teacher: str | None = None
    weight: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True)
class OutputPart:
    """Whether the adapter is merged at the end, and where that model goes (None: `merged` in training.output_dir)."""

    merge: bool = False
    packed: bool = False
    folder: str | None = None


def check_model(model: ModelPart) -> None:
    """Raises:
    ValueError: for values that contradict each other, or another task."""
    if model.task not in TASKS:
        raise ValueError(f"`model.task` is one of {', '.join(TASKS)}, got {model.task!r}.")
    if model.num_labels is not None and (model.task != "sequence_classification" or model.num_labels < 1):
        raise ValueError(
            "`model.num_labels` is for task sequence_classification, 1 for a number as the target and from 2 up for "
            f"classes, got {model.num_labels} for {model.task}."
        )
    problem = "regression" if model.num_labels == 1 else "single_label_classification"
    if model.task == "sequence_classification" and model.config.get("problem_type", problem) != problem:
        raise ValueError(
            "A classifier of a recipe has one label for a text, or with `model.num_labels: 1` a number, here "
            f"{problem}, got `model.config.problem_type` {model.config['problem_type']!r}; leave it out."
        )
    if model.packed and model.gguf_file:
        raise ValueError("`model.packed` keeps a packed checkpoint packed, got a gguf_file beside it; leave one out.")


def check_data(data: DataPart, task: str) -> None:
    """Raises:
    ValueError: if the columns do not suit the task, or a number is out of its range."""
    for name in ("max_length", "train_examples", "validation_examples", "shuffle_buffer"):
        value, least = getattr(data, name), 2 if name == "max_length" else 1
        if value is not None and value < least:
            raise ValueError(f"`data.{name}` is from {least} up, got {value}.")
    taken = next(
        (name for name in ("path", "name", "files", "split", "streaming", "texts") if name in data.options), None
    )
    if taken is not None:
        raise ValueError(
            f"`data.options` are what a reader takes besides, got {taken!r} among them, which other keys of `data` "
            "say; leave it out."
        )
    if data.files is None:
        _check_splits_of_file(data)
    if task == "sequence_classification":
        if not data.text or not data.label or data.prompt or data.completion or data.template:
            raise ValueError(
                "`data` names the columns `text` (one, or two for pairs) and `label` for sequence_classification, got "
                f"text={data.text!r}, label={data.label!r}, prompt={data.prompt!r}."
            )
        if isinstance(data.text, list) and len(data.text) > 2:
            raise ValueError(f"`data.text` is one column, or two for pairs, got {data.text!r}.")
        return
    if data.label is not None:
        raise ValueError(
            f"`data.label` is for task sequence_classification, got {data.label!r} for causal_lm, the task where none "
            "is named; name the other one, or leave the label out."
        )
    if data.template is not None and data.template not in TEMPLATES:
        raise ValueError(f"`data.template` is one of {', '.join(TEMPLATES)}, got {data.template!r}.")
    pair = data.prompt is not None and data.completion is not None
    chosen = [bool(data.text), data.prompt is not None or data.completion is not None, data.template is not None]
    if sum(chosen) != 1 or (chosen[1] and not pair) or isinstance(data.text, list):
        raise ValueError(
            "`data` names one column of `text`, or `prompt` and `completion`, or a `template` for causal_lm, got "
            f"text={data.text!r}, prompt={data.prompt!r}, completion={data.completion!r}, template={data.template!r}."
        )


def _check_splits_of_file(data: DataPart) -> None:
    kind = reader_of(data.path)
    splits = [name for name in (data.train_split, data.validation_split) if name is not None]
    several = len({name.partition("[")[0] for name in splits}) > 1
    if kind == "text" and (several or (len(set(splits)) > 1 and any("[" in name for name in splits))):
        raise ValueError(
            f"A .txt file is one document, of which no part can be held out, got {data.path!r} for {splits}; name the "
            "reader, `path: text`, with a file for each split, `files: {train: ..., validation: ...}`."
        )
    if kind is not None and several:
        raise ValueError(
            f"A file is one split, got {data.path!r} for {splits}; name two of its slices, such as "
            "train_split='train[:90%]' and validation_split='train[90%:]', or one file for each split in `data.files`."
        )


def check_distillation_part(part: DistillationPart | None, method: str) -> None:
    """Raises:
    ValueError: for numbers out of range, or no teacher where the model is none of its own."""
    if part is None:
        return
    try:
        check_distillation(part.weight, part.temperature)
    except ValueError as error:
        raise ValueError(f"`distillation`: {error}") from error
    if part.teacher is None and method != "pst":
        raise ValueError(
            "`distillation.teacher` names a dense model, got none with method spp, whose model without the adapter is "
            "the pruned one; name the one from before it was pruned, tuned on the same data."
        )


def check_output(output: OutputPart, output_dir: Path) -> None:
    """Raises:
    ValueError: if nothing is merged and it says where to, or the merged model is to go where something else is."""
    if not output.merge and (output.packed or output.folder is not None):
        raise ValueError(
            f"`output.packed` and `output.folder` are of the merged model, got packed={output.packed}, "
            f"folder={output.folder!r} and no merge; set `output.merge: true`, or leave them out."
        )
    if output.folder is None:
        return
    folder, run = Path(os.path.realpath(output.folder)), Path(os.path.realpath(output_dir))
    below = folder.parts[len(run.parts)] if folder.is_relative_to(run) and folder != run else ""
    if run.is_relative_to(folder) or below in (ADAPTER, PRUNED, RESULT) or below.startswith("checkpoint-"):
        raise ValueError(
            f"The merged model has a folder of its own, got `output.folder` {output.folder!r}, where a run in "
            f"{str(output_dir)!r} puts other things; leave it out, for `merged` in there, or choose another folder."
        )
