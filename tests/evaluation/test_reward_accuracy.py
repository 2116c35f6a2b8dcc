"""Accuracy of a reward model on held-out pairs: ties are left out, and the ceiling is the judge's own accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.schema import EvaluateConfig
from rlhf.errors import DataError
from rlhf.evaluation import reward_accuracy as module
from rlhf.evaluation.reward_accuracy import reward_accuracy
from tests.evaluation.test_model_comparison import config, inputs


class WordRenderer:
    """Encodes a response as its number of words, and every prompt as the id 0."""

    pad_id = 0

    def prompt(self, messages: Any) -> list[int]:
        """Return the ids of a prompt."""
        return [0]

    def response(self, text: str) -> list[int]:
        """Return the ids of a response."""
        return [len(text.split())]


def write_pairs(path: Path, pairs: list[tuple[str, str, float]]) -> EvaluateConfig:
    """Write comparisons to a file, and return a configuration that evaluates on them."""
    rows = [
        {"prompt": f"say {i}", "chosen": chosen, "rejected": rejected, "preference": preference, "task": {"id": i}}
        for i, (chosen, rejected, preference) in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return config(preferences=[{"path": str(path)}])


@pytest.fixture(autouse=True)
def longer_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score a sequence by the number of words of its response."""
    monkeypatch.setattr(module, "score_sequences", lambda model, rows, pad_id: [float(row[-1]) for row in rows])


def test_accuracy_counts_decided_pairs_and_equal_scores_as_half(tmp_path: Path) -> None:
    pairs = [("a b c", "a b", 1.0), ("a", "a b", 1.0), ("a b", "c d", 1.0), ("a b c", "a", 1.0), ("x", "y z", 0.5)]
    given = inputs(1, reward_model=torch.nn.Linear(1, 1), renderer=WordRenderer(), judge=None)
    row = reward_accuracy(write_pairs(tmp_path / "pairs.jsonl", pairs), given)
    assert (row["pairs"], row["accuracy"], row["longer_wins"]) == (4, 0.625, 0.625)
    assert "ceiling" not in row


def test_the_ceiling_is_the_accuracy_of_the_judge(tmp_path: Path) -> None:
    pairs = [("good", "bad", 1.0), ("good", "bad", 1.0), ("bad", "good", 1.0), ("bad", "bad ones", 1.0)]
    given = inputs(
        1,
        reward_model=torch.nn.Linear(1, 1),
        renderer=WordRenderer(),
        judge=lambda prompt, response, record, finished: float(response == "good"),
    )
    assert reward_accuracy(write_pairs(tmp_path / "pairs.jsonl", pairs), given)["ceiling"] == (1 + 1 + 0 + 0.5) / 4


def test_only_ties_are_refused(tmp_path: Path) -> None:
    given = inputs(1, reward_model=torch.nn.Linear(1, 1), renderer=WordRenderer())
    with pytest.raises(DataError, match="every pair is a tie"):
        reward_accuracy(write_pairs(tmp_path / "pairs.jsonl", [("a", "b", 0.5)]), given)
