"""SIGKILL at random moments of a run, with a fixed seed. `python -m benchmarks.store --long` has a hundred of them."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forkserver import CONTEXT
from precompute_case import contents, pack_path, recipe, teacher_folders, with_teachers
from store_builder import create_and_fill

from repcon.commands import precompute
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import normalise
from repcon.precompute import engine, ensemble

__all__ = ["pack_path", "recipe", "teacher_folders"]


def on_one_thread(run: Callable[..., Any], *arguments: Any) -> None:
    # With two threads, which share torch's exp, a unit in some 20,000 came out with labels 1e-5 off, why is not known.
    # It is the store that is tested here: its input must not differ.
    torch.set_num_threads(1)
    run(*arguments)


def killed_ten_times(run: Callable[..., Any], arguments: tuple, out: Path, generator: random.Random) -> list[int]:
    """Runs and kills; gives how many units were left after each kill."""
    left = []
    while len(left) < 10:
        # A fork of a server that has imported everything, so that kills land in the work.
        process = CONTEXT.Process(target=on_one_thread, args=(run, *arguments))
        process.start()
        # By files and not by the clock: a busy machine only takes longer to come to the same places.
        goal = files_in(out) + generator.randrange(1, 12)
        while files_in(out) < goal and process.is_alive():
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.01))
        assert process.is_alive(), "it ended before ten kills; give it more units"
        process.kill()
        process.join()
        left.append(
            len(LabelStore.open(str(out)).completion.unfinished()) if (out / "manifest.json").exists() else 10**9
        )
    return left


def files_in(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def write(url: str) -> None:
    create_and_fill(url, images=300, rows_per_shard=10)


def test_ten_kills_of_a_writer_lose_nothing_and_the_end_is_byte_identical(tmp_path):
    write(str(tmp_path / "whole"))
    left = killed_ten_times(write, (str(tmp_path / "killed"),), tmp_path / "killed", random.Random(4))
    assert left == sorted(left, reverse=True) and len(set(left)) > 4
    write(str(tmp_path / "killed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_ten_kills_of_precompute_lose_nothing_and_the_end_is_byte_identical(recipe, teacher_folders):
    two = replace(with_teachers(recipe, teacher_folders, "five", "nine"), rows_per_shard=1, crops=4)
    precompute.run(two)
    killed = replace(two, out=two.out + "-killed")
    left = killed_ten_times(precompute.run, (killed,), Path(killed.out), random.Random(5))
    assert left == sorted(left, reverse=True) and len(set(left)) > 4
    precompute.run(killed)
    assert contents(killed.out) == contents(two.out)


def test_a_resume_reads_and_labels_nothing_of_finished_units(recipe, monkeypatch):
    precompute.run(recipe)
    before = contents(recipe.out)
    (Path(recipe.out) / "done" / "part-0-crop-0-row-8.json").unlink()
    (Path(recipe.out) / "heads/five/ids/c/0/1/0").unlink()
    read, asked = [], []
    whole_read, whole_normalise = ImagePack.read, normalise
    monkeypatch.setattr(ImagePack, "read", lambda self, row: read.append(int(row)) or whole_read(self, row))
    monkeypatch.setattr(
        ensemble, "normalise", lambda images, *rest: asked.append(len(images)) or whole_normalise(images, *rest)
    )
    setting_up = precompute.set_up(recipe)
    read.clear()
    asked.clear()
    engine.work(setting_up, lambda event: None)
    assert sorted(read) == list(range(8, 16)) and sum(asked) == 8 * 8
    assert contents(recipe.out) == before
