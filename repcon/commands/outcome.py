"""The last line of a command: what it made, where, and what usually follows."""

import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from repcon.runtime.console import print_outcome

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


def run_step(command: str, run: Callable[[Any], dict[str, Any]], settings: Any) -> dict[str, Any]:
    """Run a command as a step of another, and print the line of what it made; give its figures."""
    figures = run(settings)
    show(command, settings, figures, with_next=False)
    return figures


def _pack(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    following = f"repcon precompute --pack {shlex.quote(settings.out)} --teachers NAME=MODEL ... --out labels.zarr"
    return f"pack of {figures['images']:,} images", settings.out, following


def _teach(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    teacher = shlex.quote(settings.out)
    return "teacher", settings.out, f"repcon precompute --pack PACK --teachers NAME={teacher} ... --out labels.zarr"


def _precompute(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    pack, out = shlex.quote(settings.pack), shlex.quote(settings.out)
    following = f"repcon train --pack {pack} --store {out} --out student"
    return f"labels of {figures['total_crops']:,} crops", settings.out, following


def _inspect(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    following = f"repcon verify {shlex.quote(settings.store)} --pack PACK"
    return "page" if settings.html else "", settings.html, following


def _verify(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    pack, store = shlex.quote(settings.pack or "PACK"), shlex.quote(settings.store)
    asked = figures["crops_asked_again"]
    again = f", {asked:,} of them asked again" if asked else ""
    made = f"sound store of {figures['rows_checked']:,} crops{again}"
    return made, settings.store, f"repcon train --pack {pack} --store {store} --out student"


def _train(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    following = f"repcon evaluate --data LABELLED --backbones student={shlex.quote(settings.out)} --out transfer"
    return "student", f"{settings.out}/student", following


def _evaluate(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    return "results", settings.out, f"repcon report {shlex.quote(settings.out)}"


def _report(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    return "report", os.path.realpath(figures["html"]), "open it in a browser"


def _export(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    return "exported", figures["file"], LOAD[settings.to].format(repr(figures["file"]))


def _push(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    revision = f" --revision {shlex.quote(settings.revision)}" if settings.revision else ""
    where = f"{figures['address']} at {figures['commit'][:12]}"
    return f"pushed {figures['kind']}", where, f"repcon pull {figures['address']}{revision} --out DIR"


def _pull(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    following = PULLED[figures["kind"]].format(shlex.quote(settings.out))
    return f"pulled {figures['kind']}", f"{settings.out} at {figures['commit'][:12]}", following


def _consolidate(settings: Any, figures: Mapping[str, Any]) -> Outcome:
    student = figures["student"]
    backbone, out = shlex.quote(student), shlex.quote(f"{settings.out}-transfer")
    following = f"repcon evaluate --data LABELLED --backbones student={backbone} --out {out}"
    if figures["transfer"]:
        following = f'timm.create_model("local-dir:{student}", pretrained=True)'
    return "student", f"{student}; report: {figures['report']}", following


OUTCOMES: dict[str, Callable[[Any, Mapping[str, Any]], Outcome]] = {
    "pack": _pack,
    "teach": _teach,
    "precompute": _precompute,
    "inspect": _inspect,
    "verify": _verify,
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
    "push": _push,
    "pull": _pull,
    "consolidate": _consolidate,
    "demo": _consolidate,
}
"""By command: (settings, figures) to what was made, where, and what follows."""
