"""Numbers about a model: where its zeros are, and how well it predicts."""

from peft_sparse.evaluation.perplexity import perplexity
from peft_sparse.evaluation.report import LayerSparsity, SparsityReport, sparsity_report

__all__ = ["LayerSparsity", "SparsityReport", "perplexity", "sparsity_report"]
