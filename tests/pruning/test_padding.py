"""Padding does not count, also where experts see rows that do not tell where they come from."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from peft_sparse import prune_magnitude, prune_wanda
from peft_sparse.linears import block_linears
from peft_sparse.pruning.padding import _of_tokens
from peft_sparse.pruning.walk import Walk
from peft_sparse.sparsity import ColumnNorms

import models


def switch() -> SwitchTransformersForConditionalGeneration:
    """Experts are modules of their own; attention differs between places, so no two tokens are alike."""
    config = SwitchTransformersConfig(
        vocab_size=models.VOCAB_SIZE,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=3,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        expert_capacity=64,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    torch.manual_seed(3)
    return SwitchTransformersForConditionalGeneration(config).eval()


class Mixture(nn.Module):
    """A block that routes its own input, to experts that are linears, or modules with two of them."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) if deep else nn.Linear(8, 8) for _ in range(3)
        )

    def forward(self, x, attention_mask=None):
        rows = x.reshape(-1, x.shape[-1])
        choice, out = self.router(rows).argmax(-1), torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            chosen = (choice == index).nonzero()[:, 0]
            if len(chosen):
                out[chosen] = expert(rows[chosen])
        return x + out.reshape(x.shape)


class MixtureModel(nn.Module):
    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixture(deep) for _ in range(2))

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = block(x)
        return x


def counted(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    with Walk(model, [batch]) as walk:
        steps = walk.find_steps(block_linears(model))
        return {
            name: norms.num_tokens
            for step in steps
            for name, norms in walk.gather(step, lambda linear: ColumnNorms(linear.in_features)).items()
        }


@pytest.mark.parametrize("deep", [False, True])
def test_each_counted_token_is_in_one_expert(deep):
    model, x = MixtureModel(deep), torch.randn(6, 40, 8)
    mask = torch.ones(6, 40, dtype=torch.int64)
    mask[:, 25:] = 0
    counts = counted(model, {"x": x, "attention_mask": mask})
    for block in ("blocks.0", "blocks.1"):
        for last in ("0", "2") if deep else ("",):
            names = [f"{block}.experts.{index}.{last}".rstrip(".") for index in range(3)]
            assert sum(counts[name] for name in names) == 150


@pytest.mark.parametrize("deep", [False, True])
def test_what_stands_in_padded_places_changes_nothing(deep):
    model, x, mask = MixtureModel(deep), torch.randn(6, 40, 8), torch.ones(6, 40, dtype=torch.int64)
    mask[:, 25:] = 0
    other = copy.deepcopy(model)
    scrambled = x.where(mask[..., None] == 1, 100 * torch.randn(6, 40, 8))
    prune_wanda(model, [{"x": x, "attention_mask": mask}], progress=False)
    prune_wanda(other, [{"x": scrambled, "attention_mask": mask}], progress=False)
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("form", ["additive", "bool", "no heads", "one row"])
def test_a_mask_of_what_each_token_attends_to(form):
    ids, mask = torch.randint(3, models.VOCAB_SIZE, (4, 10)), torch.ones(4, 10, dtype=torch.int64)
    mask[1:, 7:] = 0
    seen = (torch.ones(10, 10).tril() * mask[:, None, None]).bool()
    shaped = {
        "additive": torch.where(seen, 0.0, -torch.inf).nan_to_num(neginf=torch.finfo(torch.float32).min),
        "bool": seen,
        "no heads": mask[:, None].expand(4, 10, 10).float(),
        "one row": mask[:, None, None].float(),
    }[form]
    counted = _of_tokens(shaped)
    assert counted is not None and torch.equal(counted, mask.bool())
    if form == "additive":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one, other = (
                prune_wanda(models.tiny_llama(), [{"input_ids": ids, "attention_mask": given}], progress=False)
                for given in (mask, shaped)
            )
        for (name, parameter), expected in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(parameter, expected), name


def test_masks_that_say_nothing_of_tokens():
    assert _of_tokens(torch.zeros(2, 1, 4, 6)) is None and _of_tokens(torch.ones(2, 3, 1, 4, 4)) is None
    assert bool(_of_tokens(torch.zeros(2, 1, 4, 4)).all())  # additive, and nothing masked


class Latent(nn.Module):
    """Its second linear sees one head's inputs, with a dimension of 1 between sequences and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.second(self.first(x)[:, None]).squeeze(1)


class LatentModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Latent() for _ in range(2))

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_dimension_of_one_hides_no_padding():
    x, mask = torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.int64)
    mask[1:, 2:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = counted(LatentModel(), {"x": x, "attention_mask": mask})
    assert set(counts.values()) == {12} and len(counts) == 4


class Pooling(nn.Module):
    """Between its blocks two tokens become one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x, attention_mask=None):
        x = self.blocks[0](x)
        return self.blocks[1](x.unflatten(1, (-1, 2)).mean(2))


