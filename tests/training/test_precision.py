"""Half precision: bf16 and fp16 weights with fp32 factors, autocast, GradScaler; masks and scores in fp32 all the way.

The runs of 200 steps are on the shared Llama, a trained model, and are compared with the same run in float32, and with
what half precision does to LoRA.
"""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_sparse import PstConfig, SparsityCallback, SppConfig, prune_magnitude, verify_sparsity
from peft_sparse.ops import pst_mask, use_reference
from peft_sparse.ops.pst_mask import MaskCache, _scores
from peft_sparse.tuners.pst import PstLinear

from models import tiny_gpt2, tiny_llama

CONFIGS = {
    "spp": lambda: SppConfig(r=8),
    "pst": lambda: PstConfig(sparsity=0.5, r=4, score_r=4),
}
PLAIN = {"lora": lambda: LoraConfig(r=8, target_modules="all-linear")}
WAYS = ["bf16 weights", "fp16 weights", "bf16 autocast", "fp16 autocast", "fp16 weights, autocast"]
STEPS, LONG_WAYS = 200, ["bf16 weights", "bf16 autocast", "fp16 weights, autocast"]  # a run takes half a minute
LEARNING_RATES = {"spp": 5e-3, "pst": 2e-4, "lora": 1e-3}


def make(base, kind, dtype=torch.float32):
    torch.manual_seed(0)
    base = prune_magnitude(base, pattern="2:4") if kind == "spp" else base
    return get_peft_model(base.to(dtype), (CONFIGS | PLAIN)[kind]()).train()


def weights_dtype(way):
    return torch.bfloat16 if "bf16 weights" in way else torch.float16 if "fp16 weights" in way else torch.float32


