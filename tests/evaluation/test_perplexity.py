"""Perplexity against a loop over tokens, and on a trained model against its published number."""

import math

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    ElectraConfig,
    ElectraForCausalLM,
    MegatronBertConfig,
    MegatronBertForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from benchmarks.architectures import ARCHITECTURES
from peft_sparse.evaluation import perplexity

import models


@pytest.mark.parametrize(("tokens", "window"), [(20, 8), (17, 8), (9, 64), (2, 2)])
def test_against_a_loop(tiny_llama, tokens: int, window: int):
    """17 tokens in windows of 8 leave one token alone, which predicts nothing."""
    ids = torch.randint(3, models.VOCAB_SIZE, (tokens,))
    losses = []
    for start in range(0, tokens, window):
        piece = ids[start : start + window]
        for t in range(1, len(piece)):
            logits = tiny_llama(input_ids=piece[None, :t]).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[piece[t]].item())
    assert perplexity(tiny_llama, ids, window, progress=False) == pytest.approx(math.exp(sum(losses) / len(losses)))


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_weights_that_are_kept_elsewhere(tiny_llama, tmp_path, offload):
    """The recipe of docs/memory.md: the first weight is on the meta device."""
    ids = torch.randint(3, models.VOCAB_SIZE, (20,))
    expected = perplexity(tiny_llama, ids, window=8, progress=False)
    folder = {} if offload is cpu_offload else {"offload_dir": tmp_path}
    model = offload(tiny_llama, execution_device="cpu", **folder)
    assert perplexity(model, ids, window=8, progress=False) == pytest.approx(expected)


def test_ids_of_32_bits(tiny_llama):
    ids = torch.randint(3, models.VOCAB_SIZE, (20,))
    assert perplexity(tiny_llama, ids.int(), progress=False) == perplexity(tiny_llama, ids, progress=False)
    with pytest.raises(ValueError, match=r"int64 or int32, got torch.int16"):
        perplexity(tiny_llama, ids.short(), progress=False)


def test_mode_is_put_back(tiny_gpt2):
    tiny_gpt2.train()
    perplexity(tiny_gpt2, torch.arange(8), progress=False)
    assert all(module.training for module in tiny_gpt2.modules())


@pytest.mark.parametrize(
    ("input_ids", "window", "message"),
    [
        (torch.ones(1, 8, dtype=torch.long), 4, r"got shape \(1, 8\)"),
        (torch.ones(1, dtype=torch.long), 4, r"got shape \(1,\)"),
        (torch.ones(8), 4, "of torch.float32"),
        (torch.ones(8, dtype=torch.long), 1, "at least 2 so that one is predicted, got 1"),
    ],
)
def test_errors(tiny_llama, input_ids, window, message: str):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama, input_ids, window)


def prompt_tuned() -> PeftModel:
    return get_peft_model(models.tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (models.tiny_bert, r"got shape \(2, 2\) from BertForSequenceClassification for 2 x 8 tokens"),
        (lambda: models.tiny_llama().model, "got a BaseModelOutputWithPast without any from LlamaModel"),
        (ARCHITECTURES["T5"].build, "got T5ForConditionalGeneration, whose encoder sees them all"),
        (lambda: BertForMaskedLM(models.tiny_bert().config), "got BertForMaskedLM, whose encoder sees them all"),
        (prompt_tuned, r"got shape \(2, 12, 96\) from PeftModelForCausalLM for 2 x 8 tokens"),
    ],
)
def test_other_models(build, message: str):
    with pytest.raises(ValueError, match=message):
        perplexity(build(), torch.arange(8), progress=False)


SIZES = {"vocab_size": models.VOCAB_SIZE, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = SIZES | {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": models.MAX_LENGTH}
ENCODERS = {
    BertLMHeadModel: BertConfig(**BERT),
    RobertaForCausalLM: RobertaConfig(**BERT, pad_token_id=1),
    ElectraForCausalLM: ElectraConfig(**BERT, embedding_size=32),
    MegatronBertForCausalLM: MegatronBertConfig(**BERT),
    XLMWithLMHeadModel: XLMConfig(vocab_size=models.VOCAB_SIZE, emb_dim=32, n_layers=2, n_heads=4),
    XLNetLMHeadModel: XLNetConfig(vocab_size=models.VOCAB_SIZE, d_model=32, n_layer=2, n_head=4, d_inner=48),
}


@pytest.mark.parametrize("tokens", [2, 8, 40])
@pytest.mark.parametrize("model_cls", ENCODERS)
def test_an_encoder_that_goes_by_the_name_of_a_decoder(model_cls, tokens: int):
    """As `AutoModelForCausalLM` loads a masked language model; one without weights is the hardest to tell."""
    model = model_cls(ENCODERS[model_cls])
    for ids in (torch.randint(3, models.VOCAB_SIZE, (tokens,)), torch.zeros(tokens, dtype=torch.int64)):
        with pytest.raises(ValueError, match=rf"got {model_cls.__name__}, whose predictions change with the tokens a"):
            perplexity(model, ids, window=20, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["GPT-2", "BLOOM", "Mamba", "Mixtral (MoE)", "Llama 4 (text)", "Gemma 3"])
def test_decoders_are_taken(name: str, dtype):
    ids = torch.randint(3, 90, (40,))
    assert perplexity(ARCHITECTURES[name].build().to(dtype), ids, window=20, progress=False) > 1


def test_a_bert_that_is_a_decoder():
    model = BertLMHeadModel(BertConfig(**BERT, is_decoder=True))
    assert perplexity(model, torch.randint(3, 90, (40,)), window=20, progress=False) > 1


def test_a_window_beyond_the_positions(tiny_gpt2, tiny_llama):
    """Of embeddings; and what counts is a window that there is."""
    ids = torch.arange(3, 90)
    with pytest.raises(ValueError, match=r"`window` is at most 64, the positions that the model has .*, got 65"):
        perplexity(tiny_gpt2, ids, window=65, progress=False)
    assert perplexity(tiny_gpt2, ids[:60], progress=False) > 1
    assert perplexity(tiny_llama, ids, window=65, progress=False) > 1


def test_a_trained_model(llama_dir, shared):
    """README.md of the model says 4.18 over 20 windows."""
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    text = (shared / "data/tinystories/sample_a.txt").read_text()[:8000]
    ids = AutoTokenizer.from_pretrained(llama_dir)(text, return_tensors="pt").input_ids[0]
    assert 3.5 < perplexity(model, ids[:2048], progress=False) < 5


def test_windows_are_as_long_as_the_context_unless_it_is_long(tiny_gpt2, tiny_llama):
    ids = torch.arange(1200) * 7 % 90
    positions = tiny_gpt2.config.n_positions
    assert positions < 512
    assert perplexity(tiny_gpt2, ids) == perplexity(tiny_gpt2, ids, window=positions)
    with pytest.raises(ValueError, match=f"`window` is at most {positions}"):
        perplexity(tiny_gpt2, ids, window=positions + 1)
    tiny_llama.config.max_position_embeddings = 10_000
    assert perplexity(tiny_llama, ids) == perplexity(tiny_llama, ids, window=512)
