"""Tiny random models of many architectures, each with a head and a batch of a task that it is used for.

Sizes are the smallest at which nothing is square by accident and 2:4 fits: 32 wide, 48 or 64 in the feed-forward part,
two blocks. The config is the architecture's own, so that what is special about it (fused projections, shared blocks,
experts, relative positions) is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import TaskType
from transformers import PreTrainedModel

VOCAB_SIZE, LENGTH, BATCH = 96, 8, 2

# As most configs name their sizes; an architecture whose config has other names says so below.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model and a batch for it.

    Attributes:
        model_class, config_class: of transformers.
        batch: makes the model's inputs, labels included.
        sizes: for the config.
        task_type: what a user tells PEFT, so that a new head is trained and saved.
        modules_to_save: the new head, where PEFT has no task type for it.
    """

    model_class: str
    config_class: str
    batch: Callable[[], Batch]
    sizes: Mapping[str, Any]
    task_type: TaskType | None = None
    modules_to_save: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> PreTrainedModel:
        """A new model in evaluation mode; the same one for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = getattr(transformers, self.config_class)(**self.sizes, **self.config)
            return getattr(transformers, self.model_class)(config).eval()


def _ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (BATCH, length), generator=torch.Generator().manual_seed(0))


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0))


def text_to_text() -> Batch:
    """A batch of a causal language model."""
    return {"input_ids": _ids(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64), "labels": _ids()}


def text_to_label() -> Batch:
    """A batch of a text classifier, one text shorter than the other."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, -2:] = 0
    return {"input_ids": _ids(), "attention_mask": mask, "labels": torch.tensor([0, 1])}


def source_to_target() -> Batch:
    """A batch of an encoder-decoder."""
    return {"input_ids": _ids(), "labels": _ids(5)}


def image_to_label() -> Batch:
    """A batch of an image classifier."""
    return {"pixel_values": _numbers(3, 16, 16), "labels": torch.tensor([0, 1])}


def speech_to_text() -> Batch:
    """A batch of Whisper: mel spectrograms, and what was said."""
    return {"input_features": _numbers(8, 32), "labels": _ids(5)}


def sound_to_label() -> Batch:
    """A batch of a classifier of sounds."""
    return {"input_values": _numbers(400), "labels": torch.tensor([0, 1])}


def causal(model_class: str, config_class: str, sizes: Mapping[str, Any] = SIZES, **config: Any) -> Architecture:
    """A causal language model."""
    return Architecture(model_class, config_class, text_to_text, sizes, TaskType.CAUSAL_LM, config=config)


def classifier(model_class: str, config_class: str, sizes: Mapping[str, Any] = SIZES, **config: Any) -> Architecture:
    """A text classifier."""
    return Architecture(model_class, config_class, text_to_label, sizes, TaskType.SEQ_CLS, config=config)


def seq2seq(model_class: str, config_class: str, **config: Any) -> Architecture:
    """An encoder-decoder."""
    sizes = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return Architecture(model_class, config_class, source_to_target, sizes, TaskType.SEQ_2_SEQ_LM, config=config)


def vision(model_class: str, config_class: str, **config: Any) -> Architecture:
    """An image classifier."""
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8, "num_labels": 2}
    return Architecture(model_class, config_class, image_to_label, sizes, None, ("classifier",), config)


_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_GPT2 = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_TOKENS = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
_EXPERTS = {"num_experts_per_tok": 2, **GROUPED}

