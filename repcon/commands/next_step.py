"""The last line of a command: what it made, where, and the command that usually follows."""

import shlex
from collections.abc import Callable
from typing import Any

from rich.markup import escape

from repcon.runtime.console import console


def show(command: str, settings: Any) -> None:
    """Print the line; nothing for commands that end with one of their own, and where nothing was made."""
    if command in LINES and not getattr(settings, "estimate", False):
        made, following = LINES[command](settings)
        console.print(f"[dim]{escape(made)}; next:[/] {escape(following)}", highlight=False, soft_wrap=True)


def _pack(settings: Any) -> tuple[str, str]:
    out = shlex.quote(settings.out)
    return f"pack: {settings.out}", f"repcon precompute --pack {out} --teachers NAME=MODEL ... --out labels.zarr"


def _teach(settings: Any) -> tuple[str, str]:
    model = shlex.quote(settings.out)
    return f"teacher: {settings.out}", f"repcon precompute --pack PACK --teachers NAME={model} ... --out labels.zarr"


def _precompute(settings: Any) -> tuple[str, str]:
    pack, out = shlex.quote(settings.pack), shlex.quote(settings.out)
    return f"label store: {settings.out}", f"repcon train --pack {pack} --store {out} --out student"


def _inspect(settings: Any) -> tuple[str, str]:
    return f"label store: {settings.store}", f"repcon verify {shlex.quote(settings.store)} --pack PACK"


def _verify(settings: Any) -> tuple[str, str]:
    pack, store = shlex.quote(settings.pack or "PACK"), shlex.quote(settings.store)
    return f"label store: {settings.store}", f"repcon train --pack {pack} --store {store} --out student"


def _train(settings: Any) -> tuple[str, str]:
    out = shlex.quote(settings.out)
    return (
        f"student: {settings.out}/student",
        f"repcon evaluate --data LABELLED --backbones student={out} --out transfer",
    )


def _evaluate(settings: Any) -> tuple[str, str]:
    return f"results: {settings.out}", f"repcon report {shlex.quote(settings.out)}"


def _report(settings: Any) -> tuple[str, str]:
    return f"report: {settings.out}/report.html", f"open {shlex.quote(settings.out)}/report.html in a browser"


LINES: dict[str, Callable[[Any], tuple[str, str]]] = {
    "pack": _pack,
    "teach": _teach,
    "precompute": _precompute,
    "inspect": _inspect,
    "verify": _verify,
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
}
"""By command: settings to (what was made, the command that follows)."""
