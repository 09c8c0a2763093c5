"""The consolidation benchmark's table, findings, plot and record."""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.experiments.consolidation.protocol import METHODS, Protocol
from benchmarks.harness import script
from repcon.evaluation.intervals import over_draws, plus_minus
from repcon.runtime.console import console
from repcon.runtime.run_dir import write_json
from repcon.runtime.system import environment

METRICS = {"probe": "linear probe", "shot_1": "1-shot", "shot_5": "5-shot", "shot_10": "10-shot", "knn_5": "kNN 5"}
SHOWN = ("probe", "shot_1", "shot_5")
"""The metrics of the terminal's table; the record has all."""
Cells = Mapping[tuple[int, str], Mapping[str, Any]]


def summarise(cells: Cells, protocol: Protocol, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One flat object: `<domain>_<method>_<metric>` and the margins, each with `_low`, `_high`, and the facts.

    Margins by the linear probe are `<margin>` and `<margin>_<domain>`, by another metric `<margin>_<metric>` and
    `<margin>_<metric>_<domain>`. Accuracies are means over seeds; margins over seeds and domains, and over the seeds of
    a domain; in per cent and points, intervals being Student's over those runs (95 %). Of a single run, accuracies have
    the interval over test images, margins none. `margins_of_runs` holds every run's, by `<seed>/<domain>`.
    """
    figures: dict[str, Any] = {}
    by_run: dict[str, dict[str, float]] = {}
    for domain in protocol.domains:
        for method in METHODS:
            for metric in METRICS:
                runs = [
                    cells[seed, domain]["backbones"].get(method, {}).get("metrics", {}).get(metric)
                    for seed in protocol.seeds
                ]
                if all(runs):
                    put(figures, f"{domain}_{method}_{metric}", runs)
    for metric in METRICS:
        for name, (method, rivals) in FINDINGS.items():
            if not all(_has(results["backbones"], (method, *rivals), metric) for results in cells.values()):
                continue
            margins = {cell: _margin(results["backbones"], method, rivals, metric) for cell, results in cells.items()}
            name = margin_name(name, metric)
            _finding(figures, name, margins, protocol)
            by_run[name] = {f"{seed}/{domain}": margin for (seed, domain), margin in margins.items()}
    return figures | {"margins_of_runs": by_run, "protocol": asdict(protocol), **facts, "environment": environment()}


FINDINGS = {
    "finding_1": ("generalist", ("task",)),
    "finding_2": ("task_generalist", ("teacher", "generalist")),
    "finding_3": ("tasks_generalist", ("teacher", "generalist")),
    "finding_2_quarters": ("quarters_generalist", ("teacher_a", "teacher_b", "generalist")),
    "generalist_head": ("task_generalist", ("task",)),
    "generalist_head_of_tasks": ("tasks_generalist", ("tasks",)),
    "task_heads": ("task_generalist", ("generalist_only",)),
    "side_by_side": ("task_generalist", ("ceiling",)),
    "side_by_side_of_tasks": ("tasks_generalist", ("ceiling",)),
    "over_joint": ("tasks_generalist", ("joint",)),
    "training": ("task_generalist", ("average",)),
    "training_of_tasks": ("tasks_generalist", ("average_of_students",)),
}
"""Margins by name: the method, and the rivals of which the best in each run is subtracted."""


def margin_name(name: str, metric: str) -> str:
    """Margins of the linear probe carry its name alone, others their metric's after it: `finding_2_shot_5`."""
    return name if metric == "probe" else f"{name}_{metric}"


def _has(backbones: Mapping[str, Any], methods: Iterable[str], metric: str) -> bool:
    return all(metric in backbones.get(method, {}).get("metrics", {}) for method in methods)


def _margin(backbones: Mapping[str, Any], method: str, rivals: tuple[str, ...], metric: str) -> float:
    return accuracy(backbones[method], metric) - max(accuracy(backbones[rival], metric) for rival in rivals)


def accuracy(backbone: Mapping[str, Any], metric: str = "probe") -> float:
    """In per cent."""
    return backbone["metrics"][metric]["mean"]


def put(figures: dict[str, Any], name: str, runs: list[Mapping[str, float]]) -> None:
    """Mean and interval of several runs' figures, or the single run's own interval."""
    interval = runs[0] if len(runs) == 1 else over_draws(np.array([run["mean"] for run in runs]) / 100)
    figures |= {name: interval["mean"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}


PAIRED = ("probe", "shot_5")
"""The metrics of a table of backbones and their paired gains."""


def paired(runs: Iterable[Mapping[str, Any]], names: Iterable[str], baseline: str) -> dict[str, float]:
    """Of evaluate's results under several seeds `<name>_<metric>` and, but for the baseline, `<name>_<metric>_gain`.

    Accuracies in per cent, gains over the baseline in points; means over the seeds.
    """
    runs, figures = list(runs), {}
    for name in names:
        for metric in PAIRED:
            accuracies = [results["backbones"][name]["metrics"].get(metric) for results in runs]
            if not all(accuracies):
                continue
            put(figures, f"{name}_{metric}", accuracies)
            if name != baseline:
                put(figures, f"{name}_{metric}_gain", [results["differences"][name][metric] for results in runs])
    return figures


def paired_cells(figures: Mapping[str, Any], name: str) -> list[str]:
    """A row of that table: each metric and its gain."""
    return [
        shown
        for metric in PAIRED
        for shown in (
            cell(figures, f"{name}_{metric}"),
            cell(figures, f"{name}_{metric}_gain", signed=True),
        )
    ]


def _finding(figures: dict[str, Any], name: str, margins: Mapping[tuple[int, str], float], protocol: Protocol) -> None:
    put_margin(figures, name, list(margins.values()))
    for domain in protocol.domains:
        put_margin(figures, f"{name}_{domain}", [margins[seed, domain] for seed in protocol.seeds])
    figures[f"{name}_worst"] = min(figures[f"{name}_{domain}"] for domain in protocol.domains)


def put_margin(figures: dict[str, Any], name: str, margins: list[float]) -> None:
    """Their mean, with its interval if there are several."""
    if len(margins) == 1:
        figures[name] = margins[0]
    else:
        put(figures, name, [{"mean": margin} for margin in margins])


def show(results: Mapping[str, Any]) -> None:
    """The main table and the findings, in the terminal."""
    protocol = results["protocol"]
    grid = Table(
        title=f"Transfer to the unseen half of the classes, %, {len(protocol['seeds'])} seeds (95 % intervals)"
    )
    grid.add_column("", style="bold")
    for domain in protocol["domains"]:
        for metric in SHOWN:
            grid.add_column(f"{domain}\n{METRICS[metric]}", justify="right")
    for method, title in METHODS.items():
        row = [cell(results, f"{domain}_{method}_{metric}") for domain in protocol["domains"] for metric in SHOWN]
        if any(row):
            grid.add_row(title, *row)
    console.print(grid)
    for name, (method, rivals) in FINDINGS.items():
        figures = {metric: margin_name(name, metric) for metric in METRICS if margin_name(name, metric) in results}
        for metric, figure in figures.items():
            domains = ", ".join(f"{d} {cell(results, f'{figure}_{d}', signed=True)}" for d in protocol["domains"])
            what = f"{METHODS[method]} - " + (" or ".join(METHODS[r] for r in rivals)) if metric == "probe" else ""
            points = f"{cell(results, figure, signed=True)} points of {METRICS[metric]} ({domains})"
            console.print(f"[bold]{name}[/] {points}  [dim]{what}[/]")


def cell(results: Mapping[str, Any], name: str, *, signed: bool = False) -> str:
    """A figure with its interval if it has one (a single run's margin has none); empty where there is no figure."""
    if name not in results:
        return ""
    if f"{name}_low" not in results:
        return f"{results[name]:{'+' if signed else ''}.1f}"
    return plus_minus(_interval(results, name), signed=signed)


def _interval(results: Mapping[str, Any], name: str) -> dict[str, float]:
    return {"mean": results[name], "low": results[f"{name}_low"], "high": results[f"{name}_high"]}


def write(results: dict[str, Any], work: Path, arguments: Namespace) -> None:
    """Results and plot into the work folder; then what the options `--json` and `--record` ask for."""
    write_json(work / "results.json", results)
    plot(results, work / "consolidation.svg")
    script.keep("consolidation", results, markdown(results), arguments, [work / "consolidation.svg"])


def markdown(results: Mapping[str, Any]) -> str:
    """The table and the findings for the README and the record."""
    domains = results["protocol"]["domains"]
    columns = [(domain, metric) for domain in domains for metric in METRICS]
    lines = [
        "| | " + " | ".join(f"{domain}, {METRICS[metric]}" for domain, metric in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method, title in METHODS.items():
        row = [cell(results, f"{domain}_{method}_{metric}") for domain, metric in columns]
        if any(row):
            lines.append(f"| {title} | " + " | ".join(row) + " |")
    for metric, title in METRICS.items():
        rows = [(name, margin_name(name, metric)) for name in FINDINGS if margin_name(name, metric) in results]
        lines += ["", f"| margin (points, {title}) | mean | " + " | ".join(domains) + " |"] if rows else []
        lines += ["|---" * (len(domains) + 2) + "|"] if rows else []
        for name, figure in rows:
            per_domain = " | ".join(cell(results, f"{figure}_{domain}", signed=True) for domain in domains)
            lines.append(f"| {name} | {cell(results, figure, signed=True)} | {per_domain} |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Linear-probe accuracy of every method, a panel per domain, with intervals."""
    domains = results["protocol"]["domains"]
    figure = Figure(figsize=(4.2 * len(domains) + 2.4, 4.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(domains), sharey=True))
    methods = [method for method in METHODS if any(f"{domain}_{method}_probe" in results for domain in domains)][::-1]
    for axes, domain in zip(panels, domains, strict=True):
        for place, method in enumerate(methods):
            if f"{domain}_{method}_probe" not in results:
                continue
            value = _interval(results, f"{domain}_{method}_probe")
            errors = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
            colour = "C7" if method.startswith(("generalist", "teacher")) and method != "generalist_only" else "C0"
            axes.errorbar(value["mean"], place, xerr=errors, fmt="o", capsize=2, color=colour)
        axes.axvline(results[f"{domain}_generalist_probe"], color="0.6", linewidth=0.8, linestyle="--")
        axes.set_title(domain)
        axes.set_xlabel("linear probe (%)")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(methods)), [METHODS[method] for method in methods])
    figure.savefig(path, metadata={"Date": None})
