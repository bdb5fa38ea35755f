"""Tiny models whose tensors have other names, or another form, in files than in memory."""

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ZambaConfig,
    ZambaForCausalLM,
)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}


def vit() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**SIZES, **IMAGE, num_labels=3)).eval()


def llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(**SIZES, **IMAGE)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision)).eval()


def mixtral() -> MixtralForCausalLM:
    """Its experts are one parameter in memory, and tensors of their own in files."""
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=2)).eval()


def zamba() -> ZambaForCausalLM:
    """The weights of one transformer block are in two of its layers, and in files once; its mixers have parameters of
    several heads."""
    sizes = SIZES | {"vocab_size": 64, "num_hidden_layers": 4, "attention_head_dim": 16, "mamba_d_state": 4}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": ["mamba", "hybrid"] * 2}
    return ZambaForCausalLM(ZambaConfig(**sizes, **layers)).eval()


RENAMED = [vit, llava, mixtral]