def run(model, way, batches, steps, lr):
    """Losses of a loop as people write it: autocast around the forward, a GradScaler where fp16 needs one."""
    half = torch.bfloat16 if "bf16" in way else torch.float16
    autocast = torch.autocast("cpu", half) if "autocast" in way else contextlib.nullcontext()
    scaler = torch.amp.GradScaler("cpu", enabled="fp16" in way, init_scale=2.0**10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        ids = batches[step % len(batches)]
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if hasattr(model.base_model, "set_sparsity_step"):
            model.base_model.set_sparsity_step(step + 1, steps)
        losses.append(loss.item())
    return torch.tensor(losses)


def random_batches(count=4):
    return list(torch.randint(3, 90, (count, 2, 12), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_short_runs_follow_float32(kind, way, build):
    expected = run(make(build(), kind), "fp32", random_batches(), 8, 5e-3)
    model = make(build(), kind, weights_dtype(way))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found = run(model, way, random_batches(), 8, 5e-3)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {weights_dtype(way)}
    if kind == "spp":
        assert verify_sparsity(merged, pattern="2:4").exit_status == 0


def text_batches(llama_dir, shared):
    from transformers import AutoTokenizer

    text = (shared / "data" / "tinystories" / "sample_a.txt").read_text(encoding="utf-8")[:30_000]
    ids = AutoTokenizer.from_pretrained(llama_dir)(text, return_tensors="pt").input_ids[0]
    return list(ids[: 16 * 2 * 64].view(16, 2, 64))


def load(llama_dir):
    return AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)


def perturbed(base):
    """Weights that differ in their seventh digit."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
    return base


def relative(losses, expected):
    return (losses - expected).abs() / expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_200_steps_within_the_noise_of_bfloat16(kind, llama_dir, shared):
    """Half precision changes a loss no more than bfloat16 does in LoRA's plain dense layers, which is its noise.

    A mask that is chosen anew in each step makes more of any difference, also of float32's own, as a run shows whose
    weights differ in their seventh digit: it is as far away after 200 steps as one in half precision.
    """
    batches = text_batches(llama_dir, shared)

    def losses(kind, way, base=None):
        model = make(load(llama_dir) if base is None else base, kind, weights_dtype(way))
        return run(model, way, batches, STEPS, LEARNING_RATES[kind])

    noise = relative(losses("lora", "bf16 weights"), losses("lora", "fp32"))
    print(f"LoRA in bfloat16: {noise[:50].mean():.3%} in 50 steps, {noise.mean():.3%} in 200")
    expected = losses(kind, "fp32")
    first, last = expected[:16].mean(), expected[-16:].mean()
    print(f"{kind}: loss {first:.3f} -> {last:.3f} in float32")
    assert last < first  # it learned, PST while it lost half of its weights
    spread = relative(losses(kind, "fp32", perturbed(load(llama_dir))), expected)
    print(f"{kind}, float32, perturbed: {spread[:50].mean():.3%} in 50 steps, {spread.mean():.3%} in 200")
    for way in LONG_WAYS:
        found = losses(kind, way)
        difference, own = relative(found, expected), found[-16:].mean()
        print(f"{kind}, {way}: {difference[:50].mean():.3%} in 50 steps, {difference.mean():.3%} in 200")
        assert difference[:50].mean() <= 3 * (noise[:50].mean() + spread[:50].mean()), way
        assert difference.mean() <= 1.5 * (noise.mean() + spread.mean()), way
        assert abs(own - last) / last <= 1.5 * (noise.mean() + spread.mean()), way


# What is computed in float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_and_thresholds_are_float32(dtype):
    """The mask of half precision weights is the one of the same numbers in float32, ties by the thousand included."""
    model = make(tiny_llama(), "pst", dtype)
    wide = make(tiny_llama().to(dtype).float(), "pst")
    for copy in (model, wide):
        copy.base_model.set_sparsity_step(10, 10)
    torch.manual_seed(1)
    layers = [[m for m in copy.modules() if isinstance(m, PstLinear)] for copy in (model, wide)]
    for layer, other in zip(*layers, strict=True):
        with torch.no_grad():
            for factor, same in zip(layer.factors("default"), other.factors("default"), strict=True):
                if factor is not None:
                    same.copy_(factor.normal_(std=0.1))
        scores = _scores(layer.base_weight, layer.factors("default"), layer._settings["default"].scales)
        assert scores.dtype == torch.float32
        with torch.autocast("cpu", dtype):  # which would round the factors' product
            mask = layer.get_mask("default")
        assert torch.equal(mask, other.get_mask("default"))
        assert int((~mask).sum()) == mask.numel() // 2


def test_a_mask_is_the_same_inside_and_outside_of_autocast():
    layer = next(m for m in make(tiny_llama(), "pst").modules() if isinstance(m, PstLinear))
    with torch.no_grad():
        layer.pst_V["default"].normal_(), layer.pst_B["default"].normal_()
    settings = layer._settings["default"]
    arguments = (
        layer.base_weight, torch.tensor(300), settings.group_size, layer.factors("default"), settings.scales,
    )  # fmt: skip
    expected = pst_mask(MaskCache(), *arguments)
    effective = layer.effective_weight("default")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(pst_mask(MaskCache(), *arguments), expected)
            assert torch.equal(layer.effective_weight("default"), effective)
            with use_reference():
                assert torch.equal(pst_mask(MaskCache(), *arguments), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_autocast_rounds_the_effective_weight_once(kind, dtype):
    """The forward is the matmul, in half precision, of the float32 effective weight rounded to it."""
    model = make(tiny_llama(), kind)
    layer = model.base_model.sparse_layers()[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
        x = torch.randn(5, 32)
        expected = torch.nn.functional.linear(x.to(dtype), layer.effective_weight("default").to(dtype))
        with torch.autocast("cpu", dtype):
            found = layer(x)
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_factors_may_be_half_precision_too(kind):
    """`autocast_adapter_dtype=False` leaves them in the dtype of the weights."""
    torch.manual_seed(0)
    base = prune_magnitude(tiny_llama(), pattern="2:4") if kind == "spp" else tiny_llama()
    model = get_peft_model(base.bfloat16(), CONFIGS[kind](), autocast_adapter_dtype=False).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    losses = run(model, "bf16 weights", random_batches(), 4, 5e-3)
    assert losses.isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_that_overflows_is_skipped_by_the_scaler(kind):
    model = make(tiny_llama(), kind, torch.float16)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ids = random_batches()[0]
    scaler.scale(model(input_ids=ids, labels=ids).loss.float()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert scaler.get_scale() == 2.0**119


@pytest.mark.parametrize("kind", CONFIGS)
def test_trainer_in_bf16(kind, tmp_path):
    runs = {}
    for bf16 in (False, True):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=5e-3, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_steps=1, bf16=bf16, seed=1,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in torch.cat(random_batches(8))]
        trainer = Trainer(
            make(tiny_llama(), kind), arguments, train_dataset=data,
            callbacks=[SparsityCallback()] if kind == "pst" else [],
        )  # fmt: skip
        trainer.train()
        runs[bf16] = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(runs[True]) == 8 and not torch.equal(runs[True], runs[False])
    torch.testing.assert_close(runs[True], runs[False], atol=0.05, rtol=0)
