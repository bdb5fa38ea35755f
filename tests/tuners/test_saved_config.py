"""What a saved config promises to whoever reads it later: another version of this package or of PEFT, or a live
adapter that has another config."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sparse import PstConfig, SppConfig, prune_magnitude

from models import tiny_bert, tiny_llama


@dataclass
class LaterSppConfig(SppConfig):
    """Of a version with one more field."""

    brand_new: int = 0


@dataclass
class LaterPstConfig(PstConfig):
    brand_new: int = 0


@pytest.fixture(params=["pst", "spp"])
def saved(request, tmp_path):
    """The folder of a saved adapter, the class of its config and a later version of that."""
    now, later = {"pst": (PstConfig, LaterPstConfig), "spp": (SppConfig, LaterSppConfig)}[request.param]
    model = get_peft_model(prune_magnitude(tiny_llama()), now(r=5, target_modules=["q_proj", "o_proj"]))
    model.save_pretrained(tmp_path)
    return tmp_path, now, later


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in settings.items() if value != "gone"}))
    return json.loads(file.read_text())


def test_a_later_version_reads_it(saved):
    folder, _, later = saved
    assert later(**edit(folder)).brand_new == 0


def test_a_setting_of_a_later_version_is_dropped_only_if_it_changes_nothing(saved):
    folder, now, later = saved
    settings = edit(folder)
    for value in (0, 1):
        known = {name: entry for name, entry in settings.items() if name != "checksums"}
        crc32 = later(**known, brand_new=value)._crc32()
        edit(folder, brand_new=value, checksums={**settings["checksums"], "config": crc32})
        if value:
            with pytest.raises(ValueError, match=r"that only a later version of peft_sparse or peft knows.*upgrade"):
                now.from_pretrained(str(folder))
        else:
            with pytest.warns(UserWarning, match="brand_new"):
                assert now.from_pretrained(str(folder)).r == 5


@pytest.mark.parametrize("changes", [{"r": 8}, {"r": "gone"}, {"target_modules": "gone"}, {"exclude_modules": ["x"]}])
def test_what_was_changed_removed_or_added_is_seen(saved, changes):
    folder, now, _ = saved
    edit(folder, **changes)
    with pytest.raises(ValueError, match="is damaged, or has a setting"):
        now.from_pretrained(str(folder))


def test_what_is_at_its_default_may_be_missing(saved):
    folder, now, _ = saved
    edit(folder, init_weights="gone", layers_pattern="gone")
    assert now.from_pretrained(str(folder)).r == 5


@pytest.mark.parametrize("form", [list, tuple, set, frozenset])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["v_proj", "q_proj", "k_proj"]},
        {"exclude_modules": ["v_proj", "q_proj", "k_proj"]},
        {"layers_to_transform": [8, 1]},
        {"layers_to_transform": [0], "layers_pattern": ["layers", "h"]},
        {"modules_to_save": ["norm", "lm_head"], "labels": ["no", "yes"]},
    ],
    ids=str,
)
def test_names_and_numbers_in_any_form_are_read_back(settings, form, tmp_path):
    fields = {name: form(value) for name, value in settings.items()}
    model = get_peft_model(prune_magnitude(tiny_llama()), SppConfig(task_type="CAUSAL_LM", **fields))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(prune_magnitude(tiny_llama()), tmp_path).peft_config["default"]
    assert all(set(getattr(loaded, name)) == set(value) for name, value in settings.items())


@pytest.mark.parametrize("form", [tuple, set])
def test_modules_to_save_in_any_form_are_added_to_by_peft(form):
    config = SppConfig(task_type="SEQ_CLS", modules_to_save=form(["pooler"]))
    get_peft_model(prune_magnitude(tiny_bert()), config)
    assert config.modules_to_save == ["pooler", "classifier", "score"]


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (SppConfig, {"spp_alpha": 4}),
        (SppConfig, {"r": 64, "spp_alpha": 64}),
        (PstConfig, {"beta": 0.1}),
        (PstConfig, {"alpha1": 2.0, "alpha2": 0.0}),
        (PstConfig, {"pattern": "2:4"}),
        (PstConfig, {"importance": "magnitude"}),
    ],
    ids=str,
)
def test_weights_are_not_loaded_under_settings_that_compute_something_else(cls, settings, tmp_path):
    """As when a run is resumed after its recipe was edited."""
    get_peft_model(prune_magnitude(tiny_llama()), cls()).save_pretrained(tmp_path)
    model = get_peft_model(prune_magnitude(tiny_llama()), cls(**settings))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    with pytest.raises(ValueError, match=rf"got .* and {ours} in the adapter .* Nothing was loaded"):
        model.load_adapter(str(tmp_path), "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_adapter(str(tmp_path), "other")  # the way out


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (SppConfig, {"spp_dropout": 0.1, "init_weights": "ones"}),
        (PstConfig, {"sparsity": 0.5, "schedule": "linear", "total_steps": 9, "final_warmup": 0.5}),
    ],
)
def test_what_decides_how_training_goes_on_may_change(cls, settings, tmp_path):
    saved = get_peft_model(prune_magnitude(tiny_llama()), cls(init_weights=False))
    saved.save_pretrained(tmp_path)
    model = get_peft_model(prune_magnitude(tiny_llama()), cls(**settings))
    model.load_adapter(str(tmp_path), "default")
    expected = {name: tensor for name, tensor in saved.state_dict().items() if cls.__name__[:3].lower() + "_" in name}
    assert expected and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_labels_are_those_of_the_model_that_was_adapted(saved, tmp_path):
    """They may be renamed in the file: they change nothing that is computed."""
    _, now, _ = saved
    base = prune_magnitude(tiny_bert())
    for names, expected in ((["LABEL_0", "LABEL_1"], None), (["no", "yes"], ["no", "yes"])):
        base.config.id2label = dict(enumerate(names))
        model = get_peft_model(copy.deepcopy(base), now(r=4, task_type="SEQ_CLS"))
        model.save_pretrained(tmp_path / "labels")
        assert now.from_pretrained(str(tmp_path / "labels")).labels == expected
    edit(tmp_path / "labels", labels=["-", "+"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "labels")
    assert loaded.peft_config["default"].labels == ["-", "+"]
    assert loaded.get_base_model().config.id2label == {0: "no", 1: "yes"}  # which is the user's
    assert get_peft_model(base, now(r=4)).peft_config["default"].labels is None
    used = now(r=4, task_type="SEQ_CLS")
    for names, expected in ((["neg", "pos"], ["neg", "pos"]), (["no", "yes"], ["no", "yes"]), (["LABEL_0"], None)):
        base.config.id2label = dict(enumerate(names))
        assert get_peft_model(copy.deepcopy(base), used).peft_config["default"].labels == expected
    given = now(r=4, task_type="SEQ_CLS", labels=["-", "+"])
    assert get_peft_model(copy.deepcopy(base), given).peft_config["default"].labels == ["-", "+"]
    with pytest.raises(ValueError, match="`labels` is a list of names, got 'yes'"):
        now(labels="yes")
