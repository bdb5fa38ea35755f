"""The walk over the blocks against a naive one, for many architectures; and what it promises when something fails.

The naive one shares no code with it: it runs the whole model with hooks for every block, and sums squares by hand.
"""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForConditionalGeneration,
    BatchEncoding,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    FunnelConfig,
    FunnelModel,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from benchmarks import architectures
from peft_sparse import pruning
from peft_sparse.linears import block_linears, find_block_lists
from peft_sparse.pruning.calibration import evaluation_mode
from peft_sparse.pruning.checks import check_batches
from peft_sparse.pruning.targets import prune_by_scores
from peft_sparse.pruning.walk import Walk, check_blocks_called
from peft_sparse.sparsity import ColumnNorms

import models

SIZES = {"vocab_size": models.VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=models.VOCAB_SIZE, decoder_start_token_id=0, **sizes))


def bart():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=models.VOCAB_SIZE, d_model=32, max_position_embeddings=64, **sizes, **heads, **special)
    )


def gemma3():
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **heads, **windows))


def gemma3n():
    """The last two blocks attend to keys and values of the first two, which the walk has to notice."""
    sizes = {**SIZES, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "laurel_rank": 8}
    extra = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "altup_num_inputs": 2}
    extra["activation_sparsity_pattern"] = [0.0] * 4
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **sizes,
            **extra,
            **windows,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def opt():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(
        OPTConfig(vocab_size=models.VOCAB_SIZE, max_position_embeddings=64, word_embed_proj_dim=32, **sizes)
    )


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2))


def qwen3():
    """Grouped queries whose heads are normalised; q_proj is wider than the model."""
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16))


def phi3():
    """One linear for queries, keys and values of different sizes, one for gate and up."""
    return Phi3ForCausalLM(
        Phi3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=2)
    )


def vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4))


def whisper():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, "num_mel_bins": 8}
    special = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    limits = {"max_source_positions": 20, "max_target_positions": 16}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=96, **sizes, **heads, **special, **limits))


def wav2vec2():
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    sizes = SIZES | {"vocab_size": 32, "num_hidden_layers": 2}
    return Wav2Vec2Model(Wav2Vec2Config(**sizes, num_attention_heads=4, **convolutions, **positions))


def funnel():
    """Two lists of two blocks, the second on half of the tokens, and a decoder, which has no tokens of its own."""
    sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "num_decoder_layers": 2}
    return FunnelModel(FunnelConfig(vocab_size=models.VOCAB_SIZE, block_sizes=[2, 2], **sizes))


def albert():
    return AlbertModel(AlbertConfig(**SIZES, num_attention_heads=4, embedding_size=16))


ARCHITECTURES = {
    "llama": models.tiny_llama,
    "gpt2": models.tiny_gpt2,
    "bert_classifier": models.tiny_bert,
    "bert": lambda: BertModel(BertConfig(**SIZES, num_attention_heads=4)),
    "t5": t5,
    "bart": bart,
    "opt": opt,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3_fused_qkv": phi3,
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, num_attention_heads=4, pad_token_id=1)),
    "gemma3_sliding_and_full": gemma3,
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=4)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)),
    "deberta": lambda: DebertaV2Model(
        DebertaV2Config(**SIZES, num_attention_heads=4, relative_attention=True, pos_att_type=["p2c", "c2p"])
    ),
    "albert_shared_block": albert,
}


def batches_for(model: nn.Module, padding: bool = True) -> list[dict[str, torch.Tensor]]:
    """Three batches of different lengths, padded on the right."""
    batches = []
    for length in (9, 7, 12):
        batch = {"input_ids": torch.randint(3, models.VOCAB_SIZE, (2, length))}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if padding:
            batch["attention_mask"][0, length - 3 :] = 0
        if getattr(model.config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = torch.randint(3, models.VOCAB_SIZE, (2, length - 2))
        batches.append(batch)
    return batches


def naive_wanda(model: nn.Module, batches: list[dict[str, torch.Tensor]], sparsity: float, blocks: list[str]) -> None:
    """Prune block by block, each time with complete forwards of the whole model."""
    for block in blocks:
        linears = [m for name, m in block_linears(model).items() if name.startswith(f"{block}.")]
        sums = dict.fromkeys(linears, 0.0)
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones(0, 0))

            def add(linear, args, output, mask=mask, sums=sums):
                x = args[0]
                if x.dim() == 2 and len(x) == mask.numel():  # OPT flattens
                    x = x.reshape(*mask.shape, -1)
                if x.shape[:2] == mask.shape:
                    x = x * mask[:, :, None]
                sums[linear] = sums[linear] + x.double().flatten(0, -2).square().sum(0)

            hooks = [linear.register_forward_hook(add) for linear in linears]
            with torch.no_grad():
                model(**batch)
            for hook in hooks:
                hook.remove()
        for linear in linears:
            weight = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
            scores = weight.abs() * sums[linear].sqrt().float()
            order = scores.argsort(dim=1, stable=True)[:, : int(sparsity * weight.shape[1])]
            weight.scatter_(1, order, 0.0)


