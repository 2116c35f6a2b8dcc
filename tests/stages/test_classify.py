"""Tests of the classify stage: its files, its reported metrics, and the classifier as a reward of PPO."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.data.render import Renderer
from rlhf.rollout.rewards import ModelReward
from tests import oracles
from tests.stages import setup
from tests.stages.setup import info, metrics
from tests.tolerances import assert_close

pytestmark = pytest.mark.slow
LABELS = ["short", "kind", "polite"]  # in no alphabetical order: the configuration's order counts


@dataclass(frozen=True)
class Case:
    """Trained classifier with its configuration."""

    run: Path
    labels: list[str]
    multi_label: bool
    adapters: bool
    training: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    chain: Any

    @property
    def folder(self) -> Path:
        """Folder of the model."""
        return self.run / "model"

    def targets(self, rows: list[dict[str, Any]]) -> Tensor:
        """Return the targets of some rows, [B, N]."""
        return torch.tensor([[float(name in row["label"]) for name in self.labels] for row in rows])


def replies(things: list[str], *, multi_label: bool) -> list[dict[str, Any]]:
    """Return kind and short replies; with multi_label a kind reply has two labels and every fourth reply none."""
    made = []
    for i, thing in enumerate(things):
        reply = setup.BAD if i % 3 else setup.GOOD
        label: Any = ["short"] if i % 3 else ["kind", "polite"] if multi_label else ["kind"]
        made.append({"prompt": f"what is a {thing} {i}?", "completion": reply.format(thing), "label": label})
    for row in made[3::4] if multi_label else ():
        row["label"] = []
    return made


@pytest.fixture(
    scope="module", params=["full-exclusive", "full-multi_label", "adapted-exclusive", "adapted-multi_label"]
)
def case(request: pytest.FixtureRequest, run_stage: Any, write_jsonl: Any, tmp_path_factory: Any) -> Case:
    """Trained on 24 records, held out 10 others; three labels if several may hold, else two and their names sorted."""
    adapters, multi_label = (word in request.param for word in ("adapted", "multi_label"))
    chain, top = request.getfixturevalue("adapted" if adapters else "full"), tmp_path_factory.mktemp(request.param)
    training = replies(setup.THINGS * 3, multi_label=multi_label)
    held_out = replies(["ant", "bee", "elk", "eel", "cod", "emu", "yak", "ape", "gnu", "ram"], multi_label=multi_label)
    paths = [str(write_jsonl(top / f"{name}.jsonl", rows)) for name, rows in (("a", training), ("b", held_out))]
    data = {"train": [{"path": paths[0]}], "validation": [{"path": paths[1]}], "max_length": 96}
    weights = {"short": 0.5, "kind": 2.0, "polite": 1.0} if multi_label else "balanced"
    config = chain.configs["classify"] | {
        "output_dir": str(top / "run"),
        "data": data,
        "multi_label": multi_label,
        "class_weights": weights,
        "labels": LABELS if multi_label else [],
    }
    run_stage("classify", config)
    labels = LABELS if multi_label else ["kind", "short"]
    return Case(top / "run", labels, multi_label, adapters, training, held_out, chain)


def plain_model(case: Case) -> Any:
    """Load the classifier with transformers and peft alone."""
    if case.adapters:
        from peft import AutoPeftModelForSequenceClassification

        options = {"num_labels": len(case.labels), "pad_token_id": 1}
        return AutoPeftModelForSequenceClassification.from_pretrained(str(case.folder), **options).eval()
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(str(case.folder)).eval()


def plain_logits(case: Case, rows: list[dict[str, Any]]) -> Tensor:
    """Return the logits of each row alone, tokenized with the tokenizer in the model's folder."""
    from transformers import AutoTokenizer

    renderer, model = Renderer(AutoTokenizer.from_pretrained(str(case.folder))), plain_model(case)
    found = []
    for row in rows:
        turns = [setup.user(row["prompt"]), {"role": "assistant", "content": row["completion"]}]
        with torch.no_grad():
            found.append(model(torch.tensor([renderer.conversation(turns).ids])).logits[0].float())
    return torch.stack(found)


# What it leaves


