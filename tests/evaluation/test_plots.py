"""Pictures: their numbers, and that they can be written."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import prune_magnitude
from peft_sparse.evaluation import plot_schedule, plot_sparsity, sparsity_report
from peft_sparse.evaluation.plots import _by_kind, kept_profile

from models import tiny_llama

pytest.importorskip("matplotlib")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_profiles_are_sorted_shares(rows, columns, seed):
    weight = (torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    by_row, by_column = kept_profile(weight, points=rows * columns)
    assert set(by_row.tolist()) == set(weight.mean(1).tolist())
    assert set(by_column.tolist()) == set(weight.mean(0).tolist())
    for profile in (by_row, by_column):
        assert (profile[1:] <= profile[:-1]).all()


def clustered_llama(blocks):
    """A Llama whose rows differ in scale, as trained ones do."""
    model = LlamaForCausalLM(LlamaConfig(**{**tiny_llama().config.to_dict(), "num_hidden_layers": blocks}))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= torch.linspace(0.5, 1.5, len(parameter))[:, None]
    return model


def test_plot_sparsity_has_a_strip_for_each_layer_kind_by_kind(tmp_path):
    figure = plot_sparsity(prune_magnitude(tiny_llama(), sparsity=0.5))
    rows, columns, bars, _ = figure.axes
    assert rows.images[0].get_array().shape == columns.images[0].get_array().shape == (14, 100)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([0.5] * 14, abs=1e-3)
    assert [label.get_text() for label in rows.get_yticklabels()[:3]] == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    ]  # fmt: skip
    assert rows.get_yticks().tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5]
    figure.savefig(tmp_path / "sparsity.png")
    assert (tmp_path / "sparsity.png").stat().st_size > 10_000


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_structure_spans_the_colours_at_any_sparsity(sparsity):
    figure = plot_sparsity(prune_magnitude(clustered_llama(2), sparsity=sparsity))
    image = figure.axes[0].images[0]
    colours = image.norm(image.get_array())
    assert colours[:, 0].min() > 0.7 and colours[:, -1].max() < 0.3  # the fullest and the emptiest rows of every layer
    assert image.get_array().mean(1).tolist() == pytest.approx([1] * 14, abs=0.15)  # shares of the layer's mean
    assert image.norm(1.0) == 0.5


def test_equal_rows_are_pale_and_an_empty_layer_has_no_colour():
    model = prune_magnitude(clustered_llama(2), pattern="2:4")
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    image = plot_sparsity(model).axes[0].images[0]
    data = image.get_array()
    assert data.mask[0].all() and not data.mask[1:].any()
    assert abs(image.norm(data[1:]) - 0.5).max() < 1e-5 and image.norm.vmax >= 1.1


def test_a_layer_without_weights_has_no_colour_either():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0), nn.Linear(0, 3))
    rows, _, bars, _ = plot_sparsity(model).axes
    assert rows.images[0].get_array().mask.all(1).tolist() == [False, True, True]
    assert [bar.get_width() for bar in bars.patches] == [0, 0, 0]
    assert [layer.pattern for layer in sparsity_report(model).layers] == ["dense"] * 3


def test_a_deep_model_makes_no_taller_and_no_heavier_a_picture(tmp_path):
    figure = plot_sparsity(prune_magnitude(clustered_llama(30), sparsity=0.9))
    assert figure.axes[0].images[0].get_array().shape == (210, 100)
    assert figure.get_figheight() <= 7 and len(figure.axes[0].get_yticklabels()) == 7
    figure.savefig(tmp_path / "sparsity.png")
    assert (tmp_path / "sparsity.png").stat().st_size < 150_000


def boxes(figure, *texts):
    figure.draw_without_rendering()
    return [text.get_window_extent() for text in texts]


NAMES = ("q", "decoder.layer.EncDecAttention.o", "a_linear_whose_name_is_longer_than_that_of_any_model_known_so_far")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("title", [None, "runs/a-model-of-some-owner/" * 12, "word " * 60])
def test_no_text_is_cut_or_runs_into_another(name, title):
    model = nn.Module()
    model.add_module(name.replace(".", "_"), nn.Linear(4, 4))
    figure = plot_sparsity(model, title=title)
    rows, columns, bars, _ = figure.axes
    first, second, third = boxes(figure, rows.title, columns.title, bars.title)
    assert first.x1 < second.x0 and second.x1 < third.x0
    label, above = boxes(figure, rows.get_yticklabels()[0], figure._suptitle)
    assert label.x0 >= 0 and above.x0 >= 0 and above.x1 <= figure.bbox.x1
    assert first.y1 <= above.y0 and above.y1 <= figure.bbox.y1
    assert rows.get_window_extent().width == pytest.approx(225, abs=20)  # whatever the names
    assert rows.get_window_extent().height > 20


def test_kinds_of_two_stacks_stay_apart():
    names = ["encoder.layers.0.fc1", "encoder.layers.1.fc1", "decoder.layers.0.fc1", "h.0.experts.3.w1", "head"]
    assert _by_kind(names[:2]) == {"fc1": names[:2]}
    assert list(_by_kind(names[:3])) == ["encoder.layers.*.fc1", "decoder.layers.*.fc1"]
    assert _by_kind(names[3:]) == {"experts.*.w1": [names[3]], "head": [names[4]]}


def test_plot_schedule(tmp_path):
    log = [{"step": s, "loss": 1.0, "sparsity": s / 10, "mask_churn": 0.1} for s in range(0, 10, 2)] + [{"step": 9}]
    figure = plot_schedule(log)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0, 20, 40, 60, 80]
    figure.savefig(tmp_path / "schedule.png")
    with pytest.raises(ValueError, match="SparsityCallback"):
        plot_schedule([{"step": 1, "loss": 2.0}])


@pytest.mark.parametrize("steps", [[7], [1, 20, 40, 41], range(1, 3001)])
def test_a_schedule_of_any_length_is_seen(steps):
    figure = plot_schedule([{"step": s, "sparsity": 0.5, "mask_churn": 0.01} for s in steps], title="word " * 40)
    left, right = figure.axes
    assert (left.lines[0].get_marker() == "o") == (len(steps) == 1)
    (churn,) = right.patches  # one area from log to log, and no bars with gaps
    values, edges, _ = churn.get_data()
    assert values.tolist() == pytest.approx([1] * len(steps)) and edges[1:].tolist() == list(steps)
    assert 0 <= edges[0] < edges[1]
    (title,) = boxes(figure, figure._suptitle)
    assert title.x0 >= 0 and title.x1 <= figure.bbox.x1


def test_plot_schedule_of_a_file(tmp_path):
    log, path = [{"step": s, "sparsity": s / 10} for s in range(4)], tmp_path / "result.json"
    for key in ("log", "log_history"):
        path.write_text(json.dumps({"steps": 4, key: log}))
        for where in (path, str(path)):
            assert plot_schedule(where).axes[0].lines[0].get_ydata().tolist() == [0, 10, 20, 30]
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"got neither in .*result.json'; name one"):
        plot_schedule(path)
    with pytest.raises(ValueError, match=r"is read from a JSON file, got .*nowhere"):
        plot_schedule(tmp_path / "nowhere.json")
