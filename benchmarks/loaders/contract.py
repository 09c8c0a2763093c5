"""Whether every loader gives the crop that the label was computed on: pixels, and what a real teacher says of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.records import in_new_process
from repcon.commands import precompute
from repcon.config import Device, PrecomputeConfig, TeacherConfig, VerifyConfig
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.precompute.recompute import rerun
from repcon.runtime.console import console

TEACHER = "package:efficientnet_lite0"
REFERENCE = "reference"


def contract(pack: Path, store: Path, side: int, kinds: Sequence[str], device: Device) -> dict[str, dict[str, float]]:
    """One crop of every image, labelled by `repcon precompute` through the reference loader, then asked about again
    through the loaders of `kinds`, all of it on the device.

    Per loader: `pixel_difference` (mean absolute, of 255, to the float32 reference; not of the reference itself), `kl`
    and `kl_worst` in nat from the stored label to the one of its crop, `agreement` of the most probable classes.
    """
    # In a process of its own: it loads every library that the timed ones load too.
    return in_new_process(_contract, str(pack), str(store), side, tuple(kinds), device)


def put_contract(figures: dict[str, Any], kind: str, found: dict[str, float]) -> None:
    """Adds what `contract` found of a loader."""
    for name, value in found.items():
        figures[f"{kind}_pixel_difference" if name == "pixel_difference" else f"{kind}_label_{name}"] = value


def _contract(pack: str, store: str, side: int, kinds: tuple[Any, ...], device: Device) -> dict[str, dict[str, float]]:
    console.quiet = True
    teacher = TeacherConfig(name="teacher", model=TEACHER, size=side)
    precompute.run(
        PrecomputeConfig(pack=pack, out=store, teachers=(teacher,), crops=1, loader=REFERENCE, device=device)
    )
    opened = ImagePack.open(pack)
    config = VerifyConfig(store=store, pack=pack, sample=len(opened), loaders=(REFERENCE, *kinds), device=device)
    return rerun(LabelStore.open(store), opened, config)["teacher"]
