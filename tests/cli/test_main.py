"""The command line as a new user meets it: help, each command from end to end, `--json`, errors, exit statuses."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from peft_sparse import PstConfig, SppConfig, load_sparse, perplexity, prune_magnitude, save_sparse, sparsity_report
from peft_sparse.cli.main import DONE, FAILED, INTERRUPTED, USAGE, main, make_parser

from models import WORDS, save_with_tokenizer, tiny_bart, tiny_bert, tiny_gpt2, tiny_llama

pytest.importorskip("datasets")
ROOT = Path(__file__).resolve().parents[2]
TINY = ["--data", "TEXT", "--num-sequences", "2", "--length", "8"]
COMMANDS = ("prune", "finetune", "merge", "evaluate", "report", "verify", "pack", "unpack")


@pytest.fixture
def llama(tmp_path):
    return save_with_tokenizer(tiny_llama(), tmp_path / "llama")


@pytest.fixture
def pruned(tmp_path):
    return save_with_tokenizer(prune_magnitude(tiny_llama(), "2:4"), tmp_path / "pruned")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(WORDS[(3 * i + 7 * j) % 90] for j in range(30)) for i in range(30)))
    return str(path)


@pytest.fixture
def cli(capsys):
    """Runs a command; returns (status, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


# Help and the command line itself


def test_help_lists_the_commands_and_what_exit_statuses_mean(cli):
    status, out, _ = cli("--help")
    assert status == DONE
    assert all(re.search(rf"^ +{command} ", out, re.MULTILINE) for command in COMMANDS)
    assert "exit status:" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_that_parse(command, cli):
    status, out, _ = cli(command, "--help")
    assert status == DONE and "--json" in out and "--traceback" in out
    examples = out.split("examples:")[1].replace("\\\n", " ")
    found = [line.split("peft_sparse ")[-1].split("peft-sparse ")[-1] for line in examples.splitlines()
             if "peft" in line and command in line and not line.startswith("`")]  # fmt: skip
    lines = [re.split(r"   |[|]|&&", line)[0].split() for line in found if line.startswith(command)]
    assert lines
    for words in lines:
        make_parser().parse_args([word for word in words if word != "\\"])
    assert all((ROOT / name).is_file() for name in re.findall(r"configs/\S+\.yaml", out))


def test_writers_have_a_dry_run():
    for command in ("prune", "finetune", "merge", "pack", "unpack"):
        options = ["a.yaml"] if command == "finetune" else ["a", "b"]
        assert make_parser().parse_args([command, *options, "--dry-run"]).dry_run


def test_report_draws_a_picture(pruned, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["report", str(pruned), "--plot", str(tmp_path / "sparsity.png")]) == 0
    assert (tmp_path / "sparsity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments", [[], ["bogus"], ["prune"], ["report"], ["prune", "a", "b", "--num-sequences", "0"]]
)
def test_a_wrong_command_line(arguments, cli):
    assert cli(*arguments)[0] == USAGE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["prune", "a", "b", "--patern", "2:4"],
            "there is no '--patern', did you mean --pattern?; `peft-sparse prune -",
        ),
        (["prune", "--patern", "2:4"], "there is no '--patern', did you mean --pattern?; `peft-sparse prune -"),
        (["--vresion", "report"], "there is no '--vresion', did you mean --version?; `peft-sparse --help`"),
        (["verify", "a", "--refrence=b"], "there is no '--refrence=b', did you mean --reference?"),
        (["report", "a", "b"], "there is no 'b'; `peft-sparse report --help`"),
        (
            ["finetune", "--resume", "r.yaml"],
            "should be a checkpoint's folder, got 'r.yaml'; put the recipe before it",
        ),
        (["prune", "a", "b", "--sparsity", "half"], "argument --sparsity: invalid float value: 'half'"),
    ],
)
def test_a_wrong_command_line_is_one_line_by_the_command_that_was_asked_for(arguments, said, cli):
    status, out, err = cli(*arguments)
    assert status == USAGE and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and said in err


