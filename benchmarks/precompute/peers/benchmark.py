"""Precomputing labels beside what a user would write without repcon. Four minutes on two cores.

    python -m benchmarks.precompute.peers [--images N] [--rounds N] [--json FILE] [--record]

One teacher (EfficientNet-Lite0, 128 pixels), 4 crops of each image, the 16 most probable classes, the same boxes and
flips. NAME: ours (the path of `repcon precompute`), torch_files, webdataset_parquet, ray_data (the modules here).

NAME_crops_per_second    of the whole job: files, tars or pack that lie there already, to labels on disk
NAME_steady_crops_per_second  of the difference between a job and an eighth of it: without what starting costs, such as
                         Ray's actors and the teachers that they load (here the others find the teacher loaded)
ours_over_NAME           repcon's rate over the script's, the whole job; ours_steady_over_NAME likewise
NAME_top1_agreement      share of crops whose most probable class is that of the store that `repcon.precompute` wrote
NAME_lines               of user code, without comments, docstrings and blank lines (of repcon_store.py for ours)
NAME_missing             a text: why a script takes no part

Scripts take turns. Pictures are generated, as in `benchmarks.precompute`.
"""

import ast
import logging
import tempfile
import time
import tokenize
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import records, script
from benchmarks.harness.records import put
from benchmarks.harness.tables import Grid
from benchmarks.harness.targets import met, targets
from benchmarks.loaders.sample_images import DIFFERENT, generated
from benchmarks.precompute.contenders import CROP, MODELS, Job, K, Packs, load, ours
from benchmarks.precompute.peers.task import Forward, Task
from repcon.crops.plan import plan_crops
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.precompute.batching import find_batch_size
from repcon.runtime.console import console, progress
from repcon.runtime.memory import keep_freed_memory
from repcon.runtime.system import cores, environment

SIZE, CROPS, IMAGES, ROUNDS, PART = 128, 4, 512, 3, 8
CPU = torch.device("cpu")
FOLDER = "benchmarks.precompute.peers"
SCRIPTS: Mapping[str, tuple[str, ...]] = {
    "torch_files": ("torchvision.transforms",),
    "webdataset_parquet": ("webdataset", "pyarrow.parquet"),
    "ray_data": ("ray.data",),
}
"""Every script, and what it needs."""


def main() -> None:
    parser = script.parser("Precomputing labels beside what a user would write without repcon.")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.images, arguments.rounds, Path(folder))
    facts = environment()
    figures |= {"environment": facts, "targets": targets("precompute_peers", facts["device"])}
    script.finish("precompute-peers", figures, grids(figures), arguments)


