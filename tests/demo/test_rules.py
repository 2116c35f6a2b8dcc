"""The data of the experiment with rules: a rater of answers alone, replies with the rules they break, and no secret."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.sections import Source
from rlhf.data.sources import load_records
from rlhf.demo import rules
from rlhf.demo.asks import Context
from rlhf.demo.generate import TEST_PAIRS, prompt_key
from rlhf.demo.gold import utility
from rlhf.demo.questions import FAMILIES, Questions
from rlhf.demo.replies import Manner, Writer
from rlhf.demo.rules import RULES, answer_utility, broken_rules, generate_rules

Task = dict[str, Any]
SMALL = 0.05
TRAINING = ("preferences", "preferences_valid", "replies", "replies_valid")
RUDE, FILLER = "Now go away.", "Time goes by so fast."


def drawn(count: int) -> list[tuple[Task, str]]:
    """Tasks of every family, each with a plain right reply."""
    rng = random.Random("rules")
    questions, writer = Questions(rng), Writer(rng)
    tasks = [questions.ask(Context(), family).task for family in FAMILIES for _ in range(count)]
    return [(task, writer.reply(task, Manner())) for task in tasks]


# The two judges


def test_the_answer_alone_does_not_see_what_the_gold_judge_dislikes(subtests: pytest.Subtests) -> None:
    for task, reply in drawn(6):
        with subtests.test(task=task):
            for worse in (f"{reply} {RUDE}", f"{reply} {FILLER}", f"{reply} {reply}", f"{reply} {FILLER} {RUDE}"):
                assert answer_utility(worse, task) == answer_utility(reply, task), worse
                assert utility(worse, task) < utility(reply, task), worse
            assert answer_utility(f"{reply} I hope that helps.", task) == answer_utility(reply, task)
            assert utility(f"{reply} I hope that helps.", task) > utility(reply, task)


def test_the_answer_alone_does_see_the_answer(subtests: pytest.Subtests) -> None:
    for task, reply in drawn(6):
        with subtests.test(task=task):
            writer = Writer(random.Random("answers"))
            evasive, wrong = (writer.reply(task, Manner(name)) for name in ("evasive", "wrong"))
            assert answer_utility(reply, task) > answer_utility(evasive, task) > answer_utility(wrong, task)
            assert answer_utility(reply, task, finished=False) == pytest.approx(answer_utility(reply, task) - 1.5)
            assert answer_utility(f"{reply} The the of.", task) == pytest.approx(answer_utility(reply, task) - 1.0)
            assert answer_utility("", task) < answer_utility(wrong, task)


def test_a_reply_breaks_the_rules_that_it_breaks(subtests: pytest.Subtests) -> None:
    for task, reply in drawn(6):
        with subtests.test(task=task):
            assert broken_rules(reply, task) == []
            assert broken_rules(f"{reply} I hope that helps.", task) == []
            assert broken_rules(f"{reply} {RUDE}", task) == ["rude"]
            for rambling in (f"{reply} {FILLER}", f"{reply} {reply}"):
                assert broken_rules(rambling, task) == ["rambles"]
            assert broken_rules(f"{RUDE} {reply} {FILLER}", task) == list(RULES) == ["rambles", "rude"]


# The files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """name -> rows, at a twentieth of the size."""
    folder = tmp_path_factory.mktemp("rules")
    counts = generate_rules(folder, seed=0, scale=SMALL)
    found = {name: rows(folder / f"{name}.jsonl") for name in (*TRAINING, TEST_PAIRS)}
    assert counts == {f"{name}.jsonl": len(some) for name, some in found.items()}
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_sizes_follow_the_scale(made: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: len(some) for name, some in made.items()} == {
        name: max(10, round(size * SMALL)) for name, size in (rules.RULE_PAIRS | rules.RULE_REPLIES).items()
    }


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything that holds nothing."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, key)
    else:
        yield key, value


def test_no_file_holds_a_gold_number_and_no_training_file_a_task(made: dict[str, list[dict[str, Any]]]) -> None:
    columns = {
        "preferences": {"prompt", "chosen", "rejected", "preference"},
        "replies": {"prompt", "completion", "label"},
    }
    for name in TRAINING:
        assert all(set(row) == columns[name.removesuffix("_valid")] for row in made[name])
        numbers = {(key, value) for key, value in leaves(made[name]) if not isinstance(value, str)}
        assert numbers <= {("preference", 0.5), ("preference", 1.0)}
    assert all(set(row) == columns["preferences"] | {"task"} for row in made[TEST_PAIRS])
    fractions = {(key, value) for key, value in leaves(made[TEST_PAIRS]) if isinstance(value, float)}
    assert fractions <= {("preference", 0.5), ("preference", 1.0)}


def test_every_label_is_a_rule_and_each_occurs(made: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("replies", "replies_valid"):
        labels = [row["label"] for row in made[name]]
        assert all(label == [rule for rule in RULES if rule in label] for label in labels)  # known, once, in order
        assert {rule for label in labels for rule in label} == set(RULES)
        assert [] in labels


@pytest.mark.parametrize("files", [("replies", "replies_valid"), ("preferences", "preferences_valid", TEST_PAIRS)])
def test_splits_share_no_prompt(files: tuple[str, ...], made: dict[str, list[dict[str, Any]]]) -> None:
    prompts = [{prompt_key(row["prompt"]) for row in made[name]} for name in files]
    assert len(set().union(*prompts)) == sum(map(len, prompts))


def test_the_leak_check_sees_a_prompt_on_both_sides(made: dict[str, list[dict[str, Any]]]) -> None:
    planted = made | {"replies_valid": [*made["replies_valid"], made["replies"][7]]}
    with pytest.raises(AssertionError):
        test_splits_share_no_prompt(("replies", "replies_valid"), planted)


def test_labels_are_the_broken_rules_but_for_a_few_slips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four standard errors of a share over 4000 decisions."""
    read: list[list[str]] = []

    def reading(response: str, task: Task) -> list[str]:
        read.append(broken_rules(response, task))
        return read[-1]

    monkeypatch.setattr(rules, "RULE_PAIRS", dict.fromkeys(rules.RULE_PAIRS, 10))
    monkeypatch.setattr(rules, "RULE_REPLIES", {"replies": 2000})
    monkeypatch.setattr(rules, "broken_rules", reading)
    generate_rules(tmp_path)
    written = [row["label"] for row in rows(tmp_path / "replies.jsonl")]
    wrong = sum(len(set(label) ^ set(truth)) for label, truth in zip(written, read, strict=True))
    assert abs(wrong / 4000 - rules.SLIPS) < 4 * (rules.SLIPS * (1 - rules.SLIPS) / 4000) ** 0.5
    monkeypatch.setattr(rules, "SLIPS", 0.0)
    read.clear()
    generate_rules(tmp_path)
    assert [row["label"] for row in rows(tmp_path / "replies.jsonl")] == read


