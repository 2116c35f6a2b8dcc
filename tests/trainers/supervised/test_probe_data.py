"""Tests of the forgetting probe: its loss is right, it is reported, and it can stop a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.sections import Peft
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import new_classifier
from rlhf.trainers.supervised.forgetting import ProbeData, probe_text, state_drift
from rlhf.trainers.supervised.probe_data import output_weight
from tests.models import tiny
from tests.stages import setup
from tests.stages.setup import info, metrics
from tests.tolerances import assert_close

FILES = {"sft": "sft", "reward": "preferences", "classify": "labels"}
ROWS = tiny.rows(4, [9, 30, 2, 17])


def by_definition(model: Any) -> float:
    """Return the loss of the text, computed row by row and token by token."""
    total, count = 0.0, 0
    for row in ROWS:
        with torch.no_grad():
            logprobs = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        total -= sum(float(logprobs[t, token]) for t, token in enumerate(row[1:]))
        count += len(row) - 1
    return total / count


def probed(output: Any = None, *, language_model: bool = False) -> ProbeData:
    return ProbeData(ROWS, language_model, output, (), tiny.renderer().pad_id, None)


def text_loss(model: Any, what: ProbeData) -> float:
    loss, states = probe_text(model, what)
    assert loss is not None
    assert states.shape == (len(ROWS), tiny.HIDDEN)
    return loss


def test_the_loss_of_a_text_is_the_mean_over_its_tokens() -> None:
    model = tiny.new(3)
    assert_close(torch.tensor(text_loss(model, probed(language_model=True))), by_definition(model))


def test_a_scorer_reads_with_the_sources_output_layer_and_forgets_nothing_before_training(tmp_path: Path) -> None:
    model = tiny.new(3)
    source = tiny.source(tiny.save(model, tmp_path / "m"))
    scorer = new_classifier(
        source, Peft(), outputs=2, pad_id=tiny.renderer().pad_id, vocab_size=len(tiny.tokenizer()), seed=1
    )
    weight = output_weight(source)
    assert_close(torch.tensor(text_loss(scorer, probed(weight))), by_definition(model))
    before = probe_text(scorer, probed())[1]
    assert probe_text(scorer, probed())[0] is None
    assert state_drift(probe_text(model, probed(language_model=True))[1], before) == 0.0
    with torch.no_grad():
        scorer.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    assert text_loss(scorer, probed(weight)) != pytest.approx(by_definition(model), rel=1e-3)
    assert state_drift(probe_text(scorer, probed())[1], before) > 0.01
    assert_close(torch.tensor(state_drift(1.5 * before, before)), 0.5)
    tiny.save(scorer, tmp_path / "classifier")
    assert output_weight(tiny.source(tmp_path / "classifier")) is None


@pytest.mark.parametrize("stage", FILES)
def test_every_evaluation_reads_the_probe(stage: str, full: Any, run_stage: Any, tmp_path: Path) -> None:
    config = full.configs[stage] | {
        "output_dir": str(tmp_path / stage),
        "probe": {"text": [{"path": full.files["text"]}], "ood": [{"path": full.files[FILES[stage]]}]},
    }
    run_stage(stage, config)
    lines = metrics(tmp_path / stage)
    evaluated = [line["step"] for line in lines if "eval_loss" in line]
    for name in ("forgetting", "text_loss", "drift", "ood_loss"):
        assert [line["step"] for line in lines if name in line] == evaluated
    changes = [line["text_loss"] - line["forgetting"] for line in lines if "forgetting" in line]
    assert changes == pytest.approx([changes[0]] * len(changes))
    summary = info(tmp_path / stage)["summary"]
    last = [line for line in lines if "forgetting" in line][-1]
    assert summary["forgetting"] == pytest.approx(last["forgetting"], abs=1e-5)
    assert "ood_loss" in summary
    # The numbers of the stage are not touched by it.
    without = metrics(full.run(stage))
    assert [line["eval_loss"] for line in without if "eval_loss" in line] == [
        line["eval_loss"] for line in lines if "eval_loss" in line
    ]
    if stage == "classify":
        assert summary["eval_label_accuracy"] == info(full.run(stage))["summary"]["eval_label_accuracy"]
        assert summary["ood_label_accuracy"] == pytest.approx(
            [line["ood_label_accuracy"] for line in lines if "ood_label_accuracy" in line][-1], abs=1e-5
        )


def test_a_run_that_forgets_too_much_stops(full: Any, run_stage: Any, tmp_path: Path) -> None:
    config = full.configs["sft"] | {
        "output_dir": str(tmp_path / "sft"),
        "optim": setup.optim(learning_rate=0.1, epochs=10),
        "probe": {"text": [{"path": full.files["text"]}], "stop_above": 0.01},
    }
    said = run_stage("sft", config)
    assert "more than before training (limit 0.01): stopped" in said
    assert info(tmp_path / "sft")["summary"]["updates"] < 30
    assert load_causal(tiny.source(tmp_path / "sft"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"probe": {"stop_above": 1.0}}, "stop_above: set text"),
        ({"data": {"validation_fraction": 0.0}, "probe": {"text": [{"path": "text"}]}}, "a probe is measured at each"),
        ({"data": {"validation_fraction": 0.0}, "optim": {"patience": 2}}, "patience needs held-out records"),
        ({"freeze": {"names": ["*.nothing"]}}, "no parameter has a name that matches"),
        ({"freeze": {"names": ["*"]}}, "nothing is left to train"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    changes: dict[str, Any], words: str, full: Any, call_cli: Any, tmp_path: Path
) -> None:
    config = full.configs["sft"] | {"output_dir": str(tmp_path / "sft")}
    for name, value in changes.items():
        config[name] = config.get(name, {}) | value
    config["probe"] = {
        k: [{"path": full.files["text"]}] if k == "text" else v for k, v in config.get("probe", {}).items()
    }
    code, _, err = call_cli(["sft", setup.write(tmp_path, "config", config)])
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "sft").exists()


def test_a_small_data_set_for_all_weights_is_said_with_its_numbers(full: Any, run_stage: Any, tmp_path: Path) -> None:
    config = full.configs["sft"] | {"output_dir": str(tmp_path / "sft")}
    said = run_stage("sft", config)
    assert re.search(r"18 records for [\d,]+ trained parameters: full fine-tuning of a small data set over-fits", said)
    quiet = run_stage("sft", config | {"output_dir": str(tmp_path / "two"), "freeze": {"layers": "0"}})
    assert "over-fits soon" not in quiet
    assert "block 0" in quiet
