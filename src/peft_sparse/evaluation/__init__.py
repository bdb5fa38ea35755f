"""Numbers about a model: where its zeros are, whether all are still there, and how well it predicts."""

from peft_sparse.evaluation.perplexity import perplexity
from peft_sparse.evaluation.plots import plot_schedule, plot_sparsity
from peft_sparse.evaluation.report import LayerSparsity, SparsityReport, sparsity_report
from peft_sparse.evaluation.verify import LayerCheck, VerifyReport, verify_sparsity

__all__ = [
    "LayerCheck",
    "LayerSparsity",
    "SparsityReport",
    "VerifyReport",
    "perplexity",
    "plot_schedule",
    "plot_sparsity",
    "sparsity_report",
    "verify_sparsity",
]
