"""Which linears another module computes with instead of calling them, held against what runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.architectures import ARCHITECTURES
from peft_sparse.linears import block_linears, linears_not_called


def last_parts(names):
    return {name.split(".")[-1] for name in names}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama", set()),
        ("T5", set()),  # asks the weight of `wo` for its dtype
        ("BLOOM", set()),  # takes pieces of one, where its config asks for it
        ("Qwen3.5", set()),  # has Mamba's A_log, and calls all
        ("Mamba", {"dt_proj", "x_proj", "out_proj"}),
        ("WavLM", {"q_proj", "k_proj", "v_proj", "out_proj"}),
    ],
)
def test_real_models(name, expected):
    model = ARCHITECTURES[name].build()
    linears, called = block_linears(model), set()
    for full, linear in linears.items():
        linear.register_forward_hook(lambda *_, full=full: called.add(full))
    with torch.no_grad():
        model(**ARCHITECTURES[name].batch())
    not_called = linears_not_called(model)
    assert last_parts(not_called) == expected
    assert linears.keys() - called <= not_called.keys()


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole, self.cast, self.nested = nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
        self.called, self.pieces, self.elsewhere = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.compute(x)

    def reset(self):
        return self.elsewhere.weight.sum()


class Derived(Base):
    def compute(self, x):
        x = F.linear(x, self.whole.weight) + F.linear(x, self.cast.weight.float()) + x @ self.nested[0].weight
        if isinstance(self.called.weight, torch.Tensor) and self.called.weight.dtype == x.dtype:
            x = self.called(x)
        return [piece(x) for piece in (lambda x: x @ self.pieces.weight[:2].T,)]


def test_by_the_code_of_the_class():
    """In `forward` and what it calls, inherited or not; of what is reached by an index nothing is known."""
    assert linears_not_called(nn.Sequential(Derived())) == {"0.whole": "Derived", "0.cast": "Derived"}


def test_a_class_without_source_has_none():
    made = {}
    exec("class Made(base):\n    def forward(self, x):\n        return x @ self.whole.weight", {"base": Base}, made)
    assert linears_not_called(made["Made"]()) == {}
