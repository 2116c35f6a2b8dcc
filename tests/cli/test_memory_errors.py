"""Memory that runs out ends a command with a message in four parts; the command that it advises continues the run."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf.cli.memory_errors import changed_command
from rlhf.config.env_vars import LAUNCH_OPTIONS
from rlhf.config.load import load_config
from rlhf.launch.launcher import LaunchOptions, launch_stage
from rlhf.launch.supervisor import JobResult
from rlhf.preflight.memory_formulas import format_bytes
from rlhf.preflight.stage_inputs import launch_sharding, read_estimate_input
from rlhf.preflight.stage_memory import estimate_memory

GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB."
HOST = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
SFT_STEP = "rlhf.trainers.supervised.sft.DemonstrationTrainer.training_step"
PPO_TRAINER = "rlhf.trainers.ppo.trainer.PPOTrainer"


@contextmanager
def planted(target: str, error: Exception, *, calls: int = 0) -> Iterator[None]:
    """Inside the context a method or function raises `error` after `calls` calls that work."""
    original, left = pkgutil.resolve_name(target), [calls]

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            raise error
        left[0] -= 1
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, replacement)
        yield


def info(folder: Path) -> dict[str, Any]:
    """What run.json says."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def advised(err: str) -> list[str]:
    """The words after `rlhf` of the command that a message advises."""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    found = re.search(r": rlhf (.*)$", lines[0])
    assert found is not None, err
    return shlex.split(found[1])


