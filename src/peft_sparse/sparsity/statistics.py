"""Running statistics of a layer's inputs, gathered batch by batch during calibration.

ColumnNorms:  ||X_j||_2 of each input column (Wanda, RIA)        Hessian:  2 X^T X / n (SparseGPT)
"""

from __future__ import annotations

import torch


def counted_tokens(x: torch.Tensor, token_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """The tokens of a batch that count, and the number of its sequences.

    Args:
        x: (sequences, tokens, in), or (tokens, in), which counts as one sequence. Any floating dtype.
        token_mask: bool (sequences, tokens), True for tokens that count; None: all do.

    Returns:
        (counted tokens, in) float32, which may be `x` itself seen otherwise. Inputs without any token, which a linear
        gets that is not for this batch (an expert, a language's adapter), are no sequence.
    """
    num_sequences = x.shape[0] if x.dim() > 2 else 1
    if not x.numel():
        num_sequences = 0
    if token_mask is not None and token_mask.shape == x.shape[:-1]:
        x = x[token_mask]
    return x.detach().reshape(-1, x.shape[-1]).to(torch.float32), num_sequences


class ColumnNorms:
    """||X_j||_2 of every input column j over all calibration tokens, divided by the square root of the number of
    sequences, as Wanda's authors scale it.

    Args:
        in_features: number of columns.
        device: where the sums live.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.sum_of_squares = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.num_sequences = 0
        self.num_tokens = 0

    def update(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            x: (sequences, tokens, in), or (tokens, in), which counts as one sequence. Any floating dtype.
            token_mask: bool (sequences, tokens), True for tokens that count; None: all do.

        Raises:
            ValueError: if a counted token holds NaN or infinity. Nothing is added then.
        """
        x, num_sequences = counted_tokens(x, token_mask)
        squares = x.square().sum(0)
        if not bool(squares.isfinite().all()):
            raise ValueError("the inputs of this layer hold NaN or infinity")
        self.sum_of_squares += squares.to(self.sum_of_squares.device)
        self.num_sequences += num_sequences
        self.num_tokens += x.shape[0]

    @property
    def norms(self) -> torch.Tensor:
        """(in,) float32."""
        return (self.sum_of_squares / max(self.num_sequences, 1)).sqrt()


class Hessian:
    """H = 2 X^T X / n over all calibration tokens, n the number of sequences, as SparseGPT's authors scale it: a
    running mean, so that no number of batches overflows it.

    H is symmetric. Only what is on and below its diagonal is computed, which takes little more than half of the time.

    Args:
        in_features: number of columns.
        device: where it lives.

    Attributes:
        matrix: (in, in) float32; what is above the diagonal has no meaning.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.num_sequences = 0
        self.num_tokens = 0

    def update(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> None:
        """Take in one batch; arguments and error as for [`ColumnNorms.update`]."""
        tokens, num_sequences = counted_tokens(x, token_mask)
        check_finite(tokens)
        self.add(tokens, num_sequences)

    def add(self, tokens: torch.Tensor, num_sequences: int) -> None:
        """Take in finite tokens (tokens, in) float32 of so many sequences."""
        if not num_sequences:  # there may have been none before either, and a mean over none is no number
            return
        tokens = tokens.to(self.matrix.device)
        self.num_sequences += num_sequences
        self.num_tokens += len(tokens)
        old = 1 - num_sequences / self.num_sequences
        width = len(self.matrix)
        step = max(128, -(-width // 4))  # four strips: 10 of 16 tiles are computed, and each is a large product
        for start in range(0, width, step):
            stop = min(start + step, width)
            strip = self.matrix[start:stop, :stop]
            strip.addmm_(tokens[:, start:stop].T, tokens[:, :stop], beta=old, alpha=2 / self.num_sequences)

    def copy(self) -> Hessian:
        """Another one with the same content."""
        copied = Hessian(0)
        copied.matrix = self.matrix.clone()
        copied.num_sequences, copied.num_tokens = self.num_sequences, self.num_tokens
        return copied


def check_finite(tokens: torch.Tensor) -> None:
    """Raises:
    ValueError: if a tensor holds NaN or infinity, or numbers whose squares do not fit its dtype."""
    if not bool(torch.linalg.vector_norm(tokens).isfinite()):
        raise ValueError("the inputs of this layer hold NaN or infinity")
