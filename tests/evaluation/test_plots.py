"""Pictures: their numbers, and that they can be written."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse import prune_magnitude
from peft_sparse.evaluation import plot_schedule, plot_sparsity
from peft_sparse.evaluation.plots import kept_profile

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


def test_plot_sparsity_has_a_strip_for_each_layer(tmp_path):
    figure = plot_sparsity(prune_magnitude(tiny_llama(), sparsity=0.5))
    rows, columns, bars, _ = figure.axes
    assert rows.images[0].get_array().shape == columns.images[0].get_array().shape == (14, 100)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([0.5] * 14, abs=1e-3)
    assert rows.get_yticklabels()[0].get_text() == "0.self_attn.q_proj"
    figure.savefig(tmp_path / "sparsity.png")
    assert (tmp_path / "sparsity.png").stat().st_size > 10_000


def test_plot_schedule(tmp_path):
    log = [{"step": s, "loss": 1.0, "sparsity": s / 10, "mask_churn": 0.1} for s in range(0, 10, 2)] + [{"step": 9}]
    figure = plot_schedule(log)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0, 20, 40, 60, 80]
    figure.savefig(tmp_path / "schedule.png")
    with pytest.raises(ValueError, match="SparsityCallback"):
        plot_schedule([{"step": 1, "loss": 2.0}])
