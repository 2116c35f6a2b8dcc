"""Weak labels by the command line: the file, the messages, and the training of the next stages on the file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from rlhf import functional as F
from rlhf.errors import ConfigError
from rlhf.labeling.weak_labels import label_accuracy
from tests.stages import setup
from tests.stages.setup import info, metrics
from tests.tolerances import assert_quoted

Row = dict[str, Any]
SKILLS = {"ann": 0.95, "bob": 0.75, "cat": 0.6, "dan": 0.6}
CLASSES = ("ham", "spam", "eggs")


def vote(record: Row) -> str | None:
    """Vote for the reply that is not a refusal."""
    refuses = [record[side].startswith("no ") for side in ("chosen", "rejected")]
    return None if refuses[0] == refuses[1] else "rejected" if refuses[0] else "chosen"


def first(record: Row) -> str:
    """Vote for the first reply, whatever it contains."""
    return "chosen"


def pairs(count: int = 120, seed: int = 0) -> list[Row]:
    """Return pairs of a good and a bad reply in random order, with votes of four annotators; the third has no votes."""
    rng, rows = random.Random(seed), list[Row]()
    for i in range(count):
        thing = f"{rng.choice(setup.THINGS)} {i}"
        truth = rng.choice(["chosen", "rejected"])
        good, bad = setup.GOOD.format(thing), setup.BAD.format(thing)
        sides = {"chosen": good, "rejected": bad} if truth == "chosen" else {"chosen": bad, "rejected": good}
        other = "rejected" if truth == "chosen" else "chosen"
        votes = {n: truth if rng.random() < skill else other for n, skill in SKILLS.items() if rng.random() < 0.8}
        rows.append({"prompt": f"what is a {thing}?", **sides, "votes": {} if i == 2 else votes, "truth": truth})
    return rows


def texts(count: int = 90) -> list[Row]:
    """Return texts of three classes with the votes of three annotators, some of which are missing."""
    rng, rows = random.Random(1), list[Row]()
    for i in range(count):
        truth = rng.choice(CLASSES)
        votes = {f"a{k}": truth if rng.random() < 0.8 else rng.choice(CLASSES) for k in range(3) if rng.random() < 0.9}
        rows.append({"text": f"{truth} is what number {i} is about", "who": votes, "gold": truth})
    return rows


def config(folder: Path, rows: list[Row], **settings: Any) -> str:
    """Write records and a configuration file of `rlhf data weak`, and return the path of the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"output": str(folder / "out.jsonl"), "data": {"path": str(path)}, "sources": [{"votes": "votes"}]}
    return setup.write(folder, "weak", values | settings)


def label(call_cli: Any, folder: Path, rows: list[Row], *options: str, **settings: Any) -> tuple[str, list[Row]]:
    """Run `rlhf data weak` and return what it prints, and the rows that it writes."""
    code, out, err = call_cli(["data", "weak", config(folder, rows, **settings), *options])
    assert code == 0, err
    return out, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def matrix(rows: list[Row]) -> torch.Tensor:
    index = {"chosen": 0, "rejected": 1, None: -1}
    return torch.tensor([[index[row["votes"].get(name)] for name in SKILLS] for row in rows])


# Pairs


@pytest.mark.parametrize("kind", ["dawid-skene", "majority"])
def test_the_label_of_a_pair_is_the_label_models_probability(kind: str, call_cli: Any, tmp_path: Path) -> None:
    rows = pairs()
    options = (f"label_model.kind={kind}", "label_model.smoothing=2")
    out, written = label(call_cli, tmp_path, rows, *options, gold="truth")
    votes = matrix(rows)
    if kind == "majority":
        expected = F.majority_vote(votes, classes=2)
    else:
        expected = F.dawid_skene(votes, classes=2, symmetric=True, smoothing=2.0).posterior
    kept = [row for i, row in enumerate(rows) if i != 2]
    assert [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in kept] == [
        {k: v for k, v in row.items() if k != "preference"} for row in written
    ]
    assert_quoted(
        torch.tensor([row["preference"] for row in written]).double(), expected[votes.max(1).values >= 0, 0].tolist()
    )
    assert "119 records in" in out
    assert "1 without a vote dropped (no_votes=keep keeps them)" in out


def test_a_record_without_a_vote_may_be_kept_at_one_half(call_cli: Any, tmp_path: Path) -> None:
    for kind in ("dawid-skene", "majority"):
        out, written = label(call_cli, tmp_path / kind, pairs(), "no_votes=keep", f"label_model.kind={kind}")
        assert len(written) == 120
        assert written[2]["preference"] == 0.5
        assert "1 without a vote kept" in out


