"""The command line's start-up benchmark, in its smallest form."""

from benchmarks.cli import benchmark


def test_every_command_has_its_seconds_and_its_modules(tmp_path):
    figures = benchmark.measure(tmp_path, images=64, rounds=1)
    for name in benchmark.commands(tmp_path):
        assert figures[f"{name}_seconds"] > 0 and figures[f"{name}_modules"] > 10
    assert figures["python_modules"] < figures["import_modules"] < figures["help_modules"] < figures["inspect_modules"]
    assert "rich" in figures["help_heaviest"] and "rich" not in figures["import_heaviest"]
    seconds, modules = benchmark.grids(figures | {"targets": {"help_seconds": "<= 0.3"}})
    assert ("help", str(figures["help_modules"]), figures["help_heaviest"]) in modules.rows
    assert any(row[0] == "help_seconds" and row[-1] == "<= 0.3" for row in seconds.rows)
