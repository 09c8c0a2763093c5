"""Whether every loader gives the crop that the label was computed on: pixels, and what a real teacher says of them."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from loaders_contenders import OURS

from repcon import precompute
from repcon.config import PrecomputeConfig, TeacherConfig, VerifyConfig
from repcon.images import Pack
from repcon.labelling.rerun import rerun
from repcon.loaders import installed
from repcon.record import console
from repcon.store import LabelStore

TEACHER = "package:efficientnet_lite0"
REFERENCE = "reference"


def contract(pack: Path, store: Path, side: int) -> dict[str, dict[str, float]]:
    """One crop of every image, labelled by `repcon precompute` through the reference loader, then asked about again.

    Per loader: `pixel_difference` (mean absolute, of 255, to the float32 reference; not of the reference itself), `kl`
    and `kl_worst` in nat from the stored label to the one of its crop, `agreement` of the most probable classes.
    """
    # In a process of its own: it loads every library that the timed ones load too.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_contract, str(pack), str(store), side).result()


def _contract(pack: str, store: str, side: int) -> dict[str, dict[str, float]]:
    console.quiet = True
    teacher = TeacherConfig(name="teacher", model=TEACHER, size=side)
    precompute.run(PrecomputeConfig(pack=pack, out=store, teachers=(teacher,), crops=1, loader=REFERENCE, device="cpu"))
    opened = Pack.open(pack)
    kinds: tuple[Any, ...] = (REFERENCE, *(kind for kind in OURS if installed(kind)))
    config = VerifyConfig(store=store, pack=pack, sample=len(opened), loaders=kinds, device="cpu")
    return rerun(LabelStore.open(store), opened, config)["teacher"]
