"""The comparison of models: win rates, means and best-of-n, on responses whose numbers are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf.config.schema import EvaluateConfig
from rlhf.console import Console
from rlhf.data.records import Prompt
from rlhf.evaluation import model_comparison
from rlhf.evaluation.answers import GeneratedResponse
from rlhf.evaluation.model_comparison import (
    EvaluationInputs,
    ModelAnswers,
    answer_with_every_model,
    comparison_table,
    judge_responses,
    side_by_side,
)
from rlhf.evaluation.stats import best_of_n_kl


def config(**changes: Any) -> EvaluateConfig:
    """Two models, `sft` and `ppo`, of which `sft` is the reference."""
    values = {
        "output_dir": "out",
        "models": {"sft": {"path": "sft"}, "ppo": {"path": "ppo"}},
        "prompts": {"held": {"path": "prompts.jsonl"}},
        "bootstrap": 200,
    }
    return EvaluateConfig.model_validate(values | changes)


def inputs(count: int, **changes: Any) -> EvaluationInputs:
    """Prompts "0", "1", ... of one split; the judge's utility is the number in the response."""
    records = [Prompt([{"role": "user", "content": str(i)}], "here", record={"number": i}) for i in range(count)]
    values = {
        "records": {"held": records},
        "ids": {"held": [[i] for i in range(count)]},
        "text": [],
        "judge": lambda prompt, response, record, finished: float(response),
        "measures": {},
        "reward_model": None,
        "renderer": None,
        "device": torch.device("cpu"),
    }
    return EvaluationInputs(**(values | changes))


def responses(*texts: str, kl: float | None = 0.0) -> ModelAnswers:
    """Answers of a model: responses with these texts, two tokens each."""
    return ModelAnswers({"held": [GeneratedResponse(text, 2, True, kl, float(text)) for text in texts]}, 3.0)


def test_win_rates_compare_each_model_with_the_reference_prompt_by_prompt() -> None:
    answers = {"sft": responses("1", "5", "2", "2"), "ppo": responses("2", "4", "2", "9", kl=1.5)}
    sft, ppo = comparison_table(config(), inputs(4), answers)
    assert (sft["win"], sft["utility"], sft["kl"]) == (0.5, 2.5, 0.0)  # every prompt is a tie with itself
    assert ppo["win"] == (1 + 0 + 0.5 + 1) / 4
    assert (ppo["utility"], ppo["kl"], ppo["length"], ppo["ended"], ppo["perplexity"]) == (4.25, 1.5, 2.0, 1.0, 3.0)
    assert ppo["low"] <= ppo["win"] <= ppo["high"]


def test_without_a_judge_there_is_no_win_rate() -> None:
    table = comparison_table(config(), inputs(1, judge=None), {"sft": responses("1"), "ppo": responses("2")})
    assert all("win" not in row and "utility" not in row for row in table)


def test_measures_are_means_over_the_responses() -> None:
    own = {"even": lambda prompt, response, record, finished: float(int(response) % 2 == 0)}
    table = comparison_table(config(), inputs(4, measures=own), {"sft": responses("1", "2", "4", "5")})
    assert table[0]["measures"] == {"even": 0.5}


def test_the_judge_receives_the_prompts_own_record() -> None:
    seen: list[Any] = []

    def judge(prompt: Any, response: str, record: Any, finished: bool) -> float:
        seen.append((prompt[0]["content"], response, record["number"], finished))
        return 0.0

    judge_responses(judge, inputs(2).records["held"], responses("7", "8").responses["held"])
    assert seen == [("0", "7", 0, True), ("1", "8", 1, True)]


def test_best_of_n_keeps_the_response_with_the_highest_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: str, ids: list[list[int]], *_: Any, draw: int, numbers: Any, **__: Any) -> list[Any]:
        scores = [((draw * 7 + i) % 5) + (100 if model == "ppo" else 0) for i in numbers]
        return [GeneratedResponse(str(score), 1, True, None, float(score)) for score in scores]

    monkeypatch.setattr(model_comparison, "generate_responses", generate)
    given = inputs(3, reward_model=object(), renderer=object())
    answers = answer_with_every_model(config(best_of=2), given, lambda source: source.path, Console(quiet=True))
    assert list(answers) == ["sft", "ppo", "sft best-of-2"]
    draws = [[((draw * 7 + i) % 5) for draw in (1, 2)] for i in range(3)]
    assert [int(r.text) for r in answers["sft best-of-2"].responses["held"]] == [max(pair) for pair in draws]
    row = comparison_table(config(best_of=2), given, answers)[-1]
    assert row["kl"] == best_of_n_kl(2) == math.log(2) - 0.5
    assert row["score"] == sum(max(pair) for pair in draws) / 3


def test_side_by_side_prompts_are_spread_over_the_split() -> None:
    answers = {"sft": responses(*map(str, range(9)))}
    shown = side_by_side(config(show=3), inputs(9), answers)
    assert [item["replies"]["sft"] for item in shown] == ["0", "3", "6"]
    assert side_by_side(config(show=0), inputs(9), answers) == []
