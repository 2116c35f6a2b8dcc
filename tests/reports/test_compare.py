"""`rlhf compare` shows every run, and the lowest and highest values as well as the mean."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.console import Console
from rlhf.errors import ConfigError
from rlhf.reports.compare import compare_runs

WINS = (0.75, 0.625, 0.875)


def row(model: str, win: float, split: str = "held-out", **more: Any) -> dict[str, Any]:
    """Return one row of an evaluation. KL and utility depend on the win rate, so mixed-up columns would be noticed."""
    given = {"split": split, "model": model, "win": win, "low": win - 0.05, "high": win + 0.05}
    return given | {"kl": 4 * win, "utility": win - 1, "perplexity": None} | more


def evaluation(folder: Path, rows: list[dict[str, Any]], reference: str = "sft") -> Path:
    """Create a run directory with results."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"reference": reference, "models": rows}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        evaluation(
            tmp_path / f"seed{i}" / "4-evaluate",
            [row("sft", 0.5), row("ppo", win, measures={"rude": win / 10}), row("ppo", win - 0.1, "ood")],
        )
        for i, win in enumerate(WINS)
    ]


def printed(capsys: pytest.CaptureFixture[str], runs: list[Path], output: Path | None = None) -> dict[str, list[str]]:
    """Return title -> rows of the tables that `compare_runs` prints."""
    compare_runs(runs, Console(as_json=True), output=output)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line["table"]: [list(row.values()) for row in line["rows"]] for line in lines if "table" in line}


def test_every_run_has_a_row_and_the_range_is_shown(
    capsys: pytest.CaptureFixture[str], runs: list[Path], tmp_path: Path
) -> None:
    tables = printed(capsys, runs)
    assert list(tables) == [
        "held-out: ppo against sft",
        "ood: ppo against sft",
    ]  # the reference is not compared with itself
    rows = tables["held-out: ppo against sft"]
    assert [line[0] for line in rows] == [*map(str, runs), "mean", "deviation", "lowest, highest"]
    assert [line[1] for line in rows[:3]] == ["75.0 % [70.0, 80.0]", "62.5 % [57.5, 67.5]", "87.5 % [82.5, 92.5]"]
    assert [line[2] for line in rows[:3]] == ["3.00", "2.50", "3.50"]
    assert rows[3][1:] == ["75.0 %", "3.000", "-0.250", "0.075"]
    assert rows[4][1] == "12.5 %"  # the sample standard deviation: divided by runs - 1
    assert rows[5][1:] == ["62.5 %, 87.5 %", "2.500, 3.500", "-0.375, -0.125", "0.062, 0.087"]
    assert tables["ood: ppo against sft"][3][1] == "65.0 %"


def test_a_pipeline_folder_is_read_as_its_evaluation(capsys: pytest.CaptureFixture[str], runs: list[Path]) -> None:
    pipelines = [run.parent for run in runs]
    ours, theirs = printed(capsys, pipelines), printed(capsys, runs)
    assert [line[1:] for t in ours.values() for line in t] == [line[1:] for t in theirs.values() for line in t]


def test_only_what_all_runs_measured_is_compared(
    capsys: pytest.CaptureFixture[str], runs: list[Path], tmp_path: Path
) -> None:
    other = evaluation(tmp_path / "other", [row("sft", 0.5), row("ppo", 0.5), row("more", 0.9)])
    tables = printed(capsys, [*runs, other])
    assert list(tables) == ["held-out: ppo against sft"]
    assert len(tables["held-out: ppo against sft"][0]) == 4  # the measure of the others is missing in the fourth


def test_the_page_loads_no_other_file_and_shows_every_run(
    capsys: pytest.CaptureFixture[str], runs: list[Path], tmp_path: Path
) -> None:
    printed(capsys, runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(str(run) in page for run in runs)
    assert re.findall(r"src='([a-z]+:[a-z]+/[a-z]+)", page) == ["data:image/png"]
    assert "http" not in page


@pytest.mark.parametrize(
    ("rows", "reference", "expected_text"),
    [([row("ppo", 0.7)], "base", "different models"), ([row("other", 0.7)], "sft", "in common")],
)
def test_what_cannot_be_compared_is_refused(
    rows: list[dict[str, Any]], reference: str, expected_text: str, runs: list[Path], tmp_path: Path
) -> None:
    other = evaluation(tmp_path / "other", rows, reference)
    with pytest.raises(ConfigError, match=expected_text):
        compare_runs([runs[0], other], Console(), output=None)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished evaluation"):
        compare_runs([tmp_path], Console(), output=None)
