"""What the launches of a training step wait for while a loader works on the same GPU. One minute.

    python -m benchmarks.training.profile [--loaders dali,torch] [--data FOLDER] [--prepare] [--out FOLDER] [--dry]

For one batch in memory again and again (`synthetic`) and for each loader: the rate over TIMED steps after WARM ones,
then a profile of PROFILED steps by torch.profiler, from which is printed

busy            share of the time that the stream of the training step has a kernel running, and how long its kernels
                run per step: longer than with `synthetic` where a loader's kernels share the processors and the memory
gaps            time per step in which that stream has nothing to run, by what the next kernel waited for: `late
                launch` (it was called in the gap), `slow launch` (called before it, returned in it: the driver held the
                call), `queued` (launched before the gap: an event of another stream, or no room on the GPU)
late because    what the launching thread did in the gaps of `late launch`: the innermost call
launches        duration of the launch calls of the training thread; other threads' calls into the driver, by time
other streams   kernels and copies that are not the training step's, by time per step
"""

import argparse
import json
import tempfile
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.benchmark import GPU, SHORT
from benchmarks.training.contenders import _trainer
from benchmarks.training.data import CLASSES, make_data, open_data
from repcon.distill.loader import Batch
from repcon.distill.trainer import Trainer
from repcon.runtime.memory import keep_freed_memory

WARM, TIMED, PROFILED = 12, 60, 25
PASSES = 4
GAP = 5.0
"""Microseconds; shorter pauses between kernels are the launch's own."""


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training step's launches wait for.")
    parser.add_argument("--loaders", default="dali,torch")
    parser.add_argument("--data", default="", help="folder for pack and labels; default: one that is removed again")
    parser.add_argument("--prepare", action="store_true", help="only make pack and labels")
    parser.add_argument("--out", default="", help="folder for the figures, as JSON")
    parser.add_argument("--dry", action="store_true", help="a tiny form for a CPU, whose figures mean nothing")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = "cpu" if arguments.dry else "cuda"
    base = replace(SHORT, heavy="test_resnet", size=32, heavy_images=64, batch_size=2) if arguments.dry else GPU
    with tempfile.TemporaryDirectory() as folder:
        place = Path(arguments.data or folder)
        if not (place / "light.zarr").exists():
            make_data(place, replace(base, light_images=16))
        if arguments.prepare:
            return
        data = open_data(place)
        for name in ("synthetic", *arguments.loaders.split(",")):
            setting = replace(base, loader="torch" if name == "synthetic" else name)
            trainer = _trainer(data.heavy, setting, device, setting.heavy, tuple(CLASSES), PASSES)
            try:
                trace = profile(trainer, name, device, Path(folder))
            finally:
                trainer.loader.close()
            if arguments.out:
                Path(arguments.out, f"{name}-summary.json").write_text(json.dumps(summary(trace), indent=1))
            if device == "cuda":
                show(summary(trace))


