"""`repcon pack`: a pack from a folder or from WebDataset tars, and FFCV's file of the same JPEGs next to it."""

from pathlib import Path
from typing import Any

from repcon.config import PackConfig
from repcon.images import writer
from repcon.images.format import BETON, MANIFEST
from repcon.images.pack import ImagePack
from repcon.images.packing import write_pack
from repcon.images.sources import source_paths
from repcon.runtime.errors import UserError


def run(config: PackConfig) -> dict[str, Any]:
    """`repcon pack`: writes the pack, prints a summary, gives the figures.

    With a pack as its own source, only FFCV's file is added.
    """
    if (
        config.ffcv
        and (Path(config.out) / MANIFEST).is_file()
        and [Path(source).resolve() for source in source_paths(config.source)] == [Path(config.out).resolve()]
    ):
        # The pack's source may be gone; the pack and its record stay as they are.
        _write_beton(Path(config.out))
        pack = ImagePack.open(config.out)
        return {"images": len(pack), "fingerprint": pack.fingerprint}
    return write_pack(config, _write_beton if config.ffcv else None)


def _write_beton(out: Path) -> None:
    path = out / BETON
    if path.is_file():
        return
    from repcon.decode.ffcv import write_beton  # FFCV is an extra, and slow to import.

    try:
        with writer.exclusive_writer(out):
            if not path.is_file():  # else another process has written it meanwhile
                write_beton(ImagePack.open(out), path)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: cannot be written ({why}); fix that and run the same command again") from error
