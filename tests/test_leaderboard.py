"""The leaderboard: the search, the store and its claims, each row on a tiny model, and the command from runs to table.

The models are random and the texts made up here, so nothing is needed from `shared/`.
"""

import csv
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from benchmarks.leaderboard import (
    __main__ as command,
)
from benchmarks.leaderboard import (
    encoders,
    language,
    methods,
    metrics,
    nlg,
    overview,
    parts,
    plan,
    pst_methods,
    render,
    runs,
    search,
    settings,
    store,
    summary,
    training,
    tuned,
    variants,
    who_wins,
    zeroshot,
)
from benchmarks.leaderboard.settings import FINAL, SEARCH, Budget
from peft_sparse import prune_magnitude, sparsity_report
from peft_sparse.linears import block_linears, get_weight

import models

SMOKE = Budget("smoke", 5, 2, 16, 2, 2, 3, zeroshot_rows=2, calibration_rows=2)
CPU = torch.device("cpu")
LETTERS = "\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?[]'-_"


# Fixtures: a tokenizer of characters, data of a few rows


def save_with_tokenizer(model, folder):
    """The model and a tokenizer whose tokens are characters."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary = special | {letter: 4 + index for index, letter in enumerate(LETTERS)}
    assert len(vocabulary) <= models.VOCAB_SIZE
    tokenizer = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Laid out as shared/data."""
    folder = tmp_path_factory.mktemp("data")
    text = "the quick brown fox jumps over the lazy dog. " * 40
    for name in (language.TRAIN_TEXT, language.TEST_TEXT):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    write_rows(folder / language.CALIBRATION, [{"text": text[:200]}] * 6)
    for task in zeroshot.TASKS.values():
        rows = [{"question": "A _ is good.", "choices": ["dog", "fox"], "label": 0}]
        write_rows(folder / task, [*rows, {"question": "what is it?", "choices": ["a", "bcd"], "label": 1}])
    row = {"sentence": "a good dog", "sentence1": "a fox", "sentence2": "a dog"}
    for task in encoders.TASKS:
        rows = [row | {"label": index % 2} for index in range(20)]
        write_rows(folder / "glue" / task / "train.jsonl", rows)
        write_rows(folder / "glue" / task / "dev.jsonl", rows[:6])
    pairs = [{"mr": f"n[{index % 10}]", "ref": "the dog."} for index in range(30)]
    write_rows(folder / "e2e_nlg" / "train.jsonl", pairs)
    write_rows(folder / "e2e_nlg" / "test.jsonl", [{"mr": "n[1]", "refs": ["a dog.", "the dog."]}] * 4)
    return folder


def part_of(cls, model, tmp_path, data, budget=SMOKE):
    folder = save_with_tokenizer(model, tmp_path / "model")
    return cls(folder, data, store.Store(tmp_path / "store"), budget, CPU)


# The search


@given(log_best=st.floats(-9, 1), tries=st.integers(4, 7))
def test_the_search_walks_to_a_best_rate_wherever_it_lies(log_best, tries):
    tried: list = []
    while (rates := search.next_rates(tried, (1e-3,), tries)) is not None:
        assert rates not in [one for one, _ in tried] and rates[0] > 0
        tried.append((rates, abs(math.log(rates[0]) - log_best)))
    assert len(tried) == tries
    best = min(score for _, score in tried)
    start = tried[0][1]
    # Each try but the one in the wrong direction gets closer by the factor, until the best lies inside.
    assert best <= max(start - (tries - 2) * math.log(search.FACTOR), 0.6 * math.log(search.FACTOR))


def test_two_rates_share_the_tries():
    tried: list = []
    while (rates := search.next_rates(tried, (1e-3, 1e-2), 6)) is not None:
        tried.append((rates, abs(math.log(rates[0] / 4e-3)) + abs(math.log(rates[1] / 1e-3))))
    assert [rates[1] for rates, _ in tried[:3]] == [1e-2] * 3
    assert len({rates[0] for rates, _ in tried[3:]}) == 1 and tried[-1][0][1] < 1e-2


def test_a_rate_that_diverges_is_left_downwards():
    assert search.next_rates([((1.0,), math.inf)], (1.0,), 4)[0] < 1
    assert search.next_rates([((1.0,), math.inf), ((0.111,), 2.0)], (1.0,), 4)[0] < 0.111


def test_an_edge_is_told():
    assert search.at_edge([((1.0,), 2.0), ((3.0,), 1.0)])
    assert not search.at_edge([((1.0,), 2.0), ((3.0,), 1.0), ((9.0,), 2.0)])


# The store


def test_a_torn_line_is_dropped_and_the_next_one_is_whole(tmp_path):
    kept = store.Store(tmp_path)
    kept.add({"key": "a"})
    with kept.path.open("ab") as file:
        file.write(b'{"key": "b", "sco')
    assert list(kept.records()) == ["a"]
    kept.add({"key": "c"})
    assert list(store.Store(tmp_path).records()) == ["a", "c"]


def test_a_claim_is_for_one_and_ends_with_its_context(tmp_path):
    first, second = store.Store(tmp_path), store.Store(tmp_path)
    with first.claim("x") as mine, second.claim("x") as theirs:
        assert mine and not theirs
    with second.claim("x") as theirs:
        assert theirs


