"""Where an adapter's base is, by the name that the adapter has for it."""

import json

import pytest

from peft_sparse.checkpoint.lookup import base_of_adapter
from peft_sparse.checkpoint.models import load_model


@pytest.mark.parametrize(
    ("named", "there", "found"),
    [
        ("run/pruned", ["run/pruned"], "run/pruned"),  # from another working directory
        ("old/pruned", ["run/pruned"], "run/pruned"),  # and renamed
        ("a/long/way/base", ["run/base"], "run/base"),  # and moved
        ("run/base", ["run/base"], "run/base"),
        ("owner/base", ["run/base"], None),  # a name on the Hub
        ("owner/base", [], None),
        ("base", ["cwd/base", "run/base"], None),  # what is in the working directory is meant
        ("run/pruned", ["cwd/run/pruned", "run/pruned"], "run/pruned"),  # not that of another run
        ("x/run/pruned", ["cwd/x/run/pruned", "run/pruned"], None),
    ],
)
def test_the_base_of_an_adapter(named, there, found, tmp_path, monkeypatch):
    for folder in ["run/adapter", "cwd", *there]:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "run/adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    assert base_of_adapter(tmp_path / "run/adapter") == (named if found is None else tmp_path / found)


def test_an_adapter_without_a_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"names its base model, got none in .*; pass it as `base`"):
        base_of_adapter(tmp_path)


def test_a_base_at_a_revision_is_not_that_of_the_main_branch(tmp_path):
    settings = {"base_model_name_or_path": "owner/base", "revision": "step1000"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"got revision 'step1000' of 'owner/base' in .*--revision step1000 .*`base`"):
        base_of_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"revision": "main"}))
    assert base_of_adapter(tmp_path) == "owner/base"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("null", "is a JSON object, got NoneType in"),
        ("[]", "is a JSON object, got list in"),
        ("{", "is JSON, got something else"),
        ("[" * 100_000, "is JSON, got something else"),
        ("{}", "has a method of PEFT's as `peft_type`, got None in"),
        ('{"peft_type": "NEWER"}', "got 'NEWER' in .*; update PEFT"),
        ('{"peft_type": ["SPP"]}', r"got \['SPP'\] in"),
        ('{"peft_type": "SPP", "base_model_name_or_path": 7}', "names its base model, got 7 in"),
    ],
)
def test_a_config_that_tells_no_adapter(written, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(written)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
