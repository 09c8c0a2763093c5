"""Refuse work that its disk has no room for, before it begins."""

import shutil
from pathlib import Path

from repcon.runtime.errors import UserError
from repcon.runtime.text import format_bytes


def require_disk_space(path: str | Path, needed: float, *, name: str = "", hint: str = "") -> None:
    """Raises UserError where the disk of `path`, which need not exist yet, has fewer than `needed` bytes free.

    name: begins the message in place of the path. hint: what helps besides making room, `, or ...`.
    """
    place = Path(path).absolute()
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.is_dir())).free
    if free < needed:
        sizes = f"needs at least {format_bytes(needed)} of disk, and {format_bytes(free)} are free"
        raise UserError(f"{name or path}: {sizes}; make room{hint}")
