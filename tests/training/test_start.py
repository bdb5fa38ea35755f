"""What `finetune` does before it trains: it goes on from a checkpoint, or finds what does not fit, as a plan does."""

import errno
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoTokenizer,
    BartForConditionalGeneration,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainerCallback,
)

from peft_sparse import prune_magnitude
from peft_sparse.checkpoint import prune_checkpoint
from peft_sparse.evaluation.metrics import BUNDLED
from peft_sparse.training import evaluate_recipe, finetune, plan_finetune
from peft_sparse.training.adapt import note_new_modules
from peft_sparse.training.checkpoints import checkpoint_fault
from peft_sparse.training.result import FinetuneResult
from peft_sparse.training.start import claimed

from models import WORDS, save_with_tokenizer, tiny_bart, tiny_bert, tiny_llama
from recipes import classifier, language_model

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def meanwhile(patch, action):
    """Something that happens while a run is at work, when its Trainer is there."""
    module = sys.modules[finetune.__module__]  # of the same name as the function
    make = module.make_trainer

    def trainer(*arguments):
        action()
        return make(*arguments)

    patch.setattr(module, "make_trainer", trainer)


def test_a_run_has_its_folder_for_itself(tmp_path, sentences, monkeypatch):
    recipe, said = classifier(tmp_path, sentences, "out"), []

    def another():
        with pytest.raises(ValueError, match=r"in which another one is at work; wait for its end") as error:
            finetune(recipe)
        said.append(error)

    meanwhile(monkeypatch, another)
    finetune(recipe)
    assert len(said) == 1 and not list(recipe.output_dir.glob("*.lock"))
    other = classifier(tmp_path, sentences, "other")
    meanwhile(monkeypatch, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(other)
    assert not other.output_dir.exists()


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch):
    def no_locks(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    warned = pytest.warns(UserWarning, match=r"out' has no locks \(No locks available\), .* of its own")
    with warned, claimed(tmp_path / "out", SimpleNamespace(process_index=0)):
        (tmp_path / "out" / "adapter").mkdir()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter"]


def test_a_merge_that_fails_is_none_in_the_result(tmp_path, sentences, monkeypatch):
    recipe = classifier(tmp_path, sentences, "out", output={"merge": True})
    in_the_way = recipe.merged_folder / "config.json"

    def somebody_writes():
        in_the_way.parent.mkdir()
        in_the_way.write_text("{}")

    with monkeypatch.context() as patch:
        meanwhile(patch, somebody_writes)
        with pytest.raises(ValueError, match=r"which is not empty \('config.json' is in it\); choose another name"):
            finetune(recipe)
    assert in_the_way.read_text() == "{}"
    assert json.loads((recipe.output_dir / "result.json").read_text())["merged"] is None
    with pytest.raises(ValueError, match="which is not empty"):
        finetune(recipe, resume=True)
    in_the_way.unlink()
    assert finetune(recipe, resume=True).merged == str(recipe.merged_folder)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, sentences):
    whole = finetune(classifier(tmp_path, sentences, "whole"))
    first = classifier(tmp_path, sentences, "parts")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[finetune.__module__]  # of the same name as the function
        make = module.make_trainer

        def interrupted(*arguments):
            trainer = make(*arguments)
            trainer.add_callback(Stop())
            return trainer

        patch.setattr(module, "make_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(first)
    with pytest.raises(ValueError, match="an earlier run in it; resume it"):
        finetune(first)
    resumed = finetune(first, resume=True)
    assert resumed.resumed_from.endswith("checkpoint-3") and resumed.steps == 6
    assert resumed.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], abs=1e-6)
    assert resumed.sparsity == whole.sparsity


def test_nothing_to_resume(tmp_path, sentences):
    with pytest.raises(ValueError, match=r"checkpoint that is complete, got none in .*leave `resume` out"):
        finetune(classifier(tmp_path, sentences), resume=True)


