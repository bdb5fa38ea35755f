"""quantize_model where something fails, without bitsandbytes. What it does with it: tests/tuners/test_quantized.py."""

import sys
from types import ModuleType

import pytest

from peft_sparse import quantize_model
from peft_sparse.linears import quantize

import models


def test_a_failure_changes_nothing(monkeypatch):
    """Of a shape that comes last in each block, on a device where bitsandbytes cannot do it."""
    model = models.tiny_llama()
    modules = dict(model.named_modules())

    def made(linear, *_):
        if linear.in_features == 48:
            raise ValueError("cannot do this shape")
        return type(linear)(linear.in_features, linear.out_features)

    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setattr(quantize, "_quantized", made)
    monkeypatch.setattr(quantize, "_quantizer", lambda *_: None, raising=False)  # asks for bitsandbytes' version
    with pytest.raises(ValueError, match="cannot do this shape"):
        quantize_model(model)
    assert dict(model.named_modules()) == modules