def check_resumes(command: list[str], place: Path, call_cli: Any, changed: str) -> None:
    """The advised command finishes the run, which records the changed setting; so does the first command again."""
    code, _, err = call_cli(command, cwd=place)
    assert (code, err) == (0, "")
    done = info(place / "out")
    assert (done["status"], done["attempts"]) == ("finished", 2)
    assert [changed in change for change in done["changed"]] == [True]
    saved = yaml.safe_load((place / "out" / "config.yaml").read_text(encoding="utf-8"))
    for key in changed.split("."):
        saved = saved[key]
    assert saved == done["changed"][0][changed][1] != done["changed"][0][changed][0]
    assert (place / "out" / "model" / "config.json").is_file()
    assert not list((place / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("method", "doing", "changed"),
    [
        ("sample", "sampling", "sampling.batch_size"),
        ("score", "scoring", "optim.microbatch_size"),
        ("update", "updating", "optim.microbatch_size"),
    ],
)
def test_ppo_names_the_phase_and_continues_with_the_advice(
    method: str, doing: str, changed: str, place: Path, call_cli: Any
) -> None:
    words = ["ppo", "ppo.yaml", "ppo.rollout_size=64", "ppo.steps=2", "checkpoint_every=1", "--quiet"]
    with planted(f"{PPO_TRAINER}.{method}", torch.OutOfMemoryError(GPU), calls=1):
        code, _, err = call_cli(words, cwd=place)
    assert code == 2
    start = (
        f"OutOfMemoryError: stage ppo, run out: the GPU is out of memory while {doing} (found: 20.00 GiB asked for; "
    )
    assert err.startswith(start), err
    assert re.search(rf"`rlhf check` predicts [\d.]+ \w+ for {doing}, and [\d.]+ \w+ at its peak \(\w+\)\)", err), err
    command = advised(err)
    assert [*command[:2], *command[2:-1]] == words, "the same command, and one setting"
    assert command[-1].startswith(f"{changed}=")
    failed = info(place / "out")
    assert failed["status"] == "failed"
    assert failed["error"].startswith("OutOfMemoryError: stage ppo, run out: the GPU is out of memory")
    assert not (place / "out" / "model").exists()
    assert not list((place / "out").glob("error-*.txt"))
    check_resumes(command, place, call_cli, changed)
    steps = [json.loads(line)["step"] for line in (place / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (torch.OutOfMemoryError(GPU), "the GPU is out of memory while updating (found: 20.00 GiB asked for"),
        (RuntimeError(HOST), "this machine is out of memory while updating (found: 4096 bytes asked for; "),
        (MemoryError(), "this machine is out of memory while updating (found: MemoryError; "),
    ],
)
def test_sft_continues_with_the_advice(error: Exception, start: str, place: Path, call_cli: Any) -> None:
    words = ["sft", "sft.yaml", "evaluations=2", "optim.microbatch_size=4", "optim.max_updates=3", "--quiet"]
    with planted(SFT_STEP, error, calls=2):
        code, _, err = call_cli(words, cwd=place)
    assert code == 2
    assert err.startswith(f"OutOfMemoryError: stage sft, run out: {start}"), err
    command = advised(err)
    kept = [word for word in words if not word.startswith("optim.microbatch_size")]
    assert command == [*kept, "optim.microbatch_size=2"], "the setting stands once, with its new value"
    assert not (place / "out" / "model").exists()
    check_resumes(command, place, call_cli, "optim.microbatch_size")
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


def test_in_a_pipeline_the_setting_of_its_stage_is_advised(place: Path, call_cli: Any) -> None:
    with planted(SFT_STEP, torch.OutOfMemoryError(GPU)):
        code, _, err = call_cli(["run", "pipeline.yaml", "--quiet"], cwd=place)
    assert code == 2
    assert "stage sft, run out/1-sft" in err
    command = advised(err)
    assert command == ["run", "pipeline.yaml", "--quiet", "sft.optim.microbatch_size=2"]
    assert call_cli(command, cwd=place).code == 0
    assert [info(place / "out" / name)["status"] for name in ("1-sft", "2-reward")] == ["finished", "finished"]


def test_evaluate_advises_fewer_rows_and_continues(place: Path, call_cli: Any) -> None:
    with planted("rlhf.evaluation.answers.generate_rollout", torch.OutOfMemoryError(GPU)):
        code, _, err = call_cli(["evaluate", "evaluate.yaml", "--quiet"], cwd=place)
    assert code == 2
    assert "stage evaluate, run out: the GPU is out of memory while evaluating" in err
    command = advised(err)
    assert command == ["evaluate", "evaluate.yaml", "--quiet", "sampling.batch_size=64"]
    assert call_cli(command, cwd=place).code == 0


def test_memory_that_runs_out_while_loading_names_that_phase(
    place: Path, call_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr("rlhf.stages.sft.load_causal", fail)
    code, _, err = call_cli(["sft", "sft.yaml", "--quiet"], cwd=place)
    assert code == 2
    assert "stage sft, run out: the GPU is out of memory while loading (found: 20.00 GiB asked for" in err
    assert not (place / "out").exists()


def test_the_prediction_is_that_of_rlhf_check(place: Path, call_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for stage in ("sft", "reward", "classify", "ppo"):
        config = load_config(f"{stage}.yaml")
        inputs = read_estimate_input(stage, config, launch_sharding(config, None, None, None), gpu=False)
        peak = format_bytes(estimate_memory(inputs).peak)
        out = call_cli(["check", f"{stage}.yaml"]).stdout
        assert re.search(rf"peak \([^)]*\) *\W* *{re.escape(peak)}", out), (stage, peak, out)


def test_without_advice_the_message_names_rlhf_check(
    place: Path, call_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("rlhf.stages.sft.load_causal", fail)
    monkeypatch.setattr("rlhf.preflight.memory_advice.read_estimate_input", fail)
    code, _, err = call_cli(["sft", "sft.yaml", "--quiet"], cwd=place)
    assert code == 2
    assert "run `rlhf check` with the same file" in err


def test_a_command_that_is_no_stage_ends_with_a_message_too(
    place: Path, call_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr("rlhf.tools.generate.generate_file", fail)
    code, _, err = call_cli(["generate", "sft", "prompts.jsonl", "out.jsonl"], cwd=place)
    assert code == 2
    assert err.startswith("OutOfMemoryError: the GPU is out of memory (found: 20.00 GiB asked for); let the command")


def test_the_command_keeps_its_launch_and_changes_what_the_advice_changes() -> None:
    options = LaunchOptions("ddp", 2)
    words = ["ppo", "a b.yaml", "optim.microbatch_size=8", "kl.coef=0.1"]
    change = ["offload=[reference]", "optim.microbatch_size=2"]
    assert changed_command(words, options, change) == (
        "rlhf ppo 'a b.yaml' kl.coef=0.1 'offload=[reference]' optim.microbatch_size=2 --launcher ddp --num-processes 2"
    )
    assert changed_command(words[:2], options, ["--launcher", "zero3", "--num-processes", "4"]) == (
        "rlhf ppo 'a b.yaml' --launcher zero3 --num-processes 4"
    )


def test_a_launched_process_learns_the_options_of_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def supervise(command: list[str], environment: dict[str, str], *_: Any) -> JobResult:
        seen.update(environment)
        return JobResult(0)

    monkeypatch.setattr("rlhf.launch.launcher.supervise", supervise)
    options = LaunchOptions("ddp", 2)
    assert launch_stage(options, "sft", ["sft.yaml"]) == 0
    assert LaunchOptions(**json.loads(seen[LAUNCH_OPTIONS])) == options
