"""FFCV's file format `.beton`: write a pack into it, check it, and decode crops from it. Imports FFCV.

The file holds each image's JPEG as the pack has it, byte for byte, and the pack's fingerprint in the arguments of its
one field, so that a file made from another pack is refused.
"""

# FFCV has no types, and may be missing where types are checked.
# pyright: reportMissingImports=false, reportOptionalSubscript=false, reportAttributeAccessIssue=false

import ctypes
import shlex
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from ffcv import DatasetWriter
from ffcv.fields.base import ARG_TYPE
from ffcv.fields.rgb_image import IMAGE_MODES, RGBImageField, SimpleRGBImageDecoder
from ffcv.libffcv import lib
from ffcv.memory_allocator import MemoryAllocator
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
from ffcv.pipeline.compiler import Compiler
from ffcv.reader import Reader
from ffcv.types import HeaderType
from ffcv.writer import MIN_PAGE_SIZE, handle_sample

from repcon.decode.buffer_pool import image_buffer
from repcon.decode.resize import COMPILE_LOCK, Scratch, crop_resize
from repcon.images.pack import ImagePack
from repcon.runtime.atomic_files import move_into_place
from repcon.runtime.console import progress
from repcon.runtime.errors import UserError
from repcon.runtime.memory import require_memory

FIELD = "image"
_MAGIC = b"repcon pack\0"
_INDEX_BYTES = 128
"""Memory per image, at most, in which FFCV opens a file."""

# FFCV's library is linked to libjpeg-turbo, so these functions are found through it.
_decompress = lib.tjDecompress2
_decompress.argtypes = [
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int,
    ctypes.c_int, ctypes.c_int,
]  # fmt: skip
_decompress.restype = ctypes.c_int
lib.tjInitDecompress.restype = ctypes.c_void_p
lib.tjDestroy.argtypes = [ctypes.c_void_p]
lib.tjGetErrorStr2.argtypes, lib.tjGetErrorStr2.restype = [ctypes.c_void_p], ctypes.c_char_p
_RGB = 0


class JpegField(RGBImageField):
    """FFCV's image field that stores a JPEG's bytes unchanged; FFCV's own decoders read it too."""

    def __init__(self, fingerprint: str) -> None:
        super().__init__(write_mode="jpg")
        self.fingerprint = fingerprint

    def encode(self, destination: Any, image: tuple[bytes, int, int], malloc: Callable[[int], Any]) -> None:
        """`image`: the JPEG's bytes, its width and its height."""
        data, width, height = image
        destination["mode"], destination["width"], destination["height"] = IMAGE_MODES["jpg"], width, height
        destination["data_ptr"], storage = malloc(len(data))
        storage[:] = np.frombuffer(data, dtype=np.uint8)

    def to_binary(self) -> Any:
        """The fingerprint, for the file's header."""
        arguments = np.zeros(1, dtype=ARG_TYPE)[0]
        text = np.frombuffer(_MAGIC + self.fingerprint.encode(), dtype=np.uint8)
        arguments[0][: len(text)] = text
        return arguments

    @staticmethod
    def from_binary(binary: np.ndarray) -> "JpegField":
        """Raises ValueError for a file that was not made from a pack."""
        text = np.asarray(binary).tobytes()
        if not text.startswith(_MAGIC):
            raise ValueError("not made from a pack")
        return JpegField(text[len(_MAGIC) :].split(b"\0")[0].decode("ascii"))


