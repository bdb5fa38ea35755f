"""One Hessian for all linears of a block that get the same inputs, such as q, k, v or gate and up of a Llama.

Which ones do is not told by names: it is seen. A linear whose first input is the very tensor that another one has just
got joins that one; it counts nothing, and stays as long as every further input is the same as the other's. As soon as
one is not, or stays away (an expert that gets no token), it goes on by itself with a copy of what was counted up to
there. So the numbers are those of a Hessian for each linear, whatever the model does.
"""

from __future__ import annotations

import torch
from torch import nn

from peft_sparse.linears import in_out_features
from peft_sparse.sparsity.statistics import Hessian, check_finite, counted_tokens


class SharedHessians:
    """Makes the statistics of the linears of a block; see the top of this file.

    Examples:
        >>> shared, linears = SharedHessians(), [nn.Linear(4, 2), nn.Linear(4, 8)]
        >>> first, second = map(shared.new_statistics, linears)
        >>> x = torch.ones(1, 3, 4)
        >>> first.update(x), second.update(x)
        (None, None)
        >>> first.hessian is second.hessian
        True
    """

    def __init__(self) -> None:
        self._groups: list[_Group] = []

    def new_statistics(self, linear: nn.Module) -> HessianOfInputs:
        """The empty statistics of one linear."""
        return HessianOfInputs(self._groups, in_out_features(linear)[0])


class HessianOfInputs:
    """What one linear knows of its inputs: a place in a group of linears that share a Hessian, which lives where the
    inputs are."""

    def __init__(self, groups: list[_Group], in_features: int) -> None:
        self._groups, self._in_features = groups, in_features
        self._group: _Group | None = None
        self.num_updates = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that were counted."""
        return 0 if self._group is None else self._group.num_tokens(self)

    @property
    def hessian(self) -> Hessian:
        """Over all inputs so far; the same object for all that share it.

        Raises:
            ValueError: if there was no input, or `release` was called.
        """
        if self._group is None:
            raise ValueError("A Hessian needs inputs, got none; call `update` first.")
        self._group.settle()  # may put this linear into another group
        return self._group.hessian

    def update(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> None:
        """Take in one batch; arguments and error as for [`ColumnNorms.update`]."""
        group = self._group
        if group is None:
            group = next((g for g in self._groups if g.num_updates == 1 and g.is_last(x, token_mask)), None)
            if group is not None:
                group.add_member(self)
        elif group.num_updates == self.num_updates or not group.is_last(x, token_mask):
            group = None
        if group is None:
            self._take(x, token_mask)
        self.num_updates += 1

    def _take(self, x: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        """An input that no other linear of the group has got before this one."""
        tokens, num_sequences = counted_tokens(x, token_mask)
        check_finite(tokens)  # before anything has changed
        if self._group is None:
            group = _Group(Hessian(self._in_features, x.device), 0, self._groups)
            group.add_member(self)
        elif self._group.num_updates > self.num_updates:
            group = self._group.split([self])
        else:
            group = self._group
        group.take(tokens, num_sequences, x, token_mask)

    def release(self) -> None:
        """Let go of the Hessian; the memory is free when all that share it have."""
        if self._group is not None:
            self._group.remove_member(self)
            self._group = None


class _Group:
    """Linears that have got the same inputs so far, but for the last one, which some may not have got yet.

    That last one is counted only when nobody can have missed it, so that who has missed it can go on without. Until
    then its tokens are kept, as a copy: the model may change its tensor in place.
    """

    def __init__(self, hessian: Hessian, num_updates: int, groups: list[_Group]) -> None:
        self.hessian, self.num_updates = hessian, num_updates
        self._members: list[HessianOfInputs] = []
        self._waiting: tuple[torch.Tensor, int] | None = None
        self._last: tuple[torch.Tensor, int, torch.Tensor | None] | None = None
        self._groups = groups
        groups.append(self)

    def num_tokens(self, member: HessianOfInputs) -> int:
        if self._waiting is None or member.num_updates < self.num_updates:
            return self.hessian.num_tokens
        return self.hessian.num_tokens + len(self._waiting[0])

    def is_last(self, x: torch.Tensor, token_mask: torch.Tensor | None) -> bool:
        """Whether `x` is the input that was taken last, unchanged."""
        if self._last is None or x.is_inference():
            return False
        # The tensor is kept, so nothing else can be at its address.
        last, version, mask = self._last
        if x.data_ptr() != last.data_ptr() or x.shape != last.shape or x.stride() != last.stride():
            return False
        same_mask = mask is token_mask or (
            mask is not None and token_mask is not None and torch.equal(mask, token_mask)
        )
        return x._version == version and x.dtype == last.dtype and x.device == last.device and same_mask

    def take(self, tokens: torch.Tensor, num_sequences: int, x: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        """A new input `x` with its finite tokens (tokens, in)."""
        self.settle()
        if len(self._members) > 1:
            self._waiting = (tokens.clone() if tokens.data_ptr() == x.data_ptr() else tokens, num_sequences)
        else:
            self.hessian.add(tokens, num_sequences)
        self.num_updates += 1
        self._last = None if x.is_inference() else (x, x._version, token_mask)

    def settle(self) -> None:
        """Count the input that waits, after who has not got it has left."""
        if self._waiting is None:
            return
        missed = [member for member in self._members if member.num_updates < self.num_updates]
        if missed:
            self.split(missed)
        self.hessian.add(*self._waiting)
        self._waiting = None

    def split(self, members: list[HessianOfInputs]) -> _Group:
        """Let members who have not got the last input go on with a copy of what was counted before."""
        other = _Group(self.hessian.copy(), self.num_updates - 1, self._groups)
        for member in members:
            self.remove_member(member)
            other.add_member(member)
        return other

    def add_member(self, member: HessianOfInputs) -> None:
        self._members.append(member)
        member._group = self

    def remove_member(self, member: HessianOfInputs) -> None:
        self._members.remove(member)
        if not self._members:
            self._groups.remove(self)