def test_padding_that_cannot_be_told_is_named():
    x, mask = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_wanda(Pooling(), [{"x": x, "attention_mask": mask}], progress=False)
    mask[1, 3:] = 0
    with pytest.warns(UserWarning, match=r"inputs of `blocks.1.0` are \(2, 3\) and the mask is \(2, 6\)") as told:
        prune_wanda(Pooling(), [{"x": x, "attention_mask": mask}] * 3, progress=False)
    assert len(told) == 1


def test_experts_of_a_transformers_model():
    model = switch()
    ids = torch.randint(3, models.VOCAB_SIZE, (8, 20))
    mask, decoder_mask = torch.ones_like(ids), torch.ones_like(ids)
    mask[:, 15:], decoder_mask[:, 11:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    counts = counted(model, batch | {"decoder_attention_mask": decoder_mask})
    experts = {name: count for name, count in counts.items() if ".experts." in name}
    for side, expected in (("encoder", 8 * 15), ("decoder", 8 * 11)):
        for last in ("wi", "wo"):
            for block in range(2):
                there = [n for name, n in experts.items() if name.startswith(f"{side}.block.{block}") and last in name]
                assert len(there) == 3 and sum(there) == expected
    assert counts["decoder.block.1.layer.1.EncDecAttention.k"] == 8 * 15


@pytest.mark.filterwarnings("error:The inputs of")
@pytest.mark.parametrize("length", [8, 5], ids=["another length", "as many tokens as the image has"])
def test_the_mask_of_a_text_is_not_that_of_an_image(length):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    image = {**sizes, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=16)).eval()
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, 3:] = 0
    ids = torch.randint(3, 64, (2, length))
    counts = counted(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16)})
    assert {n for name, n in counts.items() if name.startswith("vision_model")} == {2 * (4 + 1)}
    assert {n for name, n in counts.items() if name.startswith("text_model")} == {3 + length}


def test_experts_as_modules_are_pruned():
    model = switch()
    ids = torch.randint(3, models.VOCAB_SIZE, (8, 20))
    prune_wanda(model, [{"input_ids": ids, "decoder_input_ids": ids}], progress=False)
    for name, linear in block_linears(model).items():
        assert ((linear.weight == 0).sum(1) == linear.in_features // 2).all(), name
    assert sum(".experts." in name for name in block_linears(model)) == 2 * 2 * 3 * 2


def test_an_expert_without_tokens_is_named():
    model = MixtureModel(True)
    with torch.no_grad():
        model.blocks[1].router.bias[2] = -1e9
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"got none for `blocks.1.experts.2.0` from 1 batches; .* `exclude_modules`"):
        prune_wanda(model, [{"x": torch.randn(6, 40, 8)}], progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=models.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
def test_fused_experts_stay_dense_and_are_named(pruner):
    model = mixtral()
    message = r"4 parameters .* stay dense, 7\d% of the model, such as `model.layers.0.mlp.experts.gate_up_proj` \(4 x"
    with pytest.warns(UserWarning, match=message):
        if pruner == "magnitude":
            prune_magnitude(model)
        else:
            ids = torch.randint(3, models.VOCAB_SIZE, (2, 10))
            prune_wanda(model, [{"input_ids": ids}], progress=False)
    assert all((linear.weight == 0).any() for linear in block_linears(model).values())
    assert (model.model.layers[0].mlp.experts.gate_up_proj != 0).all()
    with pytest.raises(ValueError, match="got none in MixtralForCausalLM for target_modules="):
        prune_magnitude(model, target_modules=["experts"])
