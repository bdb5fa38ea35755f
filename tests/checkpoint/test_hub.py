"""The model card, and a model that goes to the Hub and comes back, over HTTP to a server on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model

from peft_sparse import PstConfig, SppConfig
from peft_sparse.checkpoint import load_sparse, push_sparse_to_hub, save_sparse, write_model_card
from peft_sparse.evaluation import sparsity_report
from peft_sparse.pruning import prune_magnitude

import models

HERE = Path(__file__).resolve().parent

CLIENT = """
import sys
from pathlib import Path
import torch
sys.path[:0] = [{tests!r}]
import models
from huggingface_hub import HfApi, ModelCard, constants
from peft import get_peft_model
from peft_sparse.checkpoint.convert import pack_checkpoint
from peft_sparse import SppConfig, load_sparse, prune_magnitude, push_sparse_to_hub, verify_sparsity, sparsity_report

model = prune_magnitude(models.tiny_llama(), "2:4")
card = {{"base_model": "me/base", "method": "spp"}}
url = push_sparse_to_hub(model, "me/sparse-llama", token="hf_x", max_shard_size="10KB", **card)
assert "/me/sparse-llama/commit/" in url, url
loaded = load_sparse("me/sparse-llama")
assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
assert verify_sparsity("me/sparse-llama", reference=model).ok
assert sparsity_report("me/sparse-llama").pattern == "2:4"
card = ModelCard.load("me/sparse-llama")
assert card.data.base_model == "me/base" and {{"sparse", "pruned", "spp"}} <= set(card.data.tags), card.data

files = HfApi().list_repo_files("me/sparse-llama")
assert sum(name.endswith(".safetensors") for name in files) > 1, files
prune_magnitude(model, sparsity=0.9)
for name in ("model-00001-of-00002.safetensors", "pytorch_model.bin", "sparse_model.onnx"):
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="me/sparse-llama", token="hf_x")
push_sparse_to_hub(model, "me/sparse-llama", token="hf_x", method="spp")
files = set(HfApi().list_repo_files("me/sparse-llama"))
ours = {{"README.md", "config.json", "generation_config.json", "sparse_model.safetensors"}}
assert files == ours | {{"sparse_model.onnx"}}, files
loaded = load_sparse("me/sparse-llama", packed=True)
assert sparsity_report(loaded).to_dict() == sparsity_report(model).to_dict()
assert loaded.name_or_path == "me/sparse-llama"

HfApi().upload_file(path_or_fileobj=b"my own words", path_in_repo="README.md", repo_id="me/sparse-llama", token="hf_x")
push_sparse_to_hub(model, "me/sparse-llama", token="hf_x")
assert ModelCard.load("me/sparse-llama").text.strip() == "my own words"

merged = get_peft_model(prune_magnitude(models.tiny_llama(), "2:4"), SppConfig(r=4)).merge_and_unload()
merged.save_pretrained({folder!r}, push_to_hub=True, repo_id="me/dense-llama", token="hf_x")
card = ModelCard.load("me/dense-llama")
assert "spp" in card.data.tags and "## Measured sparsity" in card.text, card
assert verify_sparsity("me/dense-llama", reference=merged).ok
commit = merged.push_to_hub("me/pushed-llama", token="hf_x", tags=["tiny"])
assert "/me/pushed-llama/commit/" in commit.commit_url, commit
card = ModelCard.load("me/pushed-llama")
assert {{"spp", "sparse", "tiny"}} <= set(card.data.tags) and "## Measured sparsity" in card.text, card
assert verify_sparsity("me/pushed-llama", reference=merged).ok
HfApi().upload_file(path_or_fileobj=b"my own words", path_in_repo="README.md", repo_id="me/pushed-llama", token="hf_x")
merged.push_to_hub("me/pushed-llama", token="hf_x")
assert ModelCard.load("me/pushed-llama").text.strip() == "my own words"
commit = merged.push_to_hub("me/asked-llama", token="hf_x", create_pr=True)
assert commit.pr_revision == "refs/pr/1" and HfApi().list_repo_files("me/asked-llama") == []
asked = HfApi().hf_hub_download("me/asked-llama", "README.md", revision="refs/pr/1")
assert "## Measured sparsity" in Path(asked).read_text(), asked
assert HfApi().file_exists("me/asked-llama", "model.safetensors", revision="refs/pr/1")
url = push_sparse_to_hub(model, "me/asked-llama", token="hf_x", create_pr=True)
assert HfApi().list_repo_files("me/asked-llama") == [], url
assert "sparse_model.safetensors" in HfApi().list_repo_files("me/asked-llama", revision="refs/pr/2")
adapter = get_peft_model(prune_magnitude(models.tiny_llama(), "2:4"), SppConfig(r=4, spp_alpha=8))
adapter.save_pretrained({folder!r} + "-adapter")
HfApi().create_repo("me/adapter", token="hf_x")
HfApi().upload_folder(repo_id="me/adapter", folder_path={folder!r} + "-adapter", token="hf_x")
adapter.load_adapter("me/adapter", "default")
other = get_peft_model(prune_magnitude(models.tiny_llama(), "2:4"), SppConfig(r=4, spp_alpha=16))
try:
    other.load_adapter("me/adapter", "default", revision="main", is_trainable=True)
