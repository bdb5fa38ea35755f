"""A recipe: one experiment as plain values, read from YAML and checked before anything is loaded.

    model       what `from_pretrained` takes, and the task
    prune       a pruner's arguments, for methods that start from a sparse model (may be left out)
    adapter     the method, and the fields of `PstConfig` or `SppConfig`
    data        where the examples are, and which columns to use
    training    the arguments of transformers' TrainingArguments, and `score_learning_rate`
    evaluation  metrics
    output      merging and saving at the end

Every key is checked against the real signature it goes to; an unknown one is an error with the nearest name.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from peft_sparse.checkpoint.models import TASKS
from peft_sparse.pruning import PRUNERS, calibration_batches
from peft_sparse.training.values import check_keys, check_type, read_yaml, with_environment, with_overrides
from peft_sparse.tuners.pst import PstConfig
from peft_sparse.tuners.sparse_config import SparseConfig
from peft_sparse.tuners.spp import SppConfig

METHODS: dict[str, type[SparseConfig]] = {"pst": PstConfig, "spp": SppConfig}
TEMPLATES = ("alpaca",)
# Arguments of the pruners that a recipe does not give, since `finetune` does.
_OF_FINETUNE = {"model", "batches", "progress", "source", "tokenizer"}


@dataclass(frozen=True)
class ModelPart:
    """`path` is a folder, dense or packed, or a name on the Hub; `config` changes fields of the model's config."""

    path: str
    task: str = "causal_lm"
    tokenizer: str | None = None
    dtype: str | None = None
    num_labels: int | None = None
    gguf_file: str | None = None
    packed: bool = False
    trust_remote_code: bool = False
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataPart:
    """Rows, and what of them is used: `text` (a column, or two for pairs) and `label`; or templates such as
    "{question}" for `prompt` and `completion`; or a named `template`.

    `path` is a file, a loader's name ("json", "text", "csv", "parquet") with `files`, or a name on the Hub; `options`
    are further arguments of `load_dataset`. `separator` stands between documents in a causal language model's text
    (None: the end-of-sequence token).
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
    """Metrics, ours or those of the package `evaluate`, computed whenever Trainer evaluates and at the end."""

    metrics: list[str] = field(default_factory=list)
    at_end: bool = True


@dataclass(frozen=True)
class OutputPart:
    """Whether the adapter is merged at the end, and where that model goes (None: `merged` in training.output_dir)."""

    merge: bool = False
    packed: bool = False
    folder: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `prune`, `adapter` and `training` are keyword arguments, without `method`.

    Attributes:
        method: "pst" or "spp".
        pruner: a key of `PRUNERS`, or None.
        calibration: arguments of `calibration_batches`.
        score_learning_rate: of PST's scores; None: that of everything else.
    """

    model: ModelPart
    data: DataPart
    method: str
    adapter: dict[str, Any]
    training: dict[str, Any]
    evaluation: EvaluationPart
    output: OutputPart
    pruner: str | None = None
    prune: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    score_learning_rate: float | None = None

    @property
    def output_dir(self) -> Path:
        """Where checkpoints, the adapter and what belongs to them go."""
        return Path(self.training["output_dir"])

    @property
    def merged_folder(self) -> Path:
        """Where the merged model goes."""
        return Path(self.output.folder) if self.output.folder else self.output_dir / "merged"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: of a YAML file.
        overrides: such as "training.max_steps=10", see [`with_overrides`].

    Raises:
        ValueError: if a key is unknown, a value has another type or is out of its range, or a needed one is missing.
    """
    return make_recipe(with_overrides(read_yaml(path), overrides))


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """[`load_recipe`] for values that are no file.

    Example:
        >>> recipe = make_recipe({
        ...     "model": {"path": "org/llama"}, "adapter": {"method": "spp", "r": 16},
        ...     "data": {"path": "org/text", "text": "text"}, "training": {"output_dir": "out", "max_steps": 10},
        ... })
        >>> recipe.method, recipe.data.max_length
        ('spp', 128)
    """
    check_keys("recipe", values, ("model", "prune", "adapter", "data", "training", "evaluation", "output"))
    values = with_environment(values)
    for part, content in values.items():
        if content is not None:
            check_type(part, content, dict[str, Any])
    for part in ("model", "adapter", "data", "training"):
        if not values.get(part):
            raise ValueError(f"A recipe has the parts model, adapter, data and training, got none for `{part}`.")
    method, adapter = _adapter(dict(values["adapter"]))
    pruner, prune, calibration = _prune(dict(values.get("prune") or {}))
    training = dict(values["training"])
    score_learning_rate = training.pop("score_learning_rate", None)
    recipe = Recipe(
        model=_part("model", ModelPart, values["model"]),
        data=_part("data", DataPart, values["data"]),
        method=method,
        adapter=adapter,
        training=training,
        evaluation=_part("evaluation", EvaluationPart, values.get("evaluation") or {}),
        output=_part("output", OutputPart, values.get("output") or {}),
        pruner=pruner,
        prune=prune,
        calibration=calibration,
        score_learning_rate=score_learning_rate,
    )
    _check_model(recipe.model)
    check_data(recipe.data, recipe.model.task)
    _check_training(recipe)
    return recipe


def _part(where: str, part: type[Any], values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(part)
    check_keys(where, values, hints)
    for key, value in values.items():
        check_type(f"{where}.{key}", value, hints[key])
    for needed in dataclasses.fields(part):
        missing = needed.default is dataclasses.MISSING and needed.default_factory is dataclasses.MISSING
        if missing and needed.name not in values:
            raise ValueError(f"`{where}` needs the key {needed.name!r}, got {sorted(values)}.")
    return part(**values)


def _adapter(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    method = values.pop("method", None)
    if method not in METHODS:
        raise ValueError(f"`adapter.method` is one of {', '.join(METHODS)}, got {method!r}.")
    config = METHODS[method]
    check_keys("adapter", values, (item.name for item in dataclasses.fields(config) if item.init))
    try:
        config(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`adapter`: {error}") from error
    return method, values


def _prune(values: dict[str, Any]) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    if not values:
        return None, {}, {}
    method, calibration = values.pop("method", None), values.pop("calibration", None) or {}
    if method not in PRUNERS:
        raise ValueError(f"`prune.method` is one of {', '.join(PRUNERS)}, got {method!r}.")
    check_keys("prune", values, {*_names(PRUNERS[method]), "calibration"})
    check_type("prune.calibration", calibration, dict[str, Any])
    if calibration and method == "magnitude":
        raise ValueError("`prune.calibration` is data to prune on, and method 'magnitude' takes none; leave it out.")
    check_keys("prune.calibration", calibration, _names(calibration_batches))
    return method, values, calibration


def _names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - _OF_FINETUNE


def _check_model(model: ModelPart) -> None:
    if model.task not in TASKS:
        raise ValueError(f"`model.task` is one of {', '.join(TASKS)}, got {model.task!r}.")
    if model.num_labels is not None and (model.task != "sequence_classification" or model.num_labels < 1):
        raise ValueError(
            "`model.num_labels` is for task sequence_classification, 1 for a number as the target and from 2 up for "
            f"classes, got {model.num_labels} for {model.task}."
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
    if task == "sequence_classification":
        if not data.text or not data.label or data.prompt or data.completion or data.template:
            raise ValueError(
                "`data` names the columns `text` (one, or two for pairs) and `label` for sequence_classification, got "
                f"text={data.text!r}, label={data.label!r}, prompt={data.prompt!r}."
            )
        if isinstance(data.text, list) and len(data.text) > 2:
            raise ValueError(f"`data.text` is one column, or two for pairs, got {data.text!r}.")
        return
    if data.template is not None and data.template not in TEMPLATES:
        raise ValueError(f"`data.template` is one of {', '.join(TEMPLATES)}, got {data.template!r}.")
    pair = data.prompt is not None and data.completion is not None
    chosen = [bool(data.text), data.prompt is not None or data.completion is not None, data.template is not None]
    if sum(chosen) != 1 or (chosen[1] and not pair) or isinstance(data.text, list):
        raise ValueError(
            "`data` names one column of `text`, or `prompt` and `completion`, or a `template` for causal_lm, got "
            f"text={data.text!r}, prompt={data.prompt!r}, completion={data.completion!r}, template={data.template!r}."
        )


def _check_training(recipe: Recipe) -> None:
    hints = {item.name: item.type for item in dataclasses.fields(TrainingArguments) if item.init}
    check_keys("training", recipe.training, {*hints, "score_learning_rate"})
    if not isinstance(recipe.training.get("output_dir"), str):
        raise ValueError("`training` needs `output_dir`, the folder for checkpoints and results.")
    check_type("training.score_learning_rate", recipe.score_learning_rate, float | None)
    if recipe.score_learning_rate is not None and recipe.method != "pst":
        raise ValueError("`training.score_learning_rate` is for PST's scores, got it with method 'spp'; leave it out.")
    for name in ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "seed"):
        if name in recipe.training:
            check_type(f"training.{name}", recipe.training[name], int | float)
    if recipe.data.streaming and recipe.training.get("max_steps", -1) <= 0:
        raise ValueError("A stream has no length, so that `training.max_steps` says when it ends, got none.")
    evaluates = recipe.training.get("eval_strategy", "no") not in ("no", False) or recipe.evaluation.metrics
    if evaluates and recipe.data.validation_split is None:
        raise ValueError(
            "Evaluation takes `data.validation_split`, got none; name it, or leave out `evaluation.metrics` and "
            "`training.eval_strategy`."
        )
