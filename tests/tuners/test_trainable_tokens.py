"""Embeddings of single tokens, such as new ones of a chat template, are trained and saved with an adapter."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sparse import PstConfig, SppConfig, prune_magnitude, verify_sparsity

from models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:Merging the PST adapter", "ignore:Saving the PST adapter")
TOKENS = [90, 95]
IDS = torch.tensor([[5, 90, 6, 95, 7]])


def pruned(tied: bool) -> nn.Module:
    model = tiny_llama()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return prune_magnitude(model)


def trained(config, tied: bool) -> PeftModel:
    model = get_peft_model(pruned(tied), config)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(factors, lr=1.0).step()
    return model.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied head"])
@pytest.mark.parametrize("config_cls", [PstConfig, SppConfig])
def test_tokens_are_trained_saved_and_merged(config_cls, tied, tmp_path):
    model = trained(config_cls(trainable_token_indices=TOKENS), tied)
    logits = model(input_ids=IDS).logits
    base = pruned(tied)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(pruned(tied), tmp_path)(input_ids=IDS).logits, logits)
    model.load_adapter(tmp_path, "default")  # as Trainer does with the best checkpoint

    merged = model.merge_and_unload()
    embeddings = merged.get_input_embeddings().weight
    changed = (embeddings != base.get_input_embeddings().weight).any(1)
    assert changed.nonzero().flatten().tolist() == TOKENS
    assert (merged.get_output_embeddings().weight is embeddings) == tied
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits)
    assert config_cls is PstConfig or verify_sparsity(merged, reference=base).ok  # PST was not driven


def test_weights_of_other_tokens_are_refused(tmp_path):
    trained(SppConfig(trainable_token_indices=TOKENS), False).save_pretrained(tmp_path)
    model = trained(SppConfig(trainable_token_indices=[3, 4]), False)
    before = model(input_ids=IDS).logits
    with pytest.raises(ValueError, match=r"got trainable_token_indices=\[90, 95\] in .*\[3, 4\] in the"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize(
    "tokens, words",
    [
        ([96], "from 0 up to 95 in `model.embed_tokens`, got 96; for new ones"),
        ({"embed_tokens": [3, 200]}, "from 0 up to 95 in `model.embed_tokens`, got 200"),
        ({"lm_head": [96]}, "from 0 up to 95 in `lm_head`, got 96"),
        ({"wte": [1]}, "wte"),
    ],
    ids=["token", "token of a name", "token of the head", "name"],
)
@pytest.mark.parametrize("config_cls", [PstConfig, SppConfig])
def test_a_refusal_leaves_the_model_as_it_was(config_cls, tokens, words):
    model = pruned(False)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, config_cls(trainable_token_indices=tokens))
    assert list(model.state_dict()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_adapter_has_tokens_of_the_embedding_too():
    model = trained(SppConfig(trainable_token_indices=TOKENS), False)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"from 0 up to 95 in `model\.embed_tokens`, got 96"):
        model.add_adapter("other", SppConfig(trainable_token_indices=[96]))
    assert list(model.state_dict()) == before
    model.add_adapter("other", SppConfig(trainable_token_indices=[95]))
    assert "other" in model.peft_config
