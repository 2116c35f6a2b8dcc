"""Several evaluations side by side, every one shown: one run is one seed, and the worst of them counts."""

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
    """What one evaluate run measured."""

    name: str
    reference: str
    rows: tuple[ResultRow, ...]


def compare_runs(folders: Sequence[Path], console: Console, *, output: Path | None) -> None:
    """Print a table for every split, and write a page with a picture of them if `output` is given.

    Raises: ConfigError if a folder holds no finished evaluation, they have another reference, or nothing in common.
    """
    found = [_read(folder) for folder in folders]
    references = sorted({evaluation.reference for evaluation in found})
    if len(references) > 1:
        raise ConfigError(
            "win rates against different models cannot be compared",
            found=f"references {', '.join(references)}",
            where="command line",
            do="give evaluations with one reference",
        )
    tables = summarize(found)
    for (split, model), (header, rows) in tables.items():
        console.table(f"{split}: {model} against {references[0]}", header, rows)
    if output is not None:
        output.write_text(_page(found, tables), encoding="utf-8")
        console.note(f"all of them in one picture: {output}")


def _read(folder: Path) -> EvaluationResult:
    """The evaluation in a folder, which may also be the pipeline's."""
    inside = sorted(folder.glob("*-evaluate/results.json"))
    path = folder / "results.json" if (folder / "results.json").is_file() or not inside else inside[-1]
    if not path.is_file():
        raise ConfigError(
            "no finished evaluation here",
            where=str(folder),
            do="give the run directory of an evaluate stage, or of a pipeline that has one",
        )
    results = read_json(path)
    return EvaluationResult(str(folder), results["reference"], tuple(results["models"]))


def summarize(found: Sequence[EvaluationResult]) -> dict[tuple[str, str], tuple[list[str], list[list[str]]]]:
    """(split, model) -> header and rows: every run, then their mean, deviation and worst to best.

    Raises: ConfigError if no model but the reference is in all of them.
    """
    keys = [(row["split"], row["model"]) for row in found[0].rows if row["model"] != found[0].reference]
    common = [k for k in keys if all(any((r["split"], r["model"]) == k for r in e.rows) for e in found)]
    if not common:
        raise ConfigError("the evaluations have no split and model in common", where="command line")
    tables = {}
    for split, model in common:
        rows = [next(r for r in e.rows if (r["split"], r["model"]) == (split, model)) for e in found]
        columns = [name for name in COMPARED_NUMBERS if all(row.get(name) is not None for row in rows)]
        measures = [name for name in rows[0].get("measures", {}) if all(name in r.get("measures", {}) for r in rows)]
        series = [[row[name] for row in rows] for name in columns]
        series += [[row["measures"][name] for row in rows] for name in measures]
        cells = [[e.name, *(_cell(name, row) for name in columns)] for e, row in zip(found, rows, strict=True)]
        for line, row in zip(cells, rows, strict=True):
            line += [f"{row['measures'][name]:.3f}" for name in measures]
        percent = [name == "win" for name in columns] + [False] * len(measures)
        for words, function in (("mean", _mean), ("deviation", _deviation), ("lowest, highest", _ends)):
            cells.append([words, *(function(s, p) for s, p in zip(series, percent, strict=True))])
        tables[split, model] = (["run", *(COMPARED_NUMBERS[name] for name in columns), *measures], cells)
    return tables


def _cell(name: str, row: ResultRow) -> str:
    if name == "win":
        return f"{100 * row['win']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    return f"{row[name]:.2f}"


def _text(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.3f}"


def _mean(values: Sequence[float], percent: bool) -> str:
    return _text(statistics.fmean(values), percent)


def _deviation(values: Sequence[float], percent: bool) -> str:
    return _text(statistics.stdev(values), percent) if len(values) > 1 else "-"


def _ends(values: Sequence[float], percent: bool) -> str:
    return f"{_text(min(values), percent)}, {_text(max(values), percent)}"


def _page(
    found: Sequence[EvaluationResult], tables: Mapping[tuple[str, str], tuple[list[str], list[list[str]]]]
) -> str:
    parts = [f"<h1>{len(found)} evaluations</h1>", _picture(found, list(tables))]
    parts.append(
        "<p class='note'>One point is one run, with the 95 % bootstrap interval over its prompts; the dotted line is "
        "the reference itself.</p>"
    )
    for (split, model), (header, rows) in tables.items():
        parts.append(f"<h2>{html.escape(split)}: {html.escape(model)}</h2>")
        parts.append(html_table(header, [[html.escape(cell) for cell in row] for row in rows]))
    return html_page("rlhf compare", "".join(parts))


def _picture(found: Sequence[EvaluationResult], keys: Sequence[tuple[str, str]]) -> str:
    """Win rate over KL, one panel a split, one colour a model, one point a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    splits = list(dict.fromkeys(split for split, _ in keys))
    figure, axes = pyplot.subplots(1, len(splits), figsize=(5 * len(splits), 3.6), squeeze=False, sharey=True)
    for axis, split in zip(axes.flat, splits, strict=True):
        for model in (m for s, m in keys if s == split):
            rows = [r for e in found for r in e.rows if (r["split"], r["model"]) == (split, model) and "win" in r]
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
        axis.set_ylabel(f"win rate against {found[0].reference} (%)")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return embed_figure(figure, "win rate over KL, one point a run")
