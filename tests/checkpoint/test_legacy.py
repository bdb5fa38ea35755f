"""Checkpoints of compressed-tensors 0.14.0.1 in layouts that nothing else reads any more; see make_samples.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from peft_sparse.checkpoint import load_sparse, save_sparse
from peft_sparse.evaluation import sparsity_report, verify_sparsity

SAMPLES = Path(__file__).resolve().parent / "samples"
LAYOUTS = ["sparse-bitmask", "sparse-24-bitmask"]


@pytest.fixture(params=LAYOUTS)
def sample(request, tmp_path) -> Path:
    """A copy of a sample that a test may change."""
    return Path(shutil.copytree(SAMPLES / request.param, tmp_path / request.param))


def test_every_tensor_is_the_one_that_was_compressed(sample):
    dense = load_file(sample / "dense.safetensors")
    model = load_sparse(sample)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    state = model.state_dict()
    assert state.keys() == dense.keys()
    for name, tensor in dense.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def test_nothing_of_the_old_layout_is_left_on_the_model(sample, tmp_path):
    model = load_sparse(sample)
    assert not hasattr(model.config, "quantization_config")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(tmp_path / "dense")
    save_sparse(model, tmp_path / "packed")
    for again in (LlamaForCausalLM.from_pretrained(tmp_path / "dense"), load_sparse(tmp_path / "packed")):
        with torch.no_grad():
            assert torch.equal(again(ids).logits, logits)


def test_it_can_be_verified_where_it_lies(sample):
    pattern = "2:4" if "24" in sample.name else None
    report = verify_sparsity(sample, reference=load_sparse(sample), pattern=pattern)
    assert report.ok
    assert (report.lost, report.gained) == (0, 0)
    assert len(report.layers) == 7
    assert sparsity_report(sample).total_zeros == report.total_zeros


def edit(sample: Path, change) -> None:
    """Change the tensors of a sample."""
    tensors = load_file(sample / "model.safetensors")
    change(tensors)
    save_file(tensors, sample / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["compressed", "bitmask"])
def test_parts_that_do_not_fit_are_an_error_that_names_the_tensor(sample, part):
    name = "model.layers.0.mlp.down_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if part == "bitmask":
            tensors[f"{name}.bitmask"][0, 0] ^= 1
        else:
            tensors[f"{name}.compressed"] = tensors[f"{name}.compressed"].flatten()[:-1].clone()

    edit(sample, change)
    with pytest.raises(ValueError, match=rf"`{name}.weight` is damaged: each bit"):
        load_sparse(sample)


@pytest.mark.parametrize("shape", [[], [-16, 8], [0, 8], [128]])
@pytest.mark.parametrize("packed", [False, True])
def test_a_shape_that_no_weight_has(sample, shape, packed):
    name = "model.layers.0.mlp.down_proj"
    edit(sample, lambda tensors: tensors.update({f"{name}.shape": torch.tensor(shape, dtype=torch.int64)}))
    with pytest.raises(
        ValueError, match=rf"`{name}.weight` is damaged: a packed weight has two dimensions or more, got"
    ):
        load_sparse(sample, packed=packed)


def test_a_part_that_is_missing(sample):
    edit(sample, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.shape"))
    with pytest.raises(ValueError, match=r"exactly the tensors of its model, got missing keys .*down_proj.weight"):
        load_sparse(sample)


def test_quantized_weights_are_refused(sample):
    config = json.loads((sample / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}}
    (sample / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sparse floating point weights, got quantized ones"):
        load_sparse(sample)
