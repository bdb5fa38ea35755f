"""What `use_reference`, `use_csr`, `use_native` and `use_triton` have in common."""

from __future__ import annotations

from typing import Any, TypeVar

_Self = TypeVar("_Self", bound="Switch")


class Switch:
    """A setting of the whole process: made, it holds from now on; as a context manager, until the end of the block.

    Each subclass is a setting of its own, whose value is `_enabled`.
    """

    _enabled: Any = False

    def __init__(self, enabled: Any = True) -> None:
        self._before = type(self)._enabled
        type(self)._enabled = enabled

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        type(self)._enabled = self._before
