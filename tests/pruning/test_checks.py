"""What a pruner asks of its calibration data: nothing beyond the model's context."""

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    EncodecConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
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


# Names of inputs


@pytest.mark.parametrize(
    "key, words",
    [
        ("attn_mask", r"the nearest name is `attention_mask`\); mend it, or leave it out"),
        ("atention_mask", r"the nearest name is `attention_mask`"),
        ("position_id", r"the nearest name is `position_ids`"),
        ("pad_mask", "does not know; mend it, or leave it out"),
    ],
)
def test_a_mistyped_input(key, words):
    """Models of transformers leave it out, so that padding would count as text."""
    model = models.tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(3, 90, (2, 8))
    batches = [{"input_ids": ids}, {"input_ids": ids, key: torch.ones_like(ids)}]
    with pytest.raises(ValueError, match=rf"got `{key}` in batch 1, which .*{words}"):
        prune_wanda(model, batches, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=rf"got `{key}` in batch 1, which PeftModel .*{words}"):
        check_batches(batches, get_peft_model(model, LoraConfig()))


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2, models.tiny_bert])
def test_inputs_that_are_meant(factory):
    """What models take, and what tokenizers, collators and datasets have beside that."""
    ids = torch.randint(3, 90, (2, 8))
    same = ("attention_mask", "token_type_ids", "position_ids", "labels", "special_tokens_mask", "completion_mask")
    others = {"label": ids[:, 0], "idx": ids[:, 0], "length": ids[:, 0], "num_items_in_batch": ids[0, 0]}
    batch = {"input_ids": ids, **dict.fromkeys(same, torch.ones_like(ids)), **others}
    taken = batch if takes_any(factory()) else {key: batch[key] for key in ("input_ids", *same[:3])}
    assert check_batches([taken], factory()) == [taken]


def takes_any(model) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def test_inputs_of_a_model_of_one_s_own():
    class Strict(torch.nn.Module):
        def forward(self, tokens, mask=None):
            return tokens

    class Open(torch.nn.Module):
        def forward(self, tokens, **kwargs):
            return tokens + kwargs["tokenz"]

    batch = {"tokens": torch.ones(1, 2), "tokenz": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=r"got `tokenz` in batch 0, which Strict does not know; mend it"):
        check_batches([batch], Strict())
    with pytest.raises(ValueError, match=r"which Strict does not know \(the nearest name is `tokens`\)"):
        check_batches([{"tokenz": torch.ones(1, 2)}], Strict())
    assert check_batches([batch], Open()) == [batch]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float32])
def test_token_ids_of_a_type_that_no_embedding_takes(tiny_llama, dtype):
    with pytest.raises(ValueError, match=rf"int64 or int32, got {dtype} for `input_ids` of batch 0; take what"):
        prune_wanda(tiny_llama, [{"input_ids": torch.ones(1, 8, dtype=dtype)}], progress=False)


def marian() -> MarianMTModel:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
    return MarianMTModel(
        MarianConfig(
            vocab_size=40, decoder_vocab_size=70, share_encoder_decoder_embeddings=False, d_model=32, **sizes, **heads
        )
    )


def bert_and_gpt2() -> EncoderDecoderModel:
    bert = BertModel(BertConfig(**SIZES, vocab_size=40))
    return EncoderDecoderModel(
        encoder=bert, decoder=GPT2LMHeadModel(GPT2Config(vocab_size=70, n_embd=32, n_head=4, add_cross_attention=True))
    )


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("factory", [marian, bert_and_gpt2])
def test_a_decoder_with_a_vocabulary_of_its_own(factory):
    model = factory().eval()
    batch = {"input_ids": torch.full((1, 8), 39), "decoder_input_ids": torch.full((1, 6), 69)}
    prune_wanda(model, [batch], progress=False)
    for key, size in (("input_ids", 40), ("decoder_input_ids", 70)):
        with pytest.raises(ValueError, match=rf"vocabulary, from 0 to {size - 1}, got {size} in `{key}` of batch 0"):
            prune_wanda(model, [batch | {key: batch[key] + 1}], progress=False)


def test_a_model_with_several_configs_of_text():
    text = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    audio = EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=16, codebook_dim=16, upsampling_ratios=[2, 2], num_lstm_layers=1
    )
    decoder = MusicgenDecoderConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, num_codebooks=2
    )
    model = MusicgenForConditionalGeneration(
        MusicgenConfig(text_encoder=text.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder.to_dict())
    )
    ids, mask = torch.randint(0, 50, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    assert context_length(model) is None
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(0, 16, (4, 6))}
    prune_wanda(model.eval(), [batch], progress=False)
    assert all(num_zeros(linear) for linear in block_linears(model.text_encoder).values())
    assert all(num_zeros(linear) for linear in block_linears(model.decoder).values())
