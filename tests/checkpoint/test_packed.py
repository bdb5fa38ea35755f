"""Packed in memory: the same outputs, no dense copy, saved again from where it lies."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import get_peft_model
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from peft_sparse import SppConfig, sparsity_report, verify_sparsity
from peft_sparse.checkpoint import load_sparse, save_sparse
from peft_sparse.linears import PackedLinear, block_linears, unpack_model
from peft_sparse.pruning import prune_magnitude

import models

FACTORIES = [models.tiny_llama, models.tiny_gpt2, models.tiny_bert]
IDS = torch.arange(10)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factory", FACTORIES)
def test_packed_and_dense_loads_agree(factory, dtype, tmp_path):
    model = prune_magnitude(factory().to(dtype), sparsity=0.75)
    save_sparse(model, tmp_path / "a")
    packed, dense = load_sparse(tmp_path / "a", packed=True), load_sparse(tmp_path / "a")
    linears = block_linears(packed)
    assert linears.keys() == block_linears(dense).keys()
    assert all(isinstance(linear, PackedLinear) for linear in linears.values())
    with torch.no_grad():
        torch.testing.assert_close(packed(IDS).logits, dense(IDS).logits)
    assert verify_sparsity(packed, reference=model).ok
    assert sparsity_report(packed).to_dict() == sparsity_report(dense).to_dict()
    save_sparse(packed, tmp_path / "b", max_shard_size="20KB")
    again = load_sparse(tmp_path / "b")
    for name, tensor in dense.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    unpacked = unpack_model(packed).state_dict()
    assert unpacked.keys() == dense.state_dict().keys()
    assert all(torch.equal(unpacked[name], tensor) for name, tensor in dense.state_dict().items())


def test_memory_is_that_of_what_is_stored(tmp_path):
    model = prune_magnitude(models.tiny_llama(), sparsity=0.9)
    save_sparse(model, tmp_path)
    packed = load_sparse(tmp_path, packed=True)
    tensors = [*packed.parameters(), *packed.buffers()]
    held = sum(
        storage.nbytes() for storage in {id(x.untyped_storage()): x.untyped_storage() for x in tensors}.values()
    )
    linears = sum(linear.weight.nbytes for linear in block_linears(model).values())
    rest = sum(parameter.nbytes for parameter in model.parameters()) - linears
    assert held - rest < 0.15 * linears


def test_train_merge_save(tmp_path):
    pruned = prune_magnitude(models.tiny_llama(), "2:4")
    save_sparse(pruned, tmp_path / "base")
    losses = []
    for is_packed in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(load_sparse(tmp_path / "base", packed=is_packed), SppConfig(r=4))
        optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.05)
        for _ in range(3):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        merged = model.merge_and_unload()
        save_sparse(merged, tmp_path / str(is_packed))
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)
    assert losses[2] < losses[0]
    for name in ("True", "False"):
        report = verify_sparsity(tmp_path / name, reference=pruned)
        assert report.ok
        assert {layer.pattern for layer in report.layers} == {"2:4"}
    ours, theirs = (load_sparse(tmp_path / name)(IDS).logits for name in ("True", "False"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2])
@pytest.mark.parametrize("away", ["memory", "memory, bitmasks too", "disk", "a device_map"])
def test_weights_that_are_elsewhere(factory, away, tmp_path):
    model = prune_magnitude(factory(), sparsity=0.75)
    save_sparse(model, tmp_path / "a")
    packed = load_sparse(tmp_path / "a", packed=True)
    if away == "disk":
        disk_offload(packed, str(tmp_path / "away"), execution_device="cpu")
    elif away == "a device_map":
        places = {"transformer": "disk"} if "gpt2" in factory.__name__ else {"model": "disk"}
        dispatch_model(packed, places | {"lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path / "away"))
    else:
        cpu_offload(packed, execution_device="cpu", offload_buffers="bitmasks" in away)
    with torch.no_grad():
        expected = packed(IDS).logits
    with pytest.raises(ValueError, match=r"Unpacking needs weights in memory, got `.*`, which is offloaded; load"):
        unpack_model(packed)
    save_sparse(packed, tmp_path / "b")
    again = load_sparse(tmp_path / "b")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, expected)


def test_other_dtype_and_a_damaged_tensor(tmp_path):
    save_sparse(prune_magnitude(models.tiny_llama(), sparsity=0.6), tmp_path)
    packed = load_sparse(tmp_path, packed=True, dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in packed.parameters()} == {torch.bfloat16}
    assert packed(IDS).logits.dtype == torch.bfloat16
    path = tmp_path / "sparse_model.safetensors"
    content = bytearray(path.read_bytes())
    for place in range(len(content) - 5000, len(content), 97):
        content[place] ^= 16
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its CRC-32"):
        load_sparse(tmp_path, packed=True)


def test_modules_that_transformers_keeps_in_float32(tmp_path):
    """T5's `wo` in float16."""
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = prune_magnitude(T5ForConditionalGeneration(config).to(torch.float16), sparsity=0.7)
    save_sparse(model, tmp_path)
    packed, dense = load_sparse(tmp_path, packed=True, dtype="auto"), load_sparse(tmp_path)
    for name, linear in block_linears(dense).items():
        assert packed.get_submodule(name).values.dtype == linear.weight.dtype, name
        assert torch.equal(packed.get_submodule(name).dense_weight(), linear.weight), name
    assert packed.decoder.block[0].layer[2].DenseReluDense.wo.values.dtype == torch.float32


def test_legacy_layouts_load_packed_too():
    from pathlib import Path

    for layout in ("sparse-bitmask", "sparse-24-bitmask"):
        folder = Path(__file__).parent / "samples" / layout
        packed, dense = load_sparse(folder, packed=True), load_sparse(folder)
        with torch.no_grad():
            torch.testing.assert_close(packed(IDS).logits, dense(IDS).logits)


def test_plain_save_pretrained_of_a_packed_model_is_refused(tmp_path):
    save_sparse(prune_magnitude(models.tiny_llama()), tmp_path / "a")
    packed = load_sparse(tmp_path / "a", packed=True)
    with pytest.raises(ValueError, match="got a packed model"):
        packed.save_pretrained(tmp_path / "b")
    unpack_model(packed).save_pretrained(tmp_path / "b")
    assert sparsity_report(AutoModelForCausalLM.from_pretrained(tmp_path / "b")).total_sparsity == 0.5
