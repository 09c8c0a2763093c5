"""The environment that measurements are recorded with: versions, commit, processor, device, command.

Imports only the standard library and torch: the kernels' benchmark runs where little else is installed.
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "repcon", "torch", "torchvision", "timm", "triton", "numpy", "zarr", "numcodecs", "simplejpeg", "pillow",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120", "ffcv", "numba", "ray", "scikit-learn", "liger-kernel",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """This process's environment; `commit` only in a checkout, `power_limit_watts` only where it is known."""
    import torch

    on_gpu = torch.cuda.is_available()
    facts = {
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": cores(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cuda": torch.version.cuda,
        "power_limit_watts": _power_limit_watts(str(torch.cuda.get_device_properties(0).uuid)) if on_gpu else None,
        "command": f"{_program()} {shlex.join(sys.argv[1:])}".rstrip(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return {name: value for name, value in facts.items() if value is not None}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _program() -> str:
    """The script's name, or the package's of `python -m PACKAGE`."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def cores() -> int:
    """Number of processor cores that this process may use: those it is bound to, within its container's limit."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, round(_container_limit(Path("/sys/fs/cgroup")))))


def _container_limit(root: Path) -> float:
    """How many cores' time Docker's `--cpus` or a Kubernetes limit leaves to this container; `sys.maxsize` without one.

    Such a limit hides no core, but a process that works on more of them is stopped for the rest of each period.
    """
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups 2 and 1
        with suppress(OSError, ValueError):  # no such file; "max"
            quota, period = (int(word) for name in files for word in (root / name).read_text(encoding="ascii").split())
            if quota > 0:
                return quota / period
    return sys.maxsize


def sleep_when_idle() -> None:
    """Has torch's threads on a CPU spin for a shorter time between operations; to be called before torch is imported.

    A thread that waits for the next operation holds its core for milliseconds, while the loader's threads wait for one.
    With 10,000 rounds in place of some 300,000, precompute with EfficientNet-Lite0 on two cores made 4 % more crops per
    second, and the network alone was as fast (medians of five turns). Does nothing where the user has set either
    variable, and in processes with another OpenMP library than GNU's.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def own_cores() -> int:
    """This process's share of the cores, if torchrun started several processes on this machine."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores() // max(1, int(processes))) if processes.isdecimal() else cores()


@cache
def commit() -> str | None:
    """The checkout's commit, with `-dirty` where tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # An installed package may be inside another project's checkout.
        return None
    return _run_command("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _power_limit_watts(uuid: str) -> float | None:
    watts = _run_command("nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=power.limit", "--format=csv,noheader,nounits")
    try:
        return float(watts or "")
    except ValueError:  # "[N/A]" where the card does not report it
        return None


def _run_command(*command: str) -> str | None:
    """A command's output; None where it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
