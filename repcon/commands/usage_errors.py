"""Mistakes in a command's flags, as one line each."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, get_args, get_origin, get_type_hints

from tyro.conf import Positional, Suppress

from repcon.runtime.errors import UserError


def require_known_flags(command: str, kind: type, words: Sequence[str]) -> None:
    """Raises UserError for a word that looks like a flag and is none of the command's, with the one most like it."""
    known = {*_flags(kind), "--help"}
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        is_entry = name.rpartition(".")[0].rstrip("0123456789.") in known  # --heads.0.weight, of a recipe's table
        if name.startswith("--") and name not in known and not is_entry:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{name}: repcon {command} has no such flag; {hint}`repcon {command} --help-all` lists all")


def _flags(kind: type, prefix: str = "--") -> Iterator[str]:
    """Every flag of a command's settings, those of nested settings with a dot."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, marks = hints[field.name], ()
        if get_origin(hint) is Annotated:
            hint, marks = hint.__origin__, hint.__metadata__
        name = prefix + field.name.replace("_", "-")
        if Positional in marks or Suppress in marks:
            continue
        if dataclasses.is_dataclass(hint):
            yield from _flags(hint, f"{name}.")  # pyright: ignore[reportArgumentType]
        elif any(getattr(mark, "name", None) == "" for mark in marks):  # called like the settings that hold it
            yield prefix.rstrip(".")
        else:
            yield name
            if hint is bool or bool in get_args(hint):
                yield f"{prefix}no-{field.name.replace('_', '-')}"


def parser_message(command: str, shown: str) -> str:
    """The reason in what the parser printed: the first part of its box, without the frame."""
    reason: list[str] = []
    for line in shown.splitlines():
        text = line.strip(" │╭╮╰╯")
        if reason and set(text) <= {"─"}:
            break
        if line.startswith("│") and text:
            reason.append(text)
    text = (" ".join(reason) or " ".join(shown.split())).removesuffix(" (required)").rstrip(".")
    return f"{text}; `repcon {command} --help` lists the flags"
