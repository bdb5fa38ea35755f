"""The walk behind [`prune_block_by_block`]: run a batch up to one block of the model, with the blocks before it done.

Every run is the model's own forward, so masks, position embeddings, an encoder's output and whatever else a block is
called with are right for any architecture. What makes it affordable: a block that is done answers with the output that
was kept for the last block of its list instead of computing, and the run ends at the block in question. That this
makes no difference is tried with the first batch; in a model where it does, the blocks before are run again instead.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from peft_sparse.linears import find_block_lists, linears_inside, temporary_forward
from peft_sparse.pruning.data import Batch
from peft_sparse.pruning.offload import BlockMover, OffloadableWeight, execution_device
from peft_sparse.pruning.padding import TokenMasks, may_see_text, update_hook
from peft_sparse.pruning.statistics import Statistics


class _Reached(Exception):
    """Ends a forward at the block in question."""


@dataclass(eq=False)
class Step:
    """One block: its list, its targets by full name, and how often a forward calls it (ALBERT's once per layer)."""

    list_name: str
    name: str
    block: nn.Module
    linears: dict[str, nn.Module]
    calls: int = 0


class Walk:
    """Runs batches up to a block. A context: leaving it gives all blocks their own forward back.

    Args:
        model: with repeated blocks.
        batches: dicts of tensors.
        device: where blocks run, moved there one at a time; None: where they are.

    Attributes:
        outputs: by name of a list of blocks, what its last finished block returned for each batch.
        index: of the batch that is running.
        answers: whether blocks that are done may answer with their outputs; otherwise they have to run.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], device: torch.device | str | None = None) -> None:
        self.model = model
        self.batches = batches
        self.device = execution_device(model)  # of the inputs
        self.mover = BlockMover(model, device)
        self.replaced = ExitStack()
        self.outputs: dict[str, list[Any]] = {}
        self.last: dict[str, Step] = {}  # by list: the finished block whose outputs these are
        self.spare: dict[str, Any] = {}  # by list: what the blocks before that one answer with in the running forward
        self.index = 0  # of the batch that is running
        self.output: Any = None
        self.first_list = ""  # of an encoder-decoder, the encoder's
        self.has_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", True)
        self.answers = True
        self.masks = TokenMasks()

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self.replaced.close()

    def find_steps(self, targets: dict[str, nn.Module]) -> list[Step]:
        """The blocks in the order in which the first batch runs them, up to the last one that has targets."""
        steps = []
        for block_list in find_block_lists(self.model):
            for index, block in block_list.blocks.named_children():
                name = f"{block_list.name}.{index}"
                linears = {f"{name}.{path}": linear for path, linear in linears_inside(block).items()}
                linears = {path: linear for path, linear in linears.items() if path in targets}
                steps.append(Step(block_list.name, name, block, linears))
        self.mover.check_blocks(self.model, [step.block for step in steps])
        for block in dict.fromkeys(step.block for step in steps if self.mover.device is not None):
            self.replaced.enter_context(temporary_forward(block, self.mover.forward_of(block)))
        order: list[Step] = []
        dense: dict[str, list[Any]] = {step.name: [] for step in steps}

        def observed(step: Step) -> Callable[..., Any]:
            forward = step.block.forward

            def observe(*args: Any, **kwargs: Any) -> Any:
                step.calls += 1
                if step.calls == 1:
                    order.append(step)
                output = forward(*args, **kwargs)
                dense[step.name].append(copy.deepcopy(output))
                return output

            return observe

        with ExitStack() as replaced:
            for step in steps:
                replaced.enter_context(temporary_forward(step.block, observed(step)))
            self._forward(0)
        check_blocks_called([step.name for step in steps if step.calls], targets, len(self.batches))
        self.first_list = order[0].list_name
        while not order[-1].linears:
            order.pop()
        self.answers = self._may_answer(order, dense)
        return order

    def _may_answer(self, steps: list[Step], dense: dict[str, list[Any]]) -> bool:
        """Whether a block gets all it needs from what the last block returned, tried with the first batch. Not so
        where a block reads what an earlier one has put aside, such as keys and values that it shares (Gemma 3n), nor
        where several blocks run in a loop, since what a finished one returned in its earlier rounds is not kept."""
        with ExitStack() as replaced:
            for earlier, step in pairwise(steps):
                self.finish(earlier, dense[earlier.name][-1:], replaced)
                if not self._repeats(step, dense[step.name]):
                    warnings.warn(
                        f"`{step.name}` depends on more than the block before it, so all blocks before a block are "
                        "run again to prune it; this takes time that grows with the square of their number.",
                        stacklevel=4,
                    )
                    return False
        self.outputs.clear()
        return True

    def _repeats(self, step: Step, outputs: list[Any]) -> bool:
        """Whether the calls of a block return for the first batch what they have returned before."""
        same: list[bool] = []
        try:
            self.output_of(step, 0, lambda output: same.append(_close(output, outputs[len(same)])))
        except Exception:  # whatever the model makes of missing what it needs
            return False
        return all(same)

    def finish(self, step: Step, outputs: list[Any], replaced: ExitStack | None = None) -> None:
        """From now on, until `replaced` (None: the walk) is closed, a block answers with these outputs of its, one for
        each batch."""
        list_name = step.list_name
        self.outputs[list_name], self.last[list_name] = outputs, step

        def answer(*_: Any, **__: Any) -> Any:
            # A copy, since the model may go on to change it in place. Blocks before the last one share theirs: what
            # becomes of it is dropped.
            if self.last[list_name] is step:
                return copy.deepcopy(self.outputs[list_name][self.index])
            if list_name not in self.spare:
                self.spare[list_name] = copy.deepcopy(self.outputs[list_name][self.index])
            return self.spare[list_name]

        (self.replaced if replaced is None else replaced).enter_context(temporary_forward(step.block, answer))

    def pass_on(self, step: Step) -> None:
        """Run all batches through a block that is done, which answers with what it returns from now on; nothing where
        blocks have to run again."""
        if self.answers:
            self.finish(step, [self.output_of(step, index) for index in range(len(self.batches))])

    def gather(self, step: Step, new_statistics: Callable[[nn.Module], Any]) -> dict[str, Any]:
        """The statistics of a block's targets over all batches, by full name."""
        with self._gathering([step], new_statistics) as statistics:
            for index in range(len(self.batches) if step.linears else 0):
                self.output_of(step, index)
        return statistics

    def gather_dense(self, steps: list[Step], new_statistics: Callable[[nn.Module], Any]) -> dict[str, Any]:
        """The statistics of the targets of all blocks, in one forward per batch of the model as it is."""
        with self._gathering(steps, new_statistics) as statistics, ExitStack() as seen:
            for step in steps[:-1]:
                seen.enter_context(temporary_forward(step.block, self._seen(step, step.block.forward)))
            for index in range(len(self.batches)):
                self.output_of(steps[-1], index)
        return statistics

    @contextmanager
    def _gathering(self, steps: list[Step], new_statistics: Callable[[nn.Module], Any]) -> Iterator[dict[str, Any]]:
        """Everything that the targets of some blocks get as inputs within the context goes into their statistics."""
        statistics, hooks = {}, []
        for step in steps:
            hooks += self.masks.hooks_for(step.block, list(step.linears.values()))
            for name, linear in step.linears.items():
                with OffloadableWeight(self.model, name).loaded():  # for its device
                    statistics[name] = new_statistics(linear)
                hook = update_hook(self.masks, partial(self._update, name, statistics[name]))
                hooks.append(linear.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield statistics
        finally:
            for hook in hooks:
                hook.remove()
        for name, gathered in statistics.items():
            if not gathered.num_tokens:
                _raise_no_input(f"`{name}`", len(self.batches))

    def _seen(self, step: Step, forward: Callable) -> Callable[..., Any]:
        in_decoder = self.has_decoder and step.list_name != self.first_list
        of_text = may_see_text(self.model, step.name)

        def see(*args: Any, **kwargs: Any) -> Any:
            self.masks.enter_block(in_decoder, of_text, args, kwargs)
            return forward(*args, **kwargs)

        return see

    def output_of(self, step: Step, index: int, each: Callable[[Any], None] = lambda _: None) -> Any:
        """What a block returns for a batch, in the last call of it; nothing after it is run. What every call returns
        is handed to `each`, before the model goes on with it."""
        calls, forward, self.output = 0, self._seen(step, step.block.forward), None

        def stop_after(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            self.output = forward(*args, **kwargs)
            each(self.output)
            if calls == step.calls:
                raise _Reached
            return self.output

        with temporary_forward(step.block, stop_after):
            try:
                self._forward(index)
            except _Reached:
                return self.output
        raise ValueError(
            f"All calibration batches run through the same blocks, but batch {index} calls `{step.name}` {calls} "
            f"times and the first one {step.calls} times; leave that batch out."
        )

    @torch.no_grad()
    def _forward(self, index: int) -> None:
        self.index, self.spare = index, {}
        self.masks.start(self.batches[index])
        inputs = {key: tensor.to(self.device) for key, tensor in self.batches[index].items()}
        with torch.compiler.set_stance("force_eager"):  # a compiled graph does not see that forwards are replaced
            self.model(**inputs)

    def _update(self, name: str, statistics: Statistics, x: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        try:
            statistics.update(x, self.masks.if_it_fits(token_mask, x, name))
        except ValueError as error:
            raise ValueError(
                f"Calibration needs finite activations, got NaN or infinity in the input of `{name}` for batch "
                f"{self.index}; leave that batch out, or load the model in float32 or bfloat16. Nothing was pruned."
            ) from error


def _close(output: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        # NaN passes: it is for the statistics to complain.
        return output.shape == expected.shape and not (output - expected).norm() > 1e-3 * expected.norm()
    if isinstance(expected, (tuple, list)):
        return len(output) == len(expected) and all(map(_close, output, expected))
    return True


def check_blocks_called(called: Iterable[str], targets: Iterable[str], num_batches: int) -> None:
    """Raises:
    ValueError: if a linear that is pruned is in none of the blocks that a forward has called, as those of a vision
        tower are not where all is text."""
    called = tuple(f"{name}." for name in called)
    missed = [name for name in targets if not name.startswith(called)]
    if missed:
        where = dict.fromkeys(_widest_uncalled(name, called) for name in missed)
        pattern = "|".join(f"{name}[.].*" for name in where)
        _raise_no_input(
            f"`{missed[0]}` ({len(missed)} in all)", num_batches, f"them with `exclude_modules='{pattern}'`"
        )


def _widest_uncalled(linear: str, called: tuple[str, ...]) -> str:
    """The outermost list of blocks around a linear, or else block, of which nothing is called."""
    parts = linear.split(".")
    ends = [end for index, part in enumerate(parts) if part.isdigit() for end in (index, index + 1)]
    around = (".".join(parts[:end]) for end in ends)
    return next(name for name in around if not any(block.startswith(f"{name}.") for block in called))


def _raise_no_input(names: str, num_batches: int, excluded: str = "it with `exclude_modules`") -> None:
    raise ValueError(
        f"Calibration needs inputs of every linear that is pruned, got none for {names} from {num_batches} batches; "
        f"give more or other batches, or exclude {excluded}. Nothing was pruned."
    )
