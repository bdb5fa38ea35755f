"""SPP on a base model that bitsandbytes has quantised: zeros kept, nothing of the weight's size kept for backward."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer

from peft_sparse import (
    PstConfig,
    SppConfig,
    dequantize_model,
    prune_magnitude,
    quantize_model,
    sparsity_report,
    verify_sparsity,
)
from peft_sparse.checkpoint import load_sparse, save_sparse
from peft_sparse.linears import bits, block_linears, get_weight, num_zeros, quantized_weight, unwrap

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'peft-sparse[quant]'")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

KINDS = ["nf4", "fp4", "int8"]
IDS = torch.arange(24).view(2, 12) * 3 + 5
STATES = "Merging quantises 14 quantised layers again"


def llama(hidden: int = 64, seed: int = 0, **settings) -> LlamaForCausalLM:
    """Sizes are multiples of 64: bitsandbytes' own CPU kernels read other 4-bit weights wrongly."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pruned(**settings) -> LlamaForCausalLM:
    return prune_magnitude(llama(**settings), pattern="2:4")


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: get_weight(unwrap(linear)).detach().clone() for name, linear in block_linears(model).items()}


def tuned(kind: str, steps: int = 3, dtype=torch.float32, **settings):
    """A quantised model with an adapter that was trained for some steps."""
    model = get_peft_model(quantize_model(pruned().to(dtype), kind), SppConfig(r=4, init_weights=False, **settings))
    train(model, steps)
    return model