except ValueError as error:
    assert "spp_alpha=8" in str(error) and "spp_alpha=16" in str(error), error
else:
    raise AssertionError("no error")
merged.save_pretrained({folder!r} + "-again")
assert sorted(path.name for path in Path({folder!r} + "-again").iterdir())[0] == "README.md"

for name in ("additional_chat_templates/rag.jinja", "onnx/config.json", "s/config.json", "spm.model"):
    HfApi().upload_file(path_or_fileobj=b"pieces", path_in_repo=name, repo_id="me/dense-llama", token="hf_x")
pack_checkpoint("me/dense-llama", {folder!r} + "-packed")
names = sorted(str(path.relative_to({folder!r} + "-packed")) for path in Path({folder!r} + "-packed").glob("**/*"))
assert {{"additional_chat_templates/rag.jinja", "spm.model"}} < set(names) and "onnx" not in names, names
assert not list(Path(constants.HF_HUB_CACHE).glob("**/onnx")), "downloaded"
try:
    load_sparse("me/nothing")
except ValueError as error:
    assert "'me/nothing'" in str(error) and "could not be downloaded" in str(error), error
else:
    raise AssertionError("no error")
print("done")
"""


def test_there_and_back(tmp_path):
    server = subprocess.Popen([sys.executable, HERE / "hub_server.py"], stdout=subprocess.PIPE, text=True)
    try:
        port = server.stdout.readline().strip()
        # huggingface_hub reads these once, when it is imported: hence a process of its own.
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path),
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", CLIENT.format(tests=str(HERE.parent), folder=str(tmp_path / "dense"))],
            env=environment,
            capture_output=True,
            text=True,
        )
    finally:
        server.terminate()
        server.wait()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize("packed", [True, False])
def test_the_card_says_what_is_in_the_files(tmp_path, packed):
    model = prune_magnitude(models.tiny_llama(), "2:4")
    if packed:
        save_sparse(model, tmp_path, base_model="owner/base", method="pst")
    else:
        model.save_pretrained(tmp_path)
        write_model_card(tmp_path, base_model="owner/base", method="pst")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "owner/base"
    assert set(card.data.tags) == {"sparse", "pruned", "pst", "peft-sparse"}
    assert "| down_proj | 2 of 32 x 48 | 1,536 | 50.00% | 2:4 |" in card.text
    assert "2205.11005" in card.text
    assert "2405.16057" not in card.text
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    dense = sum(parameter.nbytes for parameter in model.parameters())
    assert f"{size / 1e6:,.1f} MB on disk; as plain dense tensors they take {dense / 1e6:,.1f} MB" in card.text
    assert ("load_sparse(" in card.text) is packed
    assert ("LlamaForCausalLM.from_pretrained(" in card.text) is not packed
    assert f"{sparsity_report(model).total_sparsity:.2%} of the weights" in card.text


def test_whose_card_it_is(tmp_path):
    """One's own card stays, ours is written anew."""
    model = prune_magnitude(models.tiny_llama(), "2:4")
    save_sparse(model, tmp_path)
    assert "pattern: 2:4" in (tmp_path / "README.md").read_text()
    prune_magnitude(model, sparsity=0.9)
    save_sparse(model, tmp_path)
    assert f"{sparsity_report(model).total_sparsity:.2%} of the weights" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    save_sparse(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert torch.equal(load_sparse(tmp_path).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("config", [SppConfig(r=4), PstConfig(r=2, score_r=2, sparsity=0.5, schedule="constant")])
def test_a_merged_model_says_by_which_method(config, tmp_path):
    merged = get_peft_model(prune_magnitude(models.tiny_llama(), "2:4"), config).merge_and_unload()
    save_sparse(merged, tmp_path)
    tags = ModelCard.load(tmp_path / "README.md").data.tags
    assert ("spp" in tags, "pst" in tags) == (isinstance(config, SppConfig), isinstance(config, PstConfig))


def test_an_unknown_method_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"`method` is one of \['pst', 'spp'\] or None, got 'lora'"):
        push_sparse_to_hub(models.tiny_llama(), "me/x", method="lora")
    with pytest.raises(ValueError, match="`method` is one of"):
        save_sparse(models.tiny_llama(), tmp_path / "x", method="lora")
    assert not (tmp_path / "x").exists()
