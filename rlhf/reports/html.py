"""report.html: one self-contained page with tables, training curves and the responses of all models side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.runs.metrics import METRICS, read_jsonl

CURVES_BY_STAGE = {
    "pretrain": ("loss", "eval_loss"),
    "sft": ("loss", "eval_loss"),
    "reward": ("loss", "eval_accuracy"),
    "ppo": ("score", "kl", "kl_coef", "response_length", "finished", "entropy", "explained_variance", "clip_fraction"),
}
PAGE_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem;color:#1c1c1c}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;margin:.5rem 0}
td,th{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child,
td:nth-child(2),th:nth-child(2){text-align:left}.talk td{text-align:left;vertical-align:top}
.prompt{color:#555;white-space:pre-line}img{max-width:100%}.note{color:#666;font-size:.9rem}
"""


def write_report(path: Path, results: Mapping[str, Any], runs: Mapping[str, Path]) -> None:
    """Write the report.

    Args:
        path: HTML file to write.
        results: results of the evaluate stage.
        runs: name -> run directory, for the training curves.
    """
    parts = ["<h1>From a pretrained model to an aligned one</h1>", "<h2>Models on the same prompts</h2>"]
    parts.append(_models_table(results["models"], results["reference"]))
    parts.append(
        "<p class='note'>Win rate: share of prompts on which the judge prefers the model's response to the "
        "reference's, ties half, with a 95 % bootstrap interval over prompts. KL: mean log-ratio to the reference, "
        "summed over the response (for best-of-n its upper bound). Perplexity: on held-out plain text.</p>"
    )
    if "reward_model" in results:
        parts += ["<h2>Reward model</h2>", _reward_table(results["reward_model"])]
    for name, folder in runs.items():
        image = _curves_image(name, folder)
        if image:
            parts += [f"<h2>Training: {html.escape(name)}</h2>", image]
    parts += ["<h2>Answers side by side</h2>", _side_by_side(results["side_by_side"])]
    path.write_text(html_page("rlhf report", "\n".join(parts)), encoding="utf-8")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return an HTML table.

    Args:
        header: plain text of the header cells.
        rows: HTML of the other cells.
        kind: CSS class of the table.
    """
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table class='{kind}'><tr>{head}</tr>{body}</table>"


def _models_table(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    cells, measures = [], list(rows[0].get("measures", {}))
    for r in rows:
        win = f"{100 * r['win']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]" if "win" in r else "–"
        cells.append(
            [
                html.escape(r["split"]),
                html.escape(r["model"]),
                win,
                _format_number(r.get("utility")),
                _format_number(r["kl"]),
                _format_number(r["length"], 1),
                f"{100 * r['ended']:.0f} %",
                _format_number(r.get("perplexity")),
                *(_format_number(r["measures"][m], 3) for m in measures),
            ]
        )
    win = f"win rate vs {reference} [95 %]"
    header = ["split", "model", win, "utility", "KL (nats)", "tokens", "ended", "perplexity"]
    return html_table([*header, *map(html.escape, measures)], cells)


def _format_number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _reward_table(row: Mapping[str, Any]) -> str:
    names = {
        "accuracy": "reward model",
        "ceiling": "ceiling: the judge itself on the same noisy labels",
        "tfidf": "tf-idf Bradley-Terry",
        "longer_wins": "longer wins",
    }
    cells = []
    for key, name in names.items():
        if key in row:
            interval = f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" if key == "accuracy" else ""
            cells.append([name, f"{100 * row[key]:.1f} %{interval}"])
    return html_table(["", f"accuracy on {row['pairs']} held-out pairs"], cells)


def _curves_image(name: str, folder: Path) -> str:
    lines = list(read_jsonl(folder / "metrics.jsonl"))
    wanted = next((names for stage, names in CURVES_BY_STAGE.items() if stage in folder.name or stage == name), ())
    series = {m: [(line["step"], line[m]) for line in lines if m in line] for m in wanted}
    series = {m: points for m, points in series.items() if len(points) > 1}
    if not series:
        return ""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(series))
    rows = -(-len(series) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.2 * columns, 2.3 * rows), squeeze=False)
    for axis in axes.flat[len(series) :]:
        axis.axis("off")
    for axis, (metric, points) in zip(axes.flat, series.items(), strict=False):
        axis.plot(*zip(*points, strict=True), lw=1.3)
        axis.set_title(f"{metric} ({METRICS[metric].unit})", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    return embed_figure(figure, f"training curves of {name}")


def embed_figure(figure: Any, alt: str) -> str:
    """Return a matplotlib figure as an HTML image that contains its data, and close the figure."""
    from matplotlib import pyplot

    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>"


def html_page(title: str, body: str) -> str:
    """Return a complete HTML page that loads no other file."""
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{PAGE_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def _side_by_side(items: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for item in items:
        prompt = "\n".join(f"{m['role']}: {m['content']}" for m in item["prompt"])
        replies = "".join(f"<p><b>{html.escape(n)}</b>: {html.escape(t)}</p>" for n, t in item["replies"].items())
        rows.append([html.escape(item["split"]), f"<div class='prompt'>{html.escape(prompt)}</div>", replies])
    return html_table(["split", "prompt", "replies"], rows, "talk")
