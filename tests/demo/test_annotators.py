"""The data of the experiment with weak labels: annotators as good as they are said to be, no order, no secret."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.sections import Source
from rlhf.data.sources import load_records
from rlhf.demo import annotators
from rlhf.demo.annotators import COVERAGE, SKILLS, generate_annotators
from rlhf.demo.chats import Chats
from rlhf.demo.generate import DemoGenerator, prompt_key
from rlhf.demo.gold import utility

Row = dict[str, Any]
FILES = ("pairs", "truth", "truth_valid")


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", autouse=True)
def shipped() -> Iterator[set[str]]:
    """The prompts of the shipped pairs. They are drawn once for this file: every run of the generator draws them, and
    the draw of seed 0 at full size is always the same."""
    full, real = DemoGenerator(0, 1.0), DemoGenerator._drawn
    drawn = full._drawn()

    def drawn_once(self: DemoGenerator) -> Any:
        return drawn if (self.seed, self.sizes) == (full.seed, full.sizes) else real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoGenerator, "_drawn", drawn_once)
        yield {prompt_key(prompt) for pairs in drawn.values() for prompt, *_ in pairs}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """name -> rows."""
    folder = tmp_path_factory.mktemp("annotators")
    counts = generate_annotators(folder, seed=0)
    found = {name: rows(folder / f"{name}.jsonl") for name in FILES}
    assert counts == {f"{name}.jsonl": len(some) for name, some in found.items()}
    return found


def test_sizes_and_columns(made: dict[str, list[Row]]) -> None:
    assert {name: len(some) for name, some in made.items()} == {"pairs": 1500, "truth": 1500, "truth_valid": 1000}
    columns = {"prompt", "chosen", "rejected"}
    assert all(set(row) == columns | {"votes", "truth"} for row in made["pairs"])
    for name in ("truth", "truth_valid"):
        assert all(set(row) == columns | {"preference"} and row["preference"] in (0.0, 1.0) for row in made[name])


def test_the_truth_file_labels_the_same_pairs(made: dict[str, list[Row]]) -> None:
    for voted, labelled in zip(made["pairs"], made["truth"], strict=True):
        assert all(voted[name] == labelled[name] for name in ("prompt", "chosen", "rejected"))
        assert (voted["truth"] == "chosen") == (labelled["preference"] == 1.0)


def test_annotators_are_as_good_and_as_busy_as_they_are_said_to_be(made: dict[str, list[Row]]) -> None:
    """Four standard errors."""
    for name, skill in SKILLS.items():
        votes = [(row["votes"][name], row["truth"]) for row in made["pairs"] if name in row["votes"]]
        assert abs(len(votes) / 1500 - COVERAGE) < 4 * (COVERAGE * (1 - COVERAGE) / 1500) ** 0.5
        right = sum(vote == truth for vote, truth in votes) / len(votes)
        assert abs(right - skill) < 4 * (skill * (1 - skill) / len(votes)) ** 0.5
    assert {vote for row in made["pairs"] for vote in row["votes"].values()} == {"chosen", "rejected"}


def test_the_place_in_a_pair_says_nothing(subtests: pytest.Subtests, made: dict[str, list[Row]]) -> None:
    for name in ["truth", "truth_valid"]:
        with subtests.test(name=name):
            first = sum(row["preference"] for row in made[name]) / len(made[name])
            assert abs(first - 0.5) < 4 * 0.5 / len(made[name]) ** 0.5


def test_no_prompt_of_training_is_held_out_or_shipped(made: dict[str, list[Row]], shipped: set[str]) -> None:
    training, held_out = ({prompt_key(row["prompt"]) for row in made[name]} for name in ("pairs", "truth_valid"))
    assert not training & held_out
    assert not shipped & (training | held_out)


def test_the_better_reply_is_the_one_of_higher_utility(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {}
    real = Chats.prompt

    def remembered(self: Chats, **options: Any) -> Any:
        prompt, ask = real(self, **options)
        known[prompt_key(prompt)] = ask.task
        return prompt, ask

    monkeypatch.setattr(Chats, "prompt", remembered)
    generate_annotators(tmp_path, seed=5, scale=0.05)
    for row in rows(tmp_path / "truth.jsonl"):
        task = known[prompt_key(row["prompt"])]
        assert (utility(row["chosen"], task) > utility(row["rejected"], task)) == (row["preference"] == 1.0)
        assert utility(row["chosen"], task) != utility(row["rejected"], task)


def test_the_stages_read_the_files(made: dict[str, list[Row]], write_jsonl: Any, tmp_path: Path) -> None:
    for name in ("truth", "truth_valid"):
        path = str(write_jsonl(tmp_path / f"{name}.jsonl", made[name]))
        loaded = load_records("comparison", [Source(path=path)], seed=0, on_bad_row="error", deduplicate=False)
        assert len(loaded) == len(made[name])


def test_the_command_writes_them_where_the_example_looks(
    call_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotators, "PAIRS", {"pairs": 40, "pairs_valid": 10})
    code, out, _ = call_cli(["data", "annotators"], cwd=tmp_path)
    assert code == 0
    assert "data/annotators/pairs.jsonl: 40 records" in out
    example = Path("configs/demo/experiments/weak.yaml").resolve()
    code, out, err = call_cli(["data", "weak", str(example), "output=labels.jsonl"], cwd=tmp_path)
    assert code == 0, err
    assert len(rows(tmp_path / "labels.jsonl")) >= 39