def test_a_checkpoint_that_is_not_complete_is_passed_over(tmp_path, sentences):
    """As after a kill in the middle of a save: of the second checkpoint, of the first one, and when all is done."""
    asked, run = classifier(tmp_path, sentences), tmp_path / "run"
    whole = finetune(asked)
    (run / "result.json").unlink()
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"got '.*checkpoint-6', and it has no trainer_state.json.*; name an older"):
        finetune(asked, resume=str(run / "checkpoint-6"))
    assert plan_finetune(asked, resume=True)["resumed from"].endswith("checkpoint-3")
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-6"]
    resumed = finetune(asked, resume=True)
    assert resumed.resumed_from.endswith("checkpoint-3")
    assert resumed.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], abs=1e-6)
    assert (run / "incomplete-checkpoint-6").is_dir() and checkpoint_fault(run / "checkpoint-6") is None
    for number in (3, 6):
        (run / f"checkpoint-{number}" / "trainer_state.json").unlink()
    longer = classifier(tmp_path, sentences, training={"max_steps": 9})
    with pytest.raises(
        ValueError, match=r"got only checkpoint-6 \(it has no .*; choose another `training.output_dir`"
    ):
        finetune(longer, resume=True)
    with pytest.raises(ValueError, match="an earlier run in it; choose another"):
        finetune(asked)
    (run / "result.json").unlink()
    with pytest.raises(ValueError, match=r"got only checkpoint-6 .*; leave `resume` out to start one"):
        finetune(asked, resume=True)
    with pytest.raises(ValueError, match=r"makes its folders itself, got '.*adapter', which is there already"):
        finetune(asked)
    shutil.rmtree(run / "adapter")
    assert finetune(asked).metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], abs=1e-6)


def test_resuming_takes_the_pruned_model_that_is_there(tmp_path, sentences):
    asked = language_model(tmp_path, sentences)
    finetune(asked)
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoint-6").rename(tmp_path / "run" / "gone")
    before = (tmp_path / "run" / "pruned" / "model.safetensors").stat().st_mtime_ns
    assert finetune(asked, resume=True).resumed_from.endswith("checkpoint-3")
    assert (tmp_path / "run" / "pruned" / "model.safetensors").stat().st_mtime_ns == before


def test_a_pruned_model_of_somebody_s_is_not_overwritten(tmp_path, sentences):
    """But what a run left there that was killed before its first checkpoint is."""
    asked, pruned = language_model(tmp_path, sentences), tmp_path / "run" / "pruned"
    prune_checkpoint(tmp_path / "llama", pruned, "magnitude", sparsity=0.75)
    before = (pruned / "model.safetensors").read_bytes()
    inside = language_model(tmp_path, sentences, model={"path": str(pruned)})
    for start in (plan_finetune, finetune):
        for given in (asked, inside):
            with pytest.raises(ValueError, match=r"got '.*pruned', which is there already; choose another"):
                start(given)
    assert (pruned / "model.safetensors").read_bytes() == before
    note_new_modules(pruned, [])
    for start in (plan_finetune, finetune):
        with pytest.raises(ValueError, match=r"writes into '.*pruned', as its .*, got '.*pruned' to read from"):
            start(inside)
    assert finetune(asked).sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_run_reads_nothing_that_its_checkpoints_would_replace(tmp_path, sentences):
    """A model called like a checkpoint, which is none that is complete, would be set aside."""
    folder = tmp_path / "run" / "checkpoint-500"
    save_with_tokenizer(prune_magnitude(tiny_llama(), sparsity=0.5), folder)
    asked = language_model(tmp_path, sentences, model={"path": str(folder)}, prune=None)
    for start in (plan_finetune, finetune):
        with pytest.raises(ValueError, match=r"writes into '.*checkpoint-500', as .*, got '.*' to read from; choose"):
            start(asked)
    assert (folder / "model.safetensors").is_file()


def test_without_its_optimizer_s_state_a_run_is_not_resumed(tmp_path, sentences):
    asked, run = classifier(tmp_path, sentences, training={"save_only_model": True}), tmp_path / "run"
    finetune(asked)
    (run / "result.json").unlink()
    assert finetune(asked, resume=True).steps == 6  # that needs none
    with pytest.raises(ValueError, match=r"its optimizer's state, got none in '.*checkpoint-3', as `training.save_on"):
        finetune(asked, resume=str(run / "checkpoint-3"))


