"""The package on an NVIDIA GPU, from pruning to running: the same numbers as on the CPU. Skipped without a GPU.

The Triton kernels have tests of their own, tests/ops/test_triton_*.py and tests/tuners/test_triton.py.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from benchmarks import check
from peft_sparse import (
    PstConfig,
    SparsityCallback,
    SppConfig,
    accelerate_sparse,
    load_sparse,
    pack_model,
    perplexity,
    prune_magnitude,
    prune_ria,
    prune_sparsegpt,
    prune_wanda,
    save_sparse,
    verify_sparsity,
)
from peft_sparse.linears import PackedLinear, acceleration_of, block_linears, get_weight, unwrap
from peft_sparse.sparsity import PackedWeight, pack_mask, select_mask, unpack_mask

from models import tiny_bert, tiny_gpt2, tiny_llama

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

CUDA = torch.device("cuda")
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(i))} for i in range(4)]
FROM_THE_START = {"schedule": "constant", "initial_warmup": 0.0}
CONFIGS = {
    "spp": lambda: SppConfig(r=4, init_weights=False),
    "pst": lambda: PstConfig(sparsity=0.5, **FROM_THE_START),
    "movement": lambda: PstConfig(sparsity=0.5, importance="movement", weight_update="full", **FROM_THE_START),
    "magnitude": lambda: PstConfig(sparsity=0.5, importance="magnitude", weight_update="full", **FROM_THE_START),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of the blocks' linears, on the CPU."""
    return {name: get_weight(unwrap(linear)).detach().cpu() for name, linear in block_linears(model).items()}


def train(model: nn.Module, steps: int = 3) -> list[float]:
    device = next(parameter.device for parameter in model.parameters() if parameter.requires_grad)
    ids, losses = IDS.to(device), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for done in range(steps):
        if hasattr(model.base_model, "set_sparsity_step"):
            model.base_model.set_sparsity_step(done, steps)
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_half_is_zero(model: nn.Module, base: nn.Module | None) -> None:
    """At least the zeros that were asked for, all of those of `base` among them; and no NaN."""
    for name, weight in weights(model).items():
        assert int((weight == 0).sum()) >= weight.numel() // 2 and weight.isfinite().all(), name
    if base is not None:
        assert verify_sparsity(model, base).lost == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ops_equal_their_plain_twins(dtype):
    check.check_on_device(CUDA, dtype)