# The table of docs/models.md, in its order.
ARCHITECTURES: dict[str, Architecture] = {
    "BERT": classifier("BertForSequenceClassification", "BertConfig"),
    "RoBERTa": classifier("RobertaForSequenceClassification", "RobertaConfig"),
    "DistilBERT": classifier(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": VOCAB_SIZE, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0},
    ),
    "DeBERTa-v2": classifier(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=4, max_relative_positions=16, share_att_key=True,
    ),
    "ModernBERT": classifier(
        "ModernBertForSequenceClassification", "ModernBertConfig", SIZES | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "GPT-2": causal("GPT2LMHeadModel", "GPT2Config", _TOKENS, **_GPT2),
    "OPT": causal("OPTForCausalLM", "OPTConfig", SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "BLOOM": causal("BloomForCausalLM", "BloomConfig", _TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "Llama": causal("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "Mistral": causal("MistralForCausalLM", "MistralConfig", sliding_window=4, **GROUPED),
    "Qwen2": causal("Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=2),
    "Qwen3": causal("Qwen3ForCausalLM", "Qwen3Config", **GROUPED),
    "Gemma 2": causal("Gemma2ForCausalLM", "Gemma2Config", sliding_window=4, **GROUPED),
    "Gemma 3": causal("Gemma3ForCausalLM", "Gemma3TextConfig", sliding_window=4, **GROUPED),
    "Phi-3": causal("Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2),
    "Falcon": causal("FalconForCausalLM", "FalconConfig"),
    "GPT-NeoX": causal("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "T5": seq2seq("T5ForConditionalGeneration", "T5Config", **_T5),
    "BART": seq2seq("BartForConditionalGeneration", "BartConfig", **_BART),
    "ViT": vision("ViTForImageClassification", "ViTConfig"),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration", "WhisperConfig", speech_to_text,
        {**_TOKENS, **_BART, "decoder_start_token_id": 1, "num_mel_bins": 8, "max_source_positions": 16,
         "max_target_positions": 16},
    ),
    "Mixtral (MoE)": causal("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **_EXPERTS),
    "Qwen3-MoE": causal(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, moe_intermediate_size=16, **_EXPERTS
    ),
    "Llama 4 (text)": causal(
        "Llama4ForCausalLM", "Llama4TextConfig", num_local_experts=4, intermediate_size_mlp=48,
        attention_chunk_size=8, **{**_EXPERTS, "num_experts_per_tok": 1},
    ),
    "PhiMoE": causal(
        "PhimoeForCausalLM", "PhimoeConfig", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2,
    ),
    "DeepSeek-V3": causal(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=16, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1, num_key_value_heads=4,
    ),
    "Qwen2-MoE": causal(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", num_experts=4, moe_intermediate_size=16,
        shared_expert_intermediate_size=24, num_experts_per_tok=2, num_key_value_heads=2,
    ),
    "Qwen3.5": causal(
        "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"], **GROUPED,
    ),
    "ALBERT": classifier("AlbertForSequenceClassification", "AlbertConfig", embedding_size=16),
    "ELECTRA": classifier("ElectraForSequenceClassification", "ElectraConfig", embedding_size=16),
    "XLM-RoBERTa": classifier("XLMRobertaForSequenceClassification", "XLMRobertaConfig"),
    "MPNet": classifier("MPNetForSequenceClassification", "MPNetConfig"),
    "GPT-J": causal("GPTJForCausalLM", "GPTJConfig", _TOKENS, **_GPT2, rotary_dim=4),
    "GPT-Neo": causal(
        "GPTNeoForCausalLM", "GPTNeoConfig", _TOKENS, hidden_size=32, num_layers=2, num_heads=4,
        intermediate_size=48, attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
    ),
    "GPT-BigCode": causal("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _TOKENS, **_GPT2),
    "MPT": causal("MptForCausalLM", "MptConfig", _TOKENS, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "Phi": causal("PhiForCausalLM", "PhiConfig"),
    "OLMo 2": causal("Olmo2ForCausalLM", "Olmo2Config"),
    "Cohere": causal("CohereForCausalLM", "CohereConfig", num_key_value_heads=2),
    "Granite": causal("GraniteForCausalLM", "GraniteConfig", num_key_value_heads=2),
    "StarCoder2": causal("Starcoder2ForCausalLM", "Starcoder2Config", num_key_value_heads=2),
    "SmolLM3": causal("SmolLM3ForCausalLM", "SmolLM3Config", num_key_value_heads=2),
    "Mamba": causal(
        "MambaForCausalLM", "MambaConfig", _TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4,
        time_step_rank=4,
    ),
    "mT5": seq2seq("MT5ForConditionalGeneration", "MT5Config", **_T5),
    "Pegasus": seq2seq("PegasusForConditionalGeneration", "PegasusConfig", **_BART),
    "T5Gemma": seq2seq(
        "T5GemmaForConditionalGeneration", "T5GemmaConfig", encoder=SIZES | GROUPED, decoder=SIZES | GROUPED,
    ),
    "WavLM": Architecture(
        "WavLMForSequenceClassification", "WavLMConfig", sound_to_label,
        {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        modules_to_save=("classifier",),
        config={
            "num_attention_heads": 4, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 16, "mask_time_prob": 0.0, "layerdrop": 0.0,
        },
    ),
    "DeiT": vision("DeiTForImageClassification", "DeiTConfig"),
    "BEiT": vision("BeitForImageClassification", "BeitConfig"),
    "DINOv2": vision("Dinov2ForImageClassification", "Dinov2Config"),
}  # fmt: skip

# The architectures that the project promises to have tried; the others are there because people use them.
PROMISED = (
    "BERT", "RoBERTa", "DistilBERT", "DeBERTa-v2", "ModernBERT", "GPT-2", "OPT", "BLOOM", "Llama", "Mistral", "Qwen2",
    "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "Falcon", "GPT-NeoX", "T5", "BART", "ViT", "Whisper", "Mixtral (MoE)",
)  # fmt: skip
