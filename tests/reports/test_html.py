"""report.html loads no other file, and shows the text of models without executing it."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf.reports.html import write_report
from rlhf.runs.metrics import MetricsWriter

EVIL = "<script>alert(1)</script><img src=x onerror='a()'> & \"quotes\""
ROW = {"model": "sft", "split": "held-out", "kl": 0.0, "length": 9.0, "ended": 1.0, "perplexity": 4.0, "utility": 1.0}
RESULTS = {
    "reference": "sft",
    "models": [
        ROW,
        ROW | {"model": "ppo" + EVIL, "kl": 2.5, "win": 0.8, "low": 0.7, "high": 0.9, "perplexity": None},
    ],
    "reward_model": {"pairs": 100, "accuracy": 0.8, "low": 0.7, "high": 0.9, "ceiling": 0.9, "longer_wins": 0.5},
    "side_by_side": [
        {
            "split": "ood" + EVIL,
            "prompt": [{"role": "user", "content": "ask " + EVIL}],
            "replies": {"sft" + EVIL: "said " + EVIL},
        },
    ],
}


class Page(HTMLParser):
    """Parser that collects tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def external_references(page: Page) -> Iterator[str]:
    """Yield everything in a page that would load a file or run code."""
    for tag, attributes in page.tags:
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            yield tag
        for name, value in attributes.items():
            if name.startswith("on") or (name in ("src", "href", "srcset") and not (value or "").startswith("data:")):
                yield f"{tag} {name}={value}"


@pytest.fixture
def page(tmp_path: Path) -> Page:
    """Write a report with all sections and one training run, and parse it."""
    run = tmp_path / "3-ppo"
    run.mkdir()
    writer = MetricsWriter(run / "metrics.jsonl")
    for step in range(1, 4):
        writer.write(step, {"score": step, "kl": step / 2})
    writer.close()
    write_report(tmp_path / "report.html", RESULTS, {"ppo" + EVIL: run})
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_report_loads_no_other_file(page: Page, tmp_path: Path) -> None:
    assert list(external_references(page)) == []
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert [tag for tag, _ in page.tags].count("img") == 1  # the training curves, inside the file


@pytest.mark.parametrize(
    "planted", ["<script src='x.js'></script>", "<img src='x.png'>", "<a href='http://x'>", "<p onclick='f()'>"]
)
def test_external_references_are_detected(planted: str) -> None:
    assert len(list(external_references(Page(f"<html>{planted}</html>")))) >= 1


def test_model_text_is_shown_literally(page: Page) -> None:
    assert page.words.count(EVIL) >= 6  # model, split, prompt, name, reply, heading


def test_the_report_contains_the_numbers(page: Page) -> None:
    for words in ("80.0 % [70.0, 90.0]", "2.50", "100 held-out pairs", "longer wins"):
        assert words in page.words


def test_a_run_without_curves_is_left_out(tmp_path: Path) -> None:
    MetricsWriter(tmp_path / "metrics.jsonl").close()
    write_report(tmp_path / "report.html", RESULTS, {"ppo": tmp_path})
    assert "img" not in [tag for tag, _ in Page((tmp_path / "report.html").read_text(encoding="utf-8")).tags]
