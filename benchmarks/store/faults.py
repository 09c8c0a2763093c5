"""Kills and damages by the hundred: `repcon precompute` is killed at random, finished stores are damaged at random.

kills              SIGKILLs that met a running precompute, at random moments of its work
kills_lost_units   units that were finished before a kill and not after it
kills_stores       stores that were completed after their kills
kills_differing    of these, stores that are not byte for byte what an unbroken run writes
damages, damages_found, damages_served   faults put into files (a flipped byte, a cut, emptied, deleted or swapped
                   file); how many made the reader stop with a message; how many let a wrong label through
"""

import contextlib
import io
import multiprocessing
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from repcon.config import CropConfig, PrecomputeConfig, TeacherConfig
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError

IMAGES, CROPS, SIDE = 96, 8, 32
LONGEST_SECONDS = 4.0
"""A kill comes this long after the start at the latest."""


def faults(folder: Path, kills: int, damages: int, seed: int = 0) -> dict[str, Any]:
    """The figures above; the same seed gives the same moments and places."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["repcon.commands.precompute", "timm", "repcon.decode.reference"])
    recipe = _recipe(folder)
    whole = folder / "whole.zarr"
    _finish(context, recipe, whole)
    figures = _kill(context, recipe, folder, whole, kills, random.Random(seed))
    return figures | _damage(whole, folder / "damaged.zarr", damages, random.Random(seed + 1))


def _recipe(folder: Path) -> dict[str, Any]:
    """A pack and two small teachers on disk, and what `precompute` is asked for."""
    import torch

    from repcon.images.packing import open_or_pack
    from repcon.models.factory import create_model
    from repcon.models.preprocessing import Preprocessing
    from repcon.models.saved_model import save_model

    pictures = folder / "pictures" / "any"
    pictures.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for image in range(IMAGES):
        pixels = np.repeat(np.repeat(generator.integers(0, 256, (10, 12, 3), np.uint8), 8, 0), 8, 1)
        (pictures / f"{image:03d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    pack = open_or_pack(str(folder / "pictures"), folder / "cache")
    for classes in (7, 300):
        torch.manual_seed(classes)
        model = create_model("test_resnet", num_classes=classes, pretrained=False)
        data = Preprocessing(size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        names = tuple(map(str, range(classes)))
        save_model(model, folder / f"teacher-{classes}", classes=names, preprocessing=data, extra={})
    teachers = tuple(TeacherConfig(name=f"t{count}", model=str(folder / f"teacher-{count}")) for count in (7, 300))
    return {
        "pack": str(pack.url), "teachers": teachers, "crops": CROPS, "crop": CropConfig(seed=1), "rows_per_shard": 4,
        "loader": "reference", "batch_size": 16, "device": "cpu",
    }  # fmt: skip


def _precompute(recipe: dict[str, Any], out: str) -> None:
    import torch

    from repcon.commands import precompute

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        precompute.run(PrecomputeConfig(**recipe, out=out))


def _finish(context: Any, recipe: dict[str, Any], out: Path) -> None:
    process = context.Process(target=_precompute, args=(recipe, str(out)))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"{out}: precompute ended with {process.exitcode}")


def _kill(
    context: Any, recipe: dict[str, Any], folder: Path, whole: Path, kills: int, generator: random.Random
) -> dict[str, Any]:
    """Kills and resumes until there were so many kills; a store that gets finished is compared and begun anew."""
    met = lost = stores = differing = 0
    reference, out = _bytes(whole), folder / "killed.zarr"
    while met < kills:
        done = _done(out)
        process = context.Process(target=_precompute, args=(recipe, str(out)))
        process.start()
        time.sleep(generator.uniform(0.0, LONGEST_SECONDS))
        alive = process.is_alive()
        process.kill()
        process.join()
        met += alive
        lost += len(done - _done(out))
        if not alive or met == kills:
            _finish(context, recipe, out)
            stores += 1
            differing += _bytes(out) != reference
            shutil.rmtree(out)
    return {"kills": met, "kills_lost_units": lost, "kills_stores": stores, "kills_differing": differing}


def _done(out: Path) -> set[str]:
    if not (out / "manifest.json").exists():
        return set()
    store = LabelStore.open(str(out))
    return {unit.name for unit in store.units()} - {unit.name for unit in store.completion.unfinished()}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _damage(whole: Path, out: Path, damages: int, generator: random.Random) -> dict[str, Any]:
    """One fault at a time, then everything is read; a fault is found, harmless, or served."""
    shutil.copytree(whole, out)
    files = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    expected = _labels(out)
    found = served = 0
    for number in range(damages):
        path, before = generator.choice(list(files.items()))
        other, other_before = generator.choice([file for file in files.items() if file[1] != before])
        kind = ("flip", "flip", "flip", "cut", "empty", "delete", "swap")[number % 7]
        if kind == "flip":
            place = generator.randrange(len(before))
            path.write_bytes(
                before[:place] + bytes([before[place] ^ (1 << generator.randrange(8))]) + before[place + 1 :]
            )
        elif kind == "cut":
            path.write_bytes(before[: generator.randrange(len(before))])
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "delete":
            path.unlink()
        else:
            path.write_bytes(other_before)
            other.write_bytes(before)
        try:
            served += not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(_labels(out), expected, strict=True))
        except UserError:
            found += 1
        other.write_bytes(other_before)
        path.write_bytes(before)
    return {"damages": damages, "damages_found": found, "damages_served": served}


def _labels(out: Path) -> list[np.ndarray]:
    store = LabelStore.open(str(out))
    tables = store.reader.table(range(store.crops))
    return [tables.boxes, tables.flips, *(array for pair in tables.labels.values() for array in pair)]