def _line(seeds=(0, 1), start=(1.0,), budget=SMOKE):
    return plan.Line("causal-lm", "m", "case", "row", start, seeds, budget)


def _log_and_score(folder, trial):
    with (folder / "log").open("a") as file:
        file.write(trial.key + "\n")
    return {"score": abs(math.log(trial.rates[0]))}


def _work(folder, lines):
    plan.work(store.Store(folder), lines, lambda trial: _log_and_score(folder, trial), say=lambda text: None)


def test_two_workers_make_each_run_once(tmp_path):
    lines = [plan.Line("p", "m", "case", str(i), (1.0,), (0, 1, 2), SMOKE) for i in range(6)]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(tmp_path, lines)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    made = (tmp_path / "log").read_text().split()
    assert len(made) == len(set(made)) == len(lines) * (SMOKE.tries + 3) == len(store.Store(tmp_path).records())


def test_work_goes_on_where_it_stopped(tmp_path):
    kept, calls = store.Store(tmp_path), []

    def run(trial):
        calls.append(trial)
        if len(calls) == 3:
            raise ValueError("a bug")
        return {"score": trial.rates[0]}

    with pytest.raises(RuntimeError, match="This run failed: case"):
        plan.work(kept, [_line()], run, say=lambda text: None)
    assert len(kept.records()) == 2
    assert plan.work(kept, [_line()], run, say=lambda text: None) == 2
    assert [trial.stage for trial in calls] == [SEARCH, SEARCH, FINAL, FINAL, FINAL]
    assert plan.work(kept, [_line(seeds=(0, 1, 2))], run, say=lambda text: None) == 1


def test_refusals_and_divergence_are_results(tmp_path):
    kept = store.Store(tmp_path)

    def refuse(trial):
        raise settings.Unsupported("no Conv1D")

    def diverge(trial):
        raise settings.Diverged("nan")

    assert plan.work(kept, [_line()], refuse, say=lambda text: None) == 1
    other = _line(budget=SMOKE.change(steps=9, tries=None))
    plan.work(kept, [other], diverge, say=lambda text: None)
    rows = summary.rows_of([_line(), other], kept.records(), {"row": "Row"}, "perplexity")
    assert [row.status for row in rows] == ["not supported", "2 of 2 seeds diverged"]


def test_final_runs_have_none_of_the_search_s_seed():
    with pytest.raises(SystemExit, match="--seeds"):
        command.main(["--seeds", str(settings.SEARCH_SEED)])


# The rows


@pytest.mark.parametrize(
    "name", [name for name, method in methods.METHODS.items() if method.adapt and not method.dense]
)
def test_a_row_trains_merges_and_keeps_the_zeros(name):
    model = prune_magnitude(models.tiny_llama(), "2:4")
    zeros = {key: get_weight(linear) == 0 for key, linear in block_linears(model).items()}
    ids = torch.randint(3, models.VOCAB_SIZE, (2, 16))
    method = methods.METHODS[name]
    row = method.adapt(model)
    size = sum(parameter.numel() for parameter in row.trainable)
    start = training.outputs(row.model, {"input_ids": ids})
    training.train(row, method.start, [{"input_ids": ids, "labels": ids}], SMOKE, CPU)
    before = training.outputs(row.model, {"input_ids": ids})
    assert (before - start).abs().max() > 1e-4  # it trained
    merged = row.merge()
    difference = (training.outputs(merged, {"input_ids": ids}) - before).abs().max()
    assert not any((get_weight(linear)[zeros[key]] != 0).any() for key, linear in block_linears(merged).items())
    assert (difference < 1e-4) == (name != "lora_remask")
    if name in ("hira", "masked_lora", "supertuning", "lora_remask"):
        own = sum(p.numel() for p in methods.METHODS["spp"].adapt(models.tiny_llama()).trainable)
        assert 0.7 < size / own < 1.1


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_starts_as_the_pruned_model_and_trains(name):
    model = prune_magnitude(models.tiny_llama(), "2:4")
    ids = torch.randint(3, models.VOCAB_SIZE, (2, 16))
    start = training.outputs(model, {"input_ids": ids})
    row = variants.VARIANTS[name].adapt(model)
    batches = [{"input_ids": ids, "labels": ids}] * 2
    row.prepare(batches)
    assert torch.equal(training.outputs(row.model, batches[0]), start)
    groups = row.parameter_groups((1e-2,))
    assert sum(len(group["params"]) for group in groups) == len(row.trainable)
    training.train(row, (1e-2,), batches, SMOKE, CPU)
    assert (training.outputs(row.model, batches[0]) - start).abs().max() > 1e-4


def test_the_start_along_the_gradient_shows_more_of_it():
    model, ids = prune_magnitude(models.tiny_llama(), "2:4"), torch.randint(3, models.VOCAB_SIZE, (2, 16))
    row = variants.VARIANTS["spp_gradient"].adapt(model)
    batches = [{"input_ids": ids, "labels": ids}] * 2
    own = [parameter for name, parameter in row.model.named_parameters() if ".spp_B." in name]

    def shown():
        gradients = torch.autograd.grad(row.model(**batches[0]).loss, own)
        return torch.stack([gradient.norm() for gradient in gradients])

    before = shown()
    row.prepare(batches)
    assert (shown() > 2 * before).float().mean() > 0.9


