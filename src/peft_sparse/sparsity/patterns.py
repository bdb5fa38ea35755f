"""Patterns: where zeros may sit, and how many of them.

* unstructured: anywhere; weights compete within a group, which is the whole layer or one output row.
* N:M: N weights are kept of every M consecutive ones along in_features (so 2:4 is half sparse, 2:8 is 75% sparse).

Both come down to the same thing for the code that selects weights: a group size, and a number of weights to prune in
each group. That number is `int(sparsity * group_size)`, as in the PST and Wanda authors' code.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

# The N:M patterns that `find_pattern` looks for in a weight with more zeros than they ask for: the one that NVIDIA's
# sparse tensor cores run, and its neighbours in the literature. Tightest first: a 2:4 weight satisfies 4:8 as well.
KNOWN_NM = ((1, 4), (2, 8), (2, 4), (4, 8))
# So many groups have to break one of those if the same zeros lay anywhere: with enough zeros every weight follows it.
MIN_BROKEN = 10
# The M of those that it looks for in a weight with just so many zeros.
GROUP_SIZES = (2, 4, 8, 16, 32)

# What an unstructured pattern may compare.
GROUPS = ("layer", "row")


@dataclass(frozen=True)
class Unstructured:
    """Zeros may sit anywhere.

    Args:
        group: `"layer"` (all weights of a layer compete, PST and magnitude) or `"row"` (those of one output do,
            Wanda).

    Raises:
        ValueError: for another group.
    """

    group: str = "layer"

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(
                f"`group` says which weights compete: 'layer' (all of them) or 'row' (those of one output), got "
                f"{self.group!r}."
            )

    def __str__(self) -> str:
        return "unstructured"

    def resolve_sparsity(self, sparsity: float | None, default: float) -> float:
        """The share of zeros to reach: `sparsity` checked to lie in [0, 1), or `default` when it is None."""
        if sparsity is None:
            return default
        check_sparsity("sparsity", sparsity)
        return float(sparsity)

    def group_size(self, shape: torch.Size | tuple[int, int]) -> int:
        """Number of weights that are compared with each other in a weight of `shape` (out, in)."""
        out_features, in_features = shape
        return in_features if self.group == "row" else out_features * in_features

    def num_pruned(self, sparsity: float, group_size: int) -> int:
        """How many weights of a group are zero at `sparsity`; rounds down."""
        return int(group_size * sparsity)

    def check_width(self, in_features: int, name: str) -> None:
        """Any width will do."""


@dataclass(frozen=True)
class NM:
    """N weights kept of every M consecutive ones along in_features.

    Raises:
        ValueError: unless 0 < n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(
                f"An N:M pattern keeps N of every M weights, with 0 < N < M, got {self.n}:{self.m}; for example '2:4'."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def resolve_sparsity(self, sparsity: float | None, default: float | None = None) -> float:
        """1 - N/M. Another `sparsity` is an error, since the pattern fixes it; `default` is not used."""
        fixed = 1 - self.n / self.m
        number = is_finite_number(sparsity)
        if sparsity is not None and not (number and 0 <= sparsity < 1 and math.isclose(sparsity, fixed, abs_tol=1e-6)):
            raise ValueError(
                f"The pattern {self} fixes the sparsity at {fixed:g}, got sparsity={sparsity!r}; leave `sparsity` "
                "out, or choose another pattern."
            )
        return fixed

    def group_size(self, shape: torch.Size | tuple[int, int]) -> int:
        """M, whatever the shape."""
        return self.m

    def num_pruned(self, sparsity: float, group_size: int) -> int:
        """How many of M weights are zero at `sparsity`: a ramp goes 0, 1, ..., M - N. Rounds down, but not past a
        whole number that floating point just misses: (1 - 1/3) * 3 has to be 2."""
        return math.floor(group_size * sparsity + 1e-9)

    def check_width(self, in_features: int, name: str) -> None:
        """Raises:
        ValueError: if in_features is not divisible by M; `name` is the layer that the message names."""
        if in_features % self.m:
            raise ValueError(
                f"{self} needs in_features divisible by {self.m}, got {in_features} in `{name}`; exclude it with "
                "`exclude_modules`."
            )


Pattern = Unstructured | NM


def parse_pattern(pattern: str | Pattern, group: str = "layer") -> Pattern:
    """Read a pattern from a config.

    Args:
        pattern: `"unstructured"` or `"N:M"`; a pattern object is handed back as it is.
        group: what an unstructured pattern compares, `"layer"` or `"row"`.

    Raises:
        ValueError: for anything else, such as `"4:2"`, `"a:b"` or `"0:4"`.

    Examples:
        >>> parse_pattern("2:4")
        NM(n=2, m=4)
        >>> parse_pattern("unstructured", group="row")
        Unstructured(group='row')
    """
    if isinstance(pattern, (Unstructured, NM)):
        return pattern
    if pattern == "unstructured":
        return Unstructured(group)
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is None:
        raise ValueError(
            f"A pattern is 'unstructured' or 'N:M' (N weights kept of every M, for example '2:4'), got {pattern!r}."
        )
    return NM(int(match[1]), int(match[2]))


def pattern_with_group(pattern: str | Pattern, group: str | None, default: str) -> Pattern:
    """Read a pattern and what it compares from the arguments of a pruner.

    Args:
        pattern: as for [`parse_pattern`].
        group: `"layer"` or `"row"`; None: `default` for `"unstructured"`, and what a pattern object says.
        default: of the method, by its paper.

    Raises:
        ValueError: for a group that is none, or that contradicts the pattern: in an N:M pattern each M weights
            compete, whatever the method.

    Examples:
        >>> pattern_with_group("unstructured", None, default="row")
        Unstructured(group='row')
    """
    found = parse_pattern(pattern, default if group is None else group)
    if group is None:
        return found
    Unstructured(group)  # complains of what is no group
    if isinstance(found, NM):
        raise ValueError(
            f"In an N:M pattern each M weights compete with each other, got {found} with group={group!r}; leave "
            "`group` out, or take pattern='unstructured'."
        )
    if found.group != group:
        raise ValueError(f"The pattern {found!r} says what is compared, got group={group!r} beside it; leave one out.")
    return found


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a number that a float can hold; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def check_sparsity(name: str, sparsity: float) -> None:
    """Raises:
    ValueError: if `sparsity` is not a number in [0, 1)."""
    if not is_finite_number(sparsity) or not 0 <= sparsity < 1:
        way_out = "0.9 means that 90% of the weights are zero"
        if not isinstance(sparsity, (int, float)) and hasattr(sparsity, "__float__"):  # a number of numpy or torch
            way_out = "take a Python number, since float32 makes of 0.9 less than that"
        raise ValueError(f"`{name}` is the share of zeros and lies in [0, 1), got {sparsity!r}; {way_out}.")


def find_pattern(weight: torch.Tensor) -> str:
    """The pattern that the zeros of a weight satisfy.

    Args:
        weight: (out, in), any dtype.

    Returns:
        `"dense"` when less than 1% of it is zero or there is nothing in it, `"N:M"` for the tightest N:M that holds in
        every group, `"unstructured"` otherwise. Looked for are all N of every M in 2, 4, 8, 16 and 32 that is at most
        half of in_features; and 1:4, 2:8, 2:4 and 4:8 also where there are more zeros, but not so many that they would
        follow it wherever they lay.

    Examples:
        >>> find_pattern(torch.tensor([[0.0, 0.0, 1.0, 2.0]]))
        '2:4'
    """
    kept = weight != 0
    share, in_features = kept.sum().item() / max(1, kept.numel()), kept.shape[1]
    if not kept.numel() or share > 0.99:
        return "dense"
    exact = [(round(share * m), m) for m in GROUP_SIZES if 2 * m <= in_features]
    exact = [(n, m) for n, m in (*exact, *KNOWN_NM) if 0 < n < m and share * m > 0.99 * n]
    known = [(n, m) for n, m in KNOWN_NM if kept.numel() / m * _share_broken(share, n, m) >= MIN_BROKEN]
    for n, m in (*exact, *known):
        # block by block: where the pattern does not hold, the first rows show it
        if in_features % m == 0 and all(bool((x.reshape(-1, m).sum(1) <= n).all()) for x in kept.split(256)):
            return f"{n}:{m}"
    return "unstructured"


def _share_broken(share: float, n: int, m: int) -> float:
    """Of the groups of m weights, each of which is kept with probability `share`, those that keep more than n."""
    return sum(math.comb(m, k) * share**k * (1 - share) ** (m - k) for k in range(n + 1, m + 1))
