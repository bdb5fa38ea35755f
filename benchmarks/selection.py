"""What choosing PST's mask costs beside the matmuls: our threshold selection and the whole refresh of a mask, against
a full argsort (the authors'), one kthvalue, and one forward matmul.

    python -m benchmarks.selection           # 2048 x 2048, 1024 tokens, 50% and 90% pruned
    python -m benchmarks.selection --all     # also 4096 x 4096
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import runner
from peft_sparse.ops import MaskCache, PstFactors, PstScales, pst_mask
from peft_sparse.sparsity import select_mask

RANK, TOKENS = 8, 1024
SPARSITIES = (0.5, 0.9)


def argsort_mask(scores: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """All but the smallest scores, from a full sort of them."""
    mask = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    mask.view(-1)[scores.view(-1).argsort()[:num_pruned]] = False
    return mask


def kthvalue_mask(scores: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """All above the k-th smallest score; of scores that tie with it none, so the count is not exact."""
    return scores > scores.view(-1).kthvalue(num_pruned).values


def variants(size: int, tokens: int, sparsity: float, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What is timed, by name, for a square layer with trained factors."""
    torch.manual_seed(0)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (scale * torch.randn(shape)).to(args.device, dtype)

    # V, B, R and C start at zero and stay small: a mask of a layer in training.
    weight, x = random(size, size, scale=0.02, dtype=args.dtype), random(tokens, size, dtype=args.dtype)
    factors = PstFactors(
        U=random(size, RANK), V=random(RANK, size, scale=1e-3), A=random(size, RANK),
        B=random(RANK, size, scale=1e-3), R=random(size, scale=1e-3), C=random(size, scale=1e-3),
    )  # fmt: skip
    scales, cache = PstScales(), MaskCache()
    scores = (weight + factors.U @ factors.V).abs().float() + factors.A @ factors.B
    scores += factors.R[:, None] + factors.C
    num_pruned, group = int(sparsity * weight.numel()), weight.numel()
    pruned = torch.tensor(num_pruned)

    def refresh() -> torch.Tensor:
        cache.mark_stale()
        return reuse()

    def reuse() -> torch.Tensor:
        return pst_mask(cache, weight, pruned, group, factors, scales)

    return {
        "forward_matmul": lambda: F.linear(x, weight),
        "select_mask": lambda: select_mask(scores, num_pruned, group),
        "refresh": refresh,  # scores, selection and packing
        "reuse": reuse,  # the check that a kept mask still holds
        "kthvalue": lambda: kthvalue_mask(scores, num_pruned),
        "argsort": lambda: argsort_mask(scores, num_pruned),
    }


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """A row for each way to choose, size and sparsity."""
    sizes = [64] if args.quick else [2048, 4096] if args.all else [2048]
    tokens = 16 if args.quick else TOKENS
    rows = []
    for size in sizes:
        for sparsity in SPARSITIES:
            steps = variants(size, tokens, sparsity, args)
            times = runner.interleave(steps, args.rounds, args.device, title=f"{size}x{size}, {sparsity:.0%}")
            for name in steps:
                baselines = {"ratio_forward_matmul": "forward_matmul", "ratio_kthvalue": "kthvalue"}
                baselines["ratio_argsort"] = "argsort"
                case = {"out": size, "in": size, "tokens": tokens, "sparsity": sparsity, "variant": name}
                rows.append(case | times.columns(name, baselines))
    return rows


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__)
    found.add_argument("--all", action="store_true", help="4096 x 4096 too")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("selection", options(), measure))