def train(model, steps: int, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_quantising_keeps_exactly_the_zeros(kind, double_quant):
    model = pruned()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:2] = 0  # whole blocks and rows of zeros
    before = weights_of(model)
    assert quantize_model(model, kind, double_quant=double_quant) is model
    for name, weight in weights_of(model).items():
        linear = model.get_submodule(name)
        assert bits(linear) == (8 if kind == "int8" else 4) and weight.shape == before[name].shape
        assert torch.equal(weight == 0, before[name] == 0)
        assert num_zeros(linear) == int((weight == 0).sum())
        error = (weight - before[name]).norm() / before[name].norm()
        assert error < {"nf4": 0.1, "fp4": 0.12, "int8": 0.01}[kind]
        state = getattr(linear.weight, "quant_state", None)
        if state is not None:  # as bitsandbytes reads it
            torch.testing.assert_close(weight, bnb.functional.dequantize_4bit(linear.weight.data, state))
    assert verify_sparsity(model, pattern="2:4").exit_status == 0
    assert "2:4" in str(sparsity_report(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_forward_is_that_of_the_quantised_model(kind, dtype):
    model = quantize_model(pruned().to(dtype), kind).train()
    with torch.no_grad():
        expected = model(IDS).logits
        found = get_peft_model(model, SppConfig())(IDS).logits
    assert found.dtype == dtype
    atol = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantised_model(kind, dropout):
    quantised = get_peft_model(quantize_model(pruned(), kind), SppConfig(r=4, init_weights=False, spp_dropout=dropout))
    dense = quantize_model(pruned(), kind)
    dense = get_peft_model(
        dequantize_model(dense, torch.float32), SppConfig(r=4, init_weights=False, spp_dropout=dropout)
    )
    dense.load_state_dict({k: v for k, v in quantised.state_dict().items() if "spp_" in k}, strict=False)
    gradients = []
    for model in (quantised, dense):
        torch.manual_seed(7)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_nothing_of_the_weights_size_is_kept_for_backward():
    model = get_peft_model(quantize_model(pruned(hidden=128), "nf4"), SppConfig(r=4))
    own = {p.data_ptr() for p in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(input_ids=IDS, labels=IDS)
    largest = max(t.numel() * t.element_size() for t in kept if t.data_ptr() not in own)
    tokens = IDS.numel()
    assert largest <= 4 * tokens * 256  # activations of the widest layer; its weight has 128 * 256 entries
    assert any(t.data_ptr() in own for t in kept)  # the codes, which are there anyway


@pytest.mark.parametrize("kind", KINDS)
def test_merging_quantises_again_and_says_how_well(kind):
    model = tuned(kind)
    zeros = {name: weight == 0 for name, weight in weights_of(model.get_base_model()).items()}
    base = {name: unwrap(m) for name, m in block_linears(model.get_base_model()).items()}
    before = {name: copy.deepcopy(quantized_weight(linear).dense()) for name, linear in base.items()}
    expected = model(IDS).logits.detach()
    with pytest.warns(UserWarning, match=rf"{STATES}.*relative error of the weights \d+\.\d+%.*No zero moves"):
        model.merge_adapter()
    merged = model(IDS).logits.detach()
    assert not torch.equal(merged, expected)
    torch.testing.assert_close(merged, expected, atol={"nf4": 0.3, "fp4": 0.3, "int8": 0.02}[kind], rtol=0)
    model.unmerge_adapter()  # bit for bit
    assert all(torch.equal(quantized_weight(linear).dense(), before[name]) for name, linear in base.items())
    assert torch.equal(model(IDS).logits, expected)
    with pytest.warns(UserWarning, match=STATES):
        unloaded = model.merge_and_unload()
    assert all(bits(linear) for linear in block_linears(unloaded).values())
    for name, weight in weights_of(unloaded).items():
        assert torch.equal(weight == 0, zeros[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_a_dense_model(kind, dtype, tmp_path):
    model = tuned(kind)
    zeros = {name: weight == 0 for name, weight in weights_of(model.get_base_model()).items()}
    expected = model(IDS).logits.detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = model.merge_and_unload(dequantize_to=dtype)
    said = [str(w.message) for w in caught if "rounds 14 quantised layers" in str(w.message)]
    assert len(said) == (dtype != torch.float32)
    assert {p.dtype for p in merged.parameters()} == {dtype} and not getattr(merged, "hf_quantizer", None)
    atol = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(merged(IDS).logits.float(), expected, atol=atol, rtol=0)
    for name, weight in weights_of(merged).items():
        assert torch.equal(weight == 0, zeros[name])
    merged.save_pretrained(tmp_path / "dense")  # plain transformers reads it
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    assert torch.equal(again(IDS).logits, merged(IDS).logits)
    save_sparse(merged, tmp_path / "packed")
    assert verify_sparsity(tmp_path / "packed", reference=tmp_path / "dense", pattern="2:4").exit_status == 0
    assert torch.equal(load_sparse(tmp_path / "packed")(IDS).logits, merged(IDS).logits)


def test_a_merged_adapter_can_still_be_dequantised():
    """From the weights before the first merge, not from those that were rounded."""
    model = tuned("nf4")
    expected = model(IDS).logits.detach()
    with pytest.warns(UserWarning, match=STATES):
        model.merge_adapter()
    merged = model.merge_and_unload(dequantize_to=torch.float32)
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=0)


def test_two_adapters_compose():
    model = tuned("nf4")
    model.add_adapter("second", SppConfig(r=4, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    expected = model(IDS).logits.detach()
    merged = model.merge_and_unload(dequantize_to=torch.float32)
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loaded_by_transformers(kind, tmp_path):
    """The way of its documentation: quantised while loading, prepared for training, adapter saved and loaded."""
    pruned().save_pretrained(tmp_path / "pruned")
    config = BitsAndBytesConfig(
        load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "pruned", quantization_config=config, dtype=torch.bfloat16
        )

    model = load()
    report = verify_sparsity(model, reference=tmp_path / "pruned")
    assert report.exit_status == 0  # none lost
    with pytest.raises(ValueError, match="quantised"):
        get_peft_model(load(), PstConfig())
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, SppConfig(r=4, task_type="CAUSAL_LM"))
    model.train()
    zeros = {name: weight == 0 for name, weight in weights_of(model.get_base_model()).items()}
    losses = train(model, 8, lr=2e-2)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    again.eval(), model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits.float(), model(IDS).logits.float(), atol=0.05, rtol=0)
    with pytest.warns(UserWarning, match=STATES):
        merged = again.merge_and_unload()
    for name, weight in weights_of(merged).items():
        assert torch.equal(weight == 0, zeros[name])
    merged.save_pretrained(tmp_path / "requantised")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "requantised")
    for name, weight in weights_of(reloaded).items():
        assert torch.equal(weight, weights_of(merged)[name])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_quantize_model_made_is_loaded_again(kind, tmp_path):
    model = quantize_model(pruned(), kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = weights_of(model)
    for name, weight in weights_of(again).items():
        assert torch.equal(weight, expected[name])
    with pytest.raises(ValueError, match="load the model with transformers"):
        sparsity_report(tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trainer_with_checkpointing(kind, tmp_path):
    from transformers import TrainingArguments

    model = get_peft_model(quantize_model(pruned(), kind), SppConfig(r=4))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (16, 10))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, gradient_checkpointing=True, use_cpu=True,
        report_to=[], disable_tqdm=True, save_steps=2, bf16=True, learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert all(layer.spp_B["default"].abs().sum() > 0 for layer in model.base_model.sparse_layers())


def test_evaluation_between_steps_changes_nothing():
    """bitsandbytes reorders 4-bit weights on some CPUs when its own forward runs without gradients."""
    model = tuned("nf4")
    expected = model(IDS).logits.detach()
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        model(IDS)
    model.train()
    # where it did, scales went through bfloat16 and back
    torch.testing.assert_close(model(IDS).logits, expected, atol=2e-2, rtol=0)


# What is refused


def test_pst_refuses_and_changes_nothing():
    model = quantize_model(pruned(), "nf4")
    with pytest.raises(ValueError, match=r"PST selects.*layers\.0.*quantised to 4 bits.*SppConfig"):
        get_peft_model(model, PstConfig())
    assert all(bits(linear) for linear in block_linears(model).values())


def test_linears_that_train_sixteen_bits_are_refused():
    model = llama()
    linear = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=True)
    model.model.layers[0].self_attn.q_proj = linear
    with pytest.raises(ValueError, match=r"got Linear8bitLt in `.*q_proj`, quantised in a way that is not read here"):
        get_peft_model(model, SppConfig(target_modules=["q_proj"]))


def test_a_linear_that_is_not_quantised_yet_is_told_so():
    linear = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    with pytest.raises(ValueError, match=r"not quantised yet.*model\.to\(device\)"):
        get_weight(linear)


def test_pruning_and_saving_refuse():
    model = quantize_model(pruned(), "nf4")
    with pytest.raises(ValueError, match="load the model without `quantization_config`"):
        prune_magnitude(model, sparsity=0.7)
    with pytest.raises(ValueError, match="quantized"):
        save_sparse(model, "nowhere")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kind": "int4"}, "'nf4', 'fp4', 'int8', got 'int4'"),
        ({"target_modules": ["nothing"]}, "at least one linear, got none"),
        ({"exclude_modules": ".*"}, "at least one linear, got none"),
    ],
)
def test_quantize_model_checks_its_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        quantize_model(llama(), **arguments)


def test_quantize_model_takes_plain_finite_linears():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got NaN or infinity in `model\.layers\.1\.mlp\.down_proj`"):
        quantize_model(model)
    with pytest.raises(ValueError, match="before adapters are added"):
        quantize_model(get_peft_model(pruned(), SppConfig()).get_base_model())
    with pytest.raises(ValueError, match="before adapters are added"):
        quantize_model(quantize_model(llama()))
    assert all(bits(linear) is None for linear in block_linears(model).values())
    with pytest.raises(ValueError, match=r"at most 32 bits, got torch\.float64"):
        quantize_model(llama().double())
    with pytest.raises(ValueError, match="carries an adapter"):
        dequantize_model(tuned("nf4").get_base_model())


def test_dequantize_to_is_checked_first():
    model = tuned("nf4")
    with pytest.raises(ValueError, match="bfloat16"):
        model.merge_and_unload(dequantize_to=torch.int8)
    with pytest.raises(ValueError, match="got one without such layers"):
        get_peft_model(pruned(), SppConfig()).merge_and_unload(dequantize_to=torch.bfloat16)
    with torch.no_grad():
        model.base_model.sparse_layers()[-1].spp_B["default"][0] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(dequantize_to=torch.bfloat16)
    assert all(bits(unwrap(linear)) for linear in block_linears(model.get_base_model()).values())


def test_widths_that_bitsandbytes_misreads_are_told():
    model = quantize_model(prune_magnitude(llama(hidden=32), pattern="2:4"), "nf4")
    with pytest.warns(UserWarning, match=r"gets those of 12 layers wrong.*q_proj`, 32"):
        model = get_peft_model(model, SppConfig(init_weights=False))
    expected = model(IDS).logits.detach()
    merged = model.merge_and_unload(dequantize_to=torch.float32)
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=0)


def test_the_guide_runs(tmp_path, monkeypatch):
    """docs/quantised.md, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parents[2] / "docs" / "quantised.md"
    in_memory, while_loading = re.findall(r"```py\n(.*?)```", page.read_text(), re.DOTALL)
    scope = {"model": llama(), "batches": [{"input_ids": IDS}]}
    exec(compile(in_memory, page.name, "exec"), scope)
    assert len(train(scope["model"], 2)) == 2
    pruned().save_pretrained("pruned")
    scope |= {"AutoModelForCausalLM": AutoModelForCausalLM, "BitsAndBytesConfig": BitsAndBytesConfig}
    exec(compile(while_loading, page.name, "exec"), scope)
    assert verify_sparsity(scope["model"], reference="pruned").lost == 0
