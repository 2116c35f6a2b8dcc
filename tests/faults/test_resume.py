"""SIGTERM at any moment: the stage saves, ends with its own code, and the same command ends as if nothing had been."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf.config.schema import PPOConfig
from rlhf.runs.preemption import STOPPED_EXIT_CODE
from rlhf.trainers.ppo.checkpointer import PPOCheckpointer
from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.faults.setup import checkpoints, differences
from tests.stages import setup
from tests.stages.setup import info

pytestmark = pytest.mark.slow
Signal = Callable[..., Any]


def on_call(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """SIGTERM arrives during the n-th call."""
    left = [number]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    return wrapped


def moved(config: dict[str, Any], folder: Path, **changes: Any) -> dict[str, Any]:
    merged = {k: config.get(k, {}) | v if isinstance(v, dict) else v for k, v in changes.items()}
    return config | {"output_dir": str(folder)} | merged


def every_option(trained: Any, folder: Path) -> dict[str, Any]:
    """PPO with everything that has state of its own."""
    return moved(
        trained.configs["ppo"],
        folder,
        ppo={
            "ema": 0.5,
            "normalize_scores": "running",
            "value_warmup": 1,
            "value_warmup_epochs": 1,
            "value_model": "trunk",
        },
        kl={"target": 1.0, "horizon": 20.0},
        sample_every=1,
        ptx={"coef": 0.5, "balance": 0.5, "data": [{"path": trained.files["text"]}], "batch_size": 4},
        unfreeze={"policy": [{"train": {"last": 1}, "steps": 2}, {"train": "all"}]} if not trained.adapters else {},
    )


def stopped(stage: str, config: dict[str, Any], tmp_path: Path, call_cli: Any) -> str:
    """The stage is told to end and does; what it said last."""
    code, _, err = call_cli([stage, setup.write(tmp_path, stage, config)])
    assert code == STOPPED_EXIT_CODE, err
    assert f"; the same command continues: rlhf {stage}" in err
    assert info(Path(config["output_dir"]))["status"] == "interrupted"
    return err


def test_a_ppo_run_that_is_stopped_after_every_rollout_minibatch_and_step_ends_as_an_uninterrupted_one(
    trained: Any, call_cli: Any, run_stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each attempt gets as far as the next safe point. 1 + 2 updates, then twice 1 + 4, and the end of each step."""
    plain, broken = (every_option(trained, tmp_path / name) for name in ("plain", "broken"))
    run_stage("ppo", plain)
    names = []
    for _ in range(3):
        for name in ("sample", *["optimizer_step"] * 2, "steer_kl"):
            with monkeypatch.context() as patch:
                patch.setattr(PPOTrainer, name, on_call(1, getattr(PPOTrainer, name)))
                assert "saved in step-" in stopped("ppo", broken, tmp_path, call_cli)
            names.append(checkpoints(tmp_path / "broken")[-1])
            if name == "steer_kl" and names[-1] == "step-000003":
                break
    assert names[:4] == ["step-000000-000", "step-000000-001", "step-000000-002", "step-000001"]
    assert names[-1] == "step-000003"
    assert "continuing after step 3" in run_stage("ppo", broken)
    assert differences(tmp_path / "broken", tmp_path / "plain") == []
    assert info(tmp_path / "broken")["attempts"] == len(names) + 1


def test_an_early_stop_of_an_update_is_not_undone_by_a_resume(
    full: Any, call_cli: Any, run_stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, broken = (moved(full.configs["ppo"], tmp_path / n, ppo={"target_kl": 1e-6}) for n in ("plain", "broken"))
    run_stage("ppo", plain)
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "optimizer_step", on_call(1, PPOTrainer.optimizer_step))
        stopped("ppo", broken, tmp_path, call_cli)
    assert "and 1 of its updates" in run_stage("ppo", broken)
    assert differences(tmp_path / "broken", tmp_path / "plain") == []


