"""The road on real pretrained models: prune or PST, tune, merge, save, and the same again in another process."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import PstConfig, SppConfig, perplexity, prune_magnitude, prune_wanda, sparsity_report
from peft_sparse.linears import block_linears, get_weight

READ_AGAIN = textwrap.dedent("""
    import json, sys, torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
    ids = torch.tensor(json.loads(sys.argv[2]))
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    zeros = {n: int((p == 0).sum()) for n, p in model.named_parameters()}
    checksum = {n: int((p == 0).flatten().nonzero().sum()) for n, p in model.named_parameters()}
    print(json.dumps({"sum": logits.square().sum().item(), "zeros": zeros, "checksum": checksum}))
    assert "peft_sparse" not in sys.modules and "peft" not in sys.modules
""")


def tokens_of(folder: Path, shared: Path, file: str, count: int) -> torch.Tensor:
    text = (shared / "data" / file).read_text()[: 6 * count]
    return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0, :count]


def train(model, ids: torch.Tensor, steps: int, lr: float, after_step=lambda step: None) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for step in range(steps):
        batch = ids[torch.randint(0, len(ids), (4,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(step + 1)
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def check_merge_save_and_reload(model, ids: torch.Tensor, folder: Path, tolerance: float) -> dict[str, int]:
    """Merge, compare, save, and compare again in a process that knows nothing of this package."""
    before = model(input_ids=ids).logits.float()
    merged = model.merge_and_unload()
    after = merged(input_ids=ids).logits
    assert (after.float() - before).abs().max() <= tolerance * before.abs().max()
    merged.save_pretrained(folder)
    command = [sys.executable, "-c", READ_AGAIN, str(folder), json.dumps(ids.tolist())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["sum"] == pytest.approx(after.double().square().sum().item(), rel=1e-5 if tolerance < 1e-3 else 1e-2)
    assert found["zeros"] == {n: int((p == 0).sum()) for n, p in merged.named_parameters()}
    assert found["checksum"] == {n: int((p == 0).flatten().nonzero().sum()) for n, p in merged.named_parameters()}
    return found["zeros"]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_spp_on_a_pruned_llama(llama_dir, shared, tmp_path, pattern, dtype, tolerance):
    ids = tokens_of(llama_dir, shared, "tinystories/sample_a.txt", 24 * 64)
    windows = ids.reshape(-1, 64)
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=dtype)
    prune_wanda(model, [{"input_ids": windows[i : i + 4]} for i in (0, 4)], pattern=pattern, progress=False)
    zeros = {name: get_weight(linear) == 0 for name, linear in block_linears(model).items()}
    pruned = perplexity(model, ids, window=64, progress=False)
    model = get_peft_model(model, SppConfig(spp_dropout=0.05))
    train(model, windows, steps=30, lr=2e-2)
    assert perplexity(model, ids, window=64, progress=False) < 0.8 * pruned
    assert sparsity_report(model).total_sparsity == pytest.approx(0.5, abs=1e-3)
    check_merge_save_and_reload(model, windows[:2], tmp_path, tolerance)
    for name, linear in block_linears(model.base_model.model).items():
        assert torch.equal(get_weight(linear) == 0, zeros[name]), name


@pytest.mark.parametrize("pattern, sparsity", [("unstructured", 0.7), ("2:4", 0.5)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_pst_on_gpt2(gpt2_dir, shared, tmp_path, pattern, sparsity, dtype, tolerance):
    ids = tokens_of(gpt2_dir, shared, "tinyshakespeare/input.txt", 24 * 64)
    windows = ids.reshape(-1, 64)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gpt2_dir, dtype=dtype), PstConfig(pattern=pattern, sparsity=sparsity)
    )
    steps = 30
    train(model, windows, steps, 1e-3, lambda step: model.base_model.set_sparsity_step(step, steps))
    tuned = perplexity(model, ids, window=64, progress=False)
    one_shot = AutoModelForCausalLM.from_pretrained(gpt2_dir, dtype=dtype)
    prune_magnitude(one_shot, pattern=pattern, sparsity=sparsity)
    assert tuned < perplexity(one_shot, ids, window=64, progress=False)
    zeros = check_merge_save_and_reload(model, windows[:2], tmp_path, tolerance)
    for name, count in zeros.items():
        if ".h." in name and name.endswith("weight") and "ln_" not in name:
            numel = model.base_model.model.get_parameter(name).numel()
            assert count == int(sparsity * numel), name


@pytest.mark.parametrize("config", [PstConfig(sparsity=0.6), SppConfig()], ids=["pst", "spp"])
@pytest.mark.filterwarnings("ignore:SPP tunes", "ignore:Merging the PST")
def test_generation_is_the_same_before_and_after_merge(llama_dir, config):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_dir), config)
    if isinstance(config, PstConfig):
        model.base_model.set_sparsity_step(1, 1)
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    generate = {"max_new_tokens": 20, "do_sample": False}
    before = model.eval().generate(input_ids=ids, **generate)
    assert torch.equal(model.merge_and_unload().generate(input_ids=ids, **generate), before)