@pytest.mark.parametrize("name", pst_methods.METHODS)
def test_a_head_with_a_rate_of_its_own_is_in_no_other_group(name):
    method, heads = pst_methods.METHODS[name], ("classifier",)
    row = method.adapt(models.tiny_bert(), pst_methods.Setup(0.5, heads, "SEQ_CLS"))
    row = tuned.with_head_rate(row, heads, 7.0)
    groups = row.parameter_groups((1e-4, 1e-3))
    assert groups[-1]["lr"] == 7.0 and all(group["lr"] < 1 for group in groups[:-1])
    sizes = [parameter.numel() for parameter in groups[-1]["params"]]
    assert sum(sizes) == sum(parameter.numel() for parameter in models.tiny_bert().classifier.parameters())
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in row.trainable)


def test_a_head_has_the_rate_of_the_budget(tmp_path, data):
    def loss(budget, rate):
        part = part_of(encoders.Encoders, models.tiny_bert(), tmp_path / f"{budget.name} {rate}", data, budget)
        (line,) = part.lines(["sst2 75%"], ["dense"], (0,))
        return part.run(line.trial(SEARCH, (rate,), 0))["last_loss"]

    own = SMOKE.change(head_rate=1e-2)
    assert loss(SMOKE, 1e-9) != pytest.approx(loss(own, 1e-9), abs=1e-3)  # only the head moved
    assert loss(SMOKE, 1e-2) == loss(own, 1e-2)


def test_masked_lora_is_the_formula():
    model = prune_magnitude(models.tiny_llama(), "2:4")
    linear = next(iter(block_linears(model).values()))
    weight = linear.weight.detach().clone()
    row = tuned.masked_lora(model, 3, 6.0)
    lora = linear.parametrizations.weight[0]
    torch.nn.init.normal_(lora.B)
    expected = weight + (weight != 0) * 2.0 * (lora.B @ lora.A)
    assert torch.allclose(linear.weight, expected)
    row.merge()
    assert torch.equal(linear.weight, expected) and type(linear) is torch.nn.Linear


def test_super_tuning_says_that_it_refuses_conv1d():
    with pytest.raises(settings.Unsupported, match="Conv1D"):
        methods.METHODS["supertuning"].adapt(prune_magnitude(models.tiny_gpt2(), "2:4"))


@pytest.mark.parametrize("name", [name for name, method in pst_methods.ALL.items() if method.adapt is not None])
def test_a_row_becomes_sparse(name, tmp_path, data):
    budget = SMOKE.change(tuned_first=5) if pst_methods.ALL[name].tuned_first else SMOKE
    part = part_of(encoders.Encoders, models.tiny_bert(), tmp_path, data, budget)
    (line,) = part.lines(["sst2 75%"], [name], (0,))
    found = part.run(line.trial(FINAL, line.start, 0))
    assert found["sparsity"] == pytest.approx(0.0 if name == "dense" else 0.75, abs=2e-3)
    assert found["zeros_lost"] == found["violations"] == 0 and 0 <= found["GLUE metric"] <= 1
    assert (found["merge_difference"] < 1e-4) == (name != "one_shot_after")
    without = {"pst_no_ab": 1, "pst_no_rc": 1, "pst_no_uv": 1}
    if name in without:
        full = part.run(part.lines(["sst2 75%"], ["pst"], (0,))[0].trial(SEARCH, (1e-3, 1e-3), 0))
        assert found["trainable"] < full["trainable"]


@pytest.mark.parametrize("cls", [encoders.Encoders, nlg.Nlg])
def test_rows_that_start_from_a_tuned_model(cls, tmp_path, data):
    """One model for all rows and seeds, which is another than the pretrained one; a teacher changes the loss alone."""
    model = models.tiny_bert() if cls is encoders.Encoders else models.tiny_gpt2()
    part = part_of(cls, model, tmp_path, data, SMOKE.change(tuned_first=5))
    task = part.tasks[0]
    lines = {line.row: line for line in part.lines([f"{task} 50%"], None, (0,))}
    assert lines.keys() == set(pst_methods.METHODS) | {"tuned", "pst_taught", "gradual_taught"}
    assert lines["tuned"].start == () and lines["tuned"].case == f"{task} dense"
    runs = {row: part.run(lines[row].trial(FINAL, lines["pst"].start, 0)) for row in ("tuned", "pst", "pst_taught")}
    again = part.run(lines["pst"].trial(SEARCH, lines["pst"].start, 1))
    plain = part_of(cls, model, tmp_path / "plain", data)
    pretrained = plain.run(plain.lines([f"{task} 50%"], ["pst"], (0,))[0].trial(SEARCH, lines["pst"].start, 0))
    assert {run["fingerprint"] for run in runs.values()} == {again["fingerprint"]} != {pretrained["fingerprint"]}
    assert len(list(part.store.checkpoints.iterdir())) == 1 and not list(plain.store.checkpoints.iterdir())
    assert "last_loss" not in runs["tuned"] and runs["tuned"]["sparsity"] < 0.01 and runs["tuned"]["score"] > 0
    assert runs["pst"]["last_loss"] != runs["pst_taught"]["last_loss"]


