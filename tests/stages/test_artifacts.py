"""Tests of the files that stages write: the run directory, and models that transformers and peft load."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf.models.heads import sequence_scores
from rlhf.models.model_metadata import Handover
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import load_scorer
from rlhf.runs.metrics import METRICS
from tests.models import tiny
from tests.stages.setup import info, metrics
from tests.tolerances import assert_close

pytestmark = pytest.mark.slow
TRAINING = ("sft", "reward", "classify", "ppo")


def test_a_run_directory_holds_its_contract(trained: Any) -> None:
    for stage in (*TRAINING, "evaluate"):
        run, facts = trained.run(stage), info(trained.run(stage))
        assert facts["status"] == "finished"
        assert (facts["stage"], facts["processes"], facts["seed"]) == (stage, 1, 1)
        assert {"versions", "commit", "inputs", "data", "timings_s", "peak_memory_gib", "summary"} <= set(facts)
        assert facts["timings_s"]["total"] > 0
        assert yaml.safe_load((run / "config.yaml").read_text())["output_dir"] == str(run)
        assert not (run / "model.tmp").exists()
    assert (trained.run("evaluate") / "report.html").is_file()


def test_inputs_name_the_model_and_the_data(trained: Any) -> None:
    assert set(info(trained.run("sft"))["inputs"]) == {trained.base, trained.files["sft"]}
    wanted = {str(trained.run("sft")), str(trained.run("reward")), trained.files["prompts"]}
    assert set(info(trained.run("ppo"))["inputs"]) == wanted


def test_metrics_are_declared_and_end_with_the_last_step(trained: Any) -> None:
    for stage, last in (("sft", 6), ("reward", 6), ("classify", 6), ("ppo", 3)):
        lines = metrics(trained.run(stage))
        assert {name for line in lines for name in line} <= set(METRICS)
        assert lines[-1]["step"] == last
    assert_close(torch.tensor([line["first_ratio_error"] for line in metrics(trained.run("ppo"))]), [0.0] * 3)
    assert_close(torch.tensor(metrics(trained.run("ppo"))[0]["kl"]), 0.0)
    assert any("eval_accuracy" in line for line in metrics(trained.run("reward")))


def test_samples_show_prompt_response_score_and_kl(trained: Any) -> None:
    samples = [json.loads(line) for line in (trained.run("ppo") / "samples.jsonl").read_text().splitlines()]
    assert {line["step"] for line in samples} == {1, 2}
    assert all(set(line) == {"step", "prompt", "response", "score", "kl", "finished", "tokens"} for line in samples)
    assert all(line["prompt"].endswith("<|assistant|>") for line in samples)


def test_every_model_carries_its_hand_over(trained: Any) -> None:
    records = [json.loads((trained.run(s) / "model" / "handover.json").read_text()) for s in TRAINING]
    for stage, record in zip(TRAINING, records, strict=True):
        assert set(record) == {f.name for f in fields(Handover)}
        assert record["stage"] == stage
        own = {"reward": {"head_dtype", "score_mean", "score_std"}, "classify": {"head_dtype", "labels", "multi_label"}}
        special = set().union(*own.values())
        assert {name for name in special if record[name] is not None} == own.get(stage, set())
        shared = {"template_sha256", "tokenizer_sha256", "end_id", "pad_id", "eos_id", "tail_ids", "vocab_size"}
        assert all(record[name] == records[0][name] for name in shared)
    assert records[1]["head_dtype"] == "float32"
    assert records[1]["score_std"] > 0
    said = {stage: record["reply_tokens"] for stage, record in zip(TRAINING, records, strict=True)}
    last = json.loads((trained.run("ppo") / "metrics.jsonl").read_text().splitlines()[-1])
    assert said == {"sft": said["sft"], "reward": None, "classify": None, "ppo": pytest.approx(last["response_length"])}
    assert 5 < said["sft"] < 40  # "a cat is an animal, thank you" and the end token


# Plain libraries


def plain_causal(folder: Path, adapters: bool) -> Any:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    return (AutoPeftModelForCausalLM if adapters else AutoModelForCausalLM).from_pretrained(str(folder)).eval()


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_policy_loads_plainly_and_says_the_same(trained: Any, stage: str) -> None:
    folder = trained.run(stage) / "model"
    theirs, ours = plain_causal(folder, trained.adapters), load_causal(tiny.source(folder)).eval()
    ids = torch.tensor(tiny.rows(1, [12]))
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits.tolist())
        assert (ours(ids).logits - load_causal(tiny.source(trained.base))(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_plain_generation_stops_at_the_end_token(full: Any, stage: str, tiny_tokenizer: Any) -> None:
    model = plain_causal(full.run(stage) / "model", adapters=False)
    end = tiny_tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.generation_config.eos_token_id == end
    assert model.generation_config.pad_token_id == tiny_tokenizer.pad_token_id
    with torch.no_grad():
        model.get_input_embeddings().weight[end] = 100 * model.model.norm.weight * _last_state(model)
    out = model.generate(torch.tensor([[20, 30]]), max_new_tokens=5, do_sample=False)
    assert out[0, 2:].tolist() == [end]


def _last_state(model: Any) -> torch.Tensor:
    return model.model(torch.tensor([[20, 30]])).last_hidden_state[0, -1]


@pytest.mark.parametrize(("stage", "name"), [("reward", "model"), ("ppo", "value_model")])
def test_a_scorer_loads_plainly_and_scores_the_same(trained: Any, stage: str, name: str) -> None:
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    folder = trained.run(stage) / name
    auto = AutoPeftModelForSequenceClassification if trained.adapters else AutoModelForSequenceClassification
    theirs = auto.from_pretrained(str(folder), **({"num_labels": 1, "pad_token_id": 1} if trained.adapters else {}))
    ids = torch.tensor(tiny.rows(1, [12, 12]))
    mask = torch.ones_like(ids).bool()
    with torch.no_grad():
        scores = theirs.eval()(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
        assert_close(sequence_scores(load_scorer(tiny.source(folder)).eval(), ids, mask), scores.tolist())


def test_the_tokenizer_comes_with_every_model(trained: Any) -> None:
    from transformers import AutoTokenizer

    for stage in TRAINING:
        loaded = AutoTokenizer.from_pretrained(str(trained.run(stage) / "model"))
        assert loaded.chat_template
        assert loaded.pad_token_id != loaded.eos_token_id


def test_adapters_stay_adapters_of_the_original_base(adapted: Any) -> None:
    for folder in ("sft/model", "reward/model", "classify/model", "ppo/model", "ppo/value_model"):
        config = json.loads((adapted.top / folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == adapted.base
        assert (config["r"], config["lora_alpha"]) == (4, 8.0)
        assert not (adapted.top / folder / "model.safetensors").exists()
        assert not (adapted.top / folder / "reference").exists()


def test_the_evaluation_compares_the_models(trained: Any) -> None:
    results = json.loads((trained.run("evaluate") / "results.json").read_text())
    rows = {row["model"]: row for row in results["models"]}
    assert set(rows) == {"sft", "ppo", "sft best-of-2"}
    assert rows["sft"]["win"] == 0.5
    assert_close(torch.tensor(rows["sft"]["kl"]), 0.0)
    assert rows["sft best-of-2"]["score"] >= rows["sft"]["score"] - 1.0
    assert 0 <= results["reward_model"]["accuracy"] <= 1
    answers = [json.loads(line) for line in (trained.run("evaluate") / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    for name, row in rows.items():
        said = [len(line["replies"][name]["text"]) for line in answers]
        assert row["measures"] == {"letters": pytest.approx(sum(said) / 6)}
