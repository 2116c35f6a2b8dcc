"""Tests of the stages with adapters other than plain LoRA: each stage passes its adapter and head on to the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.schema import SFTConfig
from rlhf.console import Console
from rlhf.errors import ConfigError
from rlhf.models.policy import load_causal
from rlhf.models.soft_prompt import SoftPrompt, load_for_generation
from rlhf.stages.sft import _model
from tests.models import tiny
from tests.stages import setup

pytestmark = pytest.mark.slow
DORA = {"method": "lora", "r": 4, "alpha": 8.0, "dora": True, "rslora": True, "lora_plus": 4.0}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(tiny.rows(1, [12, 12]))).logits


@pytest.mark.parametrize("peft", [DORA, {"method": "ia3"}], ids=["rsLoRA and DoRA", "IA3"])
def test_a_chain_of_stages(
    peft: dict[str, Any], tiny_model_dir: Path, files: setup.Files, run_stage: Any, call_cli: Any, tmp_path: Path
) -> None:
    made = setup.configs(tmp_path, str(tiny_model_dir), files)
    stages = ("sft", "reward", "classify", "ppo")
    printed = {name: run_stage(name, made[name] | {"peft": peft}) for name in stages}
    assert "one frozen base" in printed["ppo"]
    for folder in (*(f"{name}/model" for name in stages), "ppo/value_model"):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tiny_model_dir)
        if peft is DORA:
            assert (config["r"], config["use_dora"], config["use_rslora"]) == (4, True, True)
        else:
            assert set(config["feedforward_modules"]) == {"mlp.down_proj"}
    steps = setup.metrics(tmp_path / "ppo")
    assert [step["first_ratio_error"] for step in steps] == pytest.approx([0.0] * 3, abs=1e-5)
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    start, end = (load_causal(tiny.source(tmp_path / name / "model")) for name in ("sft", "ppo"))
    assert (logits(start) - logits(load_causal(tiny.source(tiny_model_dir)))).abs().max() > 1e-3
    assert (logits(start) - logits(end)).abs().max() > 1e-4
    code, _, err = call_cli(["merge", tmp_path / "ppo", tmp_path / "plain"])
    assert code == 0, err
    run_stage("evaluate", made["evaluate"] | {"models": {n: {"path": str(tmp_path / n)} for n in ("sft", "plain")}})


def test_roles_of_two_methods_do_not_share(adapted: Any, call_cli: Any, tmp_path: Path) -> None:
    config = adapted.configs["ppo"] | {"peft": {"method": "ia3"}, "output_dir": str(tmp_path / "run")}
    config["policy"] = {"path": adapted.base}
    code, _, err = call_cli(["ppo", setup.write(tmp_path, "ppo", config), "roles=shared"])
    assert code == 2
    assert "adapter of method lora, the policy's is ia3" in err
    assert "train the reward model with peft.method=ia3" in err
    assert not (tmp_path / "run").exists()


def test_a_soft_prompt_is_trained_used_and_trained_on(
    tiny_model_dir: Path, files: setup.Files, run_stage: Any, call_cli: Any, tmp_path: Path
) -> None:
    made = setup.configs(tmp_path, str(tiny_model_dir), files)
    peft = {"method": "prompt", "prompt_tokens": 4}
    run_stage("sft", made["sft"] | {"peft": peft, "optim": setup.optim(learning_rate=0.05, epochs=4)})
    losses = [line["loss"] for line in setup.metrics(tmp_path / "sft") if "loss" in line]
    assert losses[-1] < losses[0]
    speaker = load_for_generation(tiny.source(tmp_path / "sft"))
    assert isinstance(speaker, SoftPrompt)
    assert speaker.prompt.shape[1] == 4
    code, _, err = call_cli(
        ["generate", tmp_path / "sft", files["prompts"], tmp_path / "out.jsonl", "--max-new-tokens", "6"]
    )
    assert code == 0, err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 24
    evaluate = made["evaluate"] | {"models": {"sft": {"path": str(tmp_path / "sft")}}}
    evaluate.pop("reward_model")
    evaluate.pop("preferences")
    run_stage("evaluate", evaluate | {"best_of": 0})
    again = made["sft"] | {"output_dir": str(tmp_path / "again"), "model": {"path": str(tmp_path / "sft")}}
    run_stage("sft", again | {"peft": peft})
    more = load_for_generation(tiny.source(tmp_path / "again"))
    assert 0 < (more.prompt - speaker.prompt).abs().max() < 1
    for stage in ("reward", "sft"):
        config = made[stage] | {"output_dir": str(tmp_path / "no"), "model": {"path": str(tmp_path / "sft")}}
        code, _, err = call_cli([stage, setup.write(tmp_path, stage, config)])
        assert code == 2
        assert "a soft prompt cannot be merged" in err


def test_a_soft_prompt_brings_no_tokens_and_takes_room(
    files: setup.Files, call_cli: Any, sft_folder: str, tmp_path: Path
) -> None:
    made = setup.configs(tmp_path, sft_folder, files)["sft"] | {"peft": {"method": "prompt", "prompt_tokens": 4}}
    size = len(tiny.tokenizer())
    with pytest.raises(ConfigError, match="embeddings would not be saved"):
        _model(SFTConfig.model_validate(made), size + 3, Console(quiet=True))
    config = setup.write(tmp_path, "sft", made)
    code, _, err = call_cli(["sft", config, "data.max_length=125"])  # of 128
    assert code == 2
    assert "sequences of 129 tokens do not fit the model's context of 128" in err
