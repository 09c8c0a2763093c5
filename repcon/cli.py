"""The command line: `repcon COMMAND [--recipe FILE] [--json FILE] [flags]`; a command is imported when asked for."""

import contextlib
import dataclasses
import difflib
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro
from rich.markup import escape
from rich.text import Text

from repcon import __version__, config
from repcon.commands import help, outcome
from repcon.commands.usage_errors import parser_message, require_known_flags
from repcon.runtime.console import Terminal, console
from repcon.runtime.errors import UserError
from repcon.runtime.memory import keep_freed_memory
from repcon.runtime.run_dir import json_text
from repcon.runtime.system import sleep_when_idle
from repcon.runtime.text import one_line

errors = Terminal(stderr=True)
STARTS_AGAIN = ("verify", "inspect", "report", "export")
"""Commands that keep nothing to go on from."""

COMMANDS: dict[str, type] = {
    "consolidate": config.ConsolidateConfig,
    "pack": config.PackConfig,
    "teach": config.TeachConfig,
    "precompute": config.PrecomputeConfig,
    "inspect": config.InspectConfig,
    "verify": config.VerifyConfig,
    "train": config.TrainConfig,
    "evaluate": config.EvaluateConfig,
    "report": config.ReportConfig,
    "export": config.ExportConfig,
    "push": config.PushConfig,
    "pull": config.PullConfig,
    "demo": config.DemoConfig,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Gives 0 when all that was asked for was done, 1 for the user's mistakes, 130 on Ctrl-C."""
    _open_closed_streams()
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    finally:  # what Python's own end would flush with a traceback
        try:
            sys.stdout.flush()
        except OSError as error:
            console.discard_output(sys.stdout, error)


def _open_closed_streams() -> None:
    """Puts the null device in the place of streams that the caller has closed: else a file of ours takes the number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest free number is given
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for the whole run)


def _main(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # also for what others print
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if words[:1] in (["--version"], ["version"]):
        console.print(f"repcon {__version__}", highlight=False)
        return 0
    if words[:1] == ["help"]:  # `repcon help train` is `repcon train --help`
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        help.overview(COMMANDS)
        return 0
    json_path = None
    try:
        json_path = _json_path(words)
        figures = _command(words[0], words[1:])
    except UserError as error:
        return _failed(str(error), json_path, error.figures)
    except OSError as error:
        if not error.errno:  # raised by a library for some other reason: a fault of the program
            raise
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror), json_path, {})
    except KeyboardInterrupt:
        goes_on = "what was finished is kept, the same command goes on from there"
        again = "the same command starts it again"
        errors.print(f"[yellow]interrupted[/]; {again if words[0] in STARTS_AGAIN else goes_on}")
        return 130
    except Exception as error:
        if reason := _foreseen(error):
            return _failed(reason, json_path, {})
        raise
    return 0 if _written(json_path, figures) and _shown(words[0]) else 1


def _foreseen(error: Exception) -> str:
    """What the user can do about an exception of the interpreter's or torch's; empty for any other."""
    line = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in line:
        return f"out of memory ({line or 'of this machine'}); make batch_size, size or num_workers smaller"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"compile: torch cannot compile the model here ({line}); set compile = false"
    if "can't start new thread" in line:
        return "no further threads can be started here; make num_workers smaller"
    return ""


def _shown(command: str) -> bool:
    """Says where the standard output was lost; False for a command that has no other."""
    if console.lost is None or console.lost.errno == errno.EPIPE:  # a pipe's reader has seen enough
        return True
    reason = console.lost.strerror
    errors.print(f"[yellow]warning[/]: the standard output could not be written ({reason}); it is not whole")
    return command != "inspect"


def _json_path(words: list[str]) -> str | None:
    """Removes `--json FILE` from the words and gives the file's name, whose folder is known to exist."""
    path = _take(words, "--json")
    if path is None:
        return None
    if path == "-":  # the figures alone go to the standard output
        console.stderr = True
        return path
    path = config.expand_home(path)
    place = Path(path).absolute()
    if not place.parent.is_dir():
        raise UserError(f"--json {path}: there is no such folder; make it first")
    if place.is_dir():
        raise UserError(f"--json {path}: is a folder; name a file in it")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise UserError(f"--json {path}: cannot be written there; name another file")
    return path


def _failed(message: str, json_path: str | None, figures: dict[str, Any]) -> int:
    """One line on the standard error, and among the figures; of several processes, each says which it is."""
    _written(json_path, {**figures, "error": message})
    alone = os.environ.get("WORLD_SIZE", "") in ("", "0", "1")
    rank = "" if alone else f" (process {os.environ.get('RANK', '?')})"
    errors.print(Text.assemble(("error", "bold red"), f"{rank} {one_line(message)}"), highlight=False, soft_wrap=True)
    return 1


def _command(name: str, words: list[str]) -> dict[str, Any]:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no command {name!r}; {meant}there are {', '.join(COMMANDS)}")
    kind = COMMANDS[name]
    if words and words[-1] in ("-h", "--help"):
        help.show(name, kind)
        raise SystemExit(0)
    words = ["--help" if word == "--help-all" else word for word in words]
    settings = _settings(name, kind, words, _take(words, "--recipe"))
    keep_freed_memory()
    sleep_when_idle()
    return outcome.run_command(name, settings)


def _settings(name: str, kind: type, words: list[str], recipe: str | None) -> Any:
    """The recipe's values under the flags' values; a required field may come from either.

    Raises UserError for what the flags are wrong in, SystemExit after `--help`.
    """
    require_known_flags(name, kind, words)
    words, default = _gathered(kind, words), None
    words, sources = _sources(kind, words)
    teachers = _teachers(kind, words)
    if recipe is not None or teachers:
        values = ({} if recipe is None else config.read_toml(recipe)) | teachers
        required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
        absent = [field for field in required if field not in values]
        # A recipe may leave paths to the flags: a placeholder passes the check, then tyro asks for the field.
        blank: dict[str, Any] = {field: [] if field == "paths" else "" for field in absent}
        checked = config.parse(kind, values | blank, recipe or "--teachers")
        default = dataclasses.replace(checked, **dict.fromkeys(absent, tyro.MISSING))
    shown = io.StringIO()  # what the parser says of a mistake
    try:
        given = {} if default is None else {"default": default}
        with contextlib.redirect_stderr(shown):
            settings = tyro.cli(kind, prog=f"repcon {name}", args=words, **given)
        return dataclasses.replace(settings, source=sources) if len(sources) > 1 else settings
    except SystemExit as stop:
        if stop.code:
            raise UserError(parser_message(name, shown.getvalue())) from None
        raise SystemExit(0) from None
    except BrokenPipeError as error:  # of the help, whose reader (`| head`) has seen enough
        console.discard_output(sys.stdout, error)
        raise SystemExit(0) from None


def _gathered(kind: type, words: Sequence[str]) -> list[str]:
    """The words with a repeated flag's values after its first, for options that take several: `--data A --data B` is
    `--data A B`; the parser would keep the last alone."""
    several = {
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(kind)
        if any(get_origin(part) is tuple for part in (field.type, *get_args(field.type)))
    }
    rest, values, flag = [], {}, ""
    for word in words:
        name, equals, value = word.partition("=")
        if name in several:
            flag = name
            values.setdefault(flag, []).extend([value] if equals else [])
        elif flag and not word.startswith("--"):
            values[flag].append(word)
        else:
            flag = ""
            rest.append(word)
    return rest + [word for name, held in values.items() for word in (name, *held)]


def _sources(kind: type, words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """`pack`'s words with one SOURCE and OUT at their end, and all the sources: the parser cannot tell several from
    the OUT that follows them."""
    if kind is not config.PackConfig:
        return words, ()
    flags, plain, rest = [], [], iter(words)
    for word in rest:
        if not word.startswith("-"):
            plain.append(word)
            continue
        flags.append(word)
        if "=" not in word and word not in ("-h", "--help", "--ffcv", "--no-ffcv"):
            flags += [value for value in (next(rest, None),) if value is not None]
    return [*flags, *plain[:1], *plain[-1:]] if len(plain) > 1 else words, tuple(plain[:-1])


def _teachers(kind: type, words: list[str]) -> dict[str, list[dict[str, str]]]:
    """Removes `--teachers NAME=MODEL ...` from `precompute`'s words and gives them as a recipe has them; {} without."""
    if kind is not config.PrecomputeConfig or "--teachers" not in words:
        return {}
    start = words.index("--teachers")
    end = next((place for place in range(start + 1, len(words)) if words[place].startswith("--")), len(words))
    given = words[start + 1 : end]
    del words[start:end]
    pairs = config.parse_named_values("teachers", given, "NAME=MODEL")
    return {"teachers": [{"name": name, "model": model} for name, model in pairs.items()]}


def _take(words: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` or `flag=VALUE` from the words and gives the value."""
    for place, word in enumerate(words):
        if word.startswith(flag + "="):
            return words.pop(place).removeprefix(flag + "=")
        if word == flag:
            if place + 1 >= len(words):
                raise UserError(f"{flag} needs a file name")
            words.pop(place)
            return words.pop(place)
    return None


def _written(path: str | None, figures: dict[str, Any]) -> bool:
    """Writes the figures where they were asked for; says so and gives False where that fails."""
    try:
        if path == "-":
            sys.stdout.write(json_text(figures))
            sys.stdout.flush()
        elif path is not None:
            Path(path).write_text(json_text(figures), encoding="utf-8")  # not by a rename: it may be /dev/stdout
    except OSError as error:
        errors.print(f"[bold red]error[/] --json {escape(str(path))}: {error.strerror}", highlight=False)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