def block_names(model: nn.Module) -> list[str]:
    """Full names of the blocks in the order in which they run."""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.rsplit(".", 1)[-1] in ("layers", "layer", "h", "block", "albert_layer_groups")
        and not name.endswith("0.layer")
        and ".layer." not in name
        and "block." not in name
    ]
    lists.sort(key=lambda name: "decoder" in name and any("encoder" in other for other in lists))
    return [f"{name}.{index}" for name in lists for index in range(len(model.get_submodule(name)))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_masks_as_a_naive_walk(architecture: str):
    model = ARCHITECTURES[architecture]().eval()
    batches = batches_for(model)
    expected = copy.deepcopy(model)
    naive_wanda(expected, batches, 0.5, block_names(expected))
    pruning.prune_wanda(model, batches, sparsity=0.5, progress=False)
    changed = 0
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        changed += int((parameter == 0).sum())
    assert changed > 1000


@pytest.mark.parametrize("architecture", [vit, whisper, wav2vec2, funnel])
def test_images_sounds_and_lists_of_lists(architecture):
    model = architecture().eval()
    if architecture is vit:
        batches = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(3)]
    elif architecture is wav2vec2:
        batches = [{"input_values": torch.randn(2, 400)} for _ in range(3)]
    elif architecture is funnel:
        batches = batches_for(model)
    else:
        ids = torch.randint(3, 96, (2, 7))
        batches = [{"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids} for _ in range(3)]
    expected = copy.deepcopy(model)
    names = [f"{block_list.name}.{i}" for block_list in find_block_lists(model) for i in range(2)]
    naive_wanda(expected, batches, 0.5, names)
    pruning.prune_wanda(model, batches, sparsity=0.5, progress=False)
    assert_untouched(model, state_of(expected))
    assert sum(int((parameter == 0).sum()) for parameter in model.parameters()) > 1000


def test_a_module_tree_that_is_no_transformers_model():
    """torch's own encoder, whose fast path calls no linear at all; its attention keeps weights that are no linears."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval()
    dense = state_of(model)
    with pytest.warns(
        UserWarning, match=r"2 parameters .* stay dense, \d+% .*`layers.0.self_attn.in_proj_weight` \(96 x 32"
    ):
        pruning.prune_wanda(model, [{"src": torch.randn(2, 7, 32)} for _ in range(3)], sparsity=0.5, progress=False)
    for name, tensor in model.state_dict().items():
        if name.endswith(("linear1.weight", "linear2.weight")):
            assert ((tensor == 0).sum(1) == tensor.shape[1] // 2).all()
        else:
            assert torch.equal(tensor, dense[name]), name
    with pytest.raises(ValueError, match="Sequential has no list of such blocks"):
        pruning.prune_wanda(nn.Sequential(nn.Linear(4, 4)), [{"input": torch.ones(1, 4)}], progress=False)
    with pytest.raises(ValueError, match="got `0`, and Sequential has no list of such blocks; take it out"):
        pruning.prune_wanda(
            nn.Sequential(nn.Linear(4, 4)), [{"input": torch.ones(1, 4)}], target_modules=["0"], progress=False
        )


def test_blocks_that_share_keys_and_values():
    model = gemma3n().eval()
    expected, batches = copy.deepcopy(model), batches_for(model)
    with pytest.warns(UserWarning, match=r"layers.2` depends on more than the block before it"):
        pruning.prune_wanda(model, batches, progress=False)
    naive_wanda(expected, batches, 0.5, [f"model.layers.{index}" for index in range(4)])
    assert_untouched(model, state_of(expected))


@pytest.mark.filterwarnings("ignore:.*depends on more than the block before it")
@pytest.mark.parametrize("order", [[0, 0, 0], [0, 0, 1], [0, 1, 0]], ids=str)
def test_a_block_that_is_in_a_list_several_times(tiny_llama, order):
    """One block with one set of weights: pruned once, for the inputs of all its places."""
    tiny_llama.config.use_cache = False  # its places share a layer's index, and would share keys and values
    tiny_llama.model.layers = nn.ModuleList(tiny_llama.model.layers[index] for index in order)
    tiny_llama.config.num_hidden_layers = len(order)
    expected, batches = copy.deepcopy(tiny_llama), batches_for(tiny_llama)
    naive_wanda(expected, batches, 0.5, [f"model.layers.{order.index(index)}" for index in sorted(set(order))])
    pruning.prune_wanda(tiny_llama, batches, progress=False)
    assert_untouched(tiny_llama, state_of(expected))
    assert tiny_llama.config.peft_sparse["pruning"]["modules"] == 7 * len(set(order))
    assert pruning.owl_sparsity(tiny_llama, batches, 0.7).keys() == block_linears(tiny_llama).keys()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + 3 * self.down(self.up(x).tanh())


class Looped(nn.Module):
    """Its blocks are run in this order, as one list or in rounds over a list of all of them."""

    def __init__(self, order: list[int], rounds: int) -> None:
        super().__init__()
        blocks = [Residual() for _ in range(max(order) + 1)]
        self.blocks, self.rounds = nn.ModuleList(blocks[index] for index in order), rounds

    def forward(self, x):
        for _ in range(self.rounds):
            for block in self.blocks:
                x = block(x)
        return x


@pytest.mark.parametrize(
    ("order", "rounds"), [([0, 1, 0, 1], 1), ([0, 0, 1, 1], 1), ([0, 1], 3), ([0, 1, 2, 1], 1), ([0], 3)], ids=str
)
def test_blocks_that_run_in_turn_several_times(order, rounds):
    """A block sees what the one before it returns in each of its rounds, not what it returns in the last of them."""
    model = Looped(order, rounds)
    batches = [{"x": torch.randn(4, 5, 8) * torch.logspace(-2, 1, 8)} for _ in range(2)]
    expected, again = copy.deepcopy(model), order != sorted(order) or (rounds > 1 and len(order) > 1)
    naive_wanda(expected, batches, 0.5, [f"blocks.{order.index(index)}" for index in sorted(set(order))])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pruning.prune_wanda(model, batches, progress=False)
    assert_untouched(model, state_of(expected))
    assert again == any("depends on more than the block before it" in str(warning.message) for warning in told)


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place, compiled_blocks])
def test_compiled_models_are_pruned_as_plain_ones(tiny_llama, compiled):
    torch._dynamo.reset()
    model, batches = compiled(copy.deepcopy(tiny_llama)), batches_for(tiny_llama)
    model(**batches[0])  # the graph is there
    pruning.prune_wanda(model, batches, progress=False)
    pruning.prune_wanda(tiny_llama, batches, progress=False)
    for found, expected in zip(model.parameters(), tiny_llama.parameters(), strict=True):
        assert torch.equal(found, expected)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_encoder_decoder_counts_each_side_by_its_own_mask():
    """Padding on both sides, of equal shape: cross-attention counts the encoder's tokens, the rest the decoder's."""
    model = t5().eval()
    ids = torch.randint(3, 96, (2, 8))
    encoder_mask, decoder_mask = torch.ones_like(ids), torch.ones_like(ids)
    encoder_mask[:, 6:], decoder_mask[:, 3:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": encoder_mask, "decoder_input_ids": ids}
    counts = {}
    for way in (
        {"decoder_attention_mask": decoder_mask},
        {"labels": ids.masked_fill(decoder_mask == 0, -100)},
        {},
    ):
        walk = Walk(model, [{**batch, **way}])
        targets = block_linears(model)
        counts.clear()
        for step in walk.find_steps(targets):
            for name, norms in walk.gather(step, lambda linear: ColumnNorms(linear.in_features)).items():
                counts[name] = norms.num_tokens
        side = 6 if way else 16
        assert counts["encoder.block.0.layer.0.SelfAttention.q"] == 12
        assert counts["decoder.block.1.layer.0.SelfAttention.k"] == side
        assert counts["decoder.block.1.layer.1.EncDecAttention.k"] == 12
        assert counts["decoder.block.1.layer.1.EncDecAttention.q"] == side


def test_padding_does_not_count(tiny_llama):
    """What stands in padded places changes nothing."""
    other = copy.deepcopy(tiny_llama)
    batches = batches_for(tiny_llama)
    scrambled = [
        {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 5)} for batch in batches
    ]
    pruning.prune_wanda(tiny_llama, batches, progress=False)
    pruning.prune_wanda(other, scrambled, progress=False)
    assert_untouched(other, state_of(tiny_llama))


@pytest.mark.parametrize("way", ["list", "generator", "loader", "encoding"])
def test_batches_may_be_any_iterable(tiny_gpt2, way: str):
    ids = torch.randint(3, 96, (4, 8))
    batches = {
        "list": [{"input_ids": row[None]} for row in ids],
        "generator": ({"input_ids": row[None]} for row in ids),
        "loader": torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=1),
        "encoding": [BatchEncoding({"input_ids": row[None]}) for row in ids],
    }
    assert pruning.prune_wanda(tiny_gpt2, batches[way], progress=False) is tiny_gpt2
    expected = models.tiny_gpt2()
    naive_wanda(expected, [{"input_ids": row[None], "attention_mask": torch.ones(1, 8)} for row in ids], 0.5, blocks())
    assert_untouched(tiny_gpt2, state_of(expected))


def blocks() -> list[str]:
    return ["transformer.h.0", "transformer.h.1"]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch, got none"),
        (iter(()), "at least one batch, got none"),
        ([torch.ones(2, 3)], "a dict of tensors, got Tensor"),
        ([{"input_ids": [[1, 2]]}], "got list for `input_ids` in batch 0"),
        ([{}], "a dict of tensors"),
        ({"input_ids": torch.ones(2, 3)}, "several batches, got one dict"),
        (7, "several batches, got one int"),
        ([{"inputs_embeds": torch.tensor([[[float("nan")]]])}], "NaN or infinity in `inputs_embeds` of batch 0"),
        ([{"input_ids": torch.tensor([3, 4])}], r"shape \(sequences, tokens\), got \(2,\) for `input_ids`"),
        ([{"input_ids": torch.rand(1, 4)}], "int64 or int32, got torch.float32 for `input_ids` of batch 0"),
        ([{"input_ids": torch.ones(0, 4, dtype=torch.int64)}], r"got \(0, 4\) for `input_ids` of batch 0"),
        ([{"input_ids": torch.tensor([[3, 96]])}], "vocabulary, from 0 to 95, got 96 in `input_ids` of batch 0"),
        ([{"input_ids": torch.tensor([[-100, 3]])}], "from 0 to 95, got -100 in `input_ids` of batch 0"),
        (
            [{"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 3)}],
            r"an entry for each token, got shape \(1, 3\) beside `input_ids` of shape \(1, 2\) in batch 0",
        ),
    ],
)
def test_calibration_sets_that_are_refused(tiny_llama, batches, message: str):
    before = state_of(tiny_llama)
    with pytest.raises(ValueError, match=message):
        pruning.prune_wanda(tiny_llama, batches, progress=False)
    assert_untouched(tiny_llama, before)


def test_an_additive_mask_may_hold_infinity():
    assert check_batches([{"attention_mask": torch.tensor([[[[0.0, -torch.inf]]]])}])


def test_infinite_activations_in_the_last_block_leave_the_model_untouched(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.layers[1].post_attention_layernorm.weight[3] = torch.inf
    tiny_llama.train()
    before = state_of(tiny_llama)
    with pytest.raises(ValueError, match=r"infinity in the input of `model.layers.1.mlp.gate_proj` for batch 0"):
        pruning.prune_wanda(tiny_llama, batches_for(tiny_llama), progress=False)
    assert_untouched(tiny_llama, before)
    assert all(module.training for module in tiny_llama.modules())
    assert tiny_llama.config.use_cache


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_half_way_leaves_the_model_untouched(tiny_bert, monkeypatch, error):
    before, done = state_of(tiny_bert), []

    def interrupted(name, *args):
        if len(done) == 8:
            raise error("stop")
        done.append(name)
        prune_by_scores(name, *args)

    monkeypatch.setattr("peft_sparse.pruning.wanda.prune_by_scores", interrupted)
    with pytest.raises(error, match="stop"):
        pruning.prune_wanda(tiny_bert, batches_for(tiny_bert), progress=False)
    assert len(done) == 8
    assert_untouched(tiny_bert, before)


def test_batches_that_take_another_way_through_the_model(tiny_llama):
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

        def forward(self, x, short):
            x = self.blocks[0](x)
            return x if bool(short) else self.blocks[1](x)

    model, x = Skips(), torch.randn(2, 3, 4)
    before = state_of(model)
    batches = [{"x": x, "short": torch.tensor(flag)} for flag in (False, True)]
    with pytest.raises(ValueError, match=r"batch 1 calls `blocks.1` 0 times and the first one 1 times"):
        pruning.prune_wanda(model, batches, progress=False)
    with pytest.raises(ValueError, match=r"`blocks.1.0` \(1 in all\) from 1 batches; .*s='blocks.1\[\.\]\.\*'`"):
        pruning.prune_wanda(model, batches[1:], progress=False)
    assert_untouched(model, before)


def test_modes_are_put_back_one_by_one(tiny_bert):
    tiny_bert.train()
    tiny_bert.bert.embeddings.eval()
    modes = [module.training for module in tiny_bert.modules()]
    with evaluation_mode(tiny_bert):
        assert not any(module.training for module in tiny_bert.modules())
    assert [module.training for module in tiny_bert.modules()] == modes


def test_a_block_runs_twice_per_batch_and_the_head_once(tiny_llama):
    """The promise about cost; besides, the first batch is run to find the order of the blocks and to try the walk."""
    batches = batches_for(tiny_llama)
    runs = {"first": 0, "last": 0, "head": 0}

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    tiny_llama.model.layers[0].mlp.up_proj.register_forward_pre_hook(count("first"))
    tiny_llama.model.layers[1].mlp.up_proj.register_forward_pre_hook(count("last"))
    tiny_llama.lm_head.register_forward_pre_hook(count("head"))
    pruning.prune_wanda(tiny_llama, batches, progress=False)
    assert runs == {"first": 1 + 2 * len(batches), "last": 2 + len(batches), "head": 1}


class AddsInPlace(nn.Module):
    """Between its blocks it changes in place what they return; the first two share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])
        self.blocks[1][0].weight = self.blocks[0][0].weight

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = block(x)
            x[..., ::2] *= 3
        return x