def test_the_table_shows_each_source_and_gold_beside_the_estimates(call_cli: Any, tmp_path: Path) -> None:
    rows = pairs()
    out, written = label(call_cli, tmp_path, rows, "--json", gold="truth")
    lines = [json.loads(line) for line in out.splitlines()]
    (table,) = (line["rows"] for line in lines if "table" in line)
    votes, gold = matrix(rows), torch.tensor([row["truth"] == "rejected" for row in rows]).long()
    posterior = F.dawid_skene(votes, classes=2, symmetric=True).posterior
    columns = {
        **dict(zip(("coverage", "overlap", "conflict"), F.vote_shares(votes), strict=True)),
        "estimated accuracy": F.vote_accuracy(votes, posterior),
        "true accuracy": F.vote_accuracy(votes, one_hot(gold, 2)),
    }
    assert [row["source"] for row in table] == list(SKILLS)
    for name, values in columns.items():
        assert [row[name] for row in table] == [f"{100 * float(x):.1f} %" for x in values]
    voted = votes.max(1).values >= 0
    shares = [label_accuracy(q[voted], gold[voted]) for q in (posterior, F.majority_vote(votes, classes=2))]
    assert any(
        line.get("text") == f"labels right: {100 * shares[0]:.1f} % (majority of the votes: {100 * shares[1]:.1f} %), "
        "of 119 records with votes and gold"
        for line in lines
    )
    assert all(set(row) == {"prompt", "chosen", "rejected", "preference"} for row in written)


def test_gold_affects_only_the_table(call_cli: Any, tmp_path: Path) -> None:
    rows = pairs()
    lies = [row | {"truth": "chosen" if row["truth"] == "rejected" else "rejected"} for row in rows]
    half = [*rows[:60], *(row | {"truth": None} for row in rows[60:])]
    found = [
        label(call_cli, tmp_path / name, some, gold="truth")[1]
        for name, some in (("truth", rows), ("lies", lies), ("half", half))
    ]
    without = label(call_cli, tmp_path / "none", [{k: v for k, v in row.items() if k != "truth"} for row in rows])
    assert found[0] == found[1] == found[2] == without[1]
    assert "true accuracy" not in without[0]


def test_the_order_within_a_pair_does_not_matter(call_cli: Any, tmp_path: Path) -> None:
    rows, mirror = pairs(), {"chosen": "rejected", "rejected": "chosen"}
    turned = [
        row
        | {
            "chosen": row["rejected"],
            "rejected": row["chosen"],
            "votes": {name: mirror[v] for name, v in row["votes"].items()},
        }
        if i % 3
        else row
        for i, row in enumerate(rows)
    ]
    one, other = (label(call_cli, tmp_path / n, some)[1] for n, some in (("a", rows), ("b", turned)))
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        same = a["prompt"] == b["prompt"] and a["chosen"] == b["chosen"]
        assert abs(a["preference"] - (b["preference"] if same else 1 - b["preference"])) < 2e-6, i


def test_functions_and_rules_vote_beside_annotators(call_cli: Any, tmp_path: Path) -> None:
    sources = [
        {"votes": "votes"},
        {"function": "tests.labeling.test_weak_labels:vote", "name": "no-refusal"},
        {"function": "tests.labeling.test_weak_labels:first"},
        {"name": "thanks", "keywords": ["thank you"]},
        {"name": "long", "longer_by": 3},
        {"name": "short", "words_under": 2, "vote": "without"},
    ]
    out, written = label(call_cli, tmp_path, pairs(), sources=sources, gold="truth")
    assert len(written) == 120  # the rules vote on the record without annotators' votes
    assert (
        "'tests.labeling.test_weak_labels:first' changes its vote when the two responses are swapped, on 120 records"
        in out
    )
    assert all((row["preference"] > 0.5) == (not row["chosen"].startswith("no ")) for row in written)
    lines = {words[1]: words for line in out.splitlines() if len(words := line.replace("%", "").split()) > 8}
    assert lines["no-refusal"][-2] == "100.0"
    assert lines["tests.labeling.test_weak_labels:first"][3] == "0.0"
    assert lines["tests.labeling.test_weak_labels:first"][-2] == "–"


def test_the_reward_model_trains_on_the_file(full: Any, call_cli: Any, run_stage: Any, tmp_path: Path) -> None:
    """The file is used unchanged, with soft labels below one half."""
    _, written = label(call_cli, tmp_path, pairs())
    assert any(row["preference"] < 0.3 for row in written)
    data = full.configs["reward"]["data"] | {"train": [{"path": str(tmp_path / "out.jsonl")}]}
    optim = setup.optim(epochs=4, learning_rate=1e-2)
    out = run_stage(
        "reward", full.configs["reward"] | {"output_dir": str(tmp_path / "run"), "data": data, "optim": optim}
    )
    assert "out.jsonl: format preference" in out
    assert info(tmp_path / "run")["summary"]["pairs"] + 24 >= 110
    assert info(tmp_path / "run")["summary"]["eval_accuracy"] > 0.7  # good replies look all alike
    assert metrics(tmp_path / "run")[-1]["step"] > 0


# Classes


