"""Run folders of strangers: a report or one line, within bounds, and no request to anybody."""

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import report as benchmark_report
from repcon.commands import report
from repcon.config import ReportConfig
from repcon.reports import page, sources
from repcon.reports.sections import labels
from repcon.reports.sections.records import record_sections
from repcon.runtime.errors import UserError

LARGE = "1" * 400
FILES = {"command": "train\n", "config.toml": "", "env.json": "{}", "metrics.jsonl": "", "results.json": "{}"}


def run_folder(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, held in (FILES | {name.replace("__", "."): text for name, text in files.items()}).items():
        (folder / name).write_bytes(held if isinstance(held, bytes) else held.encode())
    return folder


def made(folder: Path, out: Path) -> str:
    """The page; a UserError's message where there is none."""
    try:
        report.run(ReportConfig(paths=(str(folder),), out=str(out)))
    except UserError as error:
        return f"error {error}"
    return (out / "report.html").read_text(encoding="utf-8")


STEPS = '{"event":"step","step":1,"loss":{"a":1e308},"seconds":1}\n{"event":"step","step":2,"loss":{"a":-1e308}}\n'
HOSTILE = {
    "integer": {"results__json": f'{{"seconds":{LARGE}}}'},
    "steps": {"metrics__jsonl": f'{{"event":"step","step":{LARGE},"seconds":{LARGE},"loss":{{"a":1}}}}\n' * 2},
    "losses": {"metrics__jsonl": STEPS},
    "surrogates": {"results__json": '{"\\ud800":"\\udfff"}', "command": b"\xff\x1b[2J"},
    "kinds": {"metrics__jsonl": '{"event":"step","loss":[1]}\n{"event":["x"]}\n{"event":"validation","heads":3}\n'},
    "nested lines": {"metrics__jsonl": "[" * 200_000 + "\n"},
    "not finite": {"results__json": '{"a":NaN,"b":Infinity}', "config__toml": "a=nan\nb=inf\nc=2020-01-01\n"},
    "backbones": {"command": "evaluate", "results__json": '{"backbones":{"a":{"metrics":{"probe":{"mean":1,"low":0'
               ',"high":2}}}},"baseline":[1],"differences":{"a":3},"verdict":5,"chance":"x","datasets":7,"tests":[1]}'},
}  # fmt: skip


@pytest.mark.parametrize("files", HOSTILE.values(), ids=HOSTILE)
def test_what_can_be_shown_of_a_damaged_run_is_shown(files: dict[str, str | bytes], tmp_path: Path) -> None:
    text = made(run_folder(tmp_path / "run", **files), tmp_path / "out")
    assert text.startswith("<!doctype html>")
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", '{"a":' * 100_000), ("results.json", f'{{"a":{"1" * 5000}}}'), ("results.json", "[1]"),
        ("config.toml", "a=" + "[" * 5000), ("config.toml", "a=" + "9" * 5000), ("env.json", ""),
        ("results.json", json.dumps([{"a": list(range(300_000))}])), ("results.json", '{"a":' * 60 + "1" + "}" * 60),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(name: str, text: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / name).write_text(text)
    assert made(folder, tmp_path / "out").startswith(f"error {folder / name}: ")


def test_a_report_asks_nobody_and_says_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    for url in ("http://127.0.0.1:9/x", "s3://bucket/labels.zarr", "reference::http://127.0.0.1:9/x.json", "ftp://a/b"):
        folder = run_folder(tmp_path / "run", config__toml=f'store="{url}"\npack="{url}"\nout="{url}"\n')
        notes = page.build(sources.read_sources([str(folder)]), "title").notes
        assert [note for note in notes if url in note and "does not open" in note]
        run_folder(tmp_path / "run", command="precompute", config__toml=f'store="{url}"\npack="{url}"\nout="{url}"\n')
        assert labels.find_stores(sources.read_sources([str(folder)])) == []


def test_links_out_of_a_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "private.json").write_text('{"secret": 1}')
    private = run_folder(tmp_path / "private", results__json='{"secret": 1}')
    given = tmp_path / "given"
    given.mkdir()
    folder = run_folder(given / "run")
    (folder / "results.json").unlink()
    (folder / "results.json").symlink_to(tmp_path / "private.json")
    (given / "other").symlink_to(private)
    (given / "latest").symlink_to(folder)
    read = sources.read_sources([str(given)])
    assert [dict(source.figures) for source in read] == [{}]
    assert sources.read_sources([str(given / "other")])[0].figures == {"secret": 1}  # the user's own link


def test_no_file_that_never_ends_is_waited_for(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for name in FILES:
        if name != "command":
            (folder / name).unlink()
            os.mkfifo(folder / name)
    assert made(folder, tmp_path / "out").startswith("<!doctype html>")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
    | st.sampled_from([int(LARGE), -(10**101), 1e308, "\x1b[2J", "step", "</script>"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=6), inner),
    max_leaves=12,
)  # fmt: skip
NAMES = st.sampled_from(
    ["step", "seconds", "loss", "validation", "heads", "a", "probe_over_knn", "metrics", "backbones", "mean", "low",
     "high", "x_low", "x_high", "x", "k4_kl", "k8_kl", "k16_kl", "licences", "baseline", "differences", "targets",
     "bytes", "protocol", "domains", "datasets", "verdict", "class_names", "environment", "versions", "models", "tests"]
)  # fmt: skip
FIGURES = st.recursive(
    JSON, lambda inner: st.dictionaries(NAMES, inner, max_size=5) | st.lists(inner, max_size=3), max_leaves=20
)
KINDS = st.sampled_from(["train", "evaluate", "teach", "precompute", "demo", "inspect", "pack", "x"])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=KINDS, results=st.dictionaries(NAMES, FIGURES, max_size=6),
    events=st.lists(st.dictionaries(NAMES | st.just("event"), FIGURES, max_size=6), max_size=4),
    environment=st.dictionaries(NAMES, FIGURES, max_size=3),
)  # fmt: skip
def test_any_run_folder_is_a_report_or_one_line(
    kind: str, results: object, events: list[dict[str, object]], environment: object, tmp_path: Path
) -> None:
    lines = "".join(
        json.dumps({"event": name, **event}) + "\n" for event in events for name in ("step", "validation", "epoch")
    )
    folder = run_folder(
        tmp_path / "run", command=kind, results__json=json.dumps(results), metrics__jsonl=lines,
        env__json=json.dumps(environment),
    )  # fmt: skip
    record = tmp_path / "record.json"
    record.write_text(json.dumps(results))
    for path in (folder, record):
        for records in (record_sections, benchmark_report.sections):
            try:
                built = page.build(sources.read_sources([str(path)]), "title", records)
            except UserError:
                continue
            page.html(built).encode()
            page.markdown(built).encode()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(FILES)), data=st.binary(max_size=60) | st.text().map(lambda t: t.encode("utf-16")))
def test_any_bytes_in_a_run_folder_are_a_report_or_one_line(name: str, data: bytes, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / name).write_bytes(data)
    try:
        page.html(page.build(sources.read_sources([str(folder)]), "title")).encode()
    except UserError as error:
        assert str(folder) in str(error)
