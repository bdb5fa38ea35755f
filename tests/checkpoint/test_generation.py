"""A generation config that transformers loads, but refuses to save once it has changed, such as Llama-2-chat's."""

import json
from pathlib import Path

import pytest

from peft_sparse.checkpoint import load_sparse, pack_checkpoint, prune_checkpoint, unpack_checkpoint
from peft_sparse.pruning import prune_magnitude

import models

FIELDS = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}


@pytest.fixture(params=[True, False], ids=["from a model's config", "its own"])
def dense(request, tmp_path) -> Path:
    prune_magnitude(models.tiny_llama(), "2:4").save_pretrained(tmp_path / "dense")
    fields = FIELDS | ({"_from_model_config": True} if request.param else {})
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(fields))
    return tmp_path / "dense"


def fields_in(folder: Path) -> dict:
    fields = json.loads((folder / "generation_config.json").read_text())
    fields.pop("transformers_version", None)
    return fields


def test_conversions_keep_its_fields(dense, tmp_path):
    pack_checkpoint(dense, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    for packed in (False, True):
        prune_checkpoint(dense, tmp_path / f"pruned-{packed}", "magnitude", packed=packed)
    prune_checkpoint(tmp_path / "packed", tmp_path / "pruned", "magnitude")
    for name in ("packed", "again", "pruned-False", "pruned-True", "pruned"):
        assert fields_in(tmp_path / name) == fields_in(dense)


def test_a_packed_model_is_saved_again_as_one_of_from_pretrained_is(dense, tmp_path):
    pack_checkpoint(dense, tmp_path / "packed")
    model = load_sparse(tmp_path / "packed")
    assert model.generation_config.temperature == 0.9
    changed = getattr(model.generation_config, "_original_object_hash", None) != hash(model.generation_config)
    assert not changed  # by which transformers decides