def test_a_seed_draws_the_same_batches_for_every_row(tmp_path, data):
    part = part_of(language.CausalLm, models.tiny_llama(), tmp_path, data)
    first, again, other = part.batches(0), part.batches(0), part.batches(1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))
    apart = {tuple(row.tolist()) for row in part._windows[part._num_train :]}
    assert apart and part._num_train + len(part._windows[part._num_train :]) == len(part._windows)


def test_the_first_rates_are_the_tasks_for_ours_and_for_the_rivals(tmp_path, data):
    part = part_of(encoders.Encoders, models.tiny_bert(), tmp_path, data)
    for name, task in encoders.TASKS.items():
        lines = part.lines([f"{name} 50%"], list(pst_methods.METHODS), (0,))
        first = {line.row: line.start for line in lines}
        assert first["pst"] == first["pst_no_ab"] == first["pst_no_rc"] == task.pst_start
        for row in ("one_shot", "gradual", "movement"):
            assert first[row] == ((task.full_start,) if task.full_start else pst_methods.METHODS[row].start)
        for row in ("dense", "one_shot_after", "pst_no_uv"):
            assert first[row] == pst_methods.METHODS[row].start


# Zero-shot and metrics


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_metric_of_a_task_is_that_of_its_examples(batch_size, tmp_path, data, monkeypatch):
    """Whichever batches they are read in."""
    monkeypatch.setattr(encoders, "EVALUATION_BATCH", batch_size)
    part, model = part_of(encoders.Encoders, models.tiny_bert(), tmp_path, data), models.tiny_bert().eval()
    texts = ["a good dog", "a", "the quick brown fox", "the lazy dog jumps", "good fox", "over the dog."]
    with torch.no_grad():
        alone = [model(**part._batch("sst2", [{"sentence": text, "label": 0}])).logits for text in texts]
        shift = torch.cat(alone).mean(0)
        model.classifier.bias -= shift  # else it gives all of them the same label
    rows = [{"sentence": text, "label": int((one - shift).argmax())} for text, one in zip(texts, alone, strict=True)]
    assert {row["label"] for row in rows} == {0, 1}
    monkeypatch.setattr(part, "_rows", lambda task, split: rows)
    assert part.measure("sst2", model, final=True) == {"score": 0.0, "GLUE metric": 1.0}
    rows[2]["label"] = 1 - rows[2]["label"]
    assert part.measure("sst2", model, final=True)["GLUE metric"] == pytest.approx(5 / 6)


def test_log_likelihoods_are_those_of_the_model(tmp_path):
    folder = save_with_tokenizer(models.tiny_llama(), tmp_path)
    model, tokenizer = models.tiny_llama(), PreTrainedTokenizerFast.from_pretrained(folder)
    asked = [zeroshot.Request("a dog", " is good", 8), zeroshot.Request("cat", " b", 1)]
    found = zeroshot.log_likelihoods(model, tokenizer, asked, 64)
    for one, value in zip(asked, found, strict=True):
        ids = tokenizer(one.context + one.continuation, return_tensors="pt")["input_ids"]
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        count = len(one.continuation)
        expected = logs.gather(1, ids[0, 1:, None])[-count:].sum()
        assert value == pytest.approx(expected.item(), abs=1e-4)
    cut = zeroshot.log_likelihoods(model, tokenizer, [zeroshot.Request("a" * 90, " dog", 3)], 64)
    assert math.isfinite(cut[0])


def test_metrics_by_hand():
    predicted, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    assert metrics.accuracy(predicted, labels) == pytest.approx(0.6)
    assert metrics.f1(predicted, labels) == pytest.approx(2 / 3)
    assert metrics.matthews(predicted, labels) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    line = metrics.pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.5]))
    assert line == pytest.approx(4.5 / math.sqrt(2 * 61 / 6))
    assert metrics.pearson(torch.ones(3), torch.ones(3)) == metrics.f1(torch.zeros(2), torch.zeros(2)) == 0.0
    # By hand: 3/4 unigrams, 2/3 bigrams, 1/2 trigrams of "a b c x" against "a b c d"; no 4-gram.
    assert metrics.bleu(["a b c x"], [["a b c d"]], order=3) == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert metrics.bleu(["a b c x"], [["a b c d"]]) == 0.0
    short = metrics.bleu(["a b c d"], [["a b c d e f g h"]])
    assert short == pytest.approx(100 * math.exp(1 - 2))