@pytest.mark.parametrize("accuracy", ["auto", "one", "per-class"])
def test_class_labels_are_the_label_models_probabilities(accuracy: str, call_cli: Any, tmp_path: Path) -> None:
    rows = texts()
    options = {"kind": "labelled", "sources": [{"votes": "who"}], "gold": "gold"}
    out, written = label(call_cli, tmp_path, rows, f"label_model.accuracy={accuracy}", **options)
    names = sorted(CLASSES)
    index = {name: i for i, name in enumerate(names)} | {None: -1}
    votes = torch.tensor([[index[row["who"].get(f"a{k}")] for k in range(3)] for row in rows])
    expected = F.dawid_skene(votes, classes=3, symmetric=accuracy == "one", max_iterations=2000).posterior
    kept = (votes >= 0).any(dim=1)
    assert [list(row["label"]) for row in written] == [names] * int(kept.sum())
    found = torch.tensor([list(row["label"].values()) for row in written]).double()
    assert_quoted(found, expected[kept].tolist())
    assert all(set(row) == {"text", "label"} for row in written)
    assert ("one accuracy per source" if accuracy == "one" else "a confusion matrix per source") in out


def test_sources_that_vote_for_one_class_only_have_one_accuracy(call_cli: Any, tmp_path: Path) -> None:
    rules = [
        {"name": f"{name}-{k}", "regex": word, "vote": name}
        for name in CLASSES
        for k, word in enumerate((rf"\b{name}\b", f"^{name}"))
    ]
    options: Row = {"kind": "labelled", "sources": [{"votes": "who"}, *rules]}
    out, written = label(call_cli, tmp_path, texts(), **options)
    assert "one accuracy per source" in out
    assert all(row["label"][row["text"].split()[0]] > 0.5 for row in written)
    path = config(tmp_path / "again", texts(), **options, label_model={"accuracy": "per-class"})
    code, _, err = call_cli(["data", "weak", path])
    assert code == 2
    assert (
        "'ham-0' votes for one class only, so its confusion matrix cannot be estimated; set label_model.accuracy=one"
        in err
    )
    assert not (tmp_path / "again" / "out.jsonl").exists()


def test_the_classifier_trains_on_the_file(full: Any, call_cli: Any, run_stage: Any, tmp_path: Path) -> None:
    _, written = label(call_cli, tmp_path, texts(), kind="labelled", sources=[{"votes": "who"}])
    assert any(0.01 < p < 0.99 for row in written for p in row["label"].values())
    data = full.configs["classify"]["data"] | {"train": [{"path": str(tmp_path / "out.jsonl")}]}
    run_stage("classify", full.configs["classify"] | {"output_dir": str(tmp_path / "run"), "data": data})
    summary = info(tmp_path / "run")["summary"]
    assert summary["labels"] == sorted(CLASSES)
    assert summary["records"] + 22 >= len(written) - 1
    assert 0 <= summary["eval_label_accuracy"] <= 1


# What is said or refused


def test_a_source_estimated_below_chance_is_noted(call_cli: Any, tmp_path: Path) -> None:
    rows, mirror = pairs(), {"chosen": "rejected", "rejected": "chosen"}
    for row in rows:
        row["votes"]["liar"] = mirror[row["truth"]]
    out, _ = label(call_cli, tmp_path, rows)
    assert "estimated worse than chance: liar. Either this is true, or most other sources make the same" in out


def test_a_stop_before_convergence_is_reported(call_cli: Any, tmp_path: Path) -> None:
    out, _ = label(call_cli, tmp_path, pairs(), "label_model.max_iterations=2")
    assert "STOPPED BEFORE IT CONVERGED (label_model.max_iterations) after 2 iterations" in out
    out, _ = label(call_cli, tmp_path / "b", pairs(), "label_model.tolerance=0.01")
    assert "converged after" in out


def test_two_sources_are_too_few_for_accuracies_and_enough_for_a_majority(call_cli: Any, tmp_path: Path) -> None:
    rows = [row | {"votes": {k: v for k, v in row["votes"].items() if k in ("ann", "bob")}} for row in pairs()]
    code, _, err = call_cli(["data", "weak", config(tmp_path, rows)])
    assert code == 2
    assert "accuracies can be estimated only if at least 3 sources vote on common records" in err
    assert "(found: 2 sources that vote, at most 2 on one record)" in err
    assert not (tmp_path / "out.jsonl").exists()
    label(call_cli, tmp_path, rows, "label_model.kind=majority")


@pytest.mark.parametrize(
    ("labels", "gold", "share"),
    [([[0.6, 0.4]], [0], 1.0), ([[0.5, 0.5]], [0], 0.5), ([[0.5, 0.5]], [1], 0.5), ([[0.4, 0.2, 0.4]], [1], 0.0)],
)
def test_a_tie_is_half_right(labels: Any, gold: Any, share: float) -> None:
    assert label_accuracy(torch.tensor(labels), torch.tensor(gold)) == share


def test_a_function_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    from rlhf.config.schema import WeakLabelConfig
    from rlhf.console import Console
    from rlhf.labeling.weak_labels import make_weak_labels

    values = {"output": str(tmp_path / "o"), "data": {"path": "d"}, "sources": [{"function": "no.module:f"}]}
    with pytest.raises(ConfigError, match="sources: the labelling function does not import"):
        make_weak_labels(WeakLabelConfig.model_validate(values), Console(quiet=True))
