"""The last line of a command: what it made, where, and what usually follows."""

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from shlex import quote
from typing import Any

from rich.markup import escape

from repcon.runtime.console import console, print_outcome

Outcome = tuple[str, str, str]
"""What was made, where it lies, and what follows."""
LOAD = {"onnx": "onnxruntime.InferenceSession({})", "torch": "torch.export.load({}).module()"}
PULLED = {
    "store": "repcon inspect {}",
    "teacher": "repcon precompute --teachers NAME={} --pack PACK --out labels.zarr",
    "student": "repcon export {} --to onnx",
}
"""What follows, by the kind of what was pulled."""


def show(command: str, settings: Any, figures: Mapping[str, Any], *, with_next: bool = True) -> None:
    """Print the line of a finished command; nothing where nothing was made, or by torchrun's other processes.

    with_next: False where the command was a step of another.
    """
    only_shown = getattr(settings, "estimate", False) or getattr(settings, "dry_run", False)
    if not only_shown and os.environ.get("RANK", "0") == "0":
        made, where, following = OUTCOMES[command](settings, figures)
        print_outcome(made, where, following if with_next else "")


def run_command(command: str, settings: Any) -> dict[str, Any]:
    """Run a command, which is imported now, and print its line; give its figures."""
    figures = import_module(f"repcon.commands.{command}").run(settings)
    show(command, settings, figures)
    return figures


def run_step(command: str, run: Callable[[Any], dict[str, Any]], settings: Any) -> dict[str, Any]:
    """Run a command as a step of another, and print the line of what it made; give its figures."""
    figures = run(settings)
    show(command, settings, figures, with_next=False)
    return figures


def print_step(title: str) -> None:
    """Print a rule with the title of a step of a command."""
    console.rule(f"[bold]{escape(title)}", align="left")


def _verify(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    pack, store = quote(settings.pack or "PACK"), quote(settings.store)
    asked = figures["crops_asked_again"]
    again = f", {asked:,} of them asked again" if asked else ""
    made = f"sound store of {figures['rows_checked']:,} crops{again}"
    return made, settings.store, f"repcon train --pack {pack} --store {store} --out student"


def _push(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    revision = f" --revision {quote(settings.revision)}" if settings.revision else ""
    where = f"{figures['address']} at {figures['commit'][:12]}"
    return f"pushed {figures['kind']}", where, f"repcon pull {figures['address']}{revision} --out DIR"


def _consolidate(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    student = figures["student"]
    backbone, out = quote(student), quote(f"{settings.out}-transfer")
    following = f"repcon evaluate --data LABELLED --backbones student={backbone} --out {out}"
    if figures["transfer"]:
        following = f'timm.create_model("local-dir:{student}", pretrained=True)'
    return "student", f"{student}; report: {figures['report']}", following


OUTCOMES: dict[str, Callable[[Any, Mapping[str, Any]], Outcome]] = {
    "pack": lambda settings, figures: (
        f"pack of {figures['images']:,} images",
        settings.out,
        f"repcon precompute --pack {quote(settings.out)} --teachers NAME=MODEL ... --out labels.zarr",
    ),
    "teach": lambda settings, figures: (
        "teacher",
        settings.out,
        f"repcon precompute --pack PACK --teachers NAME={quote(settings.out)} ... --out labels.zarr",
    ),
    "precompute": lambda settings, figures: (
        f"labels of {figures['total_crops']:,} crops",
        settings.out,
        f"repcon train --pack {quote(settings.pack)} --store {quote(settings.out)} --out student",
    ),
    "inspect": lambda settings, figures: (
        "page" if settings.html else "",
        settings.html,
        f"repcon verify {quote(settings.store)} --pack PACK",
    ),
    "verify": _verify,
    "train": lambda settings, figures: (
        "student",
        f"{settings.out}/student",
        f"repcon evaluate --data LABELLED --backbones student={quote(settings.out)} --out transfer",
    ),
    "evaluate": lambda settings, figures: ("results", settings.out, f"repcon report {quote(settings.out)}"),
    "report": lambda settings, figures: ("report", os.path.realpath(figures["html"]), "open it in a browser"),
    "export": lambda settings, figures: (
        "exported",
        figures["file"],
        LOAD[settings.to].format(repr(figures["file"])),
    ),
    "push": _push,
    "pull": lambda settings, figures: (
        f"pulled {figures['kind']}",
        f"{settings.out} at {figures['commit'][:12]}",
        PULLED[figures["kind"]].format(quote(settings.out)),
    ),
    "consolidate": _consolidate,
    "demo": _consolidate,
}
"""By command."""