def test_generation_is_the_greedy_one_of_each_prompt_up_to_the_end_of_its_line(tmp_path):
    folder = save_with_tokenizer(models.tiny_gpt2(), tmp_path)
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(folder), models.tiny_gpt2()
    with torch.no_grad():  # so that it does more than repeat its last token, which is the end of a line
        for linear in block_linears(model).values():
            linear.weight.mul_(20)
    prompts = ["n[1]\n", "a much longer prompt[2]\n", "o\n"]
    lengths = []
    for prompt, text in zip(prompts, nlg.generate(model, tokenizer, prompts), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        limit = models.MAX_LENGTH - ids.shape[1]
        greedy = model.generate(ids, max_new_tokens=limit, do_sample=False, eos_token_id=4)
        assert text == tokenizer.decode(greedy[0, ids.shape[1] :]).split("\n")[0]
        lengths.append(len(text))
    assert len(set(lengths)) > 1


# What the table says


def _row(name, values, case="wanda 2:4"):
    return summary.Row(case, name, name.upper(), values, (1e-3,), False, len(values))


def test_a_loss_is_stated_and_a_difference_within_the_spread_is_none():
    rows = [_row("spp", [10.0, 10.2]), _row("hira", [9.0, 9.1]), _row("ia3", [20.0, 21.0]), _row("full", [10.0, 10.3])]
    found = summary.verdicts(rows, "spp", ["hira", "ia3", "full", "lora"], "lower")
    assert ["LOSES" in found[0], "wins" in found[1], "level" in found[2]] == [True] * 3 and len(found) == 3
    higher = summary.verdicts(rows, "spp", ["hira"], "higher")
    assert "wins" in higher[0]
    alike = summary.verdicts([_row("spp", [0.5, 0.5]), _row("hira", [0.5 - 1e-7] * 2)], "spp", ["hira"], "lower")
    assert "level" in alike[0]  # one answer for all has no spread, but rounding
    single = summary.verdicts([_row("spp", [1.0]), _row("hira", [9.0])], "spp", ["hira"], "lower")
    assert "no verdict" in single[0]


def test_rows_of_several_checkpoints_are_told_apart():
    rows = [_row("spp", [10.0, 10.2]), _row("hira", [9.0, 9.1]), _row("full", [1.0, 2.0], case="wanda 75%")]
    for row in rows:
        row.columns = {"fingerprint": "one"}
    assert render._checkpoints(rows) == []
    rows[1].columns = {"fingerprint": "two"}
    assert render._checkpoints(rows)[0].startswith("Rows of wanda 2:4 start from checkpoints")
    assert "bit for bit: one SPP; two HIRA." in render._checkpoints(rows)[0]


@pytest.fixture
def tables(tmp_path):
    """Two tables as the command writes them, of a task and of the same one at another budget."""
    results = {
        "dense": ("sst2 dense", 0.9, 0.01, 1000), "one_shot": ("sst2 90%", 0.7, 0.01, 1000),
        "gradual": ("sst2 90%", 0.81, 0.02, 1000), "pst": ("sst2 90%", 0.8, 0.01, 100),
        "pst_no_rc": ("sst2 90%", 0.75, 0.001, 95), "pst_no_uv": ("sst2 90%", 0.79, "", 50),
    }  # fmt: skip
    for name, budget in (("", Budget("small", 120, 16, 64, 4, 500, None)), ("-variants", SMOKE)):
        base = tmp_path / f"encoders-tiny-{budget.name}{name}"
        lines = [f"{case},{row},{mean},{spread},{n},{len(row)}" for row, (case, mean, spread, n) in results.items()]
        head = "case,row,mean,spread,trainable,fingerprint"
        base.with_name(f"{base.name}.csv").write_text("\n".join([head, *lines]))
        with base.with_name(f"{base.name}-runs.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["part", "model", "budget"], ["encoders", "tiny", json.dumps(budget.as_dict())]])
    return tmp_path


def test_the_overview_has_what_is_not_beaten_at_as_few_parameters_in_bold(tables):
    page = overview.write(tables).read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|") and "±" in line]
    cells = {row[0]: row[1] for row in rows}
    assert cells["dense fine-tuning"] == "0.9 ± 0.01"
    assert cells["gradual magnitude"] == "**0.81 ± 0.02**" and cells["PST (ours)"] == "**0.8 ± 0.01**"
    assert cells["one-shot magnitude, then tuned"] == "0.7 ± 0.01"  # fewer are better: PST's
    assert cells["PST without R C"] == "0.75 ± 0.001"  # a tenth more is better
    assert "| **0.79** |" in page  # a single seed beats nothing and is not beaten
    assert "[sst2 90%](encoders-tiny-small.md) †<br>accuracy, 120 steps" in page  # fingerprints differ
    assert page.count("[sst2 90%]") == 1  # not that of the named table
    assert "| PST (ours) | 1 / 0 / 0 | 0 / 1 / 0 | 1 / 0 / 0 | 0 / 0 / 0 |" in page


def test_the_overview_in_the_repository_is_that_of_the_tables_beside_it(tmp_path):
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "leaderboard"
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / overview.PAGE).unlink()
    assert overview.write(copy).read_text() == (folder / overview.PAGE).read_text()


def test_a_folder_without_tables_has_no_overview(tmp_path):
    assert overview.write(tmp_path) is None


def test_who_wins_is_counted_from_the_tables(tables):
    page = tables / "README.md"
    page.write_text("Above.\n\n<!-- who wins: PST -->\nstale\n<!-- end -->\n\nBelow.\n")
    assert who_wins.write(tables) == page
    text = page.read_text()
    assert text.startswith("Above.") and text.endswith("<!-- end -->\n\nBelow.\n") and "stale" not in text
    rivals = "one-shot magnitude, then tuned | gradual magnitude"
    assert f"| | {rivals} |" in text  # no result of the other two
    row = "| [tiny, SST-2 90%, one rate for head and weights](encoders-tiny-small.md) | wins by 0.1 | level |"
    assert row in text and text.count("[tiny") == 1
    for path in tables.glob("encoders-tiny-smoke-variants*.csv"):  # of a few steps, which mean nothing
        shutil.copyfile(path, tables / path.name.replace("-variants", ""))
    who_wins.write(tables)
    assert page.read_text() == text


def test_who_wins_needs_both_marks_and_leaves_other_pages_alone(tables):
    assert who_wins.write(tables) is None
    page = tables / "README.md"
    for text in ("Another page.\n", "<!-- who wins: SPP -->\nno table of that part\n<!-- end -->\n"):
        page.write_text(text)
        who_wins.write(tables)
        assert page.read_text() == text
    for rest in ("", "text\n<!-- who wins: SPP -->\n<!-- end -->\n"):
        page.write_text("<!-- who wins: PST -->\n" + rest)
        with pytest.raises(ValueError, match=r"between <!-- who wins: PST --> and <!-- end -->, got no second"):
            who_wins.write(tables)


def test_who_wins_in_the_repository_is_that_of_the_tables_beside_it(tmp_path):
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "leaderboard"
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    text = who_wins.write(copy).read_text()
    assert text == (folder / who_wins.PAGE).read_text()
    assert text.count("<!-- who wins: ") == text.count(who_wins.END) == 2
    cases = [line.partition("](")[0] for line in text.splitlines() if line.startswith("| [")]
    assert len(cases) > 10 and len(set(cases)) == len(cases)


# The command


def command_line(tmp_path, data, model, *options):
    argv = ["--budget", "smoke", "--seeds", "0", "1", "--device", "cpu", "--threads", "1"]
    argv += ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "out"), "--data", str(data)]
    return [*argv, "--model", str(model), *options]


