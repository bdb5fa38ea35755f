"""Tiny models with random weights, made from configs, so that no test needs a network or a checkpoint.

Each factory returns a new model in evaluation mode, as `from_pretrained` does. The weights depend on `seed` alone, not
on what was drawn before, and the caller's random state is left as it was. Dropout is 0, so a forward in training mode
gives the same numbers. Sizes are small but not square (32 by 48), so that a swapped in and out shows; all are
divisible by 4, so that 2:4 fits. Take them through the fixtures of conftest.py, or call them for more than one.
"""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 96
MAX_LENGTH = 64


def tiny_llama(seed: int = 0, num_blocks: int = 2) -> LlamaForCausalLM:
    """Blocks of nn.Linear; grouped-query attention, so k and v are (16, 32) where q and o are (32, 32)."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _build(LlamaForCausalLM, config, seed)


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Two blocks of transformers' Conv1D, which stores its weight as (in_features, out_features)."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_inner=48,
        n_layer=2,
        n_head=4,
        n_positions=MAX_LENGTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _build(GPT2LMHeadModel, config, seed)


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    """Two encoder blocks, a pooler and a classifier with two labels; "dense" is a name inside and outside blocks."""
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
        pad_token_id=0,
    )
    return _build(BertForSequenceClassification, config, seed)


def tiny_bart(seed: int = 0, num_labels: int = 2) -> BartForSequenceClassification:
    """A classifier whose head goes by another name, and whose config means three labels where it tells none."""
    part = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    config = BartConfig(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        max_position_embeddings=MAX_LENGTH,
        dropout=0.0,
        num_labels=num_labels,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=2,
        **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in part.items()},
    )
    return _build(BartForSequenceClassification, config, seed)


def _build(model_cls: type[PreTrainedModel], config, seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_cls(config).eval()


WORDS = [f"w{number}" for number in range(VOCAB_SIZE - 4)]


def save_with_tokenizer(model: PreTrainedModel, folder) -> str:
    """Save a tiny model with a tokenizer whose tokens are `WORDS`; returns the folder."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)
