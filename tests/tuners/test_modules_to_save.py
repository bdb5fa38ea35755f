"""Modules that are trained and saved whole: what was saved loads again, and a name of nothing is told at once."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import SplinterConfig, SplinterForQuestionAnswering

from peft_sparse import PstConfig, SppConfig, prune_magnitude

from models import tiny_bert, tiny_gpt2, tiny_llama

each_config = pytest.mark.parametrize("config", [PstConfig, SppConfig])


def tiny_splinter() -> SplinterForQuestionAnswering:
    """A model for question answering whose head has another name than PEFT adds."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return SplinterForQuestionAnswering(SplinterConfig(vocab_size=100, max_position_embeddings=64, **sizes))


def filled(model):
    """The model, with random numbers for what is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def trained(model) -> dict[str, torch.Tensor]:
    parts = ("spp_", "pst_", "modules_to_save")
    return {name: tensor for name, tensor in model.state_dict().items() if any(part in name for part in parts)}


@each_config
@pytest.mark.parametrize(
    "factory, task", [(tiny_splinter, "QUESTION_ANS"), (tiny_bert, "SEQ_CLS"), (tiny_bert, "TOKEN_CLS")]
)
def test_heads_that_peft_names_and_a_model_lacks(config, factory, task, tmp_path):
    base = prune_magnitude(factory())
    model = filled(get_peft_model(base, config(task_type=task)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(prune_magnitude(factory()), tmp_path)
    assert loaded.peft_config["default"].modules_to_save
    assert all(torch.equal(tensor, trained(loaded)[name]) for name, tensor in trained(model).items())
    model.load_adapter(tmp_path, "default")  # as Trainer does with the best checkpoint


@each_config
@pytest.mark.parametrize(
    "factory, names, words",
    [
        (tiny_gpt2, ["lm_head", "embed_tokens"], r"got 'embed_tokens', which is none of GPT2LMHeadModel; mend it"),
        (tiny_llama, ["embed_token"], r"got 'embed_token', .*\(the nearest name is 'embed_tokens'\); mend it"),
    ],
)
def test_a_name_of_nothing(config, factory, names, words):
    model = factory()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, config(modules_to_save=names))
    assert list(model.state_dict()) == before


@each_config
def test_an_adapter_that_was_saved_with_a_name_of_nothing_loads(config, tmp_path):
    model = get_peft_model(prune_magnitude(tiny_llama()), config())
    model.peft_config["default"].modules_to_save = ["wte"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(prune_magnitude(tiny_llama()), tmp_path)
    assert all(torch.equal(tensor, trained(loaded)[name]) for name, tensor in trained(model).items())
    model.load_adapter(tmp_path, "default")


@each_config
def test_weights_without_a_module_do_not_replace_it(config, tmp_path):
    """Of an adapter that is there already."""
    get_peft_model(prune_magnitude(tiny_llama()), config()).save_pretrained(tmp_path)
    model = get_peft_model(prune_magnitude(tiny_llama()), config(modules_to_save=["norm"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"got \['norm'\] in the model and none of them .*Nothing was loaded"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@each_config
def test_what_an_adapter_trains_whole_gets_no_other_one_by_default(config, tmp_path):
    base = lambda: prune_magnitude(tiny_llama())  # noqa: E731
    model = get_peft_model(base(), config(exclude_modules=["up_proj"], modules_to_save=["up_proj"]))
    with pytest.warns(UserWarning, match=r"so `model.layers.\*.mlp.up_proj.original_module`, .* get no adapter"):
        model.add_adapter("other", config())
    model.set_adapter("other")
    filled(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "other")
    ids = torch.arange(3, 13)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
