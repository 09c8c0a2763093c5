"""Choose and open a loader."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from repcon.decode.base import Loader
from repcon.decode.libraries import installed, require_installed
from repcon.images.format import BETON
from repcon.images.pack import ImagePack
from repcon.runtime.console import print_plain
from repcon.runtime.errors import UserError
from repcon.runtime.system import own_cores

_announce = cache(print_plain)
"""Prints a text once per process."""


def open_loader(
    kind: str, pack: ImagePack, sizes: Sequence[int], *, num_workers: int = 0, device: str = "cpu"
) -> Loader:
    """Opens `kind` (`auto`, `reference`, `torch`, `dali`, `ffcv`) on a pack, for crops of each side in `sizes`.

    `num_workers` threads decode (0: one per core, for a GPU three for four cores, or one for two where DALI decodes on
    it). `device` is where the pixels will be used: with `cuda` the CPU loaders fill pinned memory, and DALI decodes on
    that GPU and yields pixels that lie there.
    Raises UserError for an unknown or missing loader.
    """
    sides = tuple(dict.fromkeys(int(size) for size in sizes))
    if not sides or min(sides) < 1:
        raise UserError(f"loader {kind}: sizes {list(sizes)} must be one or more sides in pixels, each at least 1")
    if kind == "auto":
        kind, reason = _choose(pack, device.startswith("cuda"))
        _announce(f"loader: {kind} ({reason})")
    require_installed(kind)
    if device.startswith("cuda") and kind in ("torch", "ffcv"):
        num_workers = num_workers or decode_threads(own_cores(), device)
    return _open(kind, pack, sides, num_workers, device)


def decode_threads(cores: int, device: str) -> int:
    """The number of decoding threads on this many cores, for batches that are used on `device`."""
    # What launches a GPU's work needs cores too: a ResNet-50 on an H200 with 16 cores took 4,584 images/s from 12
    # threads; earlier, 4,425 from 12 and 3,527 from 16.
    return max(1, 3 * cores // 4) if device.startswith("cuda") else cores


def _open(kind: str, pack: ImagePack, sides: tuple[int, ...], num_workers: int, device: str) -> Loader:
    # Imported here: DALI and FFCV are optional, and slow to import.
    if kind == "reference":
        from repcon.decode.reference import ReferenceLoader

        return ReferenceLoader(pack, sides, device=device)
    if kind == "torch":
        from repcon.decode.threads import ThreadedLoader

        return ThreadedLoader(pack, sides, num_workers=num_workers, device=device)
    if kind == "ffcv":
        from repcon.decode.ffcv import FfcvLoader

        return FfcvLoader(pack, sides, num_workers=num_workers, device=device)
    assert kind == "dali", kind
    if device.startswith("cuda"):
        from repcon.decode.dali_gpu import DaliGpuLoader

        return DaliGpuLoader(pack, sides, num_workers=num_workers, device=device)
    from repcon.decode.dali_cpu import DaliCpuLoader

    return DaliCpuLoader(pack, sides, num_workers=num_workers)


def _choose(pack: ImagePack, on_gpu: bool) -> tuple[str, str]:
    """The loader that `auto` stands for with this pack on this machine, and why."""
    if on_gpu and installed("dali"):
        return "dali", "DALI decodes on the GPU"
    if installed("ffcv") and Path(pack.url, BETON).is_file():
        return "ffcv", "the fastest on a CPU, and the pack has its .beton"
    if on_gpu:
        return "torch", "decodes on the CPU; DALI would decode on the GPU"
    return "torch", "the fastest on a CPU that needs no .beton"
