"""Records of the consolidation benchmark in a report: in the benchmark's words."""

from pathlib import Path

from report_case import make, write_record

from benchmarks import report
from benchmarks.experiments.consolidation import protocol, section, summary

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"


def test_consolidation_records_show_margins_and_domains(tmp_path: Path) -> None:
    def figure(name: str, mean: float) -> dict[str, float]:
        return {name: mean, f"{name}_low": mean - 1, f"{name}_high": mean + 1}

    figures = figure("birds_task_generalist_probe", 88.1) | figure("birds_generalist_probe", 87.2)
    figures |= figure("birds_generalist_shot_1", 40.0) | figure("finding_2", 1.4)
    figures |= {"finding_2_birds": 1.4, "finding_2_worst": 1.4, "wall_seconds": 61}
    record = write_record(tmp_path / "consolidation", protocol={"domains": ["birds"], "seeds": [0, 1]}, **figures)
    _, markdown = make(tmp_path / "out", record, records=report.sections)
    assert "| student: task + generalist | 88.1 ± 1.0 | - |" in markdown
    assert (
        "| finding 2: the student of task teacher and generalist over the better of the two | +1.4 ± 1.0 | +1.4 |"
        in markdown
    )
    single = write_record(tmp_path / "one", protocol={"domains": ["birds"]}, finding_1=2.0, finding_1_worst=2.0,
                          **figure("birds_task_probe", 80.0))  # fmt: skip
    _, markdown = make(tmp_path / "out1", single, records=report.sections)
    assert "| finding 1: the generalist over the student of the task teacher alone | +2.0 | - |" in markdown


def test_every_method_and_margin_of_the_benchmark_has_its_words(tmp_path: Path) -> None:
    assert section.MARGINS.keys() == summary.FINDINGS.keys()
    interval = {"mean": 50.0, "low": 49.0, "high": 51.0}
    figures = {f"birds_{name}_probe": interval for name in protocol.METHODS}
    margins = [name + metric for name in section.MARGINS for metric in ("", "_shot_1", "_shot_10", "_knn_5")]
    figures |= {name: interval for name in margins} | {f"{name}_worst": 49.0 for name in margins}
    _, markdown = make(
        tmp_path / "out",
        write_record(tmp_path / "r", protocol={"domains": ["birds"]}, **figures),
        records=report.sections,
    )
    for words in (*protocol.METHODS.values(), *section.MARGINS.values()):
        assert words in markdown
    assert "\n| ceiling |" not in markdown
    for words in ("linear probe", "1-shot", "10-shot", "kNN, k = 5"):
        assert f"**Margins by {words}**" in markdown
    _, markdown = make(tmp_path / "kept", RECORDS / "2026-11-25-consolidation-cpu-2-cores-7", records=report.sections)
    assert protocol.METHODS["quarters_generalist"] in markdown and section.MARGINS["task_heads"] in markdown


def test_names_that_a_newer_benchmark_may_have_are_shown_as_they_are(tmp_path: Path) -> None:
    interval = {"mean": 50.0, "low": 49.0, "high": 51.0}
    figures = {"birds_new_way_probe": interval, "new_margin": interval, "new_margin_worst": 49.0}
    _, markdown = make(
        tmp_path / "out",
        write_record(tmp_path / "r", protocol={"domains": ["birds"]}, **figures),
        records=report.sections,
    )
    assert "| new way | 50.0 ± 1.0 |" in markdown and "| new margin | +50.0 ± 1.0 | - |" in markdown