def run_command(tmp_path, data, model, *options):
    return command.main(command_line(tmp_path, data, model, *options))


def test_a_model_that_takes_hours_has_a_small_budget_of_its_own(tmp_path, data, monkeypatch):
    monkeypatch.setattr(parts.models, "DEMO_MODEL", tmp_path)

    def budget(model, *options):
        argv = command_line(tmp_path, data, model, "--part", "causal-lm", *options)
        ((part, _),) = parts.make(command.options().parse_args(argv), store.Store(tmp_path / "store"))
        return part.budget

    small, budgets = ("--budget", "small"), parts.BUDGETS["causal-lm"]
    assert budget("smollm2-135m", *small) == budgets["small"].change(steps=50, tries=3)
    assert budget("smollm2-135m", *small, "--steps", "60") == budgets["small"].change(steps=60, tries=3)
    assert budget("smollm2-135m") == budgets["smoke"]
    assert budget(tmp_path, *small) == budgets["small"]


def test_gradients_are_clipped_at_what_the_budget_says():
    def moved(budget):
        model = _Loss()
        step = training.Step(tuned.Tuned(model, lambda: model), (1.0,), [{"x": torch.ones(4)}], budget)
        step.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # whose steps are as long as the gradient
        step()
        return model.weight.item()

    assert moved(SMOKE) == pytest.approx(-1.0)
    assert moved(SMOKE.change(clip=1e-3)) == pytest.approx(-1e-3, rel=1e-2)
    assert SMOKE.change(clip=0.1).name == "smoke-clip0.1" and SMOKE.change(clip=1.0) is SMOKE
    with pytest.raises(SystemExit, match="--clip is above 0, got 0"):
        SMOKE.change(clip=0.0)


