"""A stream of examples for a Trainer, which reads it again when it ends.

Trainer does not know where a stream ends. It takes `max_steps` for one epoch, and a run that goes on from a checkpoint
skips as many batches of it as were trained: from a stream that ends before, it would start a later pass from the
beginning, and every pass has the same order. So a stream here is all its passes, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

from peft_sparse.training.texts import Row

Encode = Callable[[Iterable[Row]], Iterator[Row | None]]  # None: a row of which nothing would be learned


def endless(rows: Any, limit: int | None, encode: Encode, seed: int, buffer: int) -> Any:
    """Every pass has the same examples, each in another order.

    Args:
        rows: a `datasets.IterableDataset`, of which at least one example comes.
        limit: examples of a pass; None: all.
        encode: rows to examples.
        seed: of the order.
        buffer: rows, or examples, among which the next one is drawn.
    """
    from datasets import IterableDataset

    shuffled = rows.shuffle(seed=seed, buffer_size=buffer)
    one_pass = IterableDataset.from_generator(
        _one_pass, gen_kwargs={"rows": shuffled, "limit": limit, "encode": encode}
    )
    return IterableDataset.from_generator(_passes, gen_kwargs={"examples": one_pass, "seed": seed, "buffer": buffer})


def _one_pass(rows: Iterable[Row], limit: int | None, encode: Encode) -> Iterator[Row]:
    return islice((example for example in encode(rows) if example is not None), limit)


def _passes(examples: Any, seed: int, buffer: int) -> Iterator[Row]:
    yield from examples
    for number in count(1):
        yield from examples.shuffle(seed=seed + number, buffer_size=buffer)
