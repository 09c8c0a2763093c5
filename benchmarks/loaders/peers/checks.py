"""Whether the peers give the crops of our plan, and whether they go on in the middle of an epoch."""

import pickle
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from benchmarks.harness.records import in_new_process
from benchmarks.loaders.contenders import BATCH_IMAGES, Case, boxes_and_flips
from benchmarks.loaders.peers.contenders import PEERS
from repcon.decode import reference
from repcon.decode.factory import open_loader
from repcon.distill.sampler import CropBatchSampler, EpochGroup, box_lookup
from repcon.images.pack import ImagePack
from repcon.runtime.console import console

SAME = "the same batches"
OURS = "torch"
"""The loader with which repcon's own resuming is tried; its order comes from the sampler, as with every loader."""


def pixel_difference(name: str, case: Case, threads: int) -> float:
    """Mean absolute difference, of 255, of all the peer's crops to the reference loader's.

    Raises ValueError where an image is missing or comes twice.
    """
    return in_new_process(_pixel_difference, name, case, threads)


def _pixel_difference(name: str, case: Case, threads: int) -> float:
    pack = ImagePack.open(case.pack)
    boxes, flips = boxes_and_flips(pack, case)
    ready, total, seen = PEERS[name].open(case, threads), 0.0, []
    for batch in ready.epoch():
        for row, crops in zip(batch["row"].tolist(), batch["crops"], strict=True):  # pyright: ignore
            image = reference.decode(pack.read(row))
            for crop, box, flip in zip(crops, boxes[row], flips[row], strict=True):
                wanted = reference.crop(image, box, case.side, bool(flip))
                total += float((crop.float() - wanted.float()).abs().mean())
            seen.append(row)
    ready.close()
    if sorted(seen) != list(range(len(pack))):
        raise ValueError(f"{name}: {len(set(seen))} of {len(pack)} images in {len(seen)} samples")
    return total / (len(seen) * case.crops)


def resumes(name: str, case: Case, threads: int) -> str:
    """What a new process yields that goes on after half of a shuffled epoch: `SAME`, or what differs.

    `name` is a peer, or `OURS`.
    """
    opened = _ours if name == OURS else _peer
    if name != OURS and PEERS[name].loader is None:
        return "no position to save"
    wanted, _ = in_new_process(_batches, opened, name, case, threads, None, None)
    half = len(wanted) // 2
    first, state = in_new_process(_batches, opened, name, case, threads, None, half)
    rest, _ = in_new_process(_batches, opened, name, case, threads, state, None)
    if first != wanted[:half]:
        return "another order in every process"
    if rest == wanted[half:]:
        return SAME
    left, held = list(chain(*wanted[half:])), list(chain(*rest))
    if sorted(held) == sorted(left):
        return "the same images in other batches"
    again = len(held) - len(set(held) & set(left))
    return f"{len(set(left) - set(held))} of {len(left)} images left out, {again} shown again"


Opened = tuple[Callable[[], Iterator[list[int]]], Callable[[], Any]]
"""The rows of each batch, and the position to save."""


def _batches(
    opened: Callable[[str, Case, int, Any], Opened], name: str, case: Case, threads: int, state: Any, stop: int | None
) -> tuple[list[list[int]], Any]:
    """The rows of the batches from `state` to `stop`, and the position there, as it would be written to a file."""
    console.quiet = True
    batches, position = opened(name, case, threads, None if state is None else pickle.loads(state))
    rows = list(islice(batches(), stop))
    return rows, None if stop is None else pickle.dumps(position())


def _peer(name: str, case: Case, threads: int, state: Any) -> Opened:
    make = PEERS[name].loader
    assert make is not None
    loader = make(case, threads, shuffle=True)
    if state is not None:
        loader.load_state_dict(state)
    return lambda: (batch["row"].tolist() for batch in loader), loader.state_dict


def _ours(name: str, case: Case, threads: int, state: Any) -> Opened:
    """As `DistillLoader` does: the position is the number of the batch, and the order follows from the seed."""
    pack = ImagePack.open(case.pack)
    boxes, flips = boxes_and_flips(pack, case)
    group = EpochGroup(epoch=0, crops=tuple(range(case.crops)))
    sampler = CropBatchSampler(np.arange(len(pack)), group, seed=0, batch_size=BATCH_IMAGES * case.crops)
    lookup = box_lookup(list(boxes.swapaxes(0, 1)), list(flips.swapaxes(0, 1)))
    loader = open_loader(name, pack, [case.side], num_workers=threads, device="cpu")
    place = state or 0

    def batches() -> Iterator[list[int]]:
        nonlocal place
        for batch in loader.batches(sampler.requests(lookup, place)):
            place += 1
            yield batch.images[:: case.crops].tolist()

    return batches, lambda: place
