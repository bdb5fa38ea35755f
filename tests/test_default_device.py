"""What is computed does not depend on torch's default device: it is where the tensors are that it is computed from."""

import pytest
import torch
from peft import get_peft_model

from peft_sparse import (
    PstConfig,
    SppConfig,
    accelerate_sparse,
    calibration_batches,
    pack_model,
    prune_magnitude,
    prune_wanda,
    save_sparse,
    sparsity_report,
)
from peft_sparse.native import library
from peft_sparse.ops import use_csr
from peft_sparse.sparsity import packing

from models import tiny_llama

IDS = torch.arange(3, 35).view(2, 16)
MASK = torch.ones_like(IDS).index_fill_(1, torch.tensor([14, 15]), 0)


class Tokenizer:
    eos_token_id, pad_token_id = 1, 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 60 for letter in text]}


def calibration(model, folder):
    rows = calibration_batches([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], batch_size=2)
    return rows + calibration_batches("all of the text " * 8, Tokenizer(), length=16)


def wanda(model, folder):
    return prune_wanda(model, [{"input_ids": IDS, "attention_mask": MASK}], progress=False, measure_error=True)


def accelerated(kernel):
    def act(model, folder):
        accelerate_sparse(prune_magnitude(model, sparsity=0.9), kernel=kernel)
        with torch.no_grad():
            return model(IDS).logits

    return act


def packed(model, folder):
    return pack_model(prune_magnitude(model, sparsity=0.9))(IDS).logits.detach()


def stored(model, folder):
    save_sparse(prune_magnitude(model, sparsity=0.9), folder)
    return str(sparsity_report(folder))


def tuned(config):
    def act(model, folder):
        with torch.device("cpu"):  # adapters are made there, as by PEFT
            tuner = get_peft_model(prune_magnitude(model, sparsity=0.9), config)
        with use_csr(True):
            tuner(IDS, labels=IDS).loss.backward()
        return tuner.merge_and_unload()

    return act


ACTIONS = {
    "calibration": calibration,
    "wanda": wanda,
    "csr": accelerated("csr"),
    "bitmask": accelerated("bitmask"),
    "packed": packed,
    "stored": stored,
    "spp": tuned(SppConfig()),
    "pst": tuned(PstConfig(sparsity=0.9, schedule="constant")),
}


def plain(result):
    if isinstance(result, torch.nn.Module):
        return {name: tensor.tolist() for name, tensor in result.state_dict().items()}, result.config.peft_sparse
    if isinstance(result, list):
        return [{key: tensor.tolist() for key, tensor in batch.items()} for batch in result]
    return result.tolist() if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("name", ACTIONS)
def test_the_default_device_makes_no_difference(name, tmp_path):
    found = []
    for device in ("meta", "cpu"):  # meta has no numbers, so whatever is made there is missed
        library._library.cache_clear()
        packing._byte_table.cache_clear()
        torch.manual_seed(0)
        model = tiny_llama()
        with torch.device(device):
            found.append(ACTIONS[name](model, tmp_path / device))
    assert plain(found[0]) == plain(found[1])