def profile(trainer: Trainer, name: str, device: str, folder: Path) -> list[dict[str, Any]]:
    """Prints the rate without the profiler; gives the trace's events."""
    trainer.student.train()
    batches = _synthetic(trainer) if name == "synthetic" else _batches(trainer)

    def steps(count: int) -> int:
        crops = 0
        for _ in range(count):
            part, number, batch = next(batches)
            trainer.train_batch(batch, part, number)
            crops += batch.total
        if device == "cuda":
            torch.cuda.synchronize()
        return crops

    steps(WARM)
    started = time.perf_counter()
    crops = steps(TIMED)
    print(f"{name}: {crops / (time.perf_counter() - started):,.0f} crops/s over {TIMED} steps", flush=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        steps(PROFILED)
    file = folder / f"{name}.json"
    profiler.export_chrome_trace(str(file))
    batches.close()
    return json.loads(file.read_text())["traceEvents"]


Step = tuple[int, int, Batch]
"""Number of the pass, of the step in it, and its batch."""


def _synthetic(trainer: Trainer) -> Generator[Step, None, None]:
    batches = trainer.loader.batches(0)
    first = next(batches)
    batches.close()
    for part, steps in enumerate(trainer.loader.group_steps):
        for number in range(steps):
            yield part, number, first


def _batches(trainer: Trainer) -> Generator[Step, None, None]:
    for part, batches in trainer.loader.groups():
        for number, batch in enumerate(batches):
            yield part, number, batch


def summary(trace: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the module's text, times in microseconds per step."""
    timed = [event for event in trace if event.get("ph") == "X" and "dur" in event]
    device = [event for event in timed if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    calls = [event for event in timed if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    if not device:
        return {"cpu": _by_time(timed)}
    streams: dict[Any, list[dict]] = defaultdict(list)
    for event in device:
        streams[event["args"].get("stream", event["tid"])].append(event)
    main = max(streams, key=lambda stream: sum(event["dur"] for event in streams[stream]))
    kernels = sorted(streams[main], key=lambda event: event["ts"])
    first, last = kernels[0]["ts"], max(event["ts"] + event["dur"] for event in kernels)
    busy = sum(event["dur"] for event in kernels)
    launch_of = {event["args"].get("correlation"): event for event in calls if "args" in event}
    threads = Counter(launch_of[c]["tid"] for event in kernels if (c := event["args"].get("correlation")) in launch_of)
    thread = threads.most_common(1)[0][0] if threads else None
    gaps, because = _gaps(kernels, launch_of, _Thread(timed, thread))
    launches = sorted(event["dur"] for event in calls if event["tid"] == thread and "Launch" in event["name"])
    return {
        "step": (last - first) / PROFILED,
        "busy_share": busy / (last - first),
        "kernels": busy / PROFILED,
        "kernel_count": len(kernels) / PROFILED,
        "gaps": {name: value / PROFILED for name, value in gaps.items()},
        "late_because": because,
        "launches": {
            "count": len(launches),
            "median": launches[len(launches) // 2] if launches else 0,
            "p99": launches[int(0.99 * len(launches))] if launches else 0,
            "max": launches[-1] if launches else 0,
            "over_100_us_sum": sum(value for value in launches if value > 100) / PROFILED,
        },
        "waits_of_the_thread": _by_time([e for e in calls if e["tid"] == thread and "Launch" not in e["name"]]),
        "calls_of_other_threads": _by_time([event for event in calls if event["tid"] != thread]),
        "slowest_kernels": _by_time(kernels),
        "other_streams": _by_time([event for event in device if event["args"].get("stream", event["tid"]) != main]),
        "cpu_ops_of_the_thread": _by_time([e for e in timed if e.get("cat") == "cpu_op" and e["tid"] == thread]),
    }


def _by_time(events: list[dict[str, Any]], most: int = 8) -> list[tuple[str, float, float]]:
    """(name, microseconds per step, calls per step) of those that take most."""
    total, count = Counter(), Counter()
    for event in events:
        total[event["name"][:70]] += event["dur"]
        count[event["name"][:70]] += 1
    return [(name, round(us / PROFILED, 1), count[name] / PROFILED) for name, us in total.most_common(most)]


class _Thread:
    """What a thread did at a time."""

    def __init__(self, events: list[dict[str, Any]], thread: Any) -> None:
        kinds = ("cpu_op", "cuda_runtime", "cuda_driver", "user_annotation", "python_function")
        mine = [event for event in events if event["tid"] == thread and event.get("cat") in kinds]
        self._events = sorted(mine, key=lambda event: event["ts"])
        self._starts = [event["ts"] for event in self._events]

    def at(self, moment: float) -> str:
        """The innermost call that covers the moment."""
        place = bisect_right(self._starts, moment)
        for event in reversed(self._events[max(0, place - 200) : place]):
            if event["ts"] + event["dur"] >= moment:
                return event["name"][:70]
        return "(Python, or nothing that the profiler sees)"


def _gaps(
    kernels: list[dict[str, Any]], launch_of: dict[Any, dict[str, Any]], thread: _Thread
) -> tuple[Counter, list[tuple[str, float]]]:
    """Microseconds of gaps by kind, and what the thread did in the middle of those of late launches."""
    gaps, because = Counter(), Counter()
    end = kernels[0]["ts"] + kernels[0]["dur"]
    for kernel in kernels[1:]:
        length = kernel["ts"] - end
        if length > 0:
            launch = launch_of.get(kernel["args"].get("correlation"))
            if length < GAP:
                gaps["shorter than 5 us"] += length
            elif launch is None:
                gaps["unknown"] += length
            elif launch["ts"] >= end:
                gaps["late launch"] += length
                because[thread.at((end + launch["ts"]) / 2)] += launch["ts"] - end
            elif launch["ts"] + launch["dur"] >= end:
                gaps["slow launch"] += length
                because[f"inside {launch['name']}"] += length
            else:
                gaps["queued"] += length
        end = max(end, kernel["ts"] + kernel["dur"])
    return gaps, [(name, round(us / PROFILED, 1)) for name, us in because.most_common(10)]


def show(figures: dict[str, Any]) -> None:
    """Prints them, a line each."""
    for name, value in figures.items():
        if isinstance(value, list):
            print(f"  {name}:")
            for row in value:
                print("    " + ", ".join(f"{part:,.1f}" if isinstance(part, float) else str(part) for part in row))
        elif isinstance(value, dict):
            print(f"  {name}: " + ", ".join(f"{key} {part:,.1f}" for key, part in value.items()))
        else:
            print(f"  {name}: {value:,.3f}")
    print(flush=True)


if __name__ == "__main__":
    main()
