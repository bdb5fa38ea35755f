"""The error of a layer's output without its inputs: a sketch of X that is as cheap to gather as column norms.

    ||X D^T||_F^2 = E ||Z D^T||_F^2,   Z[b] = sum of e_t X[t] over tokens t with t mod rows = b,   e_t = +-1 at random

for any D, such as W_new - W. The signs make products of different tokens vanish on average. With at most `rows` tokens
every row of Z is one token and the equation holds without the E; beyond, the standard deviation of the relative error
of the squared norm is below sqrt(2 / rows), far below it where outputs of different tokens differ.
"""

from __future__ import annotations

import torch

SKETCH_ROWS = 512


class OutputSketch:
    """Z of one layer's inputs.

    Args:
        in_features: columns of X.
        device: where Z lives, (rows, in) float32.
        rows: of Z.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", rows: int = SKETCH_ROWS) -> None:
        self.sums = torch.zeros(rows, in_features, dtype=torch.float32, device=device)
        self.num_tokens = 0
        self._generator = torch.Generator().manual_seed(0)  # the global random state is left alone

    def update(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            x: (..., in). Any floating dtype.
            token_mask: bool of the shape of x without its last dimension, True for tokens that count; None: all do.
        """
        if token_mask is not None and token_mask.shape == x.shape[:-1]:
            x = x[token_mask]
        x = x.detach().reshape(-1, x.shape[-1])
        rows = self.sums.shape[0]
        drawn = torch.randint(0, 2, (x.shape[0], 1), generator=self._generator, dtype=torch.int8, device="cpu")
        signs = drawn.mul_(2).sub_(1).to(device=self.sums.device, dtype=torch.float32)
        done = 0
        while done < x.shape[0]:
            first = self.num_tokens % rows
            piece = slice(done, done + min(rows - first, x.shape[0] - done))
            length = piece.stop - piece.start
            tokens = x[piece].to(device=self.sums.device, dtype=torch.float32)
            self.sums[first : first + length].addcmul_(tokens, signs[piece])
            self.num_tokens += length
            done = piece.stop

    def relative_error(self, weight: torch.Tensor, pruned: torch.Tensor) -> float:
        """||X W_new^T - X W^T||_F / ||X W^T||_F, as the sketch tells it.

        Args:
            weight: W, (out, in), any dtype and device.
            pruned: W_new, of the same shape.

        Returns:
            0.0 for a layer whose outputs are all zero, before and after.
        """
        weight = weight.to(self.sums)
        change = float((self.sums @ (pruned.to(self.sums) - weight).T).double().norm())
        scale = float((self.sums @ weight.T).double().norm())
        return change / scale if scale else (0.0 if change == 0 else float("inf"))
