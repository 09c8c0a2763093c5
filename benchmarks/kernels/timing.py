"""How long a step takes: on a GPU from device events around replays of a captured graph, on a CPU the processor time of
one thread, which other work on the machine disturbs least."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUNDS = 20
COLD_BYTES = 256 * 2**20
"""Logits that a replay goes through in turn, so that no step finds its own in a cache."""
MOST_STEPS = 64
"""Steps in one graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one step, round by round, and how they were taken."""

    samples: tuple[float, ...]
    how: str

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)


def on_cpu(steps: Mapping[str, Callable[[Tensor], Any]], logits: Tensor, seconds: float) -> dict[str, Timing]:
    """All steps in turn, round after round, so that a slow moment of the machine meets all of them."""
    torch.set_num_threads(1)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(logits)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(samples.values()))) < 5:
        for name, step in steps.items():
            started = time.process_time()
            step(logits)
            samples[name].append(time.process_time() - started)
    return {name: Timing(samples=tuple(values), how="processor") for name, values in samples.items()}


def on_gpu(step: Callable[[Tensor], Any], logits: Tensor) -> Timing:
    """One step's time on the device, gaps between its own kernels included, Python's time not.

    A step that waits for the device cannot be captured; it is timed between events, as it comes.
    """
    count = max(1, min(MOST_STEPS, COLD_BYTES // max(1, logits.nbytes)))
    copies = [logits.detach().clone().requires_grad_() for _ in range(count)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for copy in copies[:3] * 2:
            step(copy)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for copy in copies:
                step(copy)
    except RuntimeError:
        torch.cuda.synchronize()
        return Timing(samples=_rounds(lambda: [step(copy) for copy in copies], count), how="events")
    graph.replay()
    return Timing(samples=_rounds(graph.replay, count), how="graph")


def _rounds(run: Callable[[], Any], count: int) -> tuple[float, ...]:
    return tuple(_between_events(run) / count for _ in range(ROUNDS))


def _between_events(run: Callable[[], Any]) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes."""
    source = torch.empty(size // 4, dtype=torch.float32, device=device).zero_()
    target = torch.empty_like(source)
    if device == "cuda":
        target.copy_(source)
        seconds = statistics.median(_between_events(lambda: target.copy_(source)) for _ in range(ROUNDS))
    else:
        seconds = on_cpu({"copy": target.copy_}, source, 1.0)["copy"].seconds
    return 2 * source.nbytes / seconds


def launch_seconds() -> float:
    """A kernel of one program that does nothing, in a graph of many."""
    import triton

    @triton.jit
    def nothing(address):
        pass

    address = torch.zeros(1, device="cuda")
    nothing[(1,)](address)  # pyright: ignore[reportIndexIssue]
    torch.cuda.synchronize()
    graph, count = torch.cuda.CUDAGraph(), 200
    with torch.cuda.graph(graph):
        for _ in range(count):
            nothing[(1,)](address)  # pyright: ignore[reportIndexIssue]
    graph.replay()
    return statistics.median(_between_events(graph.replay) / count for _ in range(ROUNDS))


def launches(step: Callable[[Tensor], Any], logits: Tensor) -> int:
    """Kernels, copies and fills that a step puts on the GPU."""
    step(logits)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(logits)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.profiler.DeviceType.CUDA for event in profile.events() or ())


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most memory that `run` holds above what was held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            highest = max(highest, held)
    return highest