def test_a_checkpoint_holds_no_frozen_weight(full: Any, adapted: Any) -> None:
    sizes = []
    for chain in (full, adapted):
        path = chain.run("ppo") / "checkpoints" / "step-000002" / "trained-00000.safetensors"
        sizes.append(path.stat().st_size)
        names = load_file(path).keys()
        assert any("base_layer" in name or "embed_tokens" in name for name in names) is not chain.adapters
        assert all("lora" in n or "score" in n for n in names) is chain.adapters
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize(("stage", "at"), [("sft", 1), ("sft", 4), ("reward", 3), ("classify", 6)])
def test_a_stage_on_a_trainer_saves_after_the_update_in_hand(
    stage: str, at: int, trained: Any, call_cli: Any, run_stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rlhf.trainers.supervised.base import MetricsCallback

    config = moved(trained.configs[stage], tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsCallback, "on_step_end", on_call(at, MetricsCallback.on_step_end))
        assert f"saved after update {at}" in stopped(stage, config, tmp_path, call_cli)
    assert f"checkpoint-{at}" in checkpoints(tmp_path / "run")
    assert f"(update {at})" in run_stage(stage, config)
    assert differences(tmp_path / "run", trained.run(stage)) == []


def test_without_a_safe_point_in_the_grace_time_it_ends_without_one(
    full: Any, call_cli: Any, run_stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import time

    config = moved(full.configs["ppo"], tmp_path / "run", saving={"grace_seconds": 0.2})

    def slow(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "score", slow)
        begun = time.monotonic()
        assert "saved" not in stopped("ppo", config, tmp_path, call_cli)
        assert time.monotonic() - begun < 30
    run_stage("ppo", config)
    assert differences(tmp_path / "run", full.run("ppo")) == []


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_as_many_checkpoints_stay_as_are_asked_for(stage: str, full: Any, run_stage: Any, tmp_path: Path) -> None:
    every = {"checkpoint_every": 1} if stage == "ppo" else {}
    config = moved(full.configs[stage], tmp_path / "run", saving={"keep": 1}, **every)
    run_stage(stage, config)
    assert checkpoints(tmp_path / "run") == [{"sft": "checkpoint-6", "ppo": "step-000003"}[stage]]


def test_a_pause_without_a_request_does_nothing(full: Any, run_stage: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Six a step, and none of them writes: after the rollout, each of four minibatches, the end."""
    calls: list[str] = []
    for name in ("pause", "save"):
        original = getattr(PPOCheckpointer, name)
        monkeypatch.setattr(PPOCheckpointer, name, lambda *a, n=name, o=original: calls.append(n) or o(*a))
    run_stage("ppo", moved(full.configs["ppo"], tmp_path / "run"))
    assert (calls.count("pause"), calls.count("save")) == (18, 1)


@pytest.mark.parametrize("share", [0.9, 0.0])
@pytest.mark.parametrize(("stage", "first"), [("ppo", "step-000001"), ("sft", "checkpoint-1")])
def test_cheap_checkpoints_come_between_the_regular_ones_and_change_no_number(
    stage: str, first: str, share: float, full: Any, run_stage: Any, tmp_path: Path
) -> None:
    every = {"checkpoint_every": 100} if stage == "ppo" else {}
    run_stage(stage, moved(full.configs[stage], tmp_path / "run", saving={"share": share, "keep": 99}, **every))
    assert (tmp_path / "run" / "checkpoints" / first).is_dir() is (share > 0)
    assert differences(tmp_path / "run", full.run(stage)) == []


@pytest.mark.parametrize(("unhealthy", "share"), [("continue", 0.5), ("rollback", 0.0)])
def test_a_rollback_returns_to_regular_checkpoints_only(unhealthy: str, share: float, full: Any) -> None:
    """Which others there are depends on the clock."""
    settings = full.configs["ppo"] | {"saving": {"share": 0.5}, "watch": {"unhealthy": unhealthy}}
    keeper = PPOCheckpointer(PPOConfig.model_validate(settings), None, None)  # type: ignore[arg-type]
    assert keeper.pace.share == share
