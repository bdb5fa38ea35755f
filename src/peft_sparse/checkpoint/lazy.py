"""What transformers gets in place of tensors while it makes a model: each is read at the moment at which it is wanted.

transformers casts every tensor to the dtype of the model. A model whose norms or head are in float32 and whose linears
are in bfloat16 would come back rounded, so a tensor may also keep the dtype that it is stored in.
"""

from __future__ import annotations

from typing import Any

import torch

from peft_sparse.storage import StoredTensor


class LazyTensor:
    """A stored tensor that remembers why it could not be read.

    Args:
        tensor: on disk.
        model_dtype: the model's, where the tensor keeps its own in place of it; None: it is cast as transformers says.
        exact: it keeps its own dtype also in a module that transformers keeps in float32.
        stand_in: give the shape and the dtype, in the memory of a single number, and read nothing.

    Attributes:
        error: what happened while it was read, if anything.
    """

    def __init__(
        self,
        tensor: StoredTensor,
        model_dtype: torch.dtype | None = None,
        *,
        exact: bool = False,
        stand_in: bool = False,
    ) -> None:
        self.tensor, self.model_dtype, self.exact, self.stand_in = tensor, model_dtype, exact, stand_in
        self.error: Exception | None = None

    def __getitem__(self, index: Any) -> _Movable:
        if self.stand_in:
            return _Movable(self, torch.zeros((), dtype=self.tensor.dtype).expand(self.tensor.shape)[index])
        try:
            return _Movable(self, self.tensor[index])
        except Exception as error:
            self.error = error
            raise

    def dtype(self, asked: torch.dtype | None) -> torch.dtype:
        """In which dtype it is loaded, where transformers asks for one: the model's, or what the module is kept in."""
        stored = self.tensor.dtype
        if asked is None or self.exact:
            return stored
        keeps = self.model_dtype is not None and stored.is_floating_point
        return stored if keeps and (asked == self.model_dtype or asked.itemsize < stored.itemsize) else asked


class _Movable:
    """What was read. `to` is all that transformers calls on it, always with a device."""

    def __init__(self, lazy: LazyTensor, tensor: torch.Tensor) -> None:
        self.lazy, self.tensor = lazy, tensor

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        wanted = self.lazy.dtype(dtype)
        if self.lazy.stand_in:  # a cast would give it memory
            return torch.zeros((), dtype=wanted, device=device).expand(self.tensor.shape)
        return self.tensor.to(device=device, dtype=wanted)
