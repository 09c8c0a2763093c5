"""What the tests share: one thread per process for NumPy and torch, and small real pictures."""

import os
from pathlib import Path

import pytest

# Before NumPy and torch are imported, and for all processes that tests start. Models this small lose by threads, and
# where processes share the cores, every parallel region waits for its slowest thread.
os.environ["OMP_NUM_THREADS"] = "1"


SLOWEST = (
    "precompute/test_launch_ray.py",
    "distill/test_distributed.py",
    "kernels/test_kernels_compile.py",
    "commands/test_consolidate.py",
    "commands/test_demo.py",
    "commands/test_train.py",
    "benchmarks/test_consolidation.py",
    "models/test_export.py",
    "precompute/test_launch_local.py",
    "distill/test_auto_settings.py",
    "test_end_to_end.py",
    "test_readme.py",
    "benchmarks/test_loader_peers.py",
    "precompute/test_precompute_urls.py",
    "labels/test_store_life.py",
    "labels/test_store_kills.py",
)
"""Started first, so that at the end no worker waits long for another (with `--no-loadscope-reorder`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_xdist_auto_num_workers() -> int:
    """One more than the cores, since a third of a worker's time is waiting: for disks, for processes, for Ray."""
    from repcon.runtime.system import cores

    return min(8, cores() + 1)


def pytest_configure(config: pytest.Config) -> None:
    """Triton's interpreter has to be asked for before any test module imports Triton, where its tests are to run."""
    kernels = Path(__file__).parent / "kernels"
    chosen = [(config.invocation_params.dir / word.split("::")[0]).resolve() for word in config.args]
    if any(kernels.is_relative_to(path) or path.is_relative_to(kernels) for path in chosen):
        import triton_interpreter  # imports torch and Triton

        triton_interpreter.start()


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled image folder: 4 classes of 8 JPEGs each, of varied sizes; colour tells the classes apart."""
    import simplejpeg
    from pictures import photograph

    root = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(["apple", "birch", "cedar", "daisy"]):
        (root / name).mkdir()
        for number in range(8):
            width, height = 72 + 8 * (number % 3), 64 + 12 * (number % 4)
            pixels = photograph(100 * label + number, width, height, hue=label)
            data = simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling=("420", "444")[number % 2])
            (root / name / f"{number:02d}.jpg").write_bytes(data)
    return root
