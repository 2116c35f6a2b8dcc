"""The committed files: reproducible, free of leaks between training and evaluation, and free of the judge's secrets."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.demo.asks import held_out, normalise
from rlhf.demo.generate import SIZES, generate, prompt_key
from rlhf.demo.gold import utility

DATA = Path(__file__).resolve().parents[2] / "data" / "demo"
TRAINING = ("dialogues", "sft", "sft_valid", "preferences", "preferences_valid", "prompts")
EVALUATION = ("eval/heldout", "eval/ood")


@functools.cache
def rows(name: str) -> list[dict[str, Any]]:
    plain, packed = DATA / f"{name}.jsonl", DATA / f"{name}.jsonl.gz"
    content = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    return [json.loads(line) for line in content.decode().splitlines()]


def messages_of(row: dict[str, Any]) -> list[dict[str, str]]:
    return row.get("messages") or row["prompt"]


def asked(training: Iterable[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Every user turn, and every full prompt (each prefix that ends with a user turn), normalised."""
    turns: set[str] = set()
    prompts: set[str] = set()
    for row in training:
        messages = messages_of(row)
        for index, message in enumerate(messages):
            if message["role"] == "user":
                turns.add(normalise(message["content"]))
                prompts.add(prompt_key(messages[: index + 1]))
    return turns, prompts


def leaks(training: tuple[set[str], set[str]], evaluation: Iterable[dict[str, Any]]) -> list[str]:
    """Evaluation prompts whose last question or whose whole text occurs in what training `asked`."""
    turns, prompts = training
    return [
        prompt_key(row["prompt"])
        for row in evaluation
        if normalise(row["prompt"][-1]["content"]) in turns or prompt_key(row["prompt"]) in prompts
    ]


@pytest.fixture(scope="module")
def training() -> list[dict[str, Any]]:
    return [row for name in TRAINING for row in rows(name)]


@pytest.fixture(scope="module")
def trained(training: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """What training `asked`."""
    return asked(training)


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def contents(folder: Path) -> dict[str, bytes]:
    """The generated files; the source model that is shipped beside them is made by `rlhf pretrain`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "model"]
    # Packed files are compared unpacked: another zlib may pack the same bytes otherwise.
    return {
        str(path.relative_to(folder)): gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in files
    }


@pytest.mark.slow
def test_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    generate(tmp_path)
    made, committed = contents(tmp_path), contents(DATA)
    assert sorted(made) == sorted(committed)
    assert [name for name in made if made[name] != committed[name]] == []


def test_row_counts_and_total_size() -> None:
    assert {name: len(rows(name)) for name in SIZES} == SIZES
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.parent.name != "model" and path.is_file())
    assert size < 12e6


def test_no_evaluation_prompt_occurs_in_training(subtests: pytest.Subtests, trained: tuple[set[str], set[str]]) -> None:
    for name in EVALUATION:
        with subtests.test(name=name):
            assert leaks(trained, rows(name)) == []


def test_the_leak_check_finds_a_planted_question(trained: tuple[set[str], set[str]]) -> None:
    row = rows("eval/heldout")[7]
    question = row["prompt"][-1]["content"]
    planted = {"prompt": [{"role": "user", "content": question.upper() + " "}]}
    (turns, prompts), (more_turns, more_prompts) = trained, asked([planted])
    assert leaks((turns | more_turns, prompts | more_prompts), [row]) == [prompt_key(row["prompt"])]


def test_held_out_prompts_are_the_set_aside_ones_and_training_has_none(training: list[dict[str, Any]]) -> None:
    assert all(held_out(row["prompt"][-1]["content"]) for row in rows("eval/heldout"))
    assert not any(
        held_out(message["content"]) for row in training for message in messages_of(row) if message["role"] == "user"
    )


def test_evaluation_prompts_are_distinct(subtests: pytest.Subtests) -> None:
    for name in EVALUATION:
        with subtests.test(name=name):
            prompts = [prompt_key(row["prompt"]) for row in rows(name)]
            assert len(set(prompts)) == len(prompts)


def test_comparison_splits_share_no_prompt() -> None:
    files = ("preferences", "preferences_valid", "eval/preferences_test")
    splits = [{prompt_key(row["prompt"]) for row in rows(name)} for name in files]
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]


def test_training_files_hold_no_task_and_no_gold(training: list[dict[str, Any]]) -> None:
    allowed = {"messages", "prompt", "chosen", "rejected", "preference", "role", "content"}
    assert set(keys(training)) == allowed
    assert {row["preference"] for row in training if "preference" in row} == {0.5, 1.0}
    assert set(keys(rows("corpus") + rows("corpus_valid"))) == {"text"}


def test_roles_alternate_and_end_where_they_should(training: list[dict[str, Any]]) -> None:
    for row in training:
        roles = [message["role"] for message in messages_of(row)]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert roles[-1] == ("assistant" if "messages" in row else "user")
        assert all(message["content"].strip() == message["content"] != "" for message in messages_of(row))


def test_prompts_are_short() -> None:
    for name in ("prompts", "preferences", "preferences_valid", "eval/preferences_test", *EVALUATION):
        sizes = sorted(sum(len(message["content"].split()) for message in row["prompt"]) for row in rows(name))
        assert sizes[-1] <= 60
        assert sizes[len(sizes) // 2] < 25


def test_replies_of_a_pair_differ() -> None:
    assert all(row["chosen"] != row["rejected"] for row in rows("preferences"))


def test_many_conversations_have_history() -> None:
    long = [row for row in rows("sft") if len(row["messages"]) > 2]
    assert 0.25 < len(long) / SIZES["sft"] < 0.40


def test_corpus_validation_is_unseen() -> None:
    seen = {row["text"] for row in rows("corpus")}
    assert not [row for row in rows("corpus_valid") if row["text"] in seen]


def test_test_pairs_have_a_computable_ceiling() -> None:
    agree = decided = 0
    for row in rows("eval/preferences_test"):
        gap = utility(row["chosen"], row["task"]) - utility(row["rejected"], row["task"])
        if row["preference"] == 1.0 and gap:
            decided += 1
            agree += gap > 0
    assert 0.74 < agree / decided < 0.82
