"""Running statistics of a layer's inputs, gathered batch by batch during calibration."""

from __future__ import annotations

import torch


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
        num_sequences = x.shape[0] if x.dim() > 2 else 1
        if token_mask is not None and token_mask.shape == x.shape[:-1]:
            x = x[token_mask]
        x = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
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
