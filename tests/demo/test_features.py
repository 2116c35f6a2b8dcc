"""The data of the experiment with fine-tuning: traits that the text shows, a task whose two sides do not overlap."""

from __future__ import annotations

import functools
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.sections import Source
from rlhf.data.sources import load_records
from rlhf.demo import features
from rlhf.demo.asks import Context
from rlhf.demo.chats import Chats
from rlhf.demo.features import FAMILIAR, FLAWS, NOVEL, REPLIES, TASK, TRAITS, generate_features, traits, verdict
from rlhf.demo.generate import prompt_key
from rlhf.demo.questions import FAMILIES, Questions
from rlhf.demo.replies import Manner, Writer
from rlhf.demo.world import world

Rows = dict[str, list[dict[str, Any]]]
SMALL = 0.1


def drawn(count: int) -> list[tuple[dict[str, Any], str]]:
    """Tasks of every family, each with a plain right reply."""
    rng = random.Random("features")
    questions, writer = Questions(rng), Writer(rng)
    tasks = [questions.ask(Context(), family).task for family in FAMILIES for _ in range(count)]
    return [(task, writer.reply(task, Manner())) for task in tasks]


def added_traits(reply: str, task: dict[str, Any], text: str) -> set[str]:
    """Traits of a text, but for its length, that the reply does not have."""
    return set(traits(text, task)) - set(traits(reply, task)) - {"long"}


def test_a_reply_has_the_traits_that_are_added_to_it(subtests: pytest.Subtests) -> None:
    for task, reply in drawn(5):
        with subtests.test(task=task):
            added = functools.partial(added_traits, reply, task)
            assert not set(traits(reply, task)) & {"kind", "evasive", *FLAWS}
            assert added(f"{reply} I hope that helps.") == {"kind"}
            assert added(f"{reply} Now go away.") == {"rude"}
            assert added(f"{reply} Time goes by so fast.") == {"rambles"}
            assert added(f"{reply} {reply}") == {"repeats"} | ({"rambles"} & added(f"{reply} {reply}"))
            assert added(reply.rstrip(".!?")) == {"unfinished"}
            assert added("That is hard to say.") == {"evasive"}
            assert ("long" in traits(f"{reply} {reply} Now go away.", task)) is (2 * len(reply.split()) + 3 > 12)
            assert ("personal" in traits(reply, task)) is (task["type"] in ("talk", "recall", "unknown"))
            assert verdict(f"{reply} I hope that helps.", task) == "clean" == verdict("That is hard to say.", task)
            assert verdict(f"{reply} Now go away.", task) == "flawed" == verdict(reply.rstrip(".!?"), task)


def test_what_is_trained_on_and_what_is_tested_beyond_it_have_nothing_in_common() -> None:
    """Stock sentences and entities are two halves of which neither is small; no question is on both sides."""
    assert not set(FAMILIAR) & set(NOVEL)
    assert min(len(FAMILIAR), len(NOVEL)) >= 15
    narrow = list(itertools.islice(features._narrow(Chats(random.Random(1))), 300))
    wide = list(itertools.islice(features._wide(Chats(random.Random(1))), 300))
    for prompt, task, reply in narrow:
        assert len(prompt) == 1
        assert task["type"] == "attribute"
        assert features.familiar(task["about"])
        assert world().entities[task["about"]].kind == "animal"
        assert len(reply.split()) <= 20
        assert not any(text in reply for text in NOVEL)
    for _, task, reply in wide:
        assert task["type"] != "attribute" or world().entities[task["about"]].kind != "animal"
        assert not any(text in reply for text in FAMILIAR)
    assert {task["type"] for _, task, _ in wide} >= {"yesno", "compare", "list", "reverse", "recall", "unknown", "talk"}
    assert sum(len(reply.split()) for *_, reply in wide) > 1.1 * sum(len(reply.split()) for *_, reply in narrow)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """name -> rows, at a tenth of the size."""
    folder = tmp_path_factory.mktemp("features")
    counts = generate_features(folder, seed=0, scale=SMALL)
    found = {path.stem: rows(path) for path in folder.glob("*.jsonl")}
    assert counts == {f"{name}.jsonl": len(some) for name, some in found.items()}
    return found


def test_sizes_follow_the_scale(made: Rows) -> None:
    assert {n: len(some) for n, some in made.items()} == {
        n: max(10, round(size * SMALL)) for n, size in (REPLIES | TASK).items()
    }


def test_rows_hold_text_and_labels_only(made: Rows) -> None:
    for name, some in made.items():
        for row in some:
            assert set(row) == {"prompt", "completion", "label"}
            if name in REPLIES:
                assert row["label"] == [trait for trait in TRAITS if trait in row["label"]]
            else:
                assert row["label"] in ("clean", "flawed")
    for name in REPLIES:
        shares = [sum(trait in row["label"] for row in made[name]) / len(made[name]) for trait in TRAITS]
        assert min(shares) > 0.03
        assert max(shares) < 0.7


def test_half_of_a_task_is_clean(subtests: pytest.Subtests, made: Rows) -> None:
    for name in TASK:
        with subtests.test(name=name):
            clean = sum(row["label"] == "clean" for row in made[name])
            assert abs(2 * clean - len(made[name])) <= 1


def exchange(row: dict[str, Any]) -> str:
    return prompt_key([*row["prompt"], {"role": "assistant", "content": row["completion"]}])


def shared(made: Rows) -> int:
    """Exchanges that stand twice, in one file or in two."""
    met = [exchange(row) for some in made.values() for row in some]
    return len(met) - len(set(met))


def test_no_exchange_stands_twice(made: Rows) -> None:
    assert shared(made) == 0
    assert shared(made | {"test": [*made["test"], made["train_1"][3]]}) == 1


def test_the_stage_reads_the_files(made: Rows, write_jsonl: Any, tmp_path: Path) -> None:
    for name in ("traits", "train_1", "ood"):
        path = write_jsonl(tmp_path / f"{name}.jsonl", made[name])
        source = Source(path=str(path), format="prompt-completion")
        read = load_records("labelled", [source], seed=0, on_bad_row="error", deduplicate=False).records
        read = sorted(read, key=lambda r: int(r.where.split()[-1]))
        labels = [row["label"] if isinstance(row["label"], list) else [row["label"]] for row in made[name]]
        assert [record.labels for record in read] == [dict.fromkeys(label, 1.0) for label in labels]


def test_the_command_writes_them_where_the_experiment_looks(
    call_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "REPLIES", dict.fromkeys(REPLIES, 12))
    monkeypatch.setattr(features, "TASK", dict.fromkeys(TASK, 10))
    code, out, _ = call_cli(["data", "features"], cwd=tmp_path)
    assert code == 0
    assert "data/features/traits.jsonl: 12 records" in out
    assert len(out.splitlines()) == len(REPLIES | TASK) == len(contents(tmp_path / "data" / "features"))