@pytest.mark.parametrize("numbers", ["many ties", "normal"])
@pytest.mark.parametrize(
    ("shape", "group"), [((7, 12), 4), ((33, 56), 56), ((45, 77), 45 * 77), ((1300, 900), 1170000)]
)
def test_masks_are_those_of_the_cpu(shape, group, numbers):
    scores = torch.randint(0, 5, shape).float() if numbers == "many ties" else torch.randn(shape)
    mask = select_mask(scores.to(CUDA), group // 2, group)
    assert (mask.view(-1, group).sum(1) == group - group // 2).all()
    assert torch.equal(mask.cpu(), select_mask(scores, group // 2, group))
    packed = pack_mask(mask)
    assert torch.equal(packed.cpu(), pack_mask(mask.cpu()))
    assert torch.equal(unpack_mask(packed, shape[1]), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 13), (700, 1022)], ids=str)
def test_packing_is_lossless(shape, dtype):
    weight = (torch.randn(shape) * (torch.rand(shape) < 0.4)).to(CUDA, dtype)
    assert torch.equal(PackedWeight.of(weight).dense(), weight)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@each_config
def test_trains_and_merges_as_on_the_cpu(make, config):
    base = prune_magnitude(make(), sparsity=0.5)
    found = []
    for device in (torch.device("cpu"), CUDA):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), config()).to(device)
        losses = train(model)
        model.eval()
        with torch.no_grad():
            tuned = model(IDS.to(device)).logits
            merged = model.merge_and_unload()
            torch.testing.assert_close(merged(IDS.to(device)).logits, tuned, atol=1e-5, rtol=1e-4)
        assert_half_is_zero(merged, base if isinstance(config(), SppConfig) else None)
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_base_trains_as_the_dense_one(dtype):
    base = prune_magnitude(tiny_llama(), pattern="2:4").to(CUDA, dtype)
    losses, merged = [], []
    for model in (copy.deepcopy(base), pack_model(copy.deepcopy(base))):
        torch.manual_seed(0)
        model = get_peft_model(model, SppConfig(r=4, init_weights=False))
        losses.append(train(model))
        merged.append(model.merge_and_unload())
    assert all(isinstance(linear, PackedLinear) for linear in block_linears(merged[1]).values())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == torch.float32 else 1e-2)
    for one, other in zip(weights(merged[0]).values(), weights(merged[1]).values(), strict=True):
        assert torch.equal(one != 0, other != 0)
        torch.testing.assert_close(one, other, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("prune", [prune_wanda, prune_ria, prune_sparsegpt])
@pytest.mark.parametrize("where", ["whole model", "block by block"])
def test_pruning_chooses_what_it_chooses_on_the_cpu(prune, where):
    expected = weights(prune(tiny_llama(), BATCHES, "2:4", progress=False))
    if where == "whole model":
        model = prune(tiny_llama().to(CUDA), [{k: v.to(CUDA) for k, v in b.items()} for b in BATCHES], "2:4")
    else:
        model = prune(tiny_llama(), BATCHES, "2:4", device="cuda")
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    for name, weight in weights(model).items():
        assert (weight.view(weight.shape[0], -1, 4) != 0).sum(-1).max() <= 2
        assert ((weight != 0) == (expected[name] != 0)).float().mean() > 0.99, name
        torch.testing.assert_close(weight.norm(), expected[name].norm(), rtol=1e-2, atol=0)


class Sentences(Dataset):
    """Random token ids; the label says whether the first one is large."""

    ids = torch.randint(3, 90, (32, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": (self.ids[index, 0] > 45).long()}


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@each_config
def test_trainer(config, precision, tmp_path):
    base = prune_magnitude(tiny_bert(), sparsity=0.5)
    model = get_peft_model(copy.deepcopy(base), config())
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, save_steps=3, bf16=precision == "bf16", fp16=precision == "fp16",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=[SparsityCallback()])
    assert trainer.args.device.type == "cuda"
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    merged = trainer.model.merge_and_unload()
    assert_half_is_zero(merged, base if isinstance(config(), SppConfig) else None)


def test_an_offloaded_base():
    losses = []
    for away in (False, True):
        model = prune_magnitude(tiny_llama(), sparsity=0.5)
        model = cpu_offload(model, execution_device=CUDA) if away else model.to(CUDA)
        torch.manual_seed(0)
        losses.append(train(get_peft_model(model, SppConfig(r=4, init_weights=False))))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_saving_and_loading(packed, tmp_path):
    model = prune_magnitude(tiny_llama(), sparsity=0.7).to(CUDA, torch.bfloat16)
    save_sparse(model, tmp_path)
    loaded = load_sparse(tmp_path, packed=packed, device="cuda")
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    for name, weight in weights(model).items():
        assert torch.equal(weights(loaded)[name], weight)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS.to(CUDA)).logits, model(IDS.to(CUDA)).logits, atol=2e-2, rtol=2e-2)


def test_perplexity_is_that_of_the_cpu():
    model, tokens = tiny_llama(), torch.arange(3, 87).repeat(3)
    expected = perplexity(model, tokens, 32, progress=False)
    assert perplexity(model.to(CUDA), tokens, 32, progress=False) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 33, 128])
def test_semi_structured(dtype, tokens):
    linear = nn.Linear(256, 128).to(CUDA, dtype)
    model = prune_magnitude(nn.Sequential(linear), pattern="2:4", target_modules=["0"])
    x = torch.randn(1, tokens, 256).to(CUDA, dtype)
    with torch.no_grad():
        expected = model(x)
        report = accelerate_sparse(model, tokens=tokens, kernel="semi_structured")
        assert [choice.chosen for choice in report.layers[0].choices] == ["semi_structured"]
        assert acceleration_of(linear).by_tokens(tokens).name == "semi_structured"
        torch.testing.assert_close(model(x), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("form", ["dense", "packed", "gave up its weights"])
def test_a_chosen_way_generates_the_same(form):
    torch.manual_seed(0)
    model = prune_magnitude(tiny_llama(), pattern="2:4").to(CUDA)
    expected = model.generate(IDS.to(CUDA), max_new_tokens=8, do_sample=False)
    if form == "packed":
        pack_model(model)
    report = accelerate_sparse(model, keep_dense=form != "gave up its weights")
    assert len(report.layers) == 14
    assert torch.equal(model.generate(IDS.to(CUDA), max_new_tokens=8, do_sample=False), expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["spp", "pst"])
def test_compiled(config):
    model = get_peft_model(prune_magnitude(tiny_llama(), sparsity=0.5), CONFIGS[config]()).to(CUDA)
    if config == "pst":
        model.base_model.set_sparsity_step(10, 10)
    ids, found = IDS.to(CUDA), []
    for forward in (model, torch.compile(model, fullgraph=True)):
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"loss": loss.detach()})
        model.zero_grad()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
