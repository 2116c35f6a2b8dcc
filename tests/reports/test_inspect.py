"""`rlhf inspect` shows the tokens of a rollout with their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.console import Console
from rlhf.errors import ConfigError
from rlhf.reports.inspect import TOKEN_COLUMNS, inspect_rollout, paint_tokens


def token(text: str, **numbers: float) -> dict[str, Any]:
    return {"token": text, **dict.fromkeys(TOKEN_COLUMNS, 0.0), **numbers}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Create a run directory with two steps of two samples."""
    lines = [
        {
            "step": step,
            "prompt": "<|user|>hi<|assistant|>",
            "response": "yes no",
            "score": 1.5,
            "kl": 0.25,
            "finished": row == 0,
            "tokens": [token("yes", advantage=2.0, kl=0.5), token(" no", advantage=-1.0, kl=-0.25)],
        }
        for step in (1, 10)
        for row in (0, 1)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_tokens_values_and_sums_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_rollout(run, Console(), step=1, row=1, paint="kl")
    out = capsys.readouterr().out
    for expected_text in (
        "step 1",
        "row 1: score 1.500, KL 0.250 nats, no end token",
        "' no'",
        "-1.000",
        "0.250",
        "<|user|>hi",
    ):
        assert expected_text in out
    assert "row 0" not in out


def test_the_last_step_is_shown_if_none_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_rollout(run, Console(), step=None, row=None, paint="advantage")
    out = capsys.readouterr().out
    assert "step 10" in out
    assert "row 0" in out
    assert "row 1" in out


def test_paint_is_green_above_and_red_below_0_by_size() -> None:
    text = paint_tokens([token("a", advantage=2.0), token("b", advantage=-1.0), token("c")], "advantage")
    assert text.plain == "  abc"
    assert [str(span.style) for span in text.spans] == [
        "white on rgb(0,200,0)",
        "white on rgb(120,0,0)",
        "white on rgb(0,40,0)",
    ]


@pytest.mark.parametrize(
    ("options", "expected_text"),
    [
        ({"step": 7}, "steps written: 1, 10"),
        ({"row": 2}, "rows 0 to 1"),
        ({"paint": "beauty"}, "one of logprob, kl"),
    ],
)
def test_errors_list_the_steps_rows_and_columns_that_exist(
    run: Path, options: dict[str, Any], expected_text: str
) -> None:
    with pytest.raises(ConfigError, match=expected_text):
        inspect_rollout(run, Console(), **{"step": 1, "row": None, "paint": "kl"} | options)


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run directory of a ppo stage"):
        inspect_rollout(tmp_path, Console(), step=None, row=None, paint="kl")
