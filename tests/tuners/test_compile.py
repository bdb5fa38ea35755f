"""torch.compile of the whole model, without a break in the graph, gives the same losses."""

import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from peft import get_peft_model
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter

from peft_sparse import PstConfig, SppConfig

from models import tiny_llama

CONFIGS = {
    "spp": lambda: SppConfig(r=5),
    "pst": lambda: PstConfig(sparsity=0.5),
    "pst 2:4": lambda: PstConfig(pattern="2:4"),
    "movement": lambda: PstConfig(sparsity=0.5, importance="movement", weight_update="full"),
}
STEPS = 5


def losses(config, backend: str | None, one_graph: bool = True) -> list[float]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = get_peft_model(tiny_llama(num_blocks=1), config())  # each is compiled anew
    forward = torch.compile(model, fullgraph=one_graph, backend=backend) if backend else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(3, 33).reshape(2, 15)
    found = []
    for step in range(STEPS):
        if isinstance(config(), PstConfig):
            model.base_model.set_sparsity_step(step, STEPS - 1)
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.filterwarnings("ignore:SPP tunes a model that is already pruned")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_aot_eager(config, one_graph):
    """The whole of tracing and of the backward's graph, without the code generation that needs a C++ compiler."""
    tolerance = 1e-5 if one_graph else 1e-3  # between graphs other things are rounded: see the mask in test_inductor
    assert losses(config, "aot_eager", one_graph) == pytest.approx(losses(config, None), abs=tolerance)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(x).relu()


@pytest.mark.filterwarnings("ignore:SPP tunes a model that is already pruned")
@pytest.mark.parametrize("config", [SppConfig, PstConfig])
def test_blocks_that_are_compiled_one_by_one_share_their_graph(config):
    """As accelerate's regional compilation compiles them; after eight graphs of a function torch gives up."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    blocks = torch.nn.Sequential(*(Block() for _ in range(10)))
    model = get_peft_model(blocks, config(target_modules=["fc"], init_weights=False))
    if config is PstConfig:
        model.base_model.set_sparsity_step(1, 1)
    x, counter = torch.randn(3, 8), CompileCounter()
    expected = model(x)
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model(x), expected)
    assert 1 <= counter.frame_count <= 3


@pytest.mark.filterwarnings("ignore:SPP tunes a model that is already pruned")
@pytest.mark.parametrize("config", [CONFIGS["spp"], CONFIGS["pst"]], ids=["spp", "pst"])
def test_nothing_is_multiplied_with_empty_memory(config, one_graph):
    """For a GPU, inductor makes `beta * input + product` of an addmm: NaN where beta is 0 and the input not set."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    losses(config, aot_autograd(fw_compiler=keep, bw_compiler=keep), one_graph)
    nodes = [node for graph in graphs for node in graph.nodes]
    assert any(node.target == torch.ops.aten.mm.default for node in nodes)
    assert not [node for node in nodes if node.kwargs.get("beta") == 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SPP tunes a model that is already pruned")
@pytest.mark.parametrize("config", [CONFIGS["spp"], CONFIGS["pst"]], ids=["spp", "pst"])
def test_inductor(config, one_graph):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor's CPU backend needs a C++ compiler")
    # PST's mask is chosen anew in each step: what its kernels round otherwise can change a weight at the threshold
    tolerance = 1e-3 if isinstance(config(), PstConfig) else 1e-5
    assert losses(config, "inductor", one_graph) == pytest.approx(losses(config, None), abs=tolerance)
