"""A recipe: one experiment as plain values, read from YAML and checked before anything is loaded.

    model         what `from_pretrained` takes, and the task
    prune         a pruner's arguments, for methods that start from a sparse model (may be left out)
    adapter       the method, and the fields of `PstConfig` or `SppConfig`
    data          where the examples are, and which columns to use
    training      the arguments of transformers' TrainingArguments, `score_learning_rate` and `head_learning_rate`
    distillation  a teacher, its weight and the temperature (may be left out)
    evaluation    metrics
    output        merging and saving at the end

Every key is checked against the real signature it goes to; an unknown one is an error with the nearest name.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from peft_sparse.checkpoint.tasks import TASKS
from peft_sparse.pruning import PRUNERS, calibration_batches
from peft_sparse.pruning.plan import pruning_pattern
from peft_sparse.training.labels import check_labels
from peft_sparse.training.parts import (
    DataPart,
    DistillationPart,
    EvaluationPart,
    ModelPart,
    OutputPart,
    check_data,
    check_distillation_part,
    check_model,
    check_output,
)
from peft_sparse.training.trainer_options import OWN_RATES, check_training, without_empty
from peft_sparse.training.values import check_keys, check_type, read_yaml, with_environment, with_overrides
from peft_sparse.tuners.pst import PstConfig
from peft_sparse.tuners.sparse_config import SparseConfig
from peft_sparse.tuners.spp import SppConfig

METHODS: dict[str, type[SparseConfig]] = {"pst": PstConfig, "spp": SppConfig}
# Arguments of the pruners that a recipe does not give, since `finetune` does.
_OF_FINETUNE = {"model", "batches", "progress", "source", "tokenizer"}
PARTS = ("model", "prune", "adapter", "data", "training", "distillation", "evaluation", "output")
_KINDS = {
    "model": ModelPart,
    "data": DataPart,
    "training": TrainingArguments,
    "distillation": DistillationPart,
    "evaluation": EvaluationPart,
    "output": OutputPart,
}
# Keys of a part that name files or folders.
_PATHS = {
    "model": ("path", "tokenizer"),
    "prune": ("checkpoint_dir",),
    "data": ("path", "files"),
    "training": ("output_dir",),
    "distillation": ("teacher",),
    "output": ("folder",),
}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `prune`, `adapter` and `training` are keyword arguments, without `method`.

    Attributes:
        method: "pst" or "spp".
        pruner: a key of `PRUNERS`, or None.
        calibration: arguments of `calibration_batches`.
        score_learning_rate: of PST's scores; None: that of the weights.
        head_learning_rate: of what PST trains beside weights and scores, a new head; None: that of the weights.
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
    distillation: DistillationPart | None = None
    score_learning_rate: float | None = None
    head_learning_rate: float | None = None

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
        overrides: such as "training.max_steps=10", see `with_overrides`.

    Raises:
        ValueError: if a key is unknown, a value has another type or is out of its range, or a needed one is missing.

    Examples:
        >>> import tempfile
        >>> text = "{model: {path: org/llama}, adapter: {method: spp}, data: {path: org/text, text: text}}"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "recipe.yaml")
        ...     _ = file.write_text(text, encoding="utf-8")
        ...     recipe = load_recipe(file, ["training.output_dir=out", "training.max_steps=10"])
        >>> recipe.training
        {'output_dir': 'out', 'max_steps': 10}
    """
    return make_recipe(with_overrides(read_yaml(path), overrides))


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """[`load_recipe`] for values that are no file.

    Examples:
        >>> recipe = make_recipe({
        ...     "model": {"path": "org/llama"}, "adapter": {"method": "spp", "r": 16},
        ...     "data": {"path": "org/text", "text": "text"}, "training": {"output_dir": "out", "max_steps": 10},
        ... })
        >>> recipe.method, recipe.data.max_length
        ('spp', 128)
    """
    check_keys("recipe", values, PARTS)
    values = with_environment(values, hints=_hints())
    for part, content in values.items():
        if content is not None:
            check_type(part, content, dict[str, Any])
    values = {part: _with_home(content, _PATHS.get(part, ())) for part, content in values.items()}
    for part in ("model", "adapter", "data", "training"):
        if not values.get(part):
            raise ValueError(f"A recipe has the parts model, adapter, data and training, got none for `{part}`.")
    method, adapter = _adapter(dict(values["adapter"]))
    pruner, prune, calibration = _prune(dict(values.get("prune") or {}))
    training = without_empty(values["training"])
    own_rates = {name: training.pop(name, None) for name in OWN_RATES}
    distillation = values.get("distillation")
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
        distillation=None if distillation is None else _part("distillation", DistillationPart, distillation),
        **own_rates,
    )
    check_model(recipe.model)
    check_data(recipe.data, recipe.model.task)
    check_labels(recipe.data, recipe.model)
    _check_adapter(recipe)
    check_training(recipe)
    check_distillation_part(recipe.distillation, recipe.method)
    check_output(recipe.output, recipe.output_dir)
    return recipe


def _hints() -> dict[str, Any]:
    """The types of keys by their paths, of parts that have a fixed list of them."""
    return {
        f"{part}.{key}": hint for part, kind in _KINDS.items() for key, hint in typing.get_type_hints(kind).items()
    }


def _with_home(content: Any, paths: Sequence[str]) -> Any:
    """A part whose paths may begin with `~`. Trainer takes it so for its own files, which belong beside the others."""

    def expanded(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: expanded(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [expanded(inner) for inner in value]
        return os.path.expanduser(value) if isinstance(value, str) else value

    return content and {key: expanded(value) if key in paths else value for key, value in content.items()}


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
    _check_pattern(method, values)
    return method, values, calibration


def _check_pattern(method: str, values: Mapping[str, Any]) -> None:
    pattern, group, sparsity = values.get("pattern", "unstructured"), values.get("group"), values.get("sparsity")
    try:
        pruning_pattern(method, pattern, group, sparsity)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`prune`: {error}") from error


def _names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - _OF_FINETUNE


def _check_adapter(recipe: Recipe) -> None:
    expected = TASKS[recipe.model.task][1]
    if recipe.adapter.get("task_type", expected) != expected:
        raise ValueError(
            f"`adapter.task_type` is that of `model.task`, {expected} for {recipe.model.task}, got "
            f"{recipe.adapter['task_type']!r}; leave it out."
        )
    if recipe.adapter.get("inference_mode"):
        raise ValueError("A recipe trains its adapter, got `adapter.inference_mode: true`; leave it out.")
