"""Checks of single config fields.

A config may come from a file that anybody wrote, so any JSON value may be in any field: a name where a list of names
belongs must not be taken for the names of its letters, nor "false" for something that is true.
"""

from __future__ import annotations

import re
from typing import Any

from peft_sparse.sparsity import is_finite_number

# Beyond it no dimension of a tensor makes sense, and Python's integers do not fit into a float.
MAX_INT = 2**31 - 1


def check_positive_int(name: str, value: Any) -> None:
    """Raises:
    ValueError: if `value` is not an integer above 0, or one that no tensor could have as a size."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"`{name}` should be a positive integer, got {value!r}.")
    if value > MAX_INT:
        raise ValueError(f"`{name}` should be a positive integer of at most {MAX_INT}, got one of more digits.")


def check_number(name: str, value: Any, way_out: str = "") -> None:
    """Raises:
    ValueError: if `value` is not a finite number. It ends with `way_out`."""
    if not is_finite_number(value):
        raise ValueError(f"`{name}` should be a finite number, got {value!r}{way_out}.")


def check_fraction(name: str, value: Any, of: str) -> None:
    """Raises:
    ValueError: if `value` is not a number in [0, 1]."""
    if not is_finite_number(value) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` is a fraction of {of} in [0, 1], got {value!r}.")


def check_bool(name: str, value: Any, way_out: str = "") -> None:
    """Raises:
    ValueError: if `value` is neither True nor False. It ends with `way_out`."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` should be True or False, got {value!r}{way_out}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises:
    ValueError: if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` should be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_names(name: str, value: Any, regex: bool = True, empty: bool = True) -> None:
    """Raises:
    ValueError: if `value` is not None, a list of names, or (if `regex`) a string that is a regular expression.

    Args:
        empty: whether the list may be empty."""
    if isinstance(value, str) and regex:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"`{name}` as a string is a regular expression for full names, got {value!r}, which is none "
                f"({error}); mend it, or list the names."
            ) from error
        return
    if value is None:
        return
    rule = f"a list of names{', or one string with a regular expression' if regex else ''}"
    names = list(value) if isinstance(value, (list, tuple, set, frozenset)) else None
    if names is None or not all(isinstance(entry, str) and entry for entry in names):
        hint = f"; for one name write [{value!r}]" if isinstance(value, str) else ""
        raise ValueError(f"`{name}` is {rule}, got {value!r}{hint}.")
    if not names and not empty:
        raise ValueError(f"`{name}` is {rule}, got an empty one; leave it out for the default.")


def check_indices(name: str, value: Any) -> None:
    """Raises:
    ValueError: if `value` is not None, a block's index, or a list of them."""
    if value is None:
        return
    indices = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if not indices or not _are_indices(indices):
        raise ValueError(
            f"`{name}` has indices of blocks, counted from 0: an integer or a list of them, got {value!r}."
        )


def check_tokens(name: str, value: Any) -> None:
    """Raises:
    ValueError: if `value` is not None, a list of tokens, or a dict with one for each name of a module."""
    lists = list(value.values()) if isinstance(value, dict) else [] if value is None else [value]
    named = not isinstance(value, dict) or all(isinstance(key, str) and key for key in value)
    good = all(isinstance(tokens, list) and tokens and _are_indices(tokens) for tokens in lists)
    if not named or not good or (value is not None and not lists):
        raise ValueError(
            f"`{name}` is a list of token numbers, from 0, or a dict that has one for the name of each embedding, "
            f"got {value!r}; leave it out to train no embeddings."
        )


def _are_indices(values: list[Any]) -> bool:
    return all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_INT for i in values)