def write_beton(pack: ImagePack, path: Path) -> None:
    """Write the pack's images to `path` atomically; one process at a time may do so.

    Raises UserError where an image cannot be read, or the file cannot be written.
    FFCV's writer runs in this process: with its own worker processes it hangs when one of them fails.
    """
    page_bytes = max(4 * MIN_PAGE_SIZE, 1 << (int(max(pack.lengths)) - 1).bit_length())
    temporary = path.with_name(f".{path.name}.tmp")  # always the same name: overwrites what a killed run left
    writer = DatasetWriter(str(temporary), {FIELD: JpegField(pack.fingerprint)}, page_size=page_bytes, num_workers=1)
    writer.num_samples = len(pack)
    try:
        writer.prepare()
        try:
            writer.finalize([_write_images(pack, writer)])
        finally:
            writer.metadata_sm.close()
            writer.metadata_sm.unlink()
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_images(pack: ImagePack, writer: DatasetWriter) -> list[tuple[int, int, int]]:
    """Write all images in the pack's order; gives FFCV's allocations: (image, position, bytes)."""
    metadata = np.zeros(len(pack), dtype=writer.metadata_type)
    allocator = MemoryAllocator(writer.fname, writer.data_region_start, writer.page_size)
    with allocator, progress() as display:
        task = display.add_task("writing for FFCV", total=len(pack), unit="images", note="")
        for image in range(len(pack)):
            width, height = (int(size) for size in pack.sizes[image])
            sample = ((pack.read(image), width, height),)
            handle_sample(sample, image, metadata.dtype.names, metadata, allocator, writer.fields)
            display.advance(task)
    writer.metadata_sm.buf[: metadata.nbytes] = metadata.tobytes()
    return allocator.allocations


class BetonReader:
    """An open `.beton` that belongs to the pack, and FFCV's compiled code that decodes crops from it."""

    def __init__(self, pack: ImagePack, path: Path, sides: Sequence[int]) -> None:
        self._reader, manager = _open(pack, path)
        self._pack, self.sides = pack, tuple(sides)
        self._context = manager.schedule_epoch(())
        self._context.__enter__()  # maps the file
        self._metadata = self._reader.metadata[self._reader.metadata.dtype.names[0]]
        self._positions, self._lengths = self._metadata["data_ptr"].astype(np.int64), pack.lengths
        self._decode = _compiled()
        self._compile()

    def _compile(self) -> None:
        """Compile before threads call."""
        outs = tuple(np.empty((0, side, side, 3), np.uint8) for side in self.sides)
        with COMPILE_LOCK:
            nothing = np.empty(0, np.int64), np.empty((0, 1, 4), np.uint16), np.empty((0, 1), np.uint8)
            self.decode(*nothing, outs, self.make_state())

    def make_state(self) -> "DecoderState":
        """The decoder and scratch memory of one thread."""
        return DecoderState(image_buffer(self._pack), Scratch.of(self._pack.widest, self.sides))

    def jpeg(self, image: int) -> memoryview:
        """The image's bytes in the file."""
        start = int(self._positions[image])
        return self._context.state[0][start : start + int(self._lengths[image])].data

    def decode(
        self,
        rows: np.ndarray,
        boxes: np.ndarray,
        flips: np.ndarray,
        outs: tuple[np.ndarray, ...],
        state: "DecoderState",
    ) -> int:
        """Decode the images `rows` (m,) int64 and fill outs, each (m * c, side, side, 3) uint8. Releases the GIL.

        boxes (m, c, 4) uint16, flips (m, c) uint8. Gives the place in `rows` of the first image that cannot be
        decoded, -1 where all could.
        """
        return self._decode(
            rows, boxes, flips, outs, self._metadata, self._context.state, state.handle, state.pixels, *state.scratch
        )


class DecoderState:
    """A decoder of libjpeg-turbo and scratch memory, for one thread at a time."""

    def __init__(self, pixels: np.ndarray, scratch: Scratch) -> None:
        self.handle = np.intp(lib.tjInitDecompress())
        self.pixels, self.scratch = pixels, scratch
        weakref.finalize(self, lib.tjDestroy, int(self.handle))

    def error(self) -> str:
        """libjpeg-turbo's last error message."""
        return lib.tjGetErrorStr2(int(self.handle)).decode("utf-8", "replace")