def test_a_run_that_diverged_is_not_finished(tmp_path, sentences):
    asked = classifier(tmp_path, sentences, training={"learning_rate": 1e30})
    for resume in (False, True, True):
        with pytest.raises(ValueError, match=r"got NaN or infinity in .* it diverged"):
            finetune(asked, resume=resume)


LENGTHS = [{"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 0.55}]  # of 10 steps an epoch


@pytest.mark.parametrize("length", LENGTHS)
def test_a_finished_run_stays_as_it_is(tmp_path, sentences, length):
    asked, run = classifier(tmp_path, sentences, output={"merge": True}, training=length), tmp_path / "run"
    first = finetune(asked)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    shown = r"The run in '.*run' is finished; nothing is left to do"
    with pytest.warns(UserWarning, match=shown):
        assert finetune(asked, resume=True) == first
    with pytest.warns(UserWarning, match=shown):
        assert plan_finetune(asked, resume=True)["steps left"] == 0
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
        before = {path: time for path, time in before.items() if not path.is_relative_to(folder)}
    with pytest.warns(UserWarning, match=shown):
        assert finetune(asked, resume=True).metrics == first.metrics
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    run.rename(tmp_path / "moved")
    moved = classifier(tmp_path, sentences, "moved", output={"merge": True}, training=length)
    with pytest.warns(UserWarning, match="is finished"):
        found = finetune(moved, resume=True)
    assert (found.adapter, found.merged) == (str(tmp_path / "moved" / "adapter"), str(tmp_path / "moved" / "merged"))


def test_a_run_that_was_stopped_behind_its_merge_is_finished(tmp_path, sentences, monkeypatch):
    """The last files are those of result.json, and of the merged folder, which has its name when it is complete."""
    asked = classifier(tmp_path, sentences, output={"merge": True})
    write = FinetuneResult.write

    def killed(result, folder):
        if (tmp_path / "run" / "merged").exists():
            raise KeyboardInterrupt
        write(result, folder)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneResult, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(asked)
    with pytest.warns(UserWarning, match="is finished"):
        assert finetune(asked, resume=True).merged == str(tmp_path / "run" / "merged")
    shutil.rmtree(tmp_path / "run" / "merged")  # as if it had been killed before
    assert (tmp_path / "run" / finetune(asked, resume=True).merged / "config.json").is_file()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_run_that_was_stopped_behind_its_last_step_trains_no_step(tmp_path, sentences, length, streaming):
    if streaming and "num_train_epochs" in length:
        return  # a stream has no epochs
    training = length | {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    parts = {"data": {"text": "text", "label": "label", "streaming": streaming}, "training": training}
    asked, run = classifier(tmp_path, sentences, **parts), tmp_path / "run"
    first = finetune(asked)
    (run / "result.json").unlink()
    shutil.rmtree(run / "adapter")
    again = finetune(classifier(tmp_path, sentences, **parts, output={"merge": True}), resume=True)
    assert (again.steps, again.sparsity) == (first.steps, first.sparsity) and Path(again.merged).is_dir()
    assert again.metrics.items() == {k: v for k, v in first.metrics.items() if k != "train_loss"}.items()
    assert not (run / "checkpoint-7").exists() and not any("train_loss" in entry for entry in again.log)
    with pytest.warns(UserWarning, match="is finished"):
        assert finetune(classifier(tmp_path, sentences, **parts, output={"merge": True}), resume=True) == again


def test_a_finished_run_is_merged_or_trained_on_where_more_is_asked_for(tmp_path, sentences):
    first = finetune(classifier(tmp_path, sentences))
    merged = finetune(classifier(tmp_path, sentences, output={"merge": True}), resume=True)
    assert merged.steps == 6 and merged.metrics["eval_loss"] == first.metrics["eval_loss"]
    longer = finetune(classifier(tmp_path, sentences, training={"max_steps": 9}), resume=True)
    assert longer.steps == 9 and longer.resumed_from.endswith("checkpoint-6")
    (tmp_path / "run" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result.json is what a run writes at its end, .*; remove it to go on"):
        finetune(longer_still := classifier(tmp_path, sentences, training={"max_steps": 10}), resume=True)
    (tmp_path / "run" / "result.json").unlink()
    assert finetune(longer_still, resume=True).steps == 10


def test_a_number_that_is_none_is_null_in_the_result(tmp_path, sentences):
    """The correlation with a constant; strict readers of JSON take no NaN."""
    asked = classifier(
        tmp_path, sentences, model={"num_labels": 1, "new_head": True}, data={"text": "text", "label": "score"},
        evaluation={"metrics": ["pearsonr"]},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUNDLED, "pearsonr", (lambda *_: {"pearsonr": math.nan}, True))
        assert math.isnan(finetune(asked).metrics["eval_pearsonr"])
    strict = {"parse_constant": lambda name: pytest.fail(name)}
    written = json.loads((tmp_path / "run" / "result.json").read_text(), **strict)
    assert written["metrics"]["eval_pearsonr"] is None and written["log"][-1]["eval_pearsonr"] is None
    with pytest.warns(UserWarning, match="is finished"):
        assert "nan" in str(finetune(asked, resume=True))


def test_a_plan_trains_and_writes_nothing(tmp_path, sentences):
    plan = plan_finetune(language_model(tmp_path, sentences, output={"merge": True}))
    assert plan["trainable"] > 0 and plan["merges to"].endswith("merged")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"prune": {"method": "magnitude", "pattern": "5:7"}}, "divisible by 7"),
        ({"prune": {"method": "wanda", "calibration": {"length": 4000}}}, "at least one window of length=4000"),
        ({"prune": {"method": "wanda", "calibration": {"length": 100}}}, "fit into the model's context of 64 tokens"),
        ({"prune": {"method": "wanda", "calibration": {"length": 0}}}, "`length` is a positive integer, got 0"),
        ({"prune": {"method": "magnitude", "target_modules": ["q_prj"]}}, "q_prj"),
        ({"training": {"report_to": "foo"}}, "`training`: foo is not supported, only .*tensorboard"),
    ],
)
def test_a_plan_finds_what_a_run_would_find(tmp_path, sentences, parts, message):
    asked = language_model(tmp_path, sentences, **parts)
    for start in (plan_finetune, finetune):
        with pytest.raises(ValueError, match=message):
            start(asked)
    assert not (tmp_path / "run").exists()


