"""What verify_sparsity says is what a comparison of the tensors by hand says, wherever they are."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from renamed import zamba
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaModel

from peft_sparse import SppConfig
from peft_sparse.checkpoint import save_sparse
from peft_sparse.evaluation import verify_sparsity
from peft_sparse.linears import block_linears, get_weight
from peft_sparse.pruning import prune_magnitude

import models

FACTORIES = [models.tiny_llama, models.tiny_gpt2, models.tiny_bert]


def one_linear(weight: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(*weight.T.shape, bias=False))
    model[0].weight.data = weight
    return model


@given(st.data())
def test_counts_and_indices_are_those_of_a_loop(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 13))
    values = st.lists(st.sampled_from([0.0, -0.0, 1.0]), min_size=rows * columns, max_size=rows * columns)
    new, old = (torch.tensor(data.draw(values)).view(rows, columns) for _ in range(2))
    places = [(i, j) for i in range(rows) for j in range(columns)]
    lost = [(i, j) for i, j in places if old[i, j] == 0 and new[i, j] != 0]
    gained = [(i, j) for i, j in places if old[i, j] != 0 and new[i, j] == 0]
    groups = [(i, j) for i, j in places if j % 4 == 0 and (new[i, j : j + 4] != 0).sum() > 2]
    (layer,) = verify_sparsity(one_linear(new), reference=one_linear(old), pattern="2:4").layers
    assert (layer.lost, layer.gained, layer.violations) == (len(lost), len(gained), len(groups))
    assert layer.first_lost == tuple(lost[:5])
    assert layer.first_violations == tuple(groups[:5])
    assert layer.zeros == int((new == 0).sum())
    assert layer.ok is not (lost or groups)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_a_lora_merge_loses_zeros_and_an_spp_merge_does_not(factory, pattern):
    pruned = prune_magnitude(factory(), pattern)
    targets = ["c_proj", "c_attn"] if factory is models.tiny_gpt2 else ["q_proj", "down_proj", "query"]
    for config, keeps in (
        (LoraConfig(target_modules=targets, init_lora_weights=False), False),
        (SppConfig(init_weights=False), True),
    ):
        model = get_peft_model(prune_magnitude(factory(), pattern), config)
        unmerged = verify_sparsity(model, reference=pruned)
        merged = verify_sparsity(model.merge_and_unload(), reference=pruned)
        assert merged.ok is keeps
        assert merged.exit_status == (0 if keeps else 1)
        assert unmerged.to_dict() == merged.to_dict()
        assert all((layer.expected == "2:4") is (pattern == "2:4") for layer in merged.layers)
        failed = {layer.name for layer in merged.failed}
        assert failed == set() if keeps else {name.split(".")[-1] for name in failed} & set(targets)
        if not keeps:
            assert all(layer.zeros == 0 for layer in merged.failed)  # it filled all of them
            assert (merged.violations > 0) is (pattern == "2:4")
            assert "FAILED" in str(merged)


@pytest.mark.parametrize("factory", FACTORIES)
def test_from_disk_as_from_memory(factory, tmp_path):
    pruned, merged = prune_magnitude(factory(), sparsity=0.6), prune_magnitude(factory(), sparsity=0.4)
    with torch.no_grad():
        next(iter(block_linears(merged).values())).weight.zero_()
    expected = verify_sparsity(merged, reference=pruned).to_dict()
    assert expected["lost"] > 0
    assert expected["gained"] > 0
    for name, model in (("pruned", pruned), ("merged", merged)):
        model.save_pretrained(tmp_path / "dense" / name, max_shard_size="20KB")
        save_sparse(model, tmp_path / "packed" / name, max_shard_size="20KB")
    for one in ("dense", "packed"):
        assert verify_sparsity(tmp_path / one / "merged", reference=pruned).to_dict() == expected
        for other in ("dense", "packed"):
            report = verify_sparsity(str(tmp_path / one / "merged"), reference=tmp_path / other / "pruned")
            assert report.to_dict() == expected


def test_without_a_reference(tiny_llama):
    assert verify_sparsity(tiny_llama).ok
    assert "nothing to compare with" in str(verify_sparsity(tiny_llama))
    prune_magnitude(tiny_llama, "2:4")
    report = verify_sparsity(tiny_llama, pattern="2:4")
    assert report.ok
    assert {layer.pattern for layer in report.layers} == {"2:4"}
    assert str(report).endswith("ok: the pattern holds")
    weight = tiny_llama.model.layers[1].self_attn.k_proj.weight.data
    weight[3, 8:12] = 1.0
    report = verify_sparsity(tiny_llama, pattern="2:4")
    assert [layer.name for layer in report.failed] == ["model.layers.1.self_attn.k_proj"]
    assert report.failed[0].first_violations == ((3, 8),)
    assert "model.layers.1.self_attn.k_proj: groups against 2:4 at (3, 8)" in str(report)
    assert verify_sparsity(tiny_llama, pattern="1:2").violations > 0


def test_json_and_dtype(tiny_bert):
    report = verify_sparsity(prune_magnitude(tiny_bert.to(torch.bfloat16)), reference=models.tiny_bert())
    data = json.loads(report.to_json())
    assert data["ok"] is True
    assert data["exit_status"] == 0
    assert data["gained"] == data["total_zeros"] == report.total_zeros
    assert data["total_sparsity"] == 0.5
    assert {layer["dtype"] for layer in data["layers"]} == {"bfloat16"}
    assert data["layers"][0]["shape"] == [32, 32]


def test_a_headless_model_is_compared_with_one_that_has_a_head(tiny_llama, tmp_path):
    prune_magnitude(tiny_llama)
    tiny_llama.save_pretrained(tmp_path / "whole")
    headless = LlamaModel.from_pretrained(tmp_path / "whole")
    headless.save_pretrained(tmp_path / "headless")
    for model, reference in ((headless, tiny_llama), (tiny_llama, headless), (tiny_llama, tmp_path / "headless")):
        report = verify_sparsity(model, reference=reference)
        assert report.ok
        assert len(report.layers) == 14


@pytest.mark.parametrize("bare", ["model", "reference"])
def test_a_folder_without_config_takes_its_linears_from_the_other_side(bare, tiny_gpt2, tmp_path):
    """GPT-2 stores (in, out); a square weight would be compared with its transpose, and nobody would notice."""
    prune_magnitude(tiny_gpt2)
    tiny_gpt2.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    sides = {"model": tiny_gpt2, "reference": tiny_gpt2} | {bare: tmp_path}
    report = verify_sparsity(sides["model"], reference=sides["reference"])
    assert report.ok
    assert report.gained == 0
    assert report.notes == []
    assert len(report.layers) == len(block_linears(tiny_gpt2))


def test_a_weight_that_linears_have_in_common_is_stored_once(tmp_path):
    model = prune_magnitude(zamba(), "2:4")
    model.save_pretrained(tmp_path)
    report = verify_sparsity(tmp_path, reference=tmp_path, pattern="2:4")
    assert report.ok and [layer.name for layer in report.layers] == list(block_linears(model))
    (tmp_path / "config.json").unlink()
    for checked in (model, get_peft_model(zamba(), LoraConfig(target_modules=["in_proj"]))):
        names = [layer.name for layer in verify_sparsity(checked, reference=tmp_path).layers]
        assert names == list(block_linears(model))


def test_what_cannot_be_compared(tiny_llama, tiny_bert, tmp_path):
    with pytest.raises(ValueError, match=r"the same layers, got `.*` \(\d+ in all\) missing from the"):
        verify_sparsity(tiny_llama, reference=tiny_bert)
    other = models.tiny_llama()
    other.model.layers[1].mlp.up_proj = nn.Linear(32, 44)
    with pytest.raises(ValueError, match=r"got \(44, 32\) and \(48, 32\) for `model.layers.1.mlp.up_proj`"):
        verify_sparsity(other, reference=tiny_llama)
    del other.model.layers[1]
    with pytest.raises(ValueError, match=r"got `model.layers.1.* \(7 in all\) missing from the model"):
        verify_sparsity(other, reference=tiny_llama)
    with pytest.raises(ValueError, match="A pattern is 'unstructured' or 'N:M'"):
        verify_sparsity(tiny_llama, pattern="half")


def test_a_checkpoint_with_a_tensor_missing(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"got `model.layers.0.mlp.up_proj` \(1 in all\) missing from the model"):
        verify_sparsity(tmp_path, reference=tiny_llama)


def test_a_missing_shard(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-.* cannot be read .* missing"):
        verify_sparsity(tmp_path)


def test_the_index_of_an_earlier_save_in_shards(tiny_llama, tmp_path):
    """transformers leaves it there, and takes the whole file beside it."""
    tiny_llama.save_pretrained(tmp_path, max_shard_size="20KB")
    prune_magnitude(tiny_llama, "2:4").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors", "model.safetensors.index.json"}
    assert verify_sparsity(tmp_path, reference=tiny_llama, pattern="2:4").ok


def test_pickles_are_not_opened(tmp_path):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    torch.save({"a.weight": Boom()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only pickled ones"):
        verify_sparsity(tmp_path)


def test_a_name_of_the_hub_without_a_connection():
    with pytest.raises(
        ValueError, match=r"'nobody/no-such-model', which is no folder here and could not be downloaded"
    ):
        verify_sparsity("nobody/no-such-model")


def test_other_names_of_files(tmp_path):
    save_file({"a.weight": torch.eye(4)}, tmp_path / "consolidated.safetensors")
    (layer,) = verify_sparsity(tmp_path).layers
    assert (layer.name, layer.zeros, layer.pattern) == ("a", 12, "1:4")


def test_memory_holds_one_layer(tiny_llama, tmp_path, monkeypatch):
    """No more than one weight of each side is alive at a time."""
    import weakref

    from peft_sparse.storage import StoredTensor

    tiny_llama.save_pretrained(tmp_path, max_shard_size="20KB")
    alive: list[weakref.ref] = []
    read, most = StoredTensor.read, 0

    def counted(self):
        nonlocal most
        tensor = read(self)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", counted)
    report = verify_sparsity(tmp_path, reference=tmp_path)
    assert len(alive) == 2 * len(report.layers)
    assert most <= 3


def test_every_layer_is_checked_as_the_forward_uses_it(tiny_gpt2):
    report = verify_sparsity(tiny_gpt2)
    shapes = {name: tuple(get_weight(linear).shape) for name, linear in block_linears(tiny_gpt2).items()}
    assert {layer.name: layer.shape for layer in report.layers} == shapes