class CropDecoder(SimpleRGBImageDecoder):
    """Exact DCT, exact boxes, antialiased triangle resize; several crops and sides per decoded image."""

    def generate_code(self) -> Callable[..., int]:
        """The function that FFCV's compiler takes; see `BetonReader.decode`."""
        read: Any = self.memory_read

        def decode(rows, boxes, flips, outs, metadata, storage, handle, pixels, row, line):
            for k in range(len(rows)):
                field = metadata[rows[k]]
                width, height = np.int64(field["width"]), np.int64(field["height"])
                jpeg = read(field["data_ptr"], storage)
                source, target = jpeg.ctypes.data, pixels.ctypes.data
                # Flags 0: exact DCT, smooth chroma. A warning is an error too: its pixels would be guessed.
                if _decompress(handle, source, jpeg.size, target, width, 0, height, _RGB, 0) != 0:
                    return k
                image = pixels[: 3 * width * height].reshape(height, 3 * width)
                crop_resize(image, boxes[k], flips[k], outs, k * boxes.shape[1], row, line)
            return -1

        return decode


class _MappedFile(OSCacheManager):
    """FFCV's memory map without its page tables, which take 300 bytes per image and serve only its other cache."""

    def __init__(self, reader: Reader) -> None:
        order = np.argsort(reader.alloc_table["ptr"])
        self.reader = reader
        self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
        self.context = OSCacheContext(self)

    @staticmethod
    def compile_reader() -> Callable[..., np.ndarray]:
        """The bytes at a position, in place of FFCV's function.

        FFCV's marks numba's shared type of byte arrays as read-only, after which numba no longer finds what it had
        compiled for byte arrays.
        """

        def read(position, state):
            size = state[2][np.searchsorted(state[1], position)]
            return state[0][position : position + size]

        return Compiler.compile(read)


@cache
def _compiled() -> Callable[..., int]:
    """`CropDecoder` compiled by FFCV, once per process: the file that it reads is among its arguments."""
    decoder = CropDecoder()
    decoder.accept_globals(None, _MappedFile.compile_reader())
    return Compiler.compile(decoder.generate_code())


def _open(pack: ImagePack, path: Path) -> tuple[Reader, _MappedFile]:
    """FFCV's reader and memory map. Raises UserError where the file is not this pack's, or is damaged."""
    url = shlex.quote(pack.url)
    command = f"`repcon pack {url} {url} --ffcv`"
    again = f"delete it and run {command}"
    if not path.is_file():
        raise UserError(f"{path}: not there; to make it, run {command}")
    try:
        reader = Reader(str(path), {FIELD: JpegField})
        fingerprint = reader.handlers[FIELD].fingerprint
    except (AssertionError, IndexError, KeyError, MemoryError, OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, MemoryError):  # memory is short, or a damaged header asks for too much
            require_memory(_INDEX_BYTES * len(pack))
        raise UserError(f"{path}: not a .beton that was made from a pack ({error}); {again}") from error
    if fingerprint != pack.fingerprint:
        raise UserError(
            f"{path}: made from another pack (fingerprint {fingerprint[:16]}, not {pack.fingerprint[:16]}); {again}"
        )
    manager = _MappedFile(reader)
    if not _is_complete(pack, path, reader, manager):
        raise UserError(f"{path}: damaged: its index does not fit the pack or the file's length; {again}")
    return reader, manager


def _is_complete(pack: ImagePack, path: Path, reader: Reader, manager: _MappedFile) -> bool:
    """Whether all images have the pack's size and their bytes lie in the file: reading past a map's end is a crash."""
    if reader.num_samples != len(pack) or len(reader.metadata) != len(pack):
        return False
    metadata = reader.metadata[reader.metadata.dtype.names[0]]
    index = np.searchsorted(manager.ptrs, metadata["data_ptr"])
    if len(pack) and index.max() >= len(manager.ptrs):
        return False
    ends = metadata["data_ptr"].astype(np.int64) + pack.lengths
    return bool(
        (manager.ptrs[index] == metadata["data_ptr"]).all()
        and (manager.sizes[index] == pack.lengths).all()
        and (np.stack([metadata["width"], metadata["height"]], axis=1) == pack.sizes).all()
        and int(max(ends, default=HeaderType.itemsize)) <= path.stat().st_size
    )
