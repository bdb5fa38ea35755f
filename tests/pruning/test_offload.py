"""Weights that accelerate keeps elsewhere, and blocks that are moved: the same model as without."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.architectures import ARCHITECTURES
from peft_sparse import owl_sparsity, prune_magnitude, prune_wanda
from peft_sparse.linears import block_linears, stored_state
from peft_sparse.pruning.offload import BlockMover, OffloadableWeight

import models


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, models.VOCAB_SIZE, (2, 10), generator=generator)} for _ in range(count)]


def by_cpu(model, folder):
    return cpu_offload(model, execution_device="cpu")


def by_disk(model, folder):
    return disk_offload(model, folder / "offload", execution_device="cpu")


def by_disk_whole_blocks(model, folder):
    return disk_offload(
        model, folder / "offload", execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"]
    )


def by_device_map(model, folder):
    """The second block on disk, as with a device_map; the others in memory."""
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder / "offload", force_hooks=True)


def by_from_pretrained(model, folder):
    """As users do it; the index points into the checkpoint's own file."""
    model.save_pretrained(folder / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return LlamaForCausalLM.from_pretrained(folder / "model", device_map=device_map, offload_folder=folder / "offload")


OFFLOADS = [by_cpu, by_disk, by_disk_whole_blocks, by_device_map, by_from_pretrained]
every_offload = pytest.mark.parametrize("offload", OFFLOADS)


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in stored_state(model)}


def assert_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = numbers(model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@every_offload
def test_wanda_on_offloaded_weights(tmp_path, offload):
    plain = prune_wanda(models.tiny_llama(), batches(), sparsity=0.6, measure_error=True, progress=False)
    model = offload(models.tiny_llama(), tmp_path)
    was_meta = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert was_meta
    prune_wanda(model, batches(), sparsity=0.6, measure_error=True, progress=False)
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == was_meta
    assert_same(model, numbers(plain))
    assert model.config.peft_sparse == plain.config.peft_sparse
    with torch.no_grad():  # what the hooks bring in
        assert torch.equal(model(**batches()[0]).logits, plain(**batches()[0]).logits)


@every_offload
def test_magnitude_and_owl_on_offloaded_weights(tmp_path, offload):
    plain, model = models.tiny_llama(), offload(models.tiny_llama(), tmp_path)
    budget = owl_sparsity(plain, batches(), 0.7, group="layer")
    assert owl_sparsity(model, batches(), 0.7, group="layer") == budget
    assert_same(prune_magnitude(model, sparsity=budget), numbers(prune_magnitude(plain, sparsity=budget)))


@every_offload
def test_an_error_leaves_offloaded_weights_as_they_were(tmp_path, offload):
    broken = models.tiny_llama()
    with torch.no_grad():
        broken.model.layers[1].post_attention_layernorm.weight[3] = torch.inf
    model = offload(broken, tmp_path)
    before = numbers(model)
    with pytest.raises(ValueError, match=r"infinity in the input of `model.layers.1.mlp.gate_proj`"):
        prune_wanda(model, batches(), progress=False)
    assert_same(model, before)
    assert not list(tmp_path.rglob("*.pruned.safetensors"))


@every_offload
def test_a_run_that_continues_on_offloaded_weights(tmp_path, offload):
    plain = prune_wanda(models.tiny_llama(), batches(), progress=False, checkpoint_dir=tmp_path / "state")
    model = offload(models.tiny_llama(), tmp_path)  # the same weights, so the same run
    prune_wanda(model, batches(), progress=False, checkpoint_dir=tmp_path / "state")
    assert_same(model, numbers(plain))


def test_files_on_disk_stay_dense_and_old_ones_go(tmp_path):
    """The offload folder may serve another process, and a from_pretrained index points to the user's checkpoint."""
    model = by_disk(models.tiny_llama(), tmp_path)
    prune_wanda(model, batches(), progress=False)
    first = set(tmp_path.rglob("*.pruned.safetensors"))
    assert len(first) == len(block_linears(model))
    assert_same(disk_offload(models.tiny_llama(7), tmp_path / "offload"), numbers(models.tiny_llama()))
    prune_wanda(model, batches(), sparsity=0.7, progress=False)
    second = set(tmp_path.rglob("*.pruned.safetensors"))
    assert len(second) == len(first) and not first & second
    expected = prune_wanda(models.tiny_llama(), batches(), progress=False)
    assert_same(model, numbers(prune_wanda(expected, batches(), sparsity=0.7, progress=False)))


def test_bfloat16_on_disk(tmp_path):
    plain = prune_wanda(models.tiny_llama().bfloat16(), batches(), progress=False)
    assert_same(
        prune_wanda(by_disk(models.tiny_llama().bfloat16(), tmp_path), batches(), progress=False), numbers(plain)
    )


def test_conv1d_on_disk(tmp_path):
    plain = prune_wanda(models.tiny_gpt2(), batches(), "2:4", progress=False)
    assert_same(prune_wanda(by_disk(models.tiny_gpt2(), tmp_path), batches(), "2:4", progress=False), numbers(plain))


def test_a_tied_weight_in_cpu_memory_is_left_alone(tiny_gpt2):
    """lm_head shares the embedding, which shows in the stored tensors only."""
    model = cpu_offload(tiny_gpt2, execution_device="cpu")
    with pytest.raises(ValueError, match="1 that share a weight with another module are left alone"):
        prune_magnitude(model, target_modules=["lm_head"])


def test_weights_on_the_meta_device_without_hooks_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"q_proj`, which is on the meta device \(never loaded\)"):
        prune_wanda(tiny_llama.to("meta"), batches(), progress=False)


