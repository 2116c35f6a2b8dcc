"""Comparison of several evaluations, for example runs with different seeds: every run is shown, not only the mean."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.console import Console
from rlhf.errors import ConfigError
from rlhf.reports.html import embed_figure, html_page, html_table
from rlhf.runs.run_dir import read_json

ResultRow = Mapping[str, Any]
COMPARED_NUMBERS = {
    "win": "win rate",
    "kl": "KL nats",
    "utility": "utility",
    "score": "score",
    "perplexity": "perplexity",
}


@dataclass(frozen=True)
class EvaluationResult:
    """Results of one evaluate run."""

    name: str
    reference: str
    rows: tuple[ResultRow, ...]


def compare_runs(folders: Sequence[Path], console: Console, *, output: Path | None) -> None:
    """Print a table for every split and model, and write an HTML page with a figure if `output` is given.

    Args:
        folders: run directories of evaluate stages, or of pipelines that have one.
        console: where the tables are printed.
        output: HTML file to write; None = no page.
    Raises: ConfigError if a folder contains no finished evaluation, or if the evaluations have different references or
        no split and model in common.
    """
    evaluations = [_read_result(folder) for folder in folders]
    references = sorted({evaluation.reference for evaluation in evaluations})
    if len(references) > 1:
        raise ConfigError(
            "win rates against different models cannot be compared",
            found=f"references {', '.join(references)}",
            where="command line",
            do="give evaluations with the same reference",
        )
    tables = summarize(evaluations)
    for (split, model), (header, rows) in tables.items():
        console.table(f"{split}: {model} against {references[0]}", header, rows)
    if output is not None:
        output.write_text(_make_page(evaluations, tables), encoding="utf-8")
        console.note(f"page with a figure of all evaluations: {output}")


def _read_result(folder: Path) -> EvaluationResult:
    """Return the results in the run directory of an evaluate stage, or of a pipeline that has one."""
    of_stages = sorted(folder.glob("*-evaluate/results.json"))
    path = folder / "results.json" if (folder / "results.json").is_file() or not of_stages else of_stages[-1]
    if not path.is_file():
        raise ConfigError(
            "the folder contains no finished evaluation",
            where=str(folder),
            do="give the run directory of an evaluate stage, or of a pipeline that has one",
        )
    results = read_json(path)
    return EvaluationResult(str(folder), results["reference"], tuple(results["models"]))


def summarize(evaluations: Sequence[EvaluationResult]) -> dict[tuple[str, str], tuple[list[str], list[list[str]]]]:
    """Return (split, model) -> header and rows: one row per run, then their mean, deviation, and lowest and highest.

    Raises: ConfigError if no model except the reference is in all evaluations.
    """
    keys = [(row["split"], row["model"]) for row in evaluations[0].rows if row["model"] != evaluations[0].reference]
    common = [k for k in keys if all(any((r["split"], r["model"]) == k for r in e.rows) for e in evaluations)]
    if not common:
        raise ConfigError("the evaluations have no split and model in common", where="command line")
    tables = {}
    for split, model in common:
        rows = [next(r for r in e.rows if (r["split"], r["model"]) == (split, model)) for e in evaluations]
        columns = [name for name in COMPARED_NUMBERS if all(row.get(name) is not None for row in rows)]
        measures = [name for name in rows[0].get("measures", {}) if all(name in r.get("measures", {}) for r in rows)]
        series = [[row[name] for row in rows] for name in columns]
        series += [[row["measures"][name] for row in rows] for name in measures]
        cells = [
            [e.name, *(_format_cell(name, row) for name in columns)] for e, row in zip(evaluations, rows, strict=True)
        ]
        for line, row in zip(cells, rows, strict=True):
            line += [f"{row['measures'][name]:.3f}" for name in measures]
        percent = [name == "win" for name in columns] + [False] * len(measures)
        for name, function in (
            ("mean", _format_mean),
            ("deviation", _format_deviation),
            ("lowest, highest", _format_range),
        ):
            cells.append([name, *(function(s, p) for s, p in zip(series, percent, strict=True))])
        tables[split, model] = (["run", *(COMPARED_NUMBERS[name] for name in columns), *measures], cells)
    return tables


def _format_cell(name: str, row: ResultRow) -> str:
    if name == "win":
        return f"{100 * row['win']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    return f"{row[name]:.2f}"


def _format_value(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.3f}"


def _format_mean(values: Sequence[float], percent: bool) -> str:
    return _format_value(statistics.fmean(values), percent)


def _format_deviation(values: Sequence[float], percent: bool) -> str:
    return _format_value(statistics.stdev(values), percent) if len(values) > 1 else "-"


def _format_range(values: Sequence[float], percent: bool) -> str:
    return f"{_format_value(min(values), percent)}, {_format_value(max(values), percent)}"


def _make_page(
    evaluations: Sequence[EvaluationResult], tables: Mapping[tuple[str, str], tuple[list[str], list[list[str]]]]
) -> str:
    parts = [f"<h1>{len(evaluations)} evaluations</h1>", _make_figure(evaluations, list(tables))]
    parts.append(
        "<p class='note'>Each point is one run, with the 95 % bootstrap interval over its prompts; the dotted line is "
        "the reference itself.</p>"
    )
    for (split, model), (header, rows) in tables.items():
        parts.append(f"<h2>{html.escape(split)}: {html.escape(model)}</h2>")
        parts.append(html_table(header, [[html.escape(cell) for cell in row] for row in rows]))
    return html_page("rlhf compare", "".join(parts))


def _make_figure(evaluations: Sequence[EvaluationResult], keys: Sequence[tuple[str, str]]) -> str:
    """Return an HTML image of win rate over KL: one panel per split, one colour per model, one point per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    splits = list(dict.fromkeys(split for split, _ in keys))
    figure, axes = pyplot.subplots(1, len(splits), figsize=(5 * len(splits), 3.6), squeeze=False, sharey=True)
    for axis, split in zip(axes.flat, splits, strict=True):
        for model in (m for s, m in keys if s == split):
            rows = [r for e in evaluations for r in e.rows if (r["split"], r["model"]) == (split, model) and "win" in r]
            if rows:
                heights = [100 * r["win"] for r in rows]
                low = [100 * (r["win"] - r["low"]) for r in rows]
                high = [100 * (r["high"] - r["win"]) for r in rows]
                axis.errorbar(
                    [r["kl"] for r in rows], heights, yerr=[low, high], fmt="o", ms=4, lw=0.8, alpha=0.8, label=model
                )
        axis.axhline(50, color="grey", lw=0.8, ls=":")
        axis.set_title(split, fontsize=10)
        axis.set_xlabel("KL to the reference (nats)")
        axis.set_ylabel(f"win rate against {evaluations[0].reference} (%)")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return embed_figure(figure, "win rate over KL, one point per run")
