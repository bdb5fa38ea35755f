"""Metrics of a run: a language model's loss and perplexity are those of its tokens, however rows share batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from peft_sparse.checkpoint import merge_checkpoint
from peft_sparse.evaluation.metrics import BUNDLED, compares_numbers, load_metric
from peft_sparse.training import evaluate_recipe, finetune, plan_finetune
from peft_sparse.training.metrics import IGNORED, Metrics, other_outputs, row_sums

from models import VOCAB_SIZE, WORDS, tiny_llama
from recipes import classifier, language_model, write_rows

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DATA = {"prompt": "{prompt}", "completion": "{completion}"}


@pytest.fixture
def completions(tmp_path):
    """Of 1 to 9 words."""
    rows = [{"prompt": WORDS[n], "completion": " ".join(WORDS[n + 1 : n + 2 + n % 9])} for n in range(20)]
    return write_rows(tmp_path / "completions.jsonl", rows)


def mean_loss(model, rows):
    """Token by token."""
    losses = []
    for ids, labels in rows:
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logits[t - 1, labels[t]].item() for t in range(1, len(ids)) if labels[t] != IGNORED]
    return sum(losses) / len(losses)


rows_of_labels = st.lists(
    st.lists(st.integers(0, 4) | st.just(IGNORED), min_size=5, max_size=5), min_size=1, max_size=6
)


@given(rows_of_labels, st.integers(1, 5))
def test_batches_do_not_matter(rows, size):
    labels = torch.tensor(rows)
    logits = torch.randn(*labels.shape, 5, generator=torch.Generator().manual_seed(0))
    metrics, found = Metrics({}, language_model=True), []
    for batch in (size, len(rows)):
        pieces = zip(logits.split(batch), labels.split(batch), strict=True)
        sums = torch.cat([metrics.kept(*piece) for piece in pieces]).numpy()
        found.append(metrics(EvalPrediction(sums, labels.numpy())))
    assert found[0] == pytest.approx(found[1], nan_ok=True)
    targets = labels[:, 1:].reshape(-1)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 5), targets, ignore_index=IGNORED).item()
    assert found[0]["loss"] == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert found[0]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4, nan_ok=True)


def test_a_perplexity_beyond_all_numbers():
    labels = torch.tensor([[0, 1]])
    sums = row_sums(torch.tensor([[[1000.0, 0.0], [0.0, 0.0]]]), labels).numpy()
    assert Metrics({}, language_model=True)(EvalPrediction(sums, labels.numpy()))["perplexity"] == math.inf


def test_perplexity_of_completions_of_unlike_lengths(tmp_path, completions):
    asked = language_model(tmp_path, completions, prune=None, data=DATA)
    number = {word: index + 4 for index, word in enumerate(WORDS)}
    rows = []
    for n in range(20):
        ids = [number[WORDS[n]], *(number[word] for word in WORDS[n + 1 : n + 2 + n % 9]), 2]
        rows.append((ids, [IGNORED, *ids[1:]]))
    expected = mean_loss(tiny_llama(), rows)
    for size in (1, 3, 64):
        found = evaluate_recipe(asked, batch_size=size, progress=False)
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_a_run_reports_and_chooses_by_the_same_numbers(tmp_path, completions):
    training = {
        "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 3, "load_best_model_at_end": True,
        "metric_for_best_model": "perplexity", "label_smoothing_factor": 0.1,
    }  # fmt: skip
    asked = language_model(
        tmp_path, completions, adapter={"method": "pst"}, prune=None, data=DATA, training=training,
        evaluation={"metrics": ["accuracy"]},
    )  # fmt: skip
    metrics = finetune(asked).metrics
    measured = evaluate_recipe(asked, tmp_path / "run" / "adapter", batch_size=20, progress=False)
    assert metrics["eval_loss"] == pytest.approx(measured["loss"], rel=1e-4)
    assert metrics["eval_perplexity"] == pytest.approx(measured["perplexity"], rel=1e-4)
    assert metrics["eval_accuracy"] == measured["accuracy"]


@pytest.mark.parametrize("kind", ["mamba", "mixtral"])
def test_what_a_model_returns_beside_its_logits_is_not_kept(tmp_path, completions, kind):
    """A cache that is no tensor; a router's loss, which comes before the logits and is no part of a perplexity."""
    if kind == "mamba":
        base = MambaForCausalLM(
            MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=2)
        )
    else:
        config = MixtralConfig(
            vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2, output_router_logits=True, router_aux_loss_coef=0.5,
        )  # fmt: skip
        base = MixtralForCausalLM(config)
    asked = language_model(tmp_path, completions, base=base, prune=None, data=DATA)
    whole = [evaluate_recipe(asked, batch_size=size, progress=False)["perplexity"] for size in (1, 20)]
    assert whole[0] == pytest.approx(whole[1], rel=1e-4) and whole[0] < 2 * VOCAB_SIZE
    caches = [{"cache_params", "past_key_values"}, {"cache"}]  # of transformers until 5.23, and from 5.24
    assert {"aux_loss", "router_logits"} <= set(other_outputs()) and any(c <= set(other_outputs()) for c in caches)
    assert not {"logits", "loss"} & set(other_outputs())


