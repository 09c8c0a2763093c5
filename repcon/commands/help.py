"""`repcon --help`, and one screen of help per command; `--help-all` lists every flag."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional

from repcon.runtime.console import console

COMMON = {
    "consolidate": (
        "proxy", "teachers", "out", "teach", "evaluate", "backbone", "size", "limit", "crops", "epochs", "estimate",
        "dry_run",
    ),
    "pack": ("source", "out", "limit", "label_column", "image_column", "max_side", "jpeg_quality", "ffcv"),
    "teach": ("data", "out", "model", "epochs", "size", "freeze_blocks", "device"),
    "precompute": ("pack", "out", "teachers", "crops", "k", "temperatures", "batch_size", "device", "estimate"),
    "verify": ("store", "pack", "sample", "models", "device"),
    "train": (
        "pack", "store", "out", "backbone", "init", "epochs", "batch_size", "crops_per_decode", "device", "trackers",
    ),
    "evaluate": ("data", "out", "backbones", "baseline", "heads", "metrics", "size", "device"),
}  # fmt: skip
"""The flags that most runs need, by command; a command that is not listed shows all of its flags."""


def overview(commands: Mapping[str, type]) -> None:
    """Print the commands, a line each."""
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, kind in commands.items():
        table.add_row(f"[bold cyan]{name}[/]", (kind.__doc__ or "").splitlines()[0])
    console.print("[bold]repcon[/] COMMAND \\[--recipe FILE] \\[--json FILE] \\[flags]\n")
    console.print(table)
    console.print("\n`repcon COMMAND --help` lists flags; a recipe is a TOML file with the same names.")
    console.print("Start with `repcon demo`, or with `repcon consolidate` on images of your own.")


def show(command: str, kind: type) -> None:
    """Print the command's common flags, a line or two each."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    names = COMMON.get(command, tuple(fields))
    about, types = _docstrings(kind), get_type_hints(kind, include_extras=True)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for name in names:
        text = about.get(name, "") + _default(fields[name])
        table.add_row(f"[bold cyan]{escape(_flag(name, types[name]))}[/]", escape(text.strip()))
    console.print(f"[bold]repcon {command}[/]: {(kind.__doc__ or '').splitlines()[0]}\n", highlight=False)
    console.print(table, highlight=False)
    if more := len(fields) - len(names):
        what = f"{more} more settings, as flags or in a recipe: repcon {command} --help-all"
        console.print(f"\n[dim]{what}[/]", highlight=False)


def _flag(name: str, hint: Any) -> str:
    """`--name VALUE`, or what stands for a positional argument."""
    plain, marks = (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())
    value = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), "") or _value(plain)
    if Positional in marks:
        return value
    flag = f"--{name.replace('_', '-')}"
    return flag if plain is bool else f"{flag} {value}"


def _value(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"{_value(get_args(kind)[0])} ..."
    if get_origin(kind) is Literal and len(get_args(kind)) <= 3:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _default(field: dataclasses.Field[Any]) -> str:
    """What a flag is when nothing is said; empty where that says nothing."""
    if field.default in (dataclasses.MISSING, "", 0, (), False, True) or not isinstance(
        field.default, int | float | str
    ):
        return ""
    return f" [{field.default}]"


def _docstrings(kind: type) -> dict[str, str]:
    """{field: first sentence of the docstring beneath it} of a dataclass and its bases."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, doc in pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr):
                text = ast.literal_eval(doc.value) if isinstance(doc.value, ast.Constant) else ""
                found[field.target.id] = " ".join(str(text).split()).partition(". ")[0].rstrip(".")
    return found