def test_a_hub_that_does_not_answer_is_asked_before_pruning(tmp_path, sentences, monkeypatch):
    asked = language_model(tmp_path, sentences, training={"push_to_hub": True, "hub_model_id": "me/x"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for start in (plan_finetune, finetune):
        with pytest.raises(ValueError, match=r"`training.push_to_hub` takes a Hub that answers .* log in with"):
            start(asked)
    assert not (tmp_path / "run").exists()


def tokenizer_of(folder, *special, words=WORDS):
    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special[0] if special else None))
    tokenizer.pre_tokenizer = Whitespace()
    names = {"unk_token": special[0]} if special else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return {"tokenizer": str(folder)}


@pytest.mark.parametrize("make", [language_model, classifier])
def test_a_tokenizer_that_does_not_fit(tmp_path, sentences, make):
    """That cannot pad, and with more tokens than the model; nothing is pruned first."""
    prune = {"method": "magnitude"}
    cannot_pad = make(tmp_path, sentences, model=tokenizer_of(tmp_path / "no_pad"), prune=prune)
    words = [f"x{number}" for number in range(95)] + WORDS
    too_many = make(tmp_path, sentences, model=tokenizer_of(tmp_path / "many", "<unk>", words=words), prune=prune)
    for asked, message in [
        (cannot_pad, r"padded with a tokenizer's pad, eos or unk token, got one without any of them in '.*no_pad'"),
        (too_many, r"from 0 to 95, got 18\d in the training examples, of the tokenizer in '.*many'; name"),
    ]:
        starts = [plan_finetune, finetune]
        for start in (*starts, evaluate_recipe) if make is classifier else starts:
            with pytest.raises(ValueError, match=message.replace("training", "(training|validation)")):
                start(asked)
    assert not (tmp_path / "run").exists()


