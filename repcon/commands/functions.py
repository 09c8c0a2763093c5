"""The commands as Python functions, which `repcon` hands on: `repcon.train(pack=..., store=..., out=...)`.

Settings are those of the command's recipe, by the same names: plain values, dicts for tables, or the dataclasses of
`repcon.config`. Each function gives the command's results (`repcon.commands.results`) and raises UserError where the
command would end with one line.
"""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from repcon import config
from repcon.commands import outcome, results

Path = str | PathLike[str]
Named = Mapping[str, Path] | Sequence[str]
"""{name: value}, or "NAME=VALUE" each."""


def consolidate(
    *, proxy: Path | Sequence[Path], teachers: Named = (), out: Path, teach: Named = (), evaluate: Named = (),
    **settings: Any,
) -> results.ConsolidateResult:  # fmt: skip
    """From images and teachers to one backbone and a report, as `repcon consolidate`."""
    named = {"teachers": _named(teachers), "teach": _named(teach), "evaluate": _named(evaluate)}
    sources = [proxy] if isinstance(proxy, str | PathLike) else list(proxy)
    return _run("consolidate", config.ConsolidateConfig, {"proxy": sources, "out": out, **named, **settings})


def pack(source: Path | Sequence[Path], out: Path, **settings: Any) -> results.PackResult:
    """Pack images into tar shards, as `repcon pack`."""
    return _run("pack", config.PackConfig, {"source": source, "out": out, **settings})


def teach(*, data: Path, out: Path, **settings: Any) -> results.TeachResult:
    """Fine-tune a generalist into a task teacher, as `repcon teach`."""
    return _run("teach", config.TeachConfig, {"data": data, "out": out, **settings})


def precompute(
    *, pack: Path, out: Path, teachers: Mapping[str, Path] | Sequence[Any] = (), **settings: Any
) -> results.PrecomputeResult:
    """Have every teacher answer once about every crop, as `repcon precompute`.

    teachers: {name: model}, or a table or `TeacherConfig` each.
    """
    if isinstance(teachers, Mapping):
        teachers = [{"name": name, "model": model} for name, model in teachers.items()]
    return _run("precompute", config.PrecomputeConfig, {"pack": pack, "out": out, "teachers": teachers, **settings})


def train(*, pack: Path, store: Path, out: Path, **settings: Any) -> results.TrainResult:
    """Distil the stored teachers into one student, as `repcon train`."""
    return _run("train", config.TrainConfig, {"pack": pack, "store": store, "out": out, **settings})


def evaluate(*, data: Path | Named, backbones: Named, out: Path, **settings: Any) -> results.EvaluateResult:
    """Measure how well features transfer, as `repcon evaluate`."""
    sets = data if isinstance(data, str | PathLike) else _named(data)
    return _run(
        "evaluate", config.EvaluateConfig, {"data": sets, "backbones": _named(backbones), "out": out, **settings}
    )


def report(*paths: Path, **settings: Any) -> results.ReportResult:
    """Run folders and records as Markdown and one HTML file, as `repcon report`."""
    return _run("report", config.ReportConfig, {"paths": paths, **settings})


def export(student: Path, *, to: str, **settings: Any) -> results.ExportResult:
    """A student as one file for torch or an ONNX runtime, as `repcon export`."""
    return _run("export", config.ExportConfig, {"model": student, "to": to, **settings})


def push(source: Path, repository: str, **settings: Any) -> results.PushResult:
    """A student, a teacher or a label store onto the Hugging Face hub, as `repcon push`."""
    return _run("push", config.PushConfig, {"source": source, "repository": repository, **settings})


def pull(repository: str, *, out: Path, **settings: Any) -> results.PullResult:
    """What `repcon push` put on the Hugging Face hub, checked, as `repcon pull`."""
    return _run("pull", config.PullConfig, {"repository": repository, "out": out, **settings})


def _run(command: str, kind: type, values: Mapping[str, Any]) -> Any:
    return outcome.run_command(command, config.parse(kind, config.to_plain(values), f"repcon.{command}()"))


def _named(values: Named) -> list[str]:
    if isinstance(values, Mapping):
        return [f"{name}={fspath(value)}" for name, value in values.items()]
    return [values] if isinstance(values, str) else list(values)