@pytest.mark.parametrize("token", [None, 9], ids=["none", "a word"])
def test_a_decoder_classifies_padded_rows_as_it_was_trained_to(tmp_path, token):
    """It reads the last token that is no padding, of which its base's config.json has none, or another token's id."""
    texts = [" ".join(WORDS[n + k] for k in range(1 + n % 5)) for n in range(20)]
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(texts)])
    base = tiny_llama()
    base.config.pad_token_id = token
    result = finetune(asked := classifier(tmp_path, rows, base=base, output={"merge": True}))
    merge_checkpoint(result.adapter, tmp_path / "merged")
    for path in (result.adapter, result.merged, tmp_path / "merged"):
        measured = evaluate_recipe(asked, path, progress=False)
        assert measured["loss"] == pytest.approx(result.metrics["eval_loss"], abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def _two_classes_only(predictions, references):
    if max(references) > 1:
        raise ValueError("Target is multiclass but average='binary'")
    return {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda *_: {"per_class": [0.5, 0.25]}, r"gives one number under each .* \[0.5, 0.25\] as 'per_class'"),
        (_two_classes_only, "multiclass but average='binary'"),
    ],
)
def test_a_metric_that_does_not_fit_is_found_before_training(tmp_path, sentences, compute, message):
    """Its error would end the run behind its last step."""
    metric = {"model": {"num_labels": 3, "new_head": True}, "evaluation": {"metrics": ["accuracy"]}}
    asked = classifier(tmp_path, sentences, prune={"method": "magnitude"}, **metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUNDLED, "accuracy", (compute, False))
        for start in (plan_finetune, finetune):
            with pytest.raises(ValueError, match=f"got 'accuracy', which fails on a try .*{message}"):
                start(asked)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", BUNDLED)
def test_every_metric_of_ours_passes_its_try(name):
    metrics = {name: load_metric(name)}
    for outputs in (1,) if compares_numbers(name) else (2, 3, 20):
        Metrics(metrics, language_model=False).check(outputs)
    if not compares_numbers(name):
        Metrics(metrics, language_model=True).check(2)


def test_the_adapter_is_saved_before_what_may_fail(tmp_path, sentences):
    """A metric that fails on the real predictions, in a run that keeps no checkpoint."""
    asked = classifier(tmp_path, sentences, training={"save_strategy": "no"}, evaluation={"metrics": ["accuracy"]})

    def fails(predictions, _):
        if len(predictions) > 2:
            raise ArithmeticError("no number")
        return {"accuracy": 1.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUNDLED, "accuracy", (fails, False))
        with pytest.raises(ArithmeticError, match="no number"):
            finetune(asked)
    adapter = tmp_path / "run" / "adapter"
    assert 0 <= evaluate_recipe(asked, adapter)["accuracy"] <= 1
