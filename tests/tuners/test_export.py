"""A model can be exported with its adapters, and packed: the graph computes the same, for other batches too, and holds
nothing that only this package knows."""

import io

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from peft_sparse import PstConfig, SppConfig, ops, prune_magnitude
from peft_sparse.linears import pack_model
from peft_sparse.sparsity import packing

TARGETS = {"target_modules": ["0", "2"], "init_weights": False}
KINDS = {
    "packed": None,
    "spp": SppConfig(r=3, **TARGETS),
    "spp packed": SppConfig(r=3, **TARGETS),
    "pst": PstConfig(sparsity=0.5, r=4, schedule="constant", **TARGETS),
    "movement": PstConfig(pattern="2:4", importance="movement", weight_update="full", schedule="constant", **TARGETS),
}


class Wrapped(nn.Module):
    """Calls a model with one argument: a PeftModel's forward takes any."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


@pytest.fixture(params=KINDS)
def model(request) -> Wrapped:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), Conv1D(8, 20))
    if "pst" not in request.param and request.param != "movement":
        prune_magnitude(base, sparsity=0.5, target_modules=["0", "2"])
    if "packed" in request.param:
        pack_model(base, target_modules=["0", "2"])
    config = KINDS[request.param]
    return Wrapped(base if config is None else get_peft_model(base, config)).eval()


def inputs(*batch: int) -> torch.Tensor:
    return torch.randn(*batch, 12)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*(deprecated|Dtype|dtype)")
def test_torch_export(model, strict, one_graph):
    if strict and not one_graph:
        pytest.skip("strict=True asks for one graph")
    batches = [{0: torch.export.Dim.AUTO}]
    program = torch.export.export(model, (inputs(3),), dynamic_shapes=batches, strict=strict)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    assert called
    assert not [name for name in called if "peft_sparse" in name]
    x = inputs(5)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_trace(model):
    packing._byte_table.cache_clear()  # what is made at a first call is no part of the graph
    traced, file = torch.jit.trace(model, (inputs(3),)), io.BytesIO()
    torch.jit.save(traced, file)  # an error where the graph calls into Python
    file.seek(0)
    x = inputs(2, 5)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


def test_fake_tensors(model):
    x = inputs(3)
    expected = model(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(inputs(2, 5)).shape == (2, 5, 8)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("native", [True, False])
def test_nothing_of_a_graph_is_kept(model, native, monkeypatch):
    """Tables and row starts that are made while a graph is recorded have no values."""
    monkeypatch.setattr(packing, "native_takes", packing.native_takes if native else lambda *_: False)
    expected = model(inputs(3)).shape
    for module in model.modules():
        module.__dict__["_starts"] = None
    for cached in (packing._byte_table, packing._byte_ranks, packing._popcounts):
        cached.cache_clear()
    torch.export.export(model, (inputs(3),), strict=False)
    x = inputs(3)
    with ops.use_reference():
        reference = model(x)
    assert reference.shape == expected
    torch.testing.assert_close(model(x), reference)


def test_meta_device(model):
    assert model.to("meta")(inputs(2, 5).to("meta")).shape == (2, 5, 8)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx(model, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    batches = [{0: torch.export.Dim.DYNAMIC}]
    torch.onnx.export(model, (inputs(3),), path, dynamo=True, dynamic_shapes=batches, verbose=False)
    session, x = runtime.InferenceSession(path), inputs(5)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)