def measure(images: int, rounds: int, folder: Path) -> dict[str, Any]:
    """All figures."""
    console.quiet = True  # repcon's own output
    packs = Packs(generated(DIFFERENT, (400, 300)), folder)
    missing = {name: error for name, needs in SCRIPTS.items() if (error := _import_error(needs))}
    figures: dict[str, Any] = {f"{name}_missing": error for name, error in missing.items()}
    batch_size = find_batch_size(load({"light": SIZE}, "fp32", CPU), CPU)
    figures |= {"images": images, "crops": images * CROPS, "batch_size": batch_size}
    jobs = [_Job(packs, count, batch_size, folder) for count in (max(1, images // PART), images)]
    contenders = {"ours": _ours} | {name: partial(_script, name) for name in SCRIPTS if name not in missing}
    wanted = jobs[0].store_top1()
    for name, run in contenders.items():  # warms up as well
        held = run(jobs[0]).top1
        figures[f"{name}_lines"] = lines(name)
        if held is not None:
            figures[f"{name}_top1_agreement"] = float((held == wanted).mean())
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    console.quiet = False
    with progress() as bar:
        task = bar.add_task("precompute", total=rounds, unit="rounds", note="")
        for _ in range(rounds):
            for name, run in contenders.items():
                seconds[name].append((run(jobs[0]).seconds, run(jobs[1]).seconds))
            bar.advance(task)
    _stop_ray(missing)
    return figures | _rates(seconds, jobs[0].crops, jobs[1].crops)


def _rates(seconds: Mapping[str, list[tuple[float, float]]], few: int, many: int) -> dict[str, Any]:
    """`seconds` of the small and the large job, of so many crops, in each round."""
    figures: dict[str, Any] = {}
    whole = {name: np.array([many / large for _, large in taken]) for name, taken in seconds.items()}
    steady = {
        name: np.array([(many - few) / max(large - small, 1e-9) for small, large in taken])
        for name, taken in seconds.items()
    }
    for name in seconds:
        put(figures, f"{name}_crops_per_second", whole[name])
        put(figures, f"{name}_steady_crops_per_second", steady[name])
        if name != "ours":
            put(figures, f"ours_over_{name}", whole["ours"] / whole[name])
            put(figures, f"ours_steady_over_{name}", steady["ours"] / steady[name])
    return figures


class _Job:
    """A number of images as a pack, files and tars."""

    def __init__(self, packs: Packs, images: int, batch_size: int, folder: Path) -> None:
        self.pack, self.pictures = packs.of(images)
        self.crops, self._batch_size, self._folder = images * CROPS, batch_size, folder
        self.tars = folder / f"tars-{images}"
        plan = plan_crops(CROP, self.pack.hashes, self.pack.sizes, range(CROPS))
        self._boxes, self._flips = (array.swapaxes(0, 1).copy() for array in (plan.boxes, plan.flips))
        self._runs = 0

    def ours(self) -> Job:
        """The job of repcon's path."""
        return Job(
            teachers=load_once(SIZE), pack=self.pack, pictures=self.pictures, crops=CROPS,
            batch_size=self._batch_size, device=CPU, folder=self._folder,
        )  # fmt: skip

    def task(self) -> Task:
        """The task of a script, with an output folder of its own."""
        self._runs += 1
        preprocessing = load_once(SIZE)[0].preprocessing
        return Task(
            images=self.pictures, boxes=self._boxes, flips=self._flips, load=partial(forward, SIZE), size=SIZE,
            mean=tuple(preprocessing.mean), std=tuple(preprocessing.std), k=K, batch_size=self._batch_size,
            workers=cores(), out=self._folder / f"out-{len(self._flips)}-{self._runs}",
        )  # fmt: skip

    def store_top1(self) -> np.ndarray:
        """(N, c) classes, of a store that the user's lines write. Raises ValueError where its crops are others."""
        from benchmarks.precompute.peers import repcon_store

        pack, out = self._folder / "agreement-pack", self._folder / "agreement.zarr"
        repcon_store.label(self.pictures, pack, MODELS["light"], CROPS, K, SIZE, out)
        paths = sorted(self.pictures.glob("*.jpg"))
        opened, labels = ImagePack.open(pack), list(LabelStore.open(str(out)).reader.iter_crop_labels(range(CROPS)))
        same_boxes = all(np.array_equal(held.boxes, self._boxes[:, crop]) for crop, held in enumerate(labels))
        if not same_boxes or opened.read(len(paths) - 1) != paths[-1].read_bytes():
            raise ValueError("the store's crops or images are not those that the scripts get")
        return np.stack([held.labels["teacher"][0][:, 0] for held in labels], axis=1).astype(np.int64)


@cache
def load_once(size: int) -> Any:
    """The teacher, as a tuple of one."""
    return load({"light": size}, "fp32", CPU)


def forward(size: int) -> Forward:
    """The teacher's forward pass."""
    return load_once(size)[0].forward


class _Took:
    def __init__(self, seconds: float, top1: np.ndarray | None = None) -> None:
        self.seconds, self.top1 = seconds, top1


def _ours(job: _Job) -> _Took:
    return _Took(ours(job.ours()).seconds)


def _script(name: str, job: _Job) -> _Took:
    """Runs a script once, and reads what it wrote."""
    module, task = import_module(f"{FOLDER}.{name}"), job.task()
    arguments: tuple[Any, ...] = (task,)
    if name == "webdataset_parquet":
        if not job.tars.exists():
            module.write_tars(job.pictures, job.tars, max(1, len(task.flips) // (4 * cores())))
        arguments = task, job.tars
    if name == "ray_data":
        _start_ray()
    started = time.perf_counter()
    module.label(*arguments)
    seconds = time.perf_counter() - started
    return _Took(seconds, READERS[name](task))


def _start_ray() -> None:
    import ray

    if not ray.is_initialized():
        # One CPU more than there are, for the task that reads the files while the actors hold theirs.
        ray.init(num_cpus=cores() + 1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False


def _stop_ray(missing: Mapping[str, str]) -> None:
    if "ray_data" not in missing:
        import ray

        ray.shutdown()


def _of_files(task: Task) -> np.ndarray:
    return np.stack([torch.load(path)[2][:, 0].numpy() for path in sorted(task.out.glob("*.pt"))])


def _of_parquet(task: Task) -> np.ndarray:
    import pyarrow.parquet as parquet

    table = parquet.read_table(task.out, columns=["image", "crop", "ids"])
    found = np.full(task.flips.shape, -1, np.int64)
    found[table["image"].to_numpy(), table["crop"].to_numpy()] = [ids[0] for ids in table["ids"].to_pylist()]
    return found


READERS: Mapping[str, Callable[[Task], np.ndarray]] = {
    "torch_files": _of_files,
    "webdataset_parquet": _of_parquet,
    "ray_data": _of_parquet,
}
"""(N, c) most probable classes of what a script wrote."""


def _import_error(modules: tuple[str, ...]) -> str:
    try:
        for module in modules:
            import_module(module)
    except Exception as error:  # a library may fail in any way
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def lines(name: str) -> int:
    """Lines of code of a script, without comments, docstrings and blank lines."""
    path = Path(__file__).with_name(f"{'repcon_store' if name == 'ours' else name}.py")
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Expr))
    texts = [node for node in nodes if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]
    docstrings = {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in _NO_CODE]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


_NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
)  # fmt: skip

TITLES = (
    "script", "crops/s", "ours over it", "steady crops/s", "ours over it, steady", "lines of code",
    "same class as our store",
)  # fmt: skip


def grids(figures: Mapping[str, Any]) -> list[Grid]:
    """One table, a line for each script, and a line for each that is missing."""
    title = (
        f"Labels of {figures['crops']:,} crops by one light teacher at {SIZE} pixels, batches of "
        f"{figures['batch_size']}, {cores()} cores"
    )
    return [Grid(title=title, titles=TITLES, rows=[_row(figures, name) for name in ("ours", *SCRIPTS)])]


def _row(figures: Mapping[str, Any], name: str) -> list[str]:
    if f"{name}_missing" in figures:
        return [name, f"missing: {figures[f'{name}_missing']}", *[""] * (len(TITLES) - 2)]
    agreement = figures.get(f"{name}_top1_agreement")
    return [
        name,
        _cell(figures, f"{name}_crops_per_second"),
        _cell(figures, f"ours_over_{name}"),
        _cell(figures, f"{name}_steady_crops_per_second"),
        _cell(figures, f"ours_steady_over_{name}"),
        str(figures[f"{name}_lines"]),
        "" if agreement is None else f"{agreement:.4f}",
    ]


def _cell(figures: Mapping[str, Any], name: str) -> str:
    """Value and spread, and whether its target is missed."""
    value, spread, _ = records.cells(figures, name)
    target = figures["targets"].get(name)
    verdict = " MISSED" if target and value and not met(target, figures[name]) else ""
    return f"{value}{f' ({spread})' if spread else ''}{verdict}"