def test_help_needs_neither_torch_nor_transformers():
    """As the console script runs it; also that pyproject.toml names it."""
    module, function = re.search(r'^peft-sparse = "(\w+):(\w+)"', (ROOT / "pyproject.toml").read_text(), re.M).groups()
    code = f"import sys; sys.argv = ['peft-sparse', 'prune', '--help']\nfrom {module} import {function}\n"
    code += (
        f"status = {function}()\nassert not {{'torch', 'transformers', 'peft'}} & sys.modules.keys()\nsys.exit(status)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "--pattern" in run.stdout


def test_the_console_script_runs_a_command(pruned):
    """Parsed without the package, which is imported afterwards: PST and SPP are registered then as ever."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    for module in ("peft_sparse_cli", "peft_sparse"):
        command = [sys.executable, "-m", module, "report", pruned, "--json"]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["pattern"] == "2:4"


def test_a_name_that_the_terminal_cannot_write(pruned, monkeypatch):
    """The work is done by then: the exit status says so."""
    model = Path(pruned).rename(Path(pruned).with_name("pr\xfcned"))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["pack", str(model), str(model.with_name("packed"))]) == DONE
    assert rb"pr\xfcned: packed" in written.getvalue()


# Commands


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "ria"])
def test_prune(method, cli, llama, text, tmp_path):
    data = [] if method == "magnitude" else ["--data", text, "--num-sequences", "4", "--length", "16"]
    arguments = ["prune", llama, tmp_path / "out", "--method", method, "--pattern", "2:4", *data, "--json"]
    status, out, _ = cli(*arguments, "--dry-run")
    planned = json.loads(out)
    assert status == DONE and not planned["written"] and not (tmp_path / "out").exists()
    status, out, _ = cli(*arguments)
    result = json.loads(out)
    assert status == DONE and result["written"] and result["pattern"] == "2:4"
    assert result["zeros"] == planned["zeros"] == sparsity_report(tmp_path / "out").total_zeros
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert cli("verify", tmp_path / "out", "--pattern", "2:4")[0] == DONE


def test_prune_plans_what_rows_and_names_give(cli, llama, text, tmp_path):
    arguments = ["prune", llama, tmp_path / "out", "--sparsity", "0.3", "--data", text, "--length", "16", "--json"]
    arguments += ["--exclude-modules", "down_proj", "--num-sequences", "2"]
    planned = json.loads(cli(*arguments, "--dry-run")[1])
    result = json.loads(cli(*arguments, "--pack")[1])
    assert planned["zeros"] == result["zeros"] > 0
    assert load_sparse(tmp_path / "out").config.model_type == "llama"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "ria", "magnitude"])
@pytest.mark.parametrize("sparsity", ["0.2", "0.7"])
def test_a_plan_counts_the_zeros_that_are_there(method, sparsity, cli, pruned, text, tmp_path):
    """Half of the weights, by 2:4."""
    data = [] if method == "magnitude" else ["--data", text, "--num-sequences", "4", "--length", "16"]
    arguments = ["prune", pruned, tmp_path / "out", "--method", method, "--sparsity", sparsity, *data, "--json"]
    planned, done = (json.loads(cli(*arguments, *more)[1]) for more in (["--dry-run"], []))
    assert planned["zeros"] == done["zeros"] and planned["sparsity"] >= 0.5


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "ria"])
def test_a_plan_knows_its_checkpoints(method, cli, llama, text, tmp_path):
    data = ["--data", text, "--num-sequences", "2", "--length", "16", "--checkpoint-dir", tmp_path / "ck"]
    assert cli("prune", llama, tmp_path / "out", "--method", method, *data, "--dry-run")[0] == DONE
    assert not (tmp_path / "ck").exists()
    assert cli("prune", llama, tmp_path / "out", "--method", method, *data)[0] == DONE
    assert cli("prune", llama, tmp_path / "again", "--method", method, *data, "--dry-run")[0] == DONE
    status, _, err = cli("prune", llama, tmp_path / "new", "--method", method, *data, "--sparsity", "0.6", "--dry-run")
    assert status == FAILED and "continues the run that it was made by" in err


def test_prune_tells_the_errors_that_it_measured(cli, llama, text, tmp_path):
    data = ["--data", text, "--num-sequences", "2", "--length", "16"]
    result = json.loads(cli("prune", llama, tmp_path / "a", *data, "--measure-error", "--json")[1])
    errors = [layer.error for layer in sparsity_report(tmp_path / "a").layers]
    assert result["output_errors"] == [min(errors), max(errors)] and min(errors) > 0
    assert f"{max(errors):.3f} of the outputs" in cli("prune", llama, tmp_path / "b", *data, "--measure-error")[1]
    assert "\nerrors" not in cli("prune", llama, tmp_path / "c", *data)[1]


def test_calibration_of_an_encoder_decoder(cli, text, tmp_path):
    """T5 takes tokens for its decoder too, which is said before anything is pruned; BART makes them from the text."""
    sizes = {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    t5 = save_with_tokenizer(T5ForConditionalGeneration(T5Config(**sizes)), tmp_path / "t5")
    arguments = [tmp_path / "out", "--data", text, "--num-sequences", "2", "--length", "8"]
    for dry_run in ([], ["--dry-run"]):
        status, _, err = cli("prune", t5, *arguments, *dry_run)
        assert status == FAILED and not (tmp_path / "out").exists()
        assert "got T5ForConditionalGeneration, whose decoder takes tokens of its own; prune it by magnitude" in err
    bart = save_with_tokenizer(tiny_bart().model, tmp_path / "bart")  # its classifier's head wants an end of text
    assert cli("prune", bart, *arguments)[0] == DONE


BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {**BLOCKS, "image_size": 32, "patch_size": 16}


def vit() -> ViTModel:
    return ViTModel(ViTConfig(**IMAGES))


def clip() -> CLIPModel:
    text = {**BLOCKS, "vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=IMAGES))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (vit, "got ViTModel, which reads `pixel_values`"),
        (clip, "got CLIPModel, which takes `pixel_values` too"),
    ],
)
def test_calibration_of_a_model_of_images(model, message, cli, text, tmp_path):
    folder = save_with_tokenizer(model(), tmp_path / "model")
    for dry_run in ([], ["--dry-run"]):
        arguments = ["--data", text, "--num-sequences", "2", "--length", "8", *dry_run]
        status, _, err = cli("prune", folder, tmp_path / "out", *arguments)
        assert status == FAILED and message in err and "prune it by magnitude (`--method magnitude`)" in err
    assert cli("prune", folder, tmp_path / "out", "--method", "magnitude")[0] == DONE


def test_calibration_of_the_language_model_beside_a_vision_tower(cli, text, tmp_path):
    """Text does not call the tower's blocks, which the error says how to exclude, in a dry run too."""
    sizes = {"vocab_size": 96, "num_key_value_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(**BLOCKS, **sizes), vision_config=CLIPVisionConfig(**IMAGES), image_token_id=95
    )
    folder = save_with_tokenizer(LlavaForConditionalGeneration(config), tmp_path / "model")
    arguments = ["prune", folder, tmp_path / "out", "--data", text, "--num-sequences", "2", "--length", "8"]
    for dry_run in ([], ["--dry-run"]):
        status, _, err = cli(*arguments, *dry_run)
        found = re.search(r"k_proj` \(12 in all\) from 2 batches; .* exclude them with `exclude_modules='(.*)'`", err)
        assert status == FAILED and found
    for dry_run in (["--dry-run"], []):
        assert cli(*arguments, "--exclude-modules", found[1], *dry_run)[0] == DONE
    report = sparsity_report(tmp_path / "out")
    assert all((layer.sparsity == 0.5) == ("language_model" in layer.name) for layer in report.layers)


def without_tokenizer(folder):
    for path in Path(folder).glob("tokenizer*"):
        path.unlink()
    return folder


def test_prune_without_a_tokenizer_beside_the_model(cli, llama, pruned, text, tmp_path):
    bare = without_tokenizer(shutil.copytree(llama, tmp_path / "bare"))
    data = ["--data", text, "--length", "16", "--num-sequences", "2"]
    status, _, err = cli("prune", bare, tmp_path / "out", *data)
    assert status == FAILED and "beside its model, got none in" in err and "`--tokenizer`" in err
    assert cli("prune", bare, tmp_path / "out", *data, "--tokenizer", llama)[0] == DONE
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert cli("prune", bare, tmp_path / "none", "--method", "magnitude")[0] == DONE  # which needs none
    status, _, err = cli("prune", bare, tmp_path / "new", "--method", "magnitude", "--tokenizer", tmp_path / "none")
    assert status == FAILED and "got none in" in err and not (tmp_path / "new").exists()


def test_evaluate_an_adapter_from_elsewhere(cli, pruned, text, tmp_path, monkeypatch):
    """As `finetune` with output_dir: run leaves it: the base lies beside it, and has the tokenizer."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pruned, "run/pruned")
    adapted(AutoModelForCausalLM.from_pretrained("run/pruned"), SppConfig(r=4, task_type="CAUSAL_LM"), "run/adapter")
    here = json.loads(cli("evaluate", "run/adapter", "--data", text, "--length", "32", "--json")[1])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(save_with_tokenizer(tiny_llama(seed=1), tmp_path / "other"), "run/pruned")  # of another run
    status, out, err = cli("evaluate", tmp_path / "run" / "adapter", "--data", text, "--length", "32", "--json")
    assert status == DONE and json.loads(out)["perplexity"] == here["perplexity"], err
    without_tokenizer(tmp_path / "run" / "pruned")
    status, _, err = cli("evaluate", tmp_path / "run" / "adapter", "--data", text)
    assert status == FAILED and re.search("got none in .*run/pruned'; name .*`--tokenizer`", err)


def test_pack_and_unpack_give_the_same_bits(cli, pruned, tmp_path):
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    planned = json.loads(cli("pack", pruned, packed, "--dry-run", "--json")[1])
    assert not packed.exists()
    status, out, _ = cli("pack", pruned, packed, "--json")
    result = json.loads(out)
    assert status == DONE and result["bytes_after"] < result["bytes_before"]
    assert planned["bytes_after"] == pytest.approx(result["bytes_after"], rel=0.3)  # headers weigh in a tiny model
    assert cli("unpack", packed, dense, "--dry-run")[0] == DONE and not dense.exists()
    assert cli("unpack", packed, dense)[0] == DONE
    expected = weights(pruned)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(dense).items())
    assert (dense / "tokenizer.json").is_file()
    assert cli("unpack", dense, tmp_path / "again")[0] == FAILED


def adapted(model, config, folder):
    adapter = get_peft_model(model, config)
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    adapter.save_pretrained(folder)
    return adapter


def test_merge_keeps_the_zeros_and_the_function(cli, pruned, tmp_path):
    model = adapted(AutoModelForCausalLM.from_pretrained(pruned), SppConfig(r=4), tmp_path / "adapter")
    expected = model.eval()(torch.arange(4, 12)[None]).logits
    status, out, _ = cli("merge", tmp_path / "adapter", tmp_path / "merged", "--dry-run")
    assert status == DONE and f"base      {pruned}\n" in out
    assert not (tmp_path / "merged").exists()
    status, out, _ = cli("merge", tmp_path / "adapter", tmp_path / "merged", "--json")
    assert status == DONE and json.loads(out)["verified"]["ok"] and json.loads(out)["base"] == pruned
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(torch.arange(4, 12)[None]).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_merge_of_lora_says_that_zeros_are_gone(cli, pruned, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted(AutoModelForCausalLM.from_pretrained(pruned), config, tmp_path / "adapter")
    status, out, _ = cli("merge", tmp_path / "adapter", tmp_path / "merged")
    assert status == 1 and "FAILED" in out
    status, out, _ = cli("verify", tmp_path / "merged", "--reference", pruned)
    assert status == 1 and "zeros lost" in out


def test_report_and_verify(cli, pruned, llama):
    status, out, _ = cli("report", pruned)
    assert status == DONE and "2:4" in out
    status, out, _ = cli("verify", pruned, "--reference", pruned, "--json")
    assert status == DONE and json.loads(out)["ok"]
    assert cli("verify", llama, "--reference", pruned)[0] == 1


def test_evaluate_text_is_the_librarys_perplexity(cli, pruned, text, tmp_path):
    status, out, _ = cli("evaluate", pruned, "--data", text, "--length", "32", "--json")
    result = json.loads(out)
    assert status == DONE
    words = Path(text).read_text().split()
    ids = torch.tensor([WORDS.index(word) + 4 for word in words])
    model = AutoModelForCausalLM.from_pretrained(pruned)
    assert result["perplexity"] == pytest.approx(perplexity(model, ids, window=32, progress=False), rel=1e-5)
    save_sparse(model, tmp_path / "packed")
    status, out, _ = cli("evaluate", tmp_path / "packed", "--data", text, "--length", "32", "--json",
                         "--tokenizer", pruned)  # fmt: skip
    assert json.loads(out)["perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)


def test_the_tokenizer_that_was_asked_for_is_used(cli, pruned, text, tmp_path):
    words = tmp_path / "letters"
    save_with_tokenizer(tiny_llama(), words)
    vocabulary = json.loads((words / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] = {token: n for token, n in vocabulary["model"]["vocab"].items() if n < 10}
    (words / "tokenizer.json").write_text(json.dumps(vocabulary))
    arguments = ["evaluate", pruned, "--data", text, "--length", "32", "--json"]
    own, other = (json.loads(cli(*arguments, *more)[1]) for more in ([], ["--tokenizer", words]))
    assert own["tokens"] == other["tokens"] and own["perplexity"] != other["perplexity"]


def test_evaluate_a_classifier(cli, tmp_path):
    pytest.importorskip("evaluate")
    bert, rows = save_with_tokenizer(tiny_bert(), tmp_path / "bert"), tmp_path / "rows.csv"
    rows.write_text("sentence,label\n" + "\n".join(f"{WORDS[i]} {WORDS[i + 1]},{i % 2}" for i in range(20)))
    arguments = ["evaluate", bert, "--data", rows, "--text-column", "sentence", "--label-column", "label", "--json"]
    status, out, _ = cli(*arguments, "--metric", "accuracy", "f1")
    result = json.loads(out)
    assert status == DONE and result["examples"] == 20 and 0 <= result["accuracy"] <= 1 and "f1" in result
    named = cli(*arguments, "--task", "sequence_classification", "--metric", "accuracy", "f1")
    assert json.loads(named[1]) == result
    status, _, err = cli("evaluate", bert, "--data", rows, "--text-column", "sentence")
    assert status == FAILED and "got no column of labels; name it in `label`, on the command line in --label" in err


def test_evaluate_takes_the_context_of_the_model_by_itself(cli, text, tmp_path):
    """Embeddings of 64 positions."""
    gpt2 = save_with_tokenizer(tiny_gpt2(), tmp_path / "gpt2")
    own, asked = (json.loads(cli("evaluate", gpt2, "--data", text, "--json", *more)[1])
                  for more in ([], ["--length", "64"]))  # fmt: skip
    assert own == asked and own["perplexity"] > 1
    status, _, err = cli("evaluate", gpt2, "--data", text, "--length", "65")
    assert status == FAILED and "at most 64, the positions that the model has embeddings for, got 65" in err


def test_evaluate_refuses_random_weights(cli, llama, pruned, tmp_path, text):
    """But the head that an adapter brings along is none."""
    for task, model in (("sequence_classification", llama), ("causal_lm", tmp_path / "bert")):
        save_with_tokenizer(tiny_bert(), tmp_path / "bert")
        labels = ["--label-column", "label"] if task == "sequence_classification" else []
        status, out, err = cli("evaluate", model, "--data", text, "--task", task, *labels)
        assert status == FAILED and out == "" and "Evaluation measures trained weights, got none for" in err
    save_sparse(AutoModelForCausalLM.from_pretrained(pruned), tmp_path / "packed")
    status, out, err = cli("evaluate", tmp_path / "packed", "--data", text, "--task", "sequence_classification",
                           "--label-column", "label", "--tokenizer", pruned)  # fmt: skip
    assert status == FAILED and "got none for score.weight (1 in all)" in err
    classifier = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    adapted(classifier, PstConfig(task_type="SEQ_CLS"), tmp_path / "adapter")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "\n".join(f"{WORDS[i]} {WORDS[i + 1]},{i % 3}" for i in range(20)))
    status, out, err = cli("evaluate", tmp_path / "adapter", "--data", rows, "--label-column", "label", "--json")
    assert status == DONE and json.loads(out)["examples"] == 20, err


def test_finetune_and_evaluate_by_a_recipe(cli, pruned, text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
model: {{path: {pruned}}}
adapter: {{method: spp, r: 4}}
data: {{path: {text}, validation_split: train, text: text, max_length: 16}}
training: {{output_dir: {tmp_path / "run"}, max_steps: 3, learning_rate: 1e-2, use_cpu: true}}
output: {{merge: true}}
""")
    status, out, _ = cli("finetune", path, "--dry-run", "--json")
    assert status == DONE and json.loads(out)["trainable"] > 0 and not (tmp_path / "run").exists()
    status, out, _ = cli("finetune", path, "--json", "--set", "training.max_steps=2", "--set", "training.save_steps=1")
    result = json.loads(out)
    assert status == DONE and result["steps"] == 2 and result["zeros_lost"] == 0
    assert cli("finetune", path)[0] == FAILED  # there is a run
    assert cli("verify", result["merged"], "--reference", pruned)[0] == DONE
    own_size = ["--set", "training.per_device_eval_batch_size=4"]
    status, out, _ = cli("evaluate", result["adapter"], "--config", path, *own_size, "--json")
    measured = json.loads(out)
    assert status == DONE and measured["sparsity"] == pytest.approx(0.5, abs=1e-3)


