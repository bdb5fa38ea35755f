"""Models whose tensors have other names in files than in memory are stored, packed, trained and verified as others."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import OffloadedWeightsLoader
from peft import get_peft_model
from renamed import RENAMED, mixtral, vit, zamba
from safetensors.torch import load_file, save_file

from peft_sparse import SppConfig
from peft_sparse.checkpoint import load_sparse, save_sparse
from peft_sparse.evaluation import sparsity_report, verify_sparsity
from peft_sparse.evaluation.weights import linear_weights
from peft_sparse.linears import PackedLinear, block_experts, block_linears, unpack_model
from peft_sparse.pruning import prune_magnitude


def pruned(make):
    """All linears and all experts."""
    model = make()
    weights = [linear.weight for linear in block_linears(model).values()] + list(block_experts(model).values())
    for weight in weights:
        weight.data[torch.rand(weight.shape) < 0.7] = 0
    return model


def assert_same(model, expected) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("make", RENAMED)
def test_packed_and_back(make, tmp_path):
    model = pruned(make)
    save_sparse(model, tmp_path / "a", max_shard_size="30KB")
    assert_same(load_sparse(tmp_path / "a"), model)
    packed = load_sparse(tmp_path / "a", packed=True)
    linears = block_linears(packed)
    assert linears.keys() == block_linears(model).keys()
    assert all(isinstance(linear, PackedLinear) for linear in linears.values())
    save_sparse(packed, tmp_path / "b")
    assert_same(load_sparse(tmp_path / "b"), model)
    assert_same(unpack_model(packed), model)


@pytest.mark.parametrize("make", [*RENAMED, zamba])
def test_verified_from_disk_and_from_memory(make, tmp_path):
    model = pruned(make)
    model.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    save_sparse(model, tmp_path / "packed")
    sources = [model, tmp_path / "dense", tmp_path / "packed"]
    reports = [sparsity_report(source) for source in sources]
    assert all(report.layers == reports[0].layers and not report.notes for report in reports)
    assert all(report.outside == reports[0].outside for report in reports)
    assert {layer.name for layer in reports[0].layers} >= block_linears(model).keys()
    for checked in sources:
        for reference in sources:
            report = verify_sparsity(checked, reference=reference)
            assert report.ok and not report.gained and not report.notes
            assert report.total_zeros == reports[0].total_zeros


@pytest.mark.parametrize("make", [*RENAMED, zamba])
def test_what_accelerate_keeps_elsewhere_is_read_too(make, tmp_path):
    model = pruned(make)
    in_memory = sparsity_report(model)
    in_ram = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    on_disk = disk_offload(copy.deepcopy(model), str(tmp_path / "offload"), execution_device="cpu")
    for away in (in_ram, on_disk):
        assert all(parameter.is_meta for parameter in away.parameters())
        assert sparsity_report(away).layers == in_memory.layers
        for report in (verify_sparsity(away, reference=model), verify_sparsity(model, reference=away)):
            assert report.ok and report.total_zeros == in_memory.total_zeros
        assert all(parameter.is_meta for parameter in away.parameters())


def test_an_expert_s_parameter_is_loaded_once(tmp_path, monkeypatch):
    """A model may have hundreds of experts in one."""
    away = disk_offload(mixtral(), str(tmp_path), execution_device="cpu")
    read = []
    load = OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", lambda self, key: read.append(key) or load(self, key))
    weights = linear_weights(away)
    assert not read
    for name in weights.names:
        weights.read(name)
    experts = block_experts(away)
    # the two parameters of a module's experts are brought in together
    assert {name: read.count(name) for name in experts} == dict.fromkeys(experts, 2)


def test_zeros_that_an_expert_lost(tmp_path):
    """As a merge into fused experts would lose them."""
    model = pruned(mixtral)
    model.save_pretrained(tmp_path)
    expert = model.model.layers[1].mlp.experts.down_proj.data[1]
    row, column = (expert == 0).nonzero()[0].tolist()
    expert[row, column] = 1.0
    report = verify_sparsity(model, reference=tmp_path)
    assert (report.lost, report.exit_status) == (1, 1)
    (layer,) = report.failed
    assert "layers.1" in layer.name and "experts.1" in layer.name
    assert layer.first_lost == ((row, column),)
    model.save_pretrained(tmp_path / "changed")
    assert verify_sparsity(tmp_path / "changed", reference=tmp_path).failed == report.failed


def test_spp_on_a_packed_vit(tmp_path):
    save_sparse(prune_magnitude(vit(), "2:4"), tmp_path / "base")
    pixels, losses, merged = torch.randn(2, 3, 16, 16), [], []
    for packed in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(load_sparse(tmp_path / "base", packed=packed), SppConfig(r=4))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            loss = model(pixel_values=pixels, labels=torch.tensor([0, 2])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        merged.append(model.merge_and_unload())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)
    save_sparse(merged[0], tmp_path / "merged")
    report = verify_sparsity(tmp_path / "merged", reference=tmp_path / "base")
    assert report.ok and {layer.pattern for layer in report.layers} == {"2:4"}


def test_a_checkpoint_without_the_prefix(tiny_gpt2, tmp_path):
    """As the first GPT-2 on the Hub: saved from the base model, with the config of the one that has a head."""
    prune_magnitude(tiny_gpt2, "2:4")
    tiny_gpt2.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    report = verify_sparsity(tmp_path, reference=tiny_gpt2)
    assert report.ok and not report.notes
    assert {layer.pattern for layer in report.layers} == {"2:4"}  # (in, out) was turned
