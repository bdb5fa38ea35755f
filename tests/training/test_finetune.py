"""`finetune` from end to end on tiny models: data of every kind, metrics, what is logged, what is saved."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_sparse.checkpoint import merge_checkpoint
from peft_sparse.checkpoint.card import MARK
from peft_sparse.checkpoint.models import load_model
from peft_sparse.evaluation import sparsity_report, verify_sparsity
from peft_sparse.pruning import prune_magnitude
from peft_sparse.training import evaluate_model, evaluate_recipe, finetune, plan_finetune
from peft_sparse.training.adapt import adapt
from peft_sparse.training.build import make_optimizer, training_arguments
from peft_sparse.training.engines import check_merge_in_one_process

from models import tiny_bart, tiny_bert, tiny_gpt2, tiny_llama
from recipes import classifier, language_model, write_rows

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_a_classifier_is_sparsified_and_merged(tmp_path, sentences):
    result = finetune(classifier(tmp_path, sentences, output={"merge": True}))
    assert {"eval_loss", "eval_accuracy", "eval_f1", "train_loss"} <= result.metrics.keys()
    assert result.steps == 6 and result.sparsity == pytest.approx(0.75, abs=1e-3)
    merged = AutoModelForSequenceClassification.from_pretrained(result.merged)
    assert sparsity_report(merged).total_sparsity == result.sparsity
    for folder in (result.adapter, result.merged):
        assert MARK in (Path(folder) / "README.md").read_text()
    measured = evaluate_recipe(classifier(tmp_path, sentences), result.merged, progress=False)
    assert measured["accuracy"] == result.metrics["eval_accuracy"]
    assert measured["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-4)
    adapter = evaluate_recipe(classifier(tmp_path, sentences), result.adapter, progress=False)
    assert adapter["loss"] == pytest.approx(measured["loss"], rel=1e-4)


@pytest.mark.parametrize("merge", [False, True])
def test_a_run_that_diverges_says_so_and_keeps_what_it_wrote(tmp_path, sentences, merge):
    recipe = classifier(tmp_path, sentences, output={"merge": merge}, training={"learning_rate": 1e30})
    with pytest.raises(ValueError, match=r"got NaN or infinity in `.*: it diverged; lower `training.learning_rate`"):
        finetune(recipe)
    assert json.loads((recipe.output_dir / "result.json").read_text())["steps"] == 6
    assert not (recipe.output_dir / "merged").exists()


def test_what_is_logged(tmp_path, sentences):
    result = finetune(classifier(tmp_path, sentences))
    logged = [entry for entry in result.log if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    for entry in logged:
        assert 0 <= entry["mask_churn"] <= 1
        assert {"score_mean", "score_std", "score_kept_mean", "score_pruned_mean"} <= entry.keys()
        assert entry["score_kept_mean"] > entry["score_pruned_mean"]
    assert logged[-1]["sparsity"] == result.sparsity
    # from a dense start, no fewer weights changed state in all than are pruned now
    assert sum(entry["mask_churn"] for entry in logged) >= logged[-1]["sparsity"] - 1e-9


def test_accumulated_batches_are_one_batch(tmp_path, sentences):
    """A classifier's loss is a mean, which Trainer would take for a share of a sum."""
    losses = []
    for accumulated in (1, 2):
        sizes = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
        result = finetune(classifier(tmp_path, sentences, str(accumulated), training=sizes))
        losses.append([entry["loss"] for entry in result.log if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_reporter_that_comes_first_gets_the_numbers_too(tmp_path, sentences, monkeypatch):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda *_: [Reporter])
    finetune(language_model(tmp_path, sentences, training={"eval_strategy": "steps", "eval_steps": 3}))
    assert all("mask_churn" in logs for logs in seen if "loss" in logs)
    assert any("eval_perplexity" in logs for logs in seen)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pruned_language_model_keeps_its_zeros(tmp_path, sentences, streaming):
    asked = language_model(
        tmp_path, sentences, data={"text": "text", "streaming": streaming}, output={"merge": True, "packed": streaming}
    )
    result = finetune(asked)
    assert result.zeros_lost == 0 and result.sparsity == pytest.approx(0.5, abs=1e-3)
    assert verify_sparsity(result.merged, reference=tmp_path / "run" / "pruned", pattern="2:4").ok
    assert "50.00% of the weights" in (tmp_path / "run" / "pruned" / "README.md").read_text()
    assert all(entry["mask_churn"] == 0 for entry in result.log if "loss" in entry)
    again = load_model(result.adapter)  # its config names the pruned weights
    assert isinstance(again, PeftModel)
    ids = torch.arange(4, 14)[None]
    expected = load_model(result.merged, "causal_lm")(ids).logits
    torch.testing.assert_close(again.eval()(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", ["folder", "hub"])
def test_a_merge_that_loses_zeros_leaves_no_folder_and_no_training_is_lost(tmp_path, sentences, monkeypatch, base):
    """Also where the base is not a folder here: what was tuned is compared, not where it came from."""
    module = sys.modules[finetune.__module__]

    def save_dense_weights(model, folder, *rest, save=module.save_model):
        layer = model.model.layers[1].mlp.down_proj.weight
        layer.data[layer.data == 0] = 0.5
        save(model, folder, *rest)

    monkeypatch.setattr(module, "save_model", save_dense_weights)
    asked = language_model(tmp_path, sentences, output={"merge": True})
    if base == "hub":
        pruned = prune_magnitude(tiny_llama(), "2:4")
        asked = language_model(tmp_path, sentences, base=pruned, prune=None, output={"merge": True})
        load = module.model_of
        monkeypatch.setattr(module, "model_of", lambda asked, **more: load(asked, tmp_path / "llama", **more))
        asked = replace(asked, model=replace(asked.model, path="org/llama", tokenizer=asked.model.path))
    with pytest.raises(RuntimeError, match=r"got 768 of them lost .* nothing was written to"):
        finetune(asked)
    assert not (tmp_path / "run" / "merged").exists() and not list((tmp_path / "run").glob(".merged*"))
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["steps"] == 6 and written["merged"] is None and written["zeros_lost"] is None
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_prompt_and_completion_on_conv1d(tmp_path, sentences):
    data = {"prompt": "{question}", "completion": "{answer}"}
    asked = language_model(
        tmp_path, sentences, base=tiny_gpt2(), data=data, prune=None, adapter={"method": "pst", "pattern": "2:4"},
        evaluation={"metrics": ["accuracy"]}, output={"merge": True},
    )  # fmt: skip
    result = finetune(asked)
    assert 0 <= result.metrics["eval_accuracy"] <= 1
    assert result.metrics["eval_perplexity"] == pytest.approx(torch.tensor(result.metrics["eval_loss"]).exp().item())
    assert sparsity_report(AutoModelForCausalLM.from_pretrained(result.merged)).pattern == "2:4"


def test_scores_with_a_rate_of_their_own_and_names_for_labels(tmp_path, sentences):
    data = {"text": ["question", "answer"], "label": "name", "labels": ["low", "high"]}
    asked = classifier(tmp_path, sentences, data=data, training={"score_learning_rate": 5e-2, "logging_steps": 1})
    assert finetune(asked).steps == 6


def test_the_names_of_labels_are_those_of_the_model(tmp_path, sentences):
    """In the order of the recipe, whatever the base called them; then by the model's own, and in no other order."""
    base = tiny_bert()
    base.config.id2label, base.config.label2id = {0: "high", 1: "low"}, {"high": 0, "low": 1}
    data = {"text": "text", "label": "name", "labels": ["low", "high"]}
    result = finetune(classifier(tmp_path, sentences, base=base, data=data, output={"merge": True}))
    merged = load_model(result.merged).config
    assert merged.id2label == {0: "low", 1: "high"} and merged.label2id == {"low": 0, "high": 1}
    expected = result.metrics["eval_accuracy"]
    for values in (data, {"text": "text", "label": "name"}, {"text": "text", "label": "label"}):
        measured = evaluate_recipe(classifier(tmp_path, sentences, data=values), result.merged, progress=False)
        assert measured["accuracy"] == expected
    merge_checkpoint(result.adapter, tmp_path / "merged later")
    assert load_model(tmp_path / "merged later").config.id2label == merged.id2label  # though the base has others
    for values in (data, {"text": "text", "label": "name"}):
        asked = classifier(tmp_path, sentences, base=base, data=values)
        assert evaluate_recipe(asked, result.adapter, progress=False)["accuracy"] == expected
    turned = classifier(tmp_path, sentences, data=data | {"labels": ["high", "low"]})
    for folder in (result.merged, result.adapter):
        with pytest.raises(
            ValueError, match=r"got \['high', 'low'\], and the model's config.json has \['low', 'high'\]"
        ):
            evaluate_recipe(turned, folder, progress=False)
    base.config.id2label, base.config.label2id = {0: "hi", 1: "low"}, {"hi": 0, "low": 1}
    with pytest.raises(ValueError, match="one of the model's names hi, low, got 'high' in column 'name'; list"):
        plan_finetune(classifier(tmp_path, sentences, "other", base=base, data={"text": "text", "label": "name"}))


@pytest.mark.parametrize("prune", [None, {"method": "magnitude"}])
def test_what_the_base_lacks_beside_the_head_is_trained_and_saved_too(tmp_path, sentences, prune):
    """A BERT from masked language modelling has no pooler: it would be random at every load."""
    base = BertForMaskedLM(tiny_bert().config)
    asked = classifier(tmp_path, sentences, base=base, prune=prune, output={"merge": True})
    assert plan_finetune(asked)["new modules"] == "bert.pooler.dense"
    result = finetune(asked)
    ids = torch.arange(4, 14)[None]
    expected = load_model(result.merged).eval()(ids).logits
    torch.manual_seed(7)
    model = load_model(result.adapter).eval()
    assert "bert.pooler.dense" in model.peft_config["default"].modules_to_save
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    (tmp_path / "run" / "checkpoint-6").rename(tmp_path / "run" / "gone")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(result.merged)
    again = finetune(asked, resume=True)
    torch.testing.assert_close(load_model(again.merged).eval()(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_tensors_that_the_tuned_model_will_not_have_are_named(tmp_path, sentences):
    asked = language_model(tmp_path, sentences, prune=None, base=prune_magnitude(tiny_llama(), "2:4"))
    path = tmp_path / "llama" / "model.safetensors"
    save_file(load_file(path) | {"model.layers.9.eh_proj.weight": torch.ones(4, 4)}, path, metadata={"format": "pt"})
    for start in (plan_finetune, finetune):
        with pytest.warns(UserWarning, match=r"no place for tensors in .* model.layers.9.eh_proj.weight\. The model"):
            start(asked)


def test_a_base_without_weights_of_its_blocks_is_refused(tmp_path, sentences):
    asked = language_model(tmp_path, sentences, prune=None)
    file = tmp_path / "llama" / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"whose blocks are trained, got none for `model.layers.1.mlp.up_proj.weight`"
    ):
        finetune(asked)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prune", [None, {"method": "magnitude"}])
def test_a_model_whose_config_means_another_number_of_labels(tmp_path, sentences, prune):
    """BART's default is three, and transformers tells none of two."""
    rows = [json.loads(line) for line in Path(sentences).read_text().splitlines()]
    write_rows(Path(sentences), [row | {"text": f"{row['text']} </s>"} for row in rows])  # its head is on that token
    asked = classifier(tmp_path, sentences, base=tiny_bart().model, prune=prune, output={"merge": True})
    result = finetune(asked)
    data = {"path": asked.data.path, "validation_split": "train", "text": "text", "label": "label"}
    for path in (result.adapter, result.merged):
        measured = evaluate_model(path, data=data, progress=False)
        assert measured["loss"] == pytest.approx(result.metrics["eval_loss"], abs=1e-4)


def test_a_head_with_a_rate_of_its_own(tmp_path, sentences):
    losses = []
    for own in ({}, {"head_learning_rate": 5e-3}, {"head_learning_rate": 5e-2}):
        training = {"learning_rate": 5e-3, "logging_steps": 1, "report_to": "none"} | own
        result = finetune(classifier(tmp_path, sentences, str(len(losses)), training=training))
        losses.append([entry["loss"] for entry in result.log if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0][-1] - losses[2][-1]) > 1e-3


def test_rates_of_their_own_keep_the_optimizer_that_was_asked_for(tmp_path, sentences, monkeypatch):
    training = {"score_learning_rate": 5e-2, "optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1}
    asked = classifier(tmp_path, sentences, training=training)
    arguments, model = training_arguments(asked), adapt(asked, tiny_bert(), [])
    optimizer = make_optimizer(asked, arguments, model)
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0.9
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates == {
        "scores": (5e-2, 0.0), "weights": (1e-2, 0.0), "others": (1e-2, 0.1), "others_without_decay": (1e-2, 0.0)
    }  # fmt: skip
    assert make_optimizer(classifier(tmp_path, sentences, training={"optim": "sgd"}), arguments, model) is None
    like_galore = staticmethod(lambda *_: (torch.optim.SGD, {"params": []}))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", like_galore)
    with pytest.raises(ValueError, match="of groups of parameters, got the optimizer sgd, which makes its own"):
        plan_finetune(asked)


def test_a_number_as_the_target(tmp_path, sentences):
    asked = classifier(
        tmp_path, sentences, model={"num_labels": 1, "new_head": True}, data={"text": "text", "label": "score"},
        evaluation={"metrics": ["pearsonr", "spearmanr", "mse"]},
    )  # fmt: skip
    with pytest.raises(ValueError, match="another number of labels"):
        finetune(replace(asked, model=replace(asked.model, new_head=False)))
    result = finetune(asked)
    assert result.metrics["eval_mse"] == pytest.approx(result.metrics["eval_loss"], rel=1e-4)
    (tmp_path / "run" / "adapter").rename(tmp_path / "adapter")
    labels = replace(asked, evaluation=replace(asked.evaluation, metrics=["accuracy"]))
    with pytest.raises(ValueError, match=r"is measured by metrics of numbers, .*got 'accuracy'"):
        evaluate_recipe(labels, tmp_path / "adapter", progress=False)


def test_merging_is_refused_where_no_process_has_whole_weights(tmp_path, monkeypatch):
    arguments = TrainingArguments(str(tmp_path), report_to="none")
    assert check_merge_in_one_process(arguments) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"got `output\.merge` with FSDP; leave it out"):
        check_merge_in_one_process(arguments)


def test_a_generation_config_that_transformers_does_not_save_costs_no_run(tmp_path, sentences):
    """Trainer gives it the tokenizer's special tokens, and a changed one is refused where it names a temperature
    without sampling, as Llama-2-chat's does."""
    asked = language_model(tmp_path, sentences, output={"merge": True})
    fields = {"_from_model_config": True, "temperature": 0.9, "top_p": 0.6}
    (tmp_path / "llama" / "generation_config.json").write_text(json.dumps(fields))
    result = finetune(asked)
    for folder in (tmp_path / "run" / "pruned", Path(result.merged)):
        assert fields.items() <= json.loads((folder / "generation_config.json").read_text()).items()
