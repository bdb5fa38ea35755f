"""An adapter goes on a model like the one that it was trained on, in class and number of tokens, whatever its base's
config.json says."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
)

from peft_sparse import PstConfig, SppConfig
from peft_sparse.checkpoint import load_model, merge_checkpoint
from peft_sparse.checkpoint.tasks import task_of
from peft_sparse.pruning import prune_magnitude

import models

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
IDS = torch.arange(5, 15)[None]
CASES = [
    (AutoModelForTokenClassification, SppConfig(task_type="TOKEN_CLS", r=2), {"num_labels": 5}),
    (AutoModelForTokenClassification, LoraConfig(task_type="TOKEN_CLS", target_modules=["query"]), {"num_labels": 5}),
    (AutoModelForQuestionAnswering, SppConfig(task_type="QUESTION_ANS", r=2), {}),
    (AutoModel, SppConfig(task_type="FEATURE_EXTRACTION", r=2), {}),
    (AutoModel, LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query"]), {}),
    # without a task type PEFT notes the class
    (AutoModelForSequenceClassification, PstConfig(modules_to_save=["classifier", "pooler"]), {"num_labels": 3}),
]


@pytest.fixture
def base(tmp_path) -> str:
    """The folder of a pruned model for masked language modelling."""
    torch.manual_seed(0)
    prune_magnitude(BertForMaskedLM(BertConfig(**SIZE)), sparsity=0.5).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def trained(auto, config, base, **labels):
    """An adapter, and a head if any, none of whose weights are those that it started with."""
    model = get_peft_model(auto.from_pretrained(base, **labels), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("auto", "config", "labels"), CASES)
def test_what_is_merged_is_what_was_trained(base, tmp_path, auto, config, labels):
    model = trained(auto, config, base, **labels)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(IDS)[0]
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    named = json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"]
    assert named == [type(model.get_base_model()).__name__]
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_another_task_is_refused(base, tmp_path):
    trained(*CASES[0][:2], base, num_labels=5).save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"its own task, AutoModelForTokenClassification, got 'causal_lm'; leave"):
        load_model(tmp_path / "tokens", "causal_lm")
    with pytest.raises(ValueError, match=r"got an adapter for AutoModelForTokenClassification in .*; merge it"):
        task_of(tmp_path / "tokens")
    trained(*CASES[5][:2], base).save_pretrained(tmp_path / "noted")
    assert task_of(tmp_path / "noted") == "sequence_classification"


@pytest.mark.filterwarnings("ignore")
def test_weights_without_a_place_in_the_model_are_no_adapter_of_it(base, tmp_path):
    """PEFT warns, and goes on with a LoRA that is random and zero."""
    trained(AutoModel, LoraConfig(target_modules=["query"]), base).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": None}))
    with pytest.raises(ValueError, match=r"on a model of the class that it was trained on, got BertForMaskedLM from"):
        load_model(tmp_path / "lora")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [LoraConfig(), SppConfig(r=4, task_type="CAUSAL_LM")])
@pytest.mark.parametrize("tied", [False, True])
def test_a_base_gets_the_tokens_that_were_added_before_training(config, tied, tmp_path):
    base = prune_magnitude(models.tiny_llama(), sparsity=0.5)
    base.config.tie_word_embeddings = tied
    base.save_pretrained(tmp_path / "base")
    resized = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(models.VOCAB_SIZE + 3)
    tuned = get_peft_model(resized, config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[models.VOCAB_SIZE + 2, 7, 8]])
    with torch.no_grad():
        expected = tuned(ids).logits
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "merged")(ids).logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_elsewhere_it_is_said_how_a_base_gets_such_tokens(tmp_path):
    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        pytest.skip("PEFT before 0.21 loads tensor by tensor, with torch's own message")
    prune_magnitude(models.tiny_llama(), sparsity=0.5).save_pretrained(tmp_path / "base")
    resized, plain = (LlamaForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    resized.resize_token_embeddings(models.VOCAB_SIZE + 3)
    get_peft_model(resized, SppConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"call `model.resize_token_embeddings\(99\)` first, or load it onto"):
        PeftModel.from_pretrained(plain, tmp_path / "adapter")


@pytest.mark.parametrize("config_class", [PrefixTuningConfig, PromptTuningConfig])
def test_a_learned_prompt_is_not_merged(config_class, tmp_path, monkeypatch):
    models.tiny_llama().save_pretrained(tmp_path / "llama")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    config = config_class(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("peft_sparse.checkpoint.convert.load_model", lambda *_, **__: pytest.fail("is loaded"))
    with pytest.raises(ValueError, match=r"got one of PR.*_TUNING .* changes none of them; use it beside its base"):
        merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
