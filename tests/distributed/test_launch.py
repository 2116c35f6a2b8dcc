"""Two processes on a CPU give the numbers of one. Launched as users launch them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.load import load_causal
from rlhf.runs.metrics import read_lines
from tests.models import tiny
from tests.stages import setup
from tests.stages.setup import info, metrics
from tests.tolerances import PROCESSES, PROCESSES_PPO, distance

pytestmark = pytest.mark.slow
ACCELERATE = Path(__file__).parents[2] / "configs" / "accelerate"
STAGES = ("sft", "reward", "classify", "ppo")
TRAINERS = ("sft", "reward", "classify")
OPTIONS = "options"
"""PPO again, with a shared trunk and with text whose weight follows the gradients."""


def launched(launcher: str, arguments: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """`accelerate launch` with one of the shipped files."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / f"{launcher}.yaml"),
        "--main_process_port", "0", "-m", "rlhf", *arguments,
    ]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "RLHF", "RANK", "WORLD_SIZE"))}
    cpu = {} if launcher.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}  # it would turn DeepSpeed off
    return subprocess.Popen(
        command, env=clean | cpu | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What it printed; it must end well."""
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.fixture(scope="module")
def runs(tiny_model_dir: Path, files: Any, run_stage: Any, tmp_path_factory: Any) -> dict[str, tuple[Path, Path]]:
    """stage -> (run of one process, run of two), each stage on what one process made before."""
    top = tmp_path_factory.mktemp("one")
    one = setup.configs(top, str(tiny_model_dir), files)
    for stage in TRAINERS:
        one[stage]["data"]["validation_fraction"] = 1 / 3  # 16 and 8 records: no batch is incomplete
    two = {name: config | {"output_dir": str(top / "two" / name)} for name, config in one.items()}
    running = []
    for stage in STAGES:
        run_stage(stage, one[stage])
        running.append(launched("ddp", [stage, setup.write(top, stage, two[stage])]))
    ptx = {"coef": 0.5, "balance": 0.5, "data": [{"path": files["text"]}], "batch_size": 4}
    for name, configs in (("one", one), ("two", two)):
        options = configs["ppo"] | {"output_dir": str(top / name / "options"), "ptx": ptx}
        configs[OPTIONS] = options | {"ppo": options["ppo"] | {"value_model": "trunk", "value_warmup": 1}}
    for process in running:
        finished(process)
    run_stage("ppo", one[OPTIONS])
    finished(launched("ddp", ["ppo", setup.write(top, OPTIONS, two[OPTIONS])]))
    return {name: (Path(one[name]["output_dir"]), Path(two[name]["output_dir"])) for name in (*STAGES, OPTIONS)}


@pytest.mark.parametrize("stage", STAGES)
def test_the_run_says_how_many_processes_it_had(stage: str, runs: Any) -> None:
    assert [info(run)["processes"] for run in runs[stage]] == [1, 2]
    assert [info(run)["status"] for run in runs[stage]] == ["finished", "finished"]


@pytest.mark.parametrize("stage", TRAINERS)
def test_two_processes_log_the_losses_of_one(stage: str, runs: Any) -> None:
    one, two = (metrics(run) for run in runs[stage])
    assert [line["step"] for line in one] == [line["step"] for line in two]
    counted = {"accuracy", "eval_accuracy", "margin", "label_accuracy", "eval_label_accuracy", "macro_f1"}
    for ours, theirs in zip(two, one, strict=True):
        for name in ({"loss", "eval_loss", "grad_norm", "eval_macro_f1"} | counted) & set(theirs):
            assert ours[name] == pytest.approx(theirs[name], abs=PROCESSES, rel=PROCESSES), (theirs["step"], name)


def test_two_processes_share_a_base_as_one_does(adapted: Any, run_stage: Any, tmp_path: Path) -> None:
    configs = {name: adapted.configs["ppo"] | {"output_dir": str(tmp_path / name)} for name in ("one", "two")}
    assert "one frozen base" in run_stage("ppo", configs["one"] | {"roles": "shared"})
    two = setup.write(tmp_path, "two", configs["two"] | {"roles": "shared"})
    assert "one frozen base" in finished(launched("ddp", ["ppo", two]))
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for metric in ("score", "kl", "policy_loss", "value_loss", "grad_norm", "explained_variance"):
            assert ours[metric] == pytest.approx(theirs[metric], abs=PROCESSES_PPO, rel=PROCESSES_PPO), metric


@pytest.mark.parametrize("name", ["ppo", OPTIONS])
def test_two_processes_do_the_ppo_of_one(name: str, runs: Any) -> None:
    one, two = (metrics(run) for run in runs[name])
    assert ("ptx_coef" in one[-1]) is (name == OPTIONS)
    assert len(one) == len(two) == 3
    for ours, theirs in zip(two, one, strict=True):
        for metric, value in theirs.items():
            if metric != "first_ratio_error":
                assert ours[metric] == pytest.approx(value, abs=PROCESSES_PPO, rel=PROCESSES_PPO), metric
        assert ours["first_ratio_error"] < PROCESSES_PPO
    said = [
        [(line["step"], line["prompt"], line["response"]) for line in read_lines(run / "samples.jsonl")]
        for run in runs[name]
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_two_processes_make_the_model_of_one(stage: str, runs: Any) -> None:
    one, two = (
        torch.cat([p.detach().flatten() for p in load_causal(tiny.source(run)).parameters()]) for run in runs[stage]
    )
    assert distance(two, one) < PROCESSES_PPO


def test_a_wrong_number_of_processes_is_refused(tiny_model_dir: Path, files: Any, tmp_path: Path) -> None:
    """Two were asked for; the file starts one. And the file for one process works."""
    config = setup.configs(tmp_path, str(tiny_model_dir), files)["sft"]
    path = setup.write(tmp_path, "sft", config)
    right = setup.write(tmp_path, "right", config | {"output_dir": str(tmp_path / "right")})
    wrong, single = (
        launched("single", ["sft", path], RLHF_EXPECTED_PROCESSES="2"),
        launched("single", ["sft", right], RLHF_EXPECTED_PROCESSES="1"),
    )
    out, _ = wrong.communicate(timeout=280)
    assert wrong.returncode != 0
    assert "1 instead of 2" in out
    assert not (tmp_path / "sft").exists()
    finished(single)
    assert info(tmp_path / "right")["processes"] == 1


def test_deepspeed_that_would_be_turned_off_is_refused(tiny_model_dir: Path, files: Any, tmp_path: Path) -> None:
    path = setup.write(tmp_path, "sft", setup.configs(tmp_path, str(tiny_model_dir), files)["sft"])
    process = launched("zero2", ["sft", path], ACCELERATE_USE_CPU="true")
    out, _ = process.communicate(timeout=280)
    assert process.returncode != 0
    assert "DeepSpeed was asked for, and something else would run" in out


def test_what_would_run_as_something_else_is_refused(tiny_model_dir: Path, files: Any, tmp_path: Path) -> None:
    """FSDP2 on a CPU would be plain data parallel; MULTI_CPU would be one process. Both would end with exit code 0."""
    path = setup.write(tmp_path, "sft", setup.configs(tmp_path, str(tiny_model_dir), files)["sft"])
    (tmp_path / "multi.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
        "num_machines: 1\nmixed_precision: 'no'\n"
    )
    running = launched("fsdp2", ["sft", path]), launched(str(tmp_path / "multi"), ["sft", path])
    for process, says in zip(
        running, ("FSDP on a CPU would silently become", "asked for several processes and started one"), strict=True
    ):
        out, _ = process.communicate(timeout=280)
        assert process.returncode != 0
        assert says in out
    assert not (tmp_path / "sft").exists()


def test_a_batch_that_two_processes_cannot_share_is_refused_before_anything_is_written(
    tiny_model_dir: Path, files: Any, call_cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = setup.configs(tmp_path, str(tiny_model_dir), files)["sft"]
    code, _, err = call_cli(["sft", setup.write(tmp_path, "sft", config)])
    assert code == 2
    assert "cannot be shared equally by 3 processes" in err
    assert not (tmp_path / "sft").exists()
