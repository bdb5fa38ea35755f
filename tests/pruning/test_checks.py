"""What a pruner asks of its calibration data: nothing beyond the model's context."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_sparse import prune_wanda
from peft_sparse.linears import block_linears, num_zeros
from peft_sparse.pruning.checks import check_batches, check_positions, context_length, learned_positions

import models


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2, models.tiny_bert])
@pytest.mark.parametrize("key", ["input_ids", "inputs_embeds"])
def test_sequences_beyond_the_context(factory, key):
    model = factory()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.register_forward_pre_hook(lambda *_: pytest.fail("nothing is run"))
    shapes = [(1, models.MAX_LENGTH), (2, models.MAX_LENGTH + 1)]
    batches = [
        {key: torch.ones(shape, dtype=torch.int64) if key == "input_ids" else torch.ones(*shape, 32)}
        for shape in shapes
    ]
    with pytest.raises(ValueError, match=rf"context of 64 tokens, got 65 in `{key}` of batch 1; cut them"):
        prune_wanda(model, batches, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_whole_context_is_taken(tiny_gpt2):
    pruned = prune_wanda(tiny_gpt2, [{"input_ids": torch.randint(3, 90, (1, models.MAX_LENGTH))}], progress=False)
    assert all(num_zeros(linear) == linear.weight.numel() // 2 for linear in block_linears(pruned).values())


def test_contexts():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    roberta = RobertaModel(RobertaConfig(vocab_size=96, **sizes, max_position_embeddings=66, pad_token_id=1)).eval()
    assert context_length(roberta) == 64  # positions are counted from behind the padding token
    prune_wanda(roberta, [{"input_ids": torch.randint(3, 90, (1, 64))}], progress=False)
    with pytest.raises(ValueError, match="context of 64 tokens, got 65"):
        prune_wanda(roberta, [{"input_ids": torch.randint(3, 90, (1, 65))}], progress=False)
    t5 = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    assert context_length(T5ForConditionalGeneration(t5)) is None  # relative positions
    assert context_length(torch.nn.Linear(2, 2)) is None


def test_learned_positions_are_where_a_model_cannot_run_further(tiny_llama, tiny_gpt2, tiny_bert):
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    opt = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=20))
    roberta = RobertaModel(RobertaConfig(**sizes, intermediate_size=48, max_position_embeddings=22, pad_token_id=1))
    for model, positions in ((tiny_gpt2, 64), (tiny_bert, 64), (opt.eval(), 20), (roberta.eval(), 20)):
        assert learned_positions(model) == positions
        model(torch.full((1, positions), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, positions + 1), 5))
        with pytest.raises(ValueError, match=f"`x` is at most {positions}, .* got {positions + 1}; take less"):
            check_positions(model, "x", positions + 1)
    assert learned_positions(tiny_llama) is None  # computes them


def test_a_decoder_has_a_context_too():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=96, d_model=32, max_position_embeddings=16, **sizes, **heads)
    )
    ids = torch.randint(3, 90, (1, 17))
    with pytest.raises(ValueError, match="context of 16 tokens, got 17 in `decoder_input_ids` of batch 0"):
        check_batches([{"input_ids": ids[:, :8], "decoder_input_ids": ids}], model)
    with pytest.raises(ValueError, match="context of 16 tokens, got 17 in `labels` of batch 0"):
        check_batches([{"input_ids": ids[:, :8], "labels": ids}], model)
