"""Training checkpoints: written atomically, refused where they belong to another run."""

import json
import re
import tomllib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from repcon.config import dump
from repcon.runtime.atomic_files import AtomicFile, remove_abandoned
from repcon.runtime.device import out_of_memory
from repcon.runtime.errors import UserError
from repcon.runtime.untrusted import UnreadableError, parse_toml, read_text

FORMAT = 1
"""Of a checkpoint's names; another is refused."""
BEST = "best.pt"
_STEP = re.compile(r"step-\d{9,}\.pt")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names: {"optim": {"lr": 1}} gives {"optim.lr": 1}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flatten(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def settings_identity(settings: Any, free: Container[str]) -> dict[str, Any]:
    """The settings as flat values, without those that a resumed run is `free` to change."""
    return flatten({name: value for name, value in tomllib.loads(dump(settings)).items() if name not in free})


def require_same_settings(settings: Any, command: str, free: Container[str]) -> None:
    """Raises UserError naming the settings, not `free` ones, in which the command's run in `settings.out` differs."""
    recipe = Path(settings.out, "config.toml")
    try:
        held = parse_toml(read_text(recipe))
    except UnreadableError as error:
        raise UserError(f"{recipe}: cannot be read ({error}); name another out, or remove it") from error
    before = flatten({name: value for name, value in held.items() if name not in free})
    now = settings_identity(settings, free)
    if other := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        what = f"{other[0]} is {now.get(other[0])} now and {before.get(other[0])} there"
        also = f" (also {', '.join(other[1:4])})" if other[1:] else ""
        hint = "name another out, or remove it"
        raise UserError(f"{settings.out}: holds another run of `repcon {command}`: {what}{also}; {hint}")


class CheckpointManager:
    """A run's checkpoints: the last `keep` by step, and the best.

    identity: what must be equal for a run to resume, as flat JSON values.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(dict(identity)))
        self.keep = max(1, keep)

    def load_latest(self) -> dict[str, Any] | None:
        """The state to resume from, None without a checkpoint. Raises UserError naming each field that differs."""
        paths = self._paths()
        if not paths:
            return None
        try:
            state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            if out_of_memory(error):
                raise
            raise UserError(f"{paths[-1]}: unreadable ({error}); delete it to go on from the one before") from error
        if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
            raise UserError(f"{paths[-1]}: not a checkpoint of repcon's; delete it to go on from the one before")
        if state.get("format") != FORMAT:
            what = f"a checkpoint of format {state.get('format')}, this version reads {FORMAT}"
            raise UserError(f"{paths[-1]}: {what}; go on with the version that wrote it, or name another `out`")
        saved, own = state["identity"], self.identity
        if names := [name for name in sorted({*saved, *own}) if saved.get(name) != own.get(name)]:
            pairs = ", ".join(f"{n} was {saved.get(n)!r} and is {own.get(n)!r}" for n in names)
            raise UserError(f"{self.folder}: belongs to another run: {pairs}; set it back or name another `out`")
        return state

    def save(self, state: Mapping[str, Any], step: int, *, best: bool) -> None:
        """Write the state of `step`; with `best` also as `best.pt`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The best first: if only this one is written, a resume repeats what led to it.
        remove_abandoned(self.folder)
        for name in (*([BEST] if best else []), f"step-{step:09d}.pt"):
            self._write(dict(state) | {"format": FORMAT, "identity": self.identity}, self.folder / name)
        for old in self._paths()[: -self.keep]:
            old.unlink()

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*.pt") if _STEP.fullmatch(path.name))

    def _write(self, state: Mapping[str, Any], path: Path) -> None:
        """Write atomically: after a crash the previous checkpoint is intact."""
        try:
            with AtomicFile(path) as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a disk that is full
            if out_of_memory(error):
                raise
            hint = "make room: the checkpoint before is kept, the same command goes on from there"
            raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0]}); {hint}") from error
