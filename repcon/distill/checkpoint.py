"""Checkpoints: written whole or not at all, refused where they belong to another run."""

import json
import re
import tomllib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from repcon.config import dump
from repcon.runtime.errors import UserError
from repcon.runtime.local_files import AtomicFile, remove_abandoned

BEST = "best.pt"
_STEP = re.compile(r"step-\d{9,}\.pt")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names, so that a difference can be named: {"optim": {"lr": 1}} gives {"optim.lr": 1}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def decisive(settings: Any, free: Container[str]) -> dict[str, Any]:
    """The settings as flat values, without those that are `free` to differ where a run goes on."""
    return flat({name: value for name, value in tomllib.loads(dump(settings)).items() if name not in free})


class Checkpoints:
    """The folder of a run's checkpoints: the last `keep` by step, and the best.

    identity: what must be equal for a run to go on, as flat JSON values.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(dict(identity)))
        self.keep = max(1, keep)

    def newest(self) -> dict[str, Any] | None:
        """The state to go on from, None at the beginning. Raises UserError naming each field that differs."""
        paths = self._paths()
        if not paths:
            return None
        try:
            state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds here; all mean that the file is not whole.
            raise UserError(f"{paths[-1]}: unreadable ({error}); delete it to go on from the one before") from error
        if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
            raise UserError(f"{paths[-1]}: not a checkpoint of repcon's; delete it to go on from the one before")
        self._compare(state["identity"])
        return state

    def save(self, state: Mapping[str, Any], step: int, *, best: bool) -> None:
        """Writes the state of `step`; with `best` it is also kept as `best.pt`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The best first: a resume repeats what led to it unless the other is there too.
        names = ([BEST] if best else []) + [f"step-{step:09d}.pt"]
        remove_abandoned(self.folder)
        for name in names:
            self._write(dict(state) | {"identity": self.identity}, self.folder / name)
        for old in self._paths()[: -self.keep]:
            old.unlink()

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*.pt") if _STEP.fullmatch(path.name))

    def _write(self, state: Mapping[str, Any], path: Path) -> None:
        """Writes the file with `AtomicFile`, so that a crash leaves the checkpoint before."""
        try:
            with AtomicFile(path) as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a disk that is full
            hint = "make room: the checkpoint before is kept, the same command goes on from there"
            raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0]}); {hint}") from error

    def _compare(self, held: Mapping[str, Any]) -> None:
        names = [name for name in sorted({*held, *self.identity}) if held.get(name) != self.identity.get(name)]
        if names:
            pairs = ", ".join(f"{n} was {held.get(n)!r} and is {self.identity.get(n)!r}" for n in names)
            raise UserError(f"{self.folder}: belongs to another run: {pairs}; set it back or name another `out`")