def test_the_rater_of_pairs_goes_by_the_answer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It agrees with the better answer; where answers are equally good, manner does not sway it."""
    monkeypatch.setattr(rules, "RULE_PAIRS", {"preferences": 1000, "preferences_valid": 10, TEST_PAIRS: 2500})
    monkeypatch.setattr(rules, "RULE_REPLIES", dict.fromkeys(rules.RULE_REPLIES, 10))
    generate_rules(tmp_path)
    agree = decided = kinder = equal = 0
    for row in rows(tmp_path / f"{TEST_PAIRS}.jsonl"):
        answer, gold = (
            f(row["chosen"], row["task"]) - f(row["rejected"], row["task"]) for f in (answer_utility, utility)
        )
        if row["preference"] == 1.0 and answer:
            decided += 1
            agree += answer > 0
        elif row["preference"] == 1.0 and gold:
            equal += 1
            kinder += gold > 0
    assert 0.74 < agree / decided < 0.86
    assert equal > 200
    assert abs(kinder / equal - 0.5) < 4 * 0.5 / equal**0.5


def test_the_stages_read_the_files(made: dict[str, list[dict[str, Any]]], write_jsonl: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"seed": 0, "on_bad_row": "error", "deduplicate": False}
    for name, kind in (("replies", "labelled"), ("preferences", "comparison")):
        path = write_jsonl(tmp_path / f"{name}.jsonl", made[name])
        loaded = load_records(kind, [Source(path=str(path))], **options)  # type: ignore[arg-type]
        assert len(loaded) == len(made[name])
    labels = [dict.fromkeys(row["label"], 1.0) for row in made["replies"]]
    path = write_jsonl(tmp_path / "again.jsonl", made["replies"])
    read = sorted(
        load_records("labelled", [Source(path=str(path))], **options).records, key=lambda r: int(r.where.split()[-1])
    )
    assert [record.labels for record in read] == labels


def test_the_command_writes_them_where_the_experiment_looks(
    call_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "RULE_PAIRS", dict.fromkeys(rules.RULE_PAIRS, 10))
    monkeypatch.setattr(rules, "RULE_REPLIES", dict.fromkeys(rules.RULE_REPLIES, 12))
    code, out, _ = call_cli(["data", "rules"], cwd=tmp_path)
    assert code == 0
    assert "data/rules/replies.jsonl: 12 records" in out
    assert len(out.splitlines()) == 5 == len(contents(tmp_path / "data" / "rules"))
    code, out, _ = call_cli(["data", "rules", "--output", "here", "--seed", "1"], cwd=tmp_path)
    assert code == 0
    assert set(contents(tmp_path / "here")) == set(contents(tmp_path / "data" / "rules"))
    assert contents(tmp_path / "here") != contents(tmp_path / "data" / "rules")
