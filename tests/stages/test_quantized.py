"""Stages with a base in 4 bits through the command line: what they write, and what is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf.models import quantization
from rlhf.models.model_metadata import read_handover
from rlhf.models.quantization import bitsandbytes_is_installed
from tests.stages import setup

needs_bitsandbytes = pytest.mark.skipif(
    not bitsandbytes_is_installed(), reason="bitsandbytes is not installed: pip install 'rlhf[quantize]'"
)


def in_four_bits(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration whose models are loaded in 4 bits."""
    models = {
        name: config[name] | {"quantize": "nf4"} for name in ("model", "policy", "reward_model") if name in config
    }
    return config | models


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_stages_with_an_adapter(
    tiny_model_dir: Path, files: setup.Files, run_stage: Any, call_cli: Any, tmp_path: Path
) -> None:
    configs = setup.configs(tmp_path, str(tiny_model_dir), files, adapters=True)
    for stage in ("sft", "reward", "classify", "ppo"):
        out = run_stage(stage, in_four_bits(configs[stage]))
        model = tmp_path / stage / "model"
        assert setup.info(tmp_path / stage)["status"] == "finished"
        saved = json.loads((model / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(tiny_model_dir)
        assert read_handover(model) is not None
        weights = load_file(model / "adapter_model.safetensors")
        assert weights
        assert {str(w.dtype) for w in weights.values()} == {"torch.float32"}
        assert all("lora_" in name or ".score." in name for name in weights)
    assert "one frozen base" in out
    steps = setup.metrics(tmp_path / "ppo")
    assert [step["first_ratio_error"] for step in steps] == pytest.approx([0.0] * 3, abs=1e-5)
    out = run_stage("ppo", in_four_bits(configs["ppo"]) | {"output_dir": str(tmp_path / "apart")}, "roles=separate")
    assert setup.metrics(tmp_path / "apart")[0]["score"] == pytest.approx(steps[0]["score"], abs=1e-4)
    # The adapter also works on the base as it is stored: the next stage may start from it, and it can be merged.
    run_stage("reward", configs["reward"] | {"output_dir": str(tmp_path / "plain")})
    code, out, err = call_cli(["merge", tmp_path / "ppo", tmp_path / "merged"])
    assert code == 0, err
    assert "trained on a base quantized to nf4" in out
    assert "logits of 32 tokens differ" in out.replace("\n", " ")


@pytest.mark.parametrize("stage", ["sft", "reward", "classify", "ppo", "evaluate"])
def test_a_stage_that_trains_no_adapter_is_refused(
    stage: str, tiny_model_dir: Path, files: setup.Files, call_cli: Any, tmp_path: Path
) -> None:
    config = setup.configs(tmp_path, str(tiny_model_dir), files)[stage]
    if stage == "evaluate":
        config["models"]["sft"]["quantize"] = "nf4"
    code, _, err = call_cli([stage, setup.write(tmp_path, stage, in_four_bits(config))])
    assert code == 2
    text = " ".join(err.split())
    assert "quantize=nf4: only stages that train an adapter" in text or "set peft.method=lora" in text
    assert not (tmp_path / stage).exists()


def test_pretraining_is_refused(call_cli: Any, files: setup.Files, tmp_path: Path) -> None:
    config = {"output_dir": str(tmp_path / "run"), "data": {"train": [{"path": files["text"]}]}}
    code, _, err = call_cli(["pretrain", setup.write(tmp_path, "pretrain", config), "model.quantize=nf4"])
    assert code == 2
    assert "pretraining creates a new model and trains all of its weights" in " ".join(err.split())


@pytest.mark.parametrize(("installed", "zero"), [(False, "2"), (True, "3")], ids=["no package", "ZeRO-3"])
def test_an_environment_that_cannot_do_it_is_refused(
    installed: bool,
    zero: str,
    tiny_model_dir: Path,
    files: setup.Files,
    call_cli: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantization, "bitsandbytes_is_installed", lambda: installed)
    config = in_four_bits(setup.configs(tmp_path, str(tiny_model_dir), files, adapters=True)["sft"])
    path = setup.write(tmp_path, "sft", config)
    code, out, err = call_cli(["check", path] + (["--launcher", "zero3"] if installed else []))
    wanted = "cannot shard 4-bit weights" if installed else "pip install 'rlhf[quantize]'"
    assert code != 0
    said = " ".join((out + err).split())
    assert wanted in said
    assert "4.127 bits for each weight" in said
    assert "was not validated on a GPU" in said
    if installed:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", zero)
    code, _, err = call_cli(["sft", path])
    assert code == 2
    assert wanted in " ".join(err.split())
    assert not (tmp_path / "sft").exists()
