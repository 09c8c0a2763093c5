"""Chooses and opens a loader; says how to get one that is missing."""

import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from repcon.errors import UserError
from repcon.record import console

if TYPE_CHECKING:
    from repcon.images import Pack
    from repcon.loaders import Loader

_LIBRARIES = {
    "reference": ("PIL",),
    "torch": ("simplejpeg",),
    "dali": ("nvidia.dali", "numba"),
    "ffcv": ("ffcv", "numba"),
}
_HOW_TO_GET = {
    "dali": "on Linux: pip install 'repcon[dali]'",
    "ffcv": "on Linux: run `make ffcv`, or tools/install-ffcv with the Python that runs repcon",
}


def installed(kind: str) -> bool:
    """Whether the loader's libraries are here."""
    return not _missing(kind)


def require(kind: str) -> None:
    """Raises UserError, saying how to get it, where the loader is unknown or its libraries are not installed."""
    if kind not in _LIBRARIES:
        raise UserError(f"loader {kind}: unknown; choose auto, {', '.join(_LIBRARIES)}")
    if missing := _missing(kind):
        how = _HOW_TO_GET.get(kind, f"pip install {' '.join(missing)}")
        raise UserError(f"loader {kind}: {' and '.join(missing)} not installed; {how}")


def _missing(kind: str) -> list[str]:
    def found(library: str) -> bool:
        try:
            return find_spec(library) is not None
        except ModuleNotFoundError:
            return False

    return [library for library in _LIBRARIES[kind] if not found(library)]


def open_loader(kind: str, pack: "Pack", sizes: Sequence[int], *, workers: int = 0, device: str = "cpu") -> "Loader":
    """Opens `kind` (`auto`, `reference`, `torch`, `dali`, `ffcv`) on a pack, for crops of each side in `sizes`.

    `workers` threads decode (0: one per core). `device` is where the pixels will be used: with `cuda` the CPU
    loaders fill pinned memory, and DALI decodes on that GPU and yields pixels that already lie there.
    Raises UserError for an unknown or missing loader.
    """
    sides = tuple(dict.fromkeys(int(size) for size in sizes))
    if not sides or min(sides) < 1:
        raise UserError(f"loader {kind}: sizes {list(sizes)} must be one or more sides in pixels, each at least 1")
    if kind == "auto":
        kind = _choose(device.startswith("cuda"))
    require(kind)
    return _open(kind, pack, sides, workers, device)


def _open(kind: str, pack: "Pack", sides: tuple[int, ...], workers: int, device: str) -> "Loader":
    # Imported here: DALI and FFCV are optional, and slow to import.
    if kind == "reference":
        from repcon.loaders.reference import ReferenceLoader

        return ReferenceLoader(pack, sides, device=device)
    if kind == "torch":
        from repcon.loaders.threads import ThreadsLoader

        return ThreadsLoader(pack, sides, workers=workers, device=device)
    if kind == "ffcv":
        from repcon.loaders.ffcv import FfcvLoader

        return FfcvLoader(pack, sides, workers=workers, device=device)
    from repcon.loaders.dali import open_dali

    return open_dali(pack, sides, workers=workers, device=device)


@cache
def _choose(on_gpu: bool) -> str:
    """The loader that `auto` means on this machine, said once."""
    kind, reason = "torch", "the fastest on a CPU without further installs"
    if on_gpu and sys.platform == "linux" and installed("dali"):
        kind, reason = "dali", "DALI decodes on the GPU"
    console.print(f"loader: {kind} ({reason})")
    return kind