def test_a_padding_token_that_the_model_has_not(tmp_path, sentences):
    """As of a tokenizer to which one was added, and no row to the model's embeddings. Windows are not padded."""
    asked = classifier(tmp_path, sentences)
    added = AutoTokenizer.from_pretrained(tmp_path / "bert")
    added.add_special_tokens({"pad_token": "[new]"})
    added.save_pretrained(tmp_path / "added")
    with pytest.raises(ValueError, match="from 0 to 95, got 96 in a padded batch"):
        plan_finetune(replace(asked, model=replace(asked.model, tokenizer=str(tmp_path / "added"))))
    windows = language_model(tmp_path, sentences, model={"tokenizer": str(tmp_path / "added")})
    assert plan_finetune(windows)["trainable"] > 0


def test_a_padding_token_that_positions_are_not_counted_from(tmp_path, sentences):
    """Trainer would write the tokenizer's into config.json, and the merged model count its positions from there."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = RobertaForSequenceClassification(RobertaConfig(vocab_size=96, max_position_embeddings=34, **sizes))
    asked = classifier(tmp_path, sentences, base=base)
    for start in (plan_finetune, finetune, evaluate_recipe):
        with pytest.raises(
            ValueError, match=r"the model's padding token, 1, got 0 as that of the tokenizer in .*bert'; n"
        ):
            start(asked)
    assert not (tmp_path / "run").exists()


def test_a_field_that_the_models_config_has_not(tmp_path, sentences):
    asked = classifier(tmp_path, sentences)
    wrong = replace(asked.model, config={"hiden_dropout_prob": 0.1})
    with pytest.raises(ValueError, match=r"got 'hiden_dropout_prob', which .* has not; check"):
        plan_finetune(replace(asked, model=wrong))


def test_an_adapter_is_no_model_to_tune(tmp_path, sentences):
    adapter = tmp_path / "adapter"
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    asked = language_model(tmp_path, sentences, prune=None)
    with pytest.raises(
        ValueError, match=r"got an adapter in `model.path` .*; merge it first, with `peft-sparse merge"
    ):
        plan_finetune(replace(asked, model=replace(asked.model, path=str(adapter))))


def test_what_is_no_causal_language_model_is_not_tuned_as_one(tmp_path, sentences):
    """`model.task` is that by default, and transformers makes one of an encoder, or of a decoder alone."""
    encoder = (
        BertForMaskedLM(tiny_bert().config),
        "got BertLMHeadModel, whose predictions change with the tokens after",
    )
    seq2seq = (
        BartForConditionalGeneration(tiny_bart().config),
        "got BartForCond.*, of which the decoder alone would be",
    )
    for model, rule in (encoder, seq2seq):
        asked = language_model(tmp_path, sentences, base=model, prune=None)
        for start in (plan_finetune, finetune):
            with pytest.raises(ValueError, match=rule):
                start(asked)
        assert not (tmp_path / "run").exists()
    asked = language_model(tmp_path, sentences, base=encoder[0], prune=None, evaluation={"metrics": ["accuracy"]})
    with pytest.raises(ValueError, match=encoder[1]):
        evaluate_recipe(asked)


def test_weights_that_are_no_numbers_are_named_before_training(tmp_path, sentences):
    model = prune_magnitude(tiny_llama(), sparsity=0.5)
    model.model.norm.weight.data[3] = math.nan
    asked = language_model(tmp_path, sentences, base=model, prune=None)
    for start in (plan_finetune, finetune):
        with pytest.raises(ValueError, match=r"got 1 NaN or infinite of 32 in `model.norm.weight`, from which"):
            start(asked)
    assert not (tmp_path / "run").exists()


def test_a_text_without_the_end_that_an_encoder_decoder_classifies_by(tmp_path, sentences):
    for start in (plan_finetune, finetune):
        with pytest.raises(
            ValueError, match=r"output at a text's end token, 2, got a tokenizer in '.*bert' that writes"
        ):
            start(classifier(tmp_path, sentences, base=tiny_bart().model))
    assert not (tmp_path / "run").exists()