def test_its_model_names_its_labels_without_code_of_ours(case: Case) -> None:
    """Full weights name them in config.json and in the hand-over record, an adapter in the record alone."""
    record = json.loads((case.folder / "handover.json").read_text())
    assert (record["stage"], record["labels"], record["multi_label"]) == ("classify", case.labels, case.multi_label)
    assert record["head_dtype"] == "float32"
    assert record["score_mean"] is record["score_std"] is None
    if case.adapters:
        assert not (case.folder / "config.json").exists()
        return
    config = plain_model(case).config
    assert config.id2label == dict(enumerate(case.labels))
    assert config.label2id == {name: i for i, name in enumerate(case.labels)}
    kind = "multi_label_classification" if case.multi_label else "single_label_classification"
    assert (config.problem_type, config.num_labels) == (kind, len(case.labels))


def test_its_summary_is_what_the_saved_model_does_on_the_held_out_records(case: Case) -> None:
    logits, target = plain_logits(case, case.held_out), case.targets(case.held_out)
    share = case.targets(case.training).mean(dim=0)
    if case.multi_label:
        weight = torch.tensor([0.5, 2.0, 1.0])
        right, guessed = (logits > 0) == target.bool(), (share > 0.5) == target.bool()
    else:
        weight = oracles.balanced_weights(case.targets(case.training), False)
        right, guessed = logits.argmax(1) == target.argmax(1), share.argmax() == target.argmax(1)
    summary = info(case.run)["summary"]
    assert_close(torch.tensor(summary["eval_label_accuracy"]), float(right.float().mean()))
    assert_close(torch.tensor(summary["baseline_accuracy"]), float(guessed.float().mean()))
    loss = oracles.classification_loss(logits, target, case.multi_label, weight).mean()
    assert_close(torch.tensor(summary["eval_loss"]), float(loss))
    assert (summary["labels"], summary["multi_label"]) == (case.labels, case.multi_label)
    assert (summary["updates"], summary["records"]) == (6, 24)


def test_it_keeps_the_model_of_the_lowest_held_out_loss_and_says_each_labels_numbers(case: Case) -> None:
    lines = metrics(case.run)
    assert info(case.run)["summary"]["eval_loss"] == pytest.approx(
        min(x["eval_loss"] for x in lines if "eval_loss" in x)
    )
    assert lines[-1]["step"] == 6
    for name in ("label_accuracy", "macro_f1", "eval_label_accuracy", "eval_macro_f1"):
        assert all(0 <= line[name] <= 1 for line in lines if name in line)
        assert any(name in line for line in lines)


