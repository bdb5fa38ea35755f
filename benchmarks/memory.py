"""Memory: bytes saved for backward, and the peak of a training step.

Saved bytes are what autograd keeps between forward and backward, told by `saved_tensors_hooks`: each storage once,
without those of inputs, parameters and buffers, which are there anyway.

The peak is taken in a process of its own for each variant, since an allocator keeps what an earlier variant freed. It
is the highest resident memory during the first steps minus the resident memory before them, so it holds activations,
gradients, optimizer state and temporaries, but neither the weights nor the libraries. The kernel's mark of the highest
resident memory (VmHWM) is reset before the steps; `ru_maxrss`, used where there is no /proc, cannot be, and so misses
what building the model had already reached.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

Build = Callable[[], Callable[[], object]]

MB = 1e6
STATUS = Path("/proc/self/status")
PEAK_STEPS = 3  # the first one makes the optimizer's state, the others have it besides their activations
FIRST, LAST = "tensor_peak: first", "tensor_peak: last"  # marks in the profile


class Peak(NamedTuple):
    """Megabytes (1e6 bytes)."""

    built: float  # what building the model, its inputs and its optimizer added
    step: float  # what the steps added to that, at most


def saved_bytes(forward: Callable[[], object], own: Iterable[torch.Tensor]) -> int:
    """Bytes that `forward` saves for backward, beyond the storages of the tensors `own`."""
    present = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in present:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in saved.values())


def tensor_peak(step: Callable[[], object], device: torch.device) -> float | None:
    """Megabytes of tensors that the first steps have at most at one time, beyond those from before.

    Unlike the resident memory this is the same in every run: it knows nothing of what an allocator keeps, nor of the
    scratch memory of matmul libraries.

    Args:
        step: fresh from its builder, so that it makes its optimizer state here.

    Returns:
        None where torch's profiler does not tell, or lost events.
    """
    if device.type == "cuda":
        before = reset(device)
        for _ in range(PEAK_STEPS):
            step()
        return (highest(device) - before) / MB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.profiler.record_function(FIRST):
            pass
        for _ in range(PEAK_STEPS):
            step()
        with torch.profiler.record_function(LAST):
            pass
    try:
        events = profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    except AttributeError:  # not a public part of torch
        return None
    if not {FIRST, LAST} <= {event.name() for event in events}:
        return None  # on a machine that is very busy the profiler loses events from one of its ends
    return max(itertools.accumulate(nbytes for _, _, nbytes in changes), default=0) / MB


def peak(build: Build, warm_up: Build, device: torch.device, threads: int) -> Peak | None:
    """Peak memory of the step that `build` returns, in a new process.

    Args:
        build: makes model and inputs, returns the step; picklable.
        warm_up: the same at a tiny size. It runs first, so that the code it loads is not counted.

    Returns:
        None if the process died, as one that runs out of memory does; its error is on stderr.
    """
    return in_new_process(_measure, threads, build, warm_up, device)


def in_new_process(function: Callable[..., Any], threads: int, *args: Any) -> Any:
    """What a function returns in a process of its own; None if the process died. All of it picklable."""
    # A server that has the libraries forks a child for each call: a child's memory is its own from the fork on.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "peft", "transformers", "peft_sparse", "benchmarks.peers"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, function, threads, args), daemon=True)
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        child.join()


def _answer(sender: Connection, function: Callable[..., Any], threads: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    sender.send(function(*args))


def _measure(build: Build, warm_up: Build, device: torch.device) -> Peak:
    warm = warm_up()
    for _ in range(PEAK_STEPS):
        warm()
    start = reset(device)
    step = build()
    before = reset(device)
    for _ in range(PEAK_STEPS):
        step()
    return Peak((before - start) / MB, max(0.0, (highest(device) - before) / MB))


def reset(device: torch.device) -> int:
    """Forget the peak so far; the bytes that are in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed shall not hide what a step needs
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS, see proc(5)
        return _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return highest(device)


def highest(device: torch.device) -> int:
    """The peak, in bytes, since [`reset`]."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except (OSError, KeyError):
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return found if sys.platform == "darwin" else found * 1024  # bytes on macOS, KiB elsewhere


def _status(name: str) -> int:
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return {line[0].removesuffix(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}[name]


def available_mb() -> float | None:
    """Memory that can still be used without swapping, where Linux tells."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        return {line[0]: int(line[1]) * 1024 / MB for line in lines}["MemAvailable:"]
    except (OSError, KeyError):
        return None
