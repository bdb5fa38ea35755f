"""Streams that are shorter than the training: pass after pass, also for a run that goes on in the middle of one."""

import shutil
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from peft_sparse.training import finetune
from peft_sparse.training.build import load_tokenizer
from peft_sparse.training.data import make_examples
from peft_sparse.training.parts import DataPart, ModelPart

from models import save_with_tokenizer, tiny_bert
from recipes import classifier

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("limit", [None, 10])
def test_every_pass_has_the_same_examples_in_another_order(tmp_path, sentences, limit):
    model = ModelPart(path=save_with_tokenizer(tiny_bert(), tmp_path / "bert"), task="sequence_classification")
    data = DataPart(path=sentences, text="text", label="label", streaming=True, train_examples=limit)
    tokenizer, size = load_tokenizer(model), limit or 40
    stream = make_examples(data, model, tokenizer, seed=3).train
    found, again = ([tuple(row["input_ids"]) for row in islice(stream, 3 * size)] for _ in range(2))
    assert found == again
    passes = [found[start : start + size] for start in range(0, 3 * size, size)]
    assert len(set(passes[0])) == size and len({tuple(sorted(one)) for one in passes}) == 1
    assert passes[0] != passes[1] != passes[2] != passes[0]


@pytest.mark.parametrize("limit", [10, 12])
def test_a_run_that_goes_on_in_the_second_pass_is_the_uninterrupted_one(tmp_path, sentences, limit):
    """Three batches of four examples are a pass, with the last one whole or not."""
    data = {"text": "text", "label": "label", "streaming": True, "train_examples": limit}
    training = {"max_steps": 8, "save_steps": 4, "logging_steps": 1}
    asked = classifier(tmp_path, sentences, data=data, training=training)
    losses = [[entry["loss"] for entry in finetune(asked).log if "loss" in entry]]
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    expected = load_file(adapter)
    for done in ("checkpoint-8", "adapter"):
        shutil.rmtree(tmp_path / "run" / done)
    result = finetune(asked, resume=True)
    assert result.resumed_from.endswith("checkpoint-4") and result.steps == 8
    losses.append([entry["loss"] for entry in result.log if "loss" in entry])
    assert losses[0] == losses[1]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(adapter).items())


def test_a_stream_is_read_by_one_process(tmp_path, sentences):
    """Of several files each would read some, and all but one end at once."""
    data = {"text": "text", "label": "label", "streaming": True}
    with pytest.raises(ValueError, match=r"one process, got `training.dataloader_num_workers` 2; set it to 1"):
        classifier(tmp_path, sentences, data=data, training={"dataloader_num_workers": 2})