def test_a_model_that_changes_outputs_in_place():
    """What is kept of a block is handed out many times, and has to be the same each time."""
    model = AddsInPlace()
    batches = [{"x": torch.randn(2, 5, 8), "attention_mask": torch.ones(2, 5)} for _ in range(3)]
    expected = copy.deepcopy(model)
    naive_wanda(expected, batches, 0.5, ["blocks.0", "blocks.1", "blocks.2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruning.prune_wanda(model, batches, progress=False)
    assert_untouched(model, state_of(expected))


def test_a_weight_shared_by_two_targets_comes_back_after_an_error():
    model = AddsInPlace()
    with torch.no_grad():
        model.blocks[1][0].bias[1] = torch.inf
    before = state_of(model)
    with pytest.raises(ValueError, match=r"infinity in the input of `blocks.2.0`"):
        pruning.prune_wanda(model, [{"x": torch.randn(2, 5, 8)}], progress=False)
    assert_untouched(model, before)


def test_by_default_linears_that_are_not_called_stay_dense():
    wavlm = architectures.ARCHITECTURES["WavLM"]
    model, batch = wavlm.build(), wavlm.batch()
    with pytest.warns(UserWarning, match=r"so 8 of 14 stay dense by default: .*attention\.k_proj"):
        pruning.prune_wanda(model, [{"input_values": batch["input_values"]}], sparsity=0.5, progress=False)
    for name, linear in block_linears(model).items():
        assert (linear.weight == 0).any() == (name.split(".")[-1] not in ("q_proj", "k_proj", "v_proj", "out_proj"))
    with pytest.raises(ValueError, match=r"got none for `.*k_proj`"):
        pruning.prune_wanda(
            model, [{"input_values": batch["input_values"]}], target_modules=["k_proj"], progress=False
        )


@pytest.mark.parametrize(
    ("called", "missed", "pattern"),
    [
        (["text.0"], ["vision.0.fc", "vision.1.fc"], "vision[.].*"),
        (["blocks.0"], ["blocks.1.fc"], "blocks.1[.].*"),
        (["stages.0.blocks.0", "stages.1.blocks.0"], ["stages.0.blocks.1.fc"], "stages.0.blocks.1[.].*"),
        (["stages.0.blocks.0"], ["stages.1.blocks.0.fc", "stages.1.blocks.1.fc"], "stages.1[.].*"),
    ],
)
def test_what_text_does_not_reach_is_excluded_and_nothing_else(called, missed, pattern):
    reached = [f"{name}.fc" for name in called]
    with pytest.raises(ValueError, match=re.escape(f"exclude_modules='{pattern}'")):
        check_blocks_called(called, [*reached, *missed], 1)
    assert all(re.fullmatch(pattern, name) for name in missed) and not any(re.fullmatch(pattern, n) for n in reached)
    check_blocks_called(called, reached, 1)
