"""`rlhf rate`: comparisons of a model's own replies to new prompts, labelled by the demo's simulated rater."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.demo.chats import Chats
from rlhf.demo.generate import DemoGenerator, prompt_key
from rlhf.demo.gold import utility
from rlhf.demo.replies import Manner

pytestmark = pytest.mark.slow
MODEL = "data/demo/model"


def rated(call_cli: Any, output: Path, *options: str) -> list[dict[str, Any]]:
    code, _, err = call_cli(["rate", MODEL, output, "--rows", "24", "--max-new-tokens", "24", *options])
    assert code == 0, err
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_rate_writes_comparisons_that_repeat_with_their_seed(call_cli: Any, tmp_path: Path) -> None:
    first, again = (rated(call_cli, tmp_path / f"{i}.jsonl") for i in range(2))
    other = rated(call_cli, tmp_path / "other.jsonl", "--seed", "2")
    assert first == again
    assert 12 < len(first) <= 24
    assert not {prompt_key(row["prompt"]) for row in first} & {prompt_key(row["prompt"]) for row in other}
    assert all(set(row) == {"prompt", "chosen", "rejected", "preference"} for row in first)
    code, _, err = call_cli(["rate", MODEL, tmp_path / "0.jsonl", "--rows", "24"])
    assert code == 2
    assert "exists" in err


def test_equal_and_blank_replies_make_no_pair_and_no_prompt_is_a_shipped_one() -> None:
    maker = DemoGenerator(0, 0.02)
    rows = maker.rated(
        40, "test", lambda prompts: [["yes", "no"]] * (len(prompts) - 3) + [["a", "a "], ["", "b"], ["c", "\n"]]
    )
    assert len(rows) == 37
    shipped = {prompt_key(p) for pairs in maker._drawn().values() for p, *_ in pairs}
    assert not shipped & {prompt_key(row["prompt"]) for row in rows}


def test_the_better_reply_is_usually_chosen() -> None:
    """One reply of each pair is correct and polite, the other is rude and does not answer."""
    maker = DemoGenerator(0, 0.02)
    chats = Chats(maker._rng("writer"))
    known: dict[str, dict[str, Any]] = {}
    real = Chats.prompt

    def remembered(self: Chats, **options: Any) -> Any:
        prompt, ask = real(self, **options)
        known[prompt_key(prompt)] = ask.task
        return prompt, ask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chats, "prompt", remembered)
        rows = maker.rated(
            300,
            "test",
            lambda prompts: [
                [chats.writer.reply(known[prompt_key(p)], Manner("right", polite=1)), "Do not waste my time."]
                for p in prompts
            ],
        )
    gaps = [
        utility(row["chosen"], known[prompt_key(row["prompt"])])
        - utility(row["rejected"], known[prompt_key(row["prompt"])])
        for row in rows
        if row["preference"] == 1.0
    ]
    assert sum(gap > 0 for gap in gaps) / len(gaps) > 0.8