# Errors


def test_an_error_is_one_message_and_a_traceback_only_on_request(cli, tmp_path):
    status, out, err = cli("report", tmp_path / "nowhere")
    assert status == FAILED and out == ""
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and "nowhere" in err
    status, _, err = cli("report", tmp_path / "nowhere", "--traceback")
    assert status == FAILED and "Traceback" in err and err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "LLAMA", "NEW", "--pattern", "3:2", "--data", "TEXT"], "3:2"),
        (["prune", "LLAMA", "NEW", "--pattern", "2:4"], "wanda calibrates on data"),
        (["prune", "LLAMA", "NEW", "--method", "magnitude", "--data", "TEXT"], "got --data; leave it out"),
        (["prune", "LLAMA", "NEW", "--method", "magnitude", "--length", "8", "--seed", "1"], "got --length, --seed;"),
        (["prune", "LLAMA", "NEW", "--sparsity", "1.5", "--data", "TEXT"], "1.5"),
        (["prune", "LLAMA", "NEW", "--data", "nowhere.txt"], "nowhere.txt"),
        (["prune", "LLAMA", "LLAMA", "--method", "magnitude"], "is not empty .* is in it.; choose another name"),
        (["prune", "TEXT", "NEW", "--method", "magnitude"], "is no folder"),
        (["prune", "/nowhere", "NEW", "--method", "magnitude"], "is no folder"),
        (["prune", "LLAMA", "TEXT/new", "--method", "magnitude"], "a folder that can be written, got .*text.txt/new"),
        (["prune", "LLAMA", "NEW", "--data", "TEXT", "--length", "4000"], "4000"),
        (["prune", "LLAMA", "NEW", "--data", "EMPTY"], "something in them, got .*empty.txt', which is empty"),
        (["prune", "LLAMA", "NEW", "--data", "LATIN"], "stored as UTF-8, got .*latin.txt' with the byte 0xe9"),
        (["prune", "LLAMA", "NEW", "--data", "RECIPE"], "ending tells its format, one of .txt, .* got .*recipe.yaml"),
        (["prune", "LLAMA", "NEW", "--data", "ROWS"], "got .*rows.jsonl' .*JSON parse error.*check what is in it"),
        (["prune", "LLAMA", "NEW", *TINY, "--device", "foo", "--dry-run"], "torch can use here, .* got 'foo'"),
        (["prune", "LLAMA", "NEW", *TINY, "--checkpoint-dir", "TEXT"], "that can be written, got .*text.txt"),
        (
            ["prune", "LLAMA", "NEW", *TINY, "--checkpoint-dir", "LLAMA", "--dry-run"],
            "earlier run with its pruning_run.json, got .*llama.*config.json. is in it.; choose another name",
        ),
        (
            ["prune", "LLAMA", "NEW", *TINY, "--checkpoint-dir", "NEW"],
            "outside of the result's folder, got .*new' for",
        ),
        (
            ["prune", "LLAMA", "NEW", *TINY, "--checkpoint-dir", "NEW/ck"],
            "outside of the result's folder, got .*ck' for",
        ),
        (["report", "LLAMA", "--plot", "NEW/x.png"], "a folder that is there, got .*new/x.png' and no folder"),
        (["report", "LLAMA", "--plot", "TEXT/x.png"], "a folder that is there, got .*text.txt/x.png'"),
        (["report", "LLAMA", "--plot", "x.jpq"], "ending tells its format, one of .*png, .* got 'x.jpq'"),
        (["merge", "LLAMA", "NEW"], "got .* which has none"),
        (["pack", "LLAMA", "TEXT"], "which is a file"),
        (["pack", "LLAMA", "NEW", "--max-shard-size", "5 G", "--dry-run"], "a number of bytes .* got '5 G'"),
        (
            ["prune", "BERT", "NEW", *TINY, "--task", "causal_lm"],
            "got causal_lm for the model in .*bert'; name another",
        ),
        (
            ["prune", "LLAMA", "NEW", *TINY, "--task", "sequence_classification", "--dry-run"],
            "weights that it has, got none for score.weight .1 in all. for sequence_classification .*leave the task",
        ),
        (["verify", "LLAMA"], "pass --reference or --pattern"),
        (["verify", "LLAMA", "--pattern", "unstructured"], "got 'unstructured', which any zeros follow; pass the"),
        (["evaluate", "LLAMA"], "give one of the two"),
        (["evaluate", "LLAMA", "--data", "TEXT", "--text-column", "story"], "got 'story'|names columns"),
        (
            ["evaluate", "LLAMA", "--data", "TEXT", "--set", "data.max_length=8"],
            "changes a recipe, got .*in `--config`",
        ),
        (["evaluate", "LLAMA", "--config", "RECIPE", "--length", "8"], "the recipe names .*, got --length beside it"),
        (["evaluate", "LLAMA", "--data", "TEXT", "--batch-size", "4"], "window by window, .* batch size of 4; leave"),
        (["evaluate", "LLAMA", "--data", "TEXT", "--tokenizer", "NOTHING"], "a tokenizer.json, got .*nothing' with"),
        (["evaluate", "NOTHING", "--data", "TEXT"], "folder has a config.json, got .*nothing' without one; check"),
        (["finetune", "nowhere.yaml"], "nowhere.yaml"),
        (["finetune", str(ROOT / "configs/spp_causal_lm.yaml")], "got './pruned', which is no folder here"),
        (["finetune", "RECIPE"], "is YAML, got something else: expected .* in line 2, column 1"),
    ],
)
def test_bad_input(arguments, message, cli, llama, text, tmp_path):
    wrong = {"EMPTY": ("empty.txt", b""), "LATIN": ("latin.txt", "caf\xe9".encode("latin-1")),
             "RECIPE": ("recipe.yaml", b"model: {path: x\n"), "ROWS": ("rows.jsonl", b"{no json\n")}  # fmt: skip
    for name, content in wrong.values():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "nothing").mkdir()
    no_decoder = DistilBertConfig(vocab_size=96, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    save_with_tokenizer(DistilBertModel(no_decoder), tmp_path / "bert")
    places = {"LLAMA": llama, "TEXT": text, "TEXT/new": text + "/new", "NEW": str(tmp_path / "new")}
    places |= {key: str(tmp_path / name) for key, (name, _) in wrong.items()}
    places |= {
        "BERT": str(tmp_path / "bert"),
        "NOTHING": str(tmp_path / "nothing"),
        "TEXT/x.png": text + "/x.png",
        "NEW/x.png": f"{tmp_path}/new/x.png",
        "NEW/ck": f"{tmp_path}/new/ck",
    }
    before = set(tmp_path.iterdir())
    status, out, err = cli(*[places.get(argument, argument) for argument in arguments])
    assert status == FAILED and out == ""
    assert "Traceback" not in err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(message, error)
    assert not (tmp_path / "new").exists()
    assert set(tmp_path.iterdir()) == before  # nothing half-written


def test_a_picture_is_refused_before_the_work(cli, monkeypatch, llama):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("peft_sparse.evaluation.sparsity_report", lambda *_: pytest.fail("counted first"))
    assert cli("report", llama, "--plot", "nowhere/x.png")[0] == FAILED


def test_an_interrupted_command(cli, monkeypatch, llama):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_sparse.evaluation.sparsity_report", interrupted)
    status, _, err = cli("report", llama)
    assert status == INTERRUPTED and err.strip() == "interrupted"


def test_an_unexpected_error_names_its_class(cli, monkeypatch, llama):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("peft_sparse.evaluation.sparsity_report", broken)
    status, _, err = cli("report", llama)
    assert status == FAILED and err.startswith("error: ZeroDivisionError: no message (--traceback")


def test_quiet_says_nothing_but_the_result(cli, llama, text, tmp_path):
    """Also where libraries are imported before the command line is read."""
    shown = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    data = ["--data", text, "--num-sequences", "2", "--length", "8"]
    status, out, err = cli("prune", llama, tmp_path / "out", *data, "--quiet", "--json")
    assert status == DONE and json.loads(out)["sparsity"] == pytest.approx(0.5, abs=1e-3) and err == ""
    assert (transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()) == shown
