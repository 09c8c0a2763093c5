"""The same with repcon."""

from pathlib import Path

import repcon


def label(images: Path, pack: Path, model: str, crops: int, k: int, size: int, out: Path) -> None:
    """Write a pack and a label store."""
    repcon.pack(images, pack)
    teacher = {"name": "teacher", "model": model, "size": size}
    repcon.precompute(pack=pack, out=out, teachers=[teacher], crops=crops, k=k, device="cpu")