class _Loss(torch.nn.Module):
    """A model with a `loss`, as those of transformers have it; its gradient is 4 long."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return SimpleNamespace(loss=(self.weight * x).sum())


def test_a_budget_without_a_head_rate_has_the_name_that_it_had(tmp_path, data):
    line = _line()
    trial = line.trial(FINAL, (1.0,), 0)
    assert not {"head_rate", "clip", "tuned_first"} & trial.record()["budget"].keys()
    assert trial.key == "0946858e167841f83867"
    own = line.budget.change(head_rate=1.5e-3)
    assert own.name == "smoke-headrate0.0015"
    assert _line(budget=own).trial(FINAL, (1.0,), 0).record()["budget"]["head_rate"] == 1.5e-3

    def budget(*options):
        argv = command_line(tmp_path, data, tmp_path, *options)
        ((part, _),) = parts.make(command.options().parse_args(argv), store.Store(tmp_path / "store"))
        return part.budget

    small = parts.BUDGETS["encoders"]["small"]
    assert budget("--part", "encoders", "--budget", "small", "--cases", "sst2 50%", "--head-rate", "0") == small
    for options, words in (
        (("nlg", "--head-rate", "1e-3"), "encoders"),
        (("encoders", "--head-rate", "-1"), "at least 0"),
    ):
        with pytest.raises(SystemExit, match=words):
            budget("--part", *options)


def test_a_task_has_a_small_budget_of_its_own_and_tasks_of_one_budget_a_table(tmp_path, data):
    def made(*options):
        argv = command_line(tmp_path, data, tmp_path, "--part", "encoders", *options)
        return [
            (part.budget, cases)
            for part, cases in parts.make(command.options().parse_args(argv), store.Store(tmp_path / "store"))
        ]

    budget = parts.BUDGETS["encoders"]["small"]
    whole = made("--budget", "small")
    cases = [case for _, several in whole for case in several]
    assert sorted(cases) == sorted(f"{task} {share}" for task in encoders.TASKS for share in ("50%", "90%"))
    assert len({budget.name for budget, _ in whole}) == len(whole)  # the name of the table's file
    for own, several in whole:
        assert all(own == budget.change(**encoders.TASKS[case.partition(" ")[0]].small) for case in several)
    assert made("--budget", "small", "--cases", "sst2 75%") == [(budget.change(head_rate=1.5e-3), ("sst2 75%",))]
    assert made("--budget", "small", "--cases", "stsb 50%", "--head-rate", "0.1", "--steps", "9", "--tries", "2") == [
        (budget.change(head_rate=0.1, steps=9, tries=2), ("stsb 50%",))
    ]
    tuned = made("--budget", "small", "--cases", "sst2 50%", "cola 50%", "rte 50%", "--tuned-first", "300")
    assert tuned == [
        (budget.change(tuned_first=300), ("sst2 50%", "cola 50%")),
        (budget.change(tuned_first=300, length=128), ("rte 50%",)),
    ]
    assert made("--budget", "smoke", "--cases", "rte 50%", "sst2 50%") == [
        (parts.BUDGETS["encoders"]["smoke"], ("rte 50%", "sst2 50%"))
    ]


def test_the_command_makes_tables_and_runs_nothing_twice(tmp_path, data, capsys):
    folder = save_with_tokenizer(models.tiny_llama(), tmp_path / "tiny")
    options = ("--part", "causal-lm", "--cases", "wanda 2:4", "--rows", "dense", "pruned", "spp", "lora_remask")
    assert run_command(tmp_path, data, folder, *options) == 0
    records = store.Store(tmp_path / "store").records()
    assert len(records) == 2 + 2 * (parts.BUDGETS["causal-lm"]["smoke"].tries + 2)
    finals = [record for record in records.values() if record["stage"] == FINAL and record["case"] != "dense"]
    assert len({record["fingerprint"] for record in finals}) == 1  # one checkpoint for all rows
    assert all(record["zeros_lost"] == 0 and record["sparsity"] == 0.5 for record in finals)
    assert {record["commit"] for record in records.values()} and all(record["seed"] < 2 for record in finals)
    text = (tmp_path / "out" / "causal-lm-tiny-smoke.md").read_text()
    assert "SPP r=16 (ours)" in text and "zero-shot accuracy" in text and "Ours loses beyond the spread" in text
    assert (tmp_path / "out" / "causal-lm-tiny-smoke.csv").read_text().count("\n") == 5
    page = (tmp_path / "out" / "overview.md").read_text()
    assert "[wanda 2:4](causal-lm-tiny-smoke.md)<br>6 steps" in page and "SPP r=16 (ours)" in page
    listed = (tmp_path / "out" / "causal-lm-tiny-smoke-runs.csv").read_text()
    assert listed.count("\n") == len(records) + 1
    assert run_command(tmp_path, data, folder, *options) == 0
    assert len(store.Store(tmp_path / "store").records()) == len(records)
    capsys.readouterr()
    assert run_command(tmp_path, data, folder, *options, "--list") == 0
    assert capsys.readouterr().out == ""


def test_a_row_with_a_teacher(tmp_path, data):
    """The same start, batches and rate, another loss; one teacher for each seed, the dense model tuned."""
    folder = save_with_tokenizer(models.tiny_llama(), tmp_path / "tiny")
    rows = ("spp_swapped", "spp_swapped_taught")
    assert run_command(tmp_path, data, folder, "--part", "causal-lm", "--cases", "wanda 2:4", "--rows", *rows) == 0
    kept = store.Store(tmp_path / "store")
    runs = {(record["row"], *record["rates"], record["seed"]): record for record in kept.records().values()}
    plain, taught = ({run[1:]: record for run, record in runs.items() if run[0] == row} for row in rows)
    both = plain.keys() & taught.keys()
    assert both and all(plain[run]["last_loss"] != taught[run]["last_loss"] for run in both)
    assert all(record["status"] == "done" and record.get("zeros_lost", 0) == 0 for record in taught.values())
    teachers = sorted(path.name for path in kept.checkpoints.glob("tiny-teacher-*"))
    assert [name.rpartition("-")[2] for name in teachers] == ["0", "1", "1234"]
    assert sparsity_report(str(kept.checkpoints / teachers[0])).total_sparsity < 0.01


def test_a_fresh_clone_goes_on_from_the_runs_beside_the_tables(tmp_path, data, capsys):
    folder = save_with_tokenizer(models.tiny_llama(), tmp_path / "tiny")
    options = ("--part", "causal-lm", "--cases", "wanda 2:4", "--rows", "pruned", "spp")
    assert run_command(tmp_path, data, folder, *options) == 0
    made = store.Store(tmp_path / "store").records()
    table = (tmp_path / "out" / "causal-lm-tiny-smoke.md").read_text()
    (tmp_path / "store" / "trials.jsonl").unlink()
    capsys.readouterr()
    assert run_command(tmp_path, data, folder, *options, "--restore") == 0
    said = capsys.readouterr().out
    assert f"{len(made)} runs taken over" in said and "seed" not in said.splitlines()[1]  # and none was made
    restored = store.Store(tmp_path / "store").records()
    assert list(restored) == list(made)
    for key, record in made.items():
        assert restored[key]["score"] == pytest.approx(record["score"], rel=1e-5)
        assert {name: restored[key][name] for name in (*runs.OWN, "commit", "fingerprint")} == {
            name: json.loads(json.dumps(record[name])) for name in (*runs.OWN, "commit", "fingerprint")
        }
    assert (tmp_path / "out" / "causal-lm-tiny-smoke.md").read_text() == table
    path = tmp_path / "out" / "causal-lm-tiny-smoke-runs.csv"
    path.write_text(path.read_text().replace(",spp,", ",hira,"))
    with pytest.raises(SystemExit, match="The key of a run is made from its settings, got"):
        runs.restore(path, store.Store(tmp_path / "other"))


@pytest.mark.slow
def test_several_workers_from_the_command(tmp_path, data):
    """In a process of its own: workers are started anew, and have to find what they are to do."""
    folder = save_with_tokenizer(models.tiny_llama(), tmp_path / "tiny")
    options = ("--part", "causal-lm", "--cases", "wanda 2:4", "--rows", "pruned", "spp", "--workers", "2")
    subprocess.run(
        [sys.executable, "-m", "benchmarks.leaderboard", *command_line(tmp_path, data, folder, *options)],
        cwd=Path(__file__).parents[1], check=True, timeout=300,
    )  # fmt: skip
    records = store.Store(tmp_path / "store").records()
    assert len(records) == 1 + parts.BUDGETS["causal-lm"]["smoke"].tries + 2
    assert "SPP r=16 (ours)" in (tmp_path / "out" / "causal-lm-tiny-smoke.md").read_text()


def test_tuned_first_from_the_command(tmp_path, data):
    folder = save_with_tokenizer(models.tiny_bert(), tmp_path / "tiny")
    options = ("--part", "encoders", "--cases", "cola 50%", "--rows", "tuned", "pst", "--tuned-first", "4")
    assert run_command(tmp_path, data, folder, *options) == 0
    text = (tmp_path / "out" / "encoders-tiny-smoke-tunedfirst4.md").read_text()
    assert "tuned for 4 steps before" in text and "| the dense model that all start from |" in text
    assert "from a tuned dense model" in (tmp_path / "out" / "overview.md").read_text()


def test_nlg_from_the_command(tmp_path, data):
    folder = save_with_tokenizer(models.tiny_gpt2(), tmp_path / "tiny")
    assert run_command(tmp_path, data, folder, "--part", "nlg", "--cases", "e2e 50%", "--rows", "dense", "pst") == 0
    text = (tmp_path / "out" / "nlg-tiny-smoke.md").read_text()
    assert "PST (ours)" in text and "BLEU" in text and "50.0" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "causal-lm", "--cases", "wonda 2:4"], "A case is"),
        (["--part", "causal-lm", "--rows", "sppp"], "A row of causal-lm is"),
        (["--part", "nlg", "--cases", "e2e 190%"], "A case is"),
        (["--part", "encoders", "--rows", "spp"], "A row of encoders is"),
        (["--part", "causal-lm", "--steps", "2"], "more than 3 steps"),
        (["--part", "causal-lm", "--tuned-first", "9"], "whose rows make a dense model sparse, got causal-lm"),
        (["--part", "nlg", "--tuned-first", "-1"], "--tuned-first is at least 0"),
        (["--part", "nlg", "--tuned-first", "2"], "more than 3 steps, .* got 2"),
        (["--part", "nlg", "--rows", "pst_taught"], "give --tuned-first STEPS"),
        (["--part", "causal-lm", "--tries", "0"], "--tries is at least 1"),
        (["--part", "causal-lm", "nlg"], "--model is for one part"),
        (["--part", "nlg", "--device", "tpv"], "--device is one that torch knows, .* got tpv"),
    ],
)
def test_what_there_is_not_is_refused(tmp_path, data, options, message):
    folder = save_with_tokenizer(models.tiny_gpt2(), tmp_path / "tiny")
    with pytest.raises(SystemExit, match=message):
        run_command(tmp_path, data, folder, *options)


def test_an_interrupt_says_that_the_same_command_goes_on(tmp_path, data, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "make_runs", interrupted)
    folder = save_with_tokenizer(models.tiny_gpt2(), tmp_path / "tiny")
    assert run_command(tmp_path, data, folder, "--part", "nlg", "--cases", "e2e 50%", "--rows", "dense") == 130
    assert "finished runs are kept, and the same command makes the others" in capsys.readouterr().err


def test_minilm_as_a_roberta_is_exact(tmp_path):
    bert = models.tiny_bert()
    folder = save_with_tokenizer(bert, tmp_path / "bert")
    roberta = encoders.relabel_as_roberta(folder, tmp_path / "roberta")
    ids = torch.randint(4, models.VOCAB_SIZE, (2, 9))
    from transformers import AutoModel

    first, second = AutoModel.from_pretrained(folder).eval(), AutoModel.from_pretrained(roberta).eval()
    assert type(second).__name__ == "RobertaModel"
    difference = first(input_ids=ids).last_hidden_state - second(input_ids=ids).last_hidden_state
    assert difference.abs().max() < 1e-6
