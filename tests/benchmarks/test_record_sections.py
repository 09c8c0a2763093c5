"""The benchmarks' own sections in a report: ratios, scaling, gains."""

import json
import re
from pathlib import Path

from report_case import make, write_record

from benchmarks import report
from repcon.reports.plot_style import LIGHT


def written(out: Path, *paths: Path) -> str:
    """The report in Markdown."""
    return make(out, *paths, records=report.sections)[1]


def test_figures_that_count_something_are_a_line(tmp_path: Path) -> None:
    figures = {f"{metric}_k{k}_minus_online": 0.1 * k for metric in ("probe", "knn") for k in (4, 8, 1000)}
    memory = {f"memory_{images}_images_bytes": 1e9 for images in (64, 256, 1024)}
    record = write_record(tmp_path / "quality", **figures, **memory, finding_1=1.0, finding_2=2.0, b256_us=3.0)
    markdown = written(tmp_path / "out", record)
    assert re.findall(r"!\[(.*)\]", markdown) == ["minus online by k", "memory by images"]
    text = (tmp_path / "out" / "plots" / "bench0-line0.svg").read_text()
    assert all(word in text for word in (">probe<", ">knn<", ">1,000<"))


def test_gains_of_variants_share_a_plot(tmp_path: Path) -> None:
    gains = {f"{name}_probe_gain": {"mean": 1.0, "low": -1.0, "high": 3.0} for name in ("k_64", "no_tail")}
    markdown = written(tmp_path / "out", write_record(tmp_path / "ablation", **gains))
    assert re.findall(r"!\[(.*)\]", markdown) == ["Gain in linear probe"]


def test_ratios_to_one_peer_share_a_plot(tmp_path: Path) -> None:
    ratios = {f"{shape}_{peer}_over_ours": 2.0 for shape in ("small", "large") for peer in ("eager", "liger")}
    record = write_record(tmp_path / "kernels", **ratios, linear_peak_over_plain=0.4, launches=3)
    markdown = written(tmp_path / "out", record)
    assert re.findall(r"!\[(.*)\]", markdown) == ["Over ours", "Ratios"]
    assert "small eager" in (tmp_path / "out" / "plots" / "bench0-0.svg").read_text()


def test_ratios_are_explained_after_the_machine_and_the_note(tmp_path: Path) -> None:
    figures = {"step_over_synthetic": 0.9, "read_bytes_growth": 1.2}
    for name, device, note in (("a", "cpu", {}), ("b", "cpu", {}), ("c", "Some GPU", {"note": "cut off"})):
        facts = {"device": device, "cores": 4, "processor": "", "started": "2026-01-02T03:04:05Z", **note}
        folder = write_record(tmp_path / "records" / name, **figures)
        (folder / "env.json").write_text(json.dumps(facts))
    markdown = written(tmp_path / "out", tmp_path / "records")
    assert "CPU, 4 cores, 2026-01-02. Ratios measured" in markdown
    assert "Some GPU, 4 cores, 2026-01-02. cut off Ratios measured" in markdown


def test_the_command_writes_a_page_over_a_folder_of_records(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("a", "b"):
        write_record(tmp_path / "records" / name, slab_over_memmap=0.4)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "records"), "--out", str(tmp_path / "out")])
    report.main()
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Benchmark: a" in text and "Ratios measured in one run" in text
    assert "report.html" in capsys.readouterr().out


def test_rows_of_one_plot_share_a_colour(tmp_path: Path) -> None:
    figure = {"mean": 1.0, "low": -1.0, "high": 3.0}
    written(tmp_path / "out", write_record(tmp_path / "ablation", k_64_probe_gain=figure, no_tail_probe_gain=figure))
    text = (tmp_path / "out" / "plots" / "bench0-gain-probe.svg").read_text()
    assert "var(--s1)" in text and "var(--s2)" not in text and LIGHT["s1"] in text
