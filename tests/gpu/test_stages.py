"""The demo's pipeline, shortened, and every stage on all weights and on adapters, through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf.distributed.engine import inference_device
from tests.project.code import ROOT
from tests.stages.setup import info, metrics

SHORT = (
    "sft.optim.max_updates=4",
    "reward.optim.max_updates=4",
    "ppo.ppo.steps=2",
    "ppo.ppo.rollout_size=32",
    "ppo.optim.microbatch_size=8",
)
PIPELINE = {1: "sft", 2: "reward", 3: "ppo", 4: "evaluate"}


def test_the_device_is_the_one_that_commands_use(device: torch.device) -> None:
    assert inference_device().type == device.type


@pytest.mark.timeout(600)
def test_the_demo_pipeline(run_cli: Any, tmp_path: Path) -> None:
    evaluate = yaml.safe_load((ROOT / "configs/demo/evaluate.yaml").read_text(encoding="utf-8"))
    few = [f"evaluate.prompts.{name}.limit=8" for name in evaluate["prompts"]]
    command = ["run", "configs/demo/pipeline.yaml", f"output_dir={tmp_path}", *SHORT, *few]
    code, out, err = run_cli([*command, "evaluate.bootstrap=50"], cwd=ROOT, timeout=560)
    assert code == 0, (out + err)[-3000:]
    for number, stage in PIPELINE.items():
        assert info(tmp_path / f"{number}-{stage}")["status"] == "finished"
    assert [line["step"] for line in metrics(tmp_path / "3-ppo")] == [1, 2]
    assert (tmp_path / "report.html").is_file()


@pytest.mark.timeout(600)
def test_every_stage_and_tool(trained: Any, call_cli: Any, tmp_path: Path) -> None:
    for stage in trained.configs:
        assert info(trained.run(stage))["status"] == "finished"
    out = tmp_path / "responses.jsonl"
    prompts = trained.files["prompts"]
    code, _, err = call_cli(["generate", str(trained.run("ppo")), prompts, str(out), "--max-new-tokens", "4"])
    assert code == 0, err
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(Path(prompts).read_text().splitlines())
    if trained.adapters:
        code, _, err = call_cli(["merge", str(trained.run("ppo")), str(tmp_path / "merged")])
        assert code == 0, err
        assert list((tmp_path / "merged").glob("*.safetensors"))


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_computes_on_the_gpu(stage: str, full: Any, run_stage: Any, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    run_stage(stage, full.configs[stage] | {"output_dir": str(tmp_path / stage)})
    assert torch.cuda.max_memory_allocated() > before