def test_another_classifier_starts_from_it_with_labels_of_its_own(
    case: Case, run_stage: Any, write_jsonl: Any, tmp_path: Path
) -> None:
    """Four labels after two or three; what was learnt before stays in the trunk when hardly anything is learnt now."""
    rows = [row | {"label": f"kind {i % 4}"} for i, row in enumerate(case.training)]
    config = case.chain.configs["classify"] | {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(case.run)},
        "optim": setup.optim(learning_rate=1e-12),
        "data": {"train": [{"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}], "max_length": 96},
    }
    run_stage("classify", config)
    after = Case(tmp_path / "run", [f"kind {i}" for i in range(4)], False, case.adapters, rows, [], case.chain)
    new, old = plain_model(after), plain_model(case)
    if not case.adapters:
        assert list(new.config.id2label.values()) == after.labels
    theirs = dict(old.named_parameters())
    for name, p in new.named_parameters():
        if "score" in name:
            assert p.shape[0] == 4
        else:
            assert_close(p, theirs[name].tolist(), name)


def test_what_it_prints(full: Any, run_stage: Any, tmp_path: Path) -> None:
    out = run_stage("classify", full.configs["classify"] | {"output_dir": str(tmp_path / "run")})
    summary = info(tmp_path / "run")["summary"]
    assert "Held-out records" in out
    rows = {
        words[1]: words for line in out.splitlines() if len(words := line.split()) > 5 and words[1] in ("kind", "short")
    }
    assert sum(int(words[3]) for words in rows.values()) == 6
    assert f"held-out accuracy {summary['eval_label_accuracy']:.3f}" in out
    assert f"(majority baseline: {summary['baseline_accuracy']:.3f})" in out
    assert (tmp_path / "run" / "model" / "handover.json").is_file()


def test_without_held_out_records_there_is_a_model_and_no_claim(full: Any, run_stage: Any, tmp_path: Path) -> None:
    config = full.configs["classify"]
    data = config["data"] | {"validation_fraction": 0.0}
    run_stage("classify", config | {"output_dir": str(tmp_path / "run"), "data": data, "class_weights": "equal"})
    assert not {name for name in info(tmp_path / "run")["summary"] if "eval" in name or "accuracy" in name}
    assert json.loads((tmp_path / "run" / "model" / "handover.json").read_text())["labels"] == ["kind", "short"]


@pytest.mark.parametrize(
    ("label", "found"), [(["kind", "short"], "kind 1, short 1"), ([], "none"), ({"kind": 0.5}, "kind 0.5")]
)
def test_labels_that_exclude_each_other_are_one_a_record(
    label: Any, found: str, full: Any, call_cli: Any, run_stage: Any, write_jsonl: Any, tmp_path: Path
) -> None:
    """The error comes before anything is written and names two remedies, which both work."""
    rows = replies(setup.THINGS * 3, multi_label=False)
    path = write_jsonl(tmp_path / "x.jsonl", [*rows, rows[0] | {"prompt": "one more", "label": label}])
    data = full.configs["classify"]["data"] | {"train": [{"path": str(path)}], "validation_fraction": 0.0}
    config = full.configs["classify"] | {"output_dir": str(tmp_path / "run"), "data": data}
    code, _, err = call_cli(["classify", setup.write(tmp_path, "classify", config)])
    assert code == 2
    assert (
        f"{path} row 25: a record must have exactly one label, or probabilities that sum to 1 (found: {found})" in err
    )
    assert "set multi_label=true" in err
    assert not (tmp_path / "run").exists()
    out = run_stage("classify", config, "data.on_bad_row=drop", f"output_dir={tmp_path / 'dropped'}")
    assert "1 of 25 records dropped (1 not one label)" in out
    assert info(tmp_path / "dropped")["summary"]["records"] == 24
    run_stage("classify", config, "multi_label=true", f"output_dir={tmp_path / 'multi_label'}")
    assert info(tmp_path / "multi_label")["summary"]["records"] == 25


# As a reward


def rewarded(case: Case, folder: Path, label: str) -> dict[str, Any]:
    """Run one step of PPO whose only reward is the probability of a label."""
    base = case.chain.configs["ppo"]
    return base | {
        "output_dir": str(folder),
        "reward_model": None,
        "ppo": base["ppo"] | {"steps": 1, "normalize_scores": "raw"},
        "rewards": [{"classifier": {"path": str(case.run)}, "label": label}],
    }


def test_its_label_probability_is_the_reward_of_ppo(
    case: Case, run_stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The scores in PPO equal those of the model loaded by transformers on the same tokens."""
    seen, original = [], ModelReward.__call__

    def call(self: ModelReward, part: Any, prompts: Any, **options: Any) -> Tensor:
        value = original(self, part, prompts, **options)
        seen.append((self.name, part, value))
        return value

    monkeypatch.setattr(ModelReward, "__call__", call)
    run_stage("ppo", rewarded(case, tmp_path / "run", "short"))
    model, column, by_slot = plain_model(case), case.labels.index("short"), dict[int, float]()
    for name, part, value in seen:
        assert name == f"P(short) of {case.run}"
        rows = [ids[mask][None] for ids, mask in zip(part.ids, part.mask, strict=True)]
        with torch.no_grad():
            logits = torch.cat([model(ids).logits.float() for ids in rows])
        readings = logits.softmax(1)[:, column], logits.sigmoid()[:, column]
        assert_close(value, readings[case.multi_label].tolist())
        assert (readings[not case.multi_label] - value).abs().max() > 0.01  # the other reading is another number
        by_slot |= dict(zip(part.index.tolist(), value.tolist(), strict=True))
    assert sorted(by_slot) == list(range(8))
    score = metrics(tmp_path / "run")[0]["score"]
    assert_close(torch.tensor(score), sum(by_slot.values()) / 8)


def test_a_label_that_it_does_not_have_is_refused_with_those_it_has(case: Case, call_cli: Any, tmp_path: Path) -> None:
    for wrong in ("kinds", "LABEL_0"):
        path = setup.write(tmp_path, "ppo", rewarded(case, tmp_path / "run", wrong))
        code, _, err = call_cli(["ppo", path])
        assert code == 2
        assert f"{case.run}: the classifier has no label '{wrong}' (found: {', '.join(case.labels)}); " in err
        assert not (tmp_path / "run").exists()