# Blocks moved one at a time. "cpu:0" is no other place than "cpu", and another device to whoever compares the two.


class Moves:
    """Records which blocks go where, and how many were away at a time."""

    def __init__(self, monkeypatch) -> None:
        self.to: list[tuple[int, str]] = []
        self.away: set[int] = set()
        self.most_away = 0
        original = nn.Module.to

        def record(module, device, *args, **kwargs):
            self.to.append((id(module), str(device)))
            (self.away.add if str(device) == "cpu:0" else self.away.discard)(id(module))
            self.most_away = max(self.most_away, len(self.away))
            return original(module, device, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "to", record)


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_bert, models.tiny_gpt2])
def test_one_block_at_a_time_is_moved_and_comes_back(monkeypatch, factory):
    plain = prune_wanda(factory(), batches(), sparsity=0.6, progress=False)
    model, moves = factory(), Moves(monkeypatch)
    prune_wanda(model, batches(), sparsity=0.6, device="cpu:0", progress=False)
    assert_same(model, numbers(plain))
    assert moves.most_away == 1 and not moves.away
    blocks = {
        id(module) for module in model.modules() if "Layer" in type(module).__name__ or "Block" in str(type(module))
    }
    assert {moved for moved, _ in moves.to} <= blocks
    # to be looked at, to try the walk (all but the first), and to be pruned: not once for each batch
    assert len(moves.to) == 2 * (2 * 2 + 1)


def test_blocks_come_back_after_an_error(monkeypatch, tiny_llama):
    moves = Moves(monkeypatch)
    with torch.no_grad():
        tiny_llama.model.layers[1].post_attention_layernorm.weight[3] = torch.inf
    before = numbers(tiny_llama)
    with pytest.raises(ValueError, match="NaN or infinity"):
        prune_wanda(tiny_llama, batches(), device="cpu:0", progress=False)
    assert not moves.away
    assert_same(tiny_llama, before)
    assert not any("forward" in vars(module) for module in tiny_llama.modules())


def test_owl_with_a_device(monkeypatch, tiny_llama):
    expected, moves = owl_sparsity(tiny_llama, batches()), Moves(monkeypatch)
    assert owl_sparsity(tiny_llama, batches(), device="cpu:0") == expected
    assert moves.most_away == 1 and not moves.away


def copied(data, device):
    """As `send_to_device` does where the device is another one."""
    if isinstance(data, dict):
        return {key: copied(value, device) for key, value in data.items()}
    if isinstance(data, tuple):
        return tuple(copied(value, device) for value in data)
    return data.clone() if isinstance(data, torch.Tensor) else data


@pytest.mark.parametrize("architecture", ["BART", "T5"])
def test_a_device_and_padding_on_both_sides(monkeypatch, architecture):
    """The encoder's states are moved too, and their mask goes with them."""
    build, ids = ARCHITECTURES[architecture].build, torch.randint(3, models.VOCAB_SIZE, (4, 12))
    mask, decoder_mask = torch.ones_like(ids), torch.ones_like(ids)
    mask[:, 6:], decoder_mask[:, 3:5] = 0, 0
    data = [{"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)}]
    data[0]["decoder_attention_mask"] = decoder_mask
    plain = prune_wanda(build(), data, progress=False)
    monkeypatch.setattr("peft_sparse.pruning.offload.send_to_device", copied)
    assert_same(prune_wanda(build(), data, device="cpu", progress=False), numbers(plain))


def test_the_model_s_own_device_moves_nothing(monkeypatch, tiny_llama):
    moves = Moves(monkeypatch)
    prune_wanda(tiny_llama, batches(), device="cpu", progress=False)
    assert not moves.to


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:99", r"one that torch can use here, such as 'cuda:0', got 'cuda:99'"),
        ("nowhere", r"one that torch can use here, .* got 'nowhere'"),
        ("meta", "got 'meta', which holds no numbers"),
    ],
)
def test_devices_that_are_refused(tiny_llama, device, message):
    before = numbers(tiny_llama)
    with pytest.raises(ValueError, match=message):
        prune_wanda(tiny_llama, batches(), device=device, progress=False)
    assert_same(tiny_llama, before)


def test_a_device_beside_hooks_is_refused(tiny_llama):
    model = cpu_offload(tiny_llama, execution_device="cpu")
    with pytest.raises(ValueError, match=r"got device='cpu:0' for a model whose weights accelerate moves already"):
        prune_wanda(model, batches(), device="cpu:0", progress=False)


def test_a_block_that_shares_with_the_rest_is_not_moved():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 8)
            self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8), "tied": nn.Linear(8, 8)})])
            self.blocks[0]["tied"].weight = self.embedding.weight

    model = Tied()
    BlockMover(model, None).check_blocks(model, list(model.blocks))
    with pytest.raises(ValueError, match="shares a parameter with `embedding` outside"):
        BlockMover(model, "cpu:0").check_blocks(model, list(model.blocks))


def test_a_weight_is_found_where_it_is_kept(tmp_path):
    model = by_disk_whole_blocks(models.tiny_llama(), tmp_path)
    assert isinstance(model.model.layers[0], LlamaDecoderLayer)
    weight = OffloadableWeight(model, "model.layers.1.mlp.up_proj")
    expected = copy.deepcopy(models.tiny_llama().model.layers[1].mlp.up_proj.weight.data)
    with weight.loaded() as values:
        assert torch.equal(values, expected)
    assert weight.in_memory and weight.linear.weight.is_meta
