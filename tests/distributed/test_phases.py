"""Phases and accumulation under every engine: two processes, with DDP and with ZeRO, give the numbers of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.load import load_causal
from tests.distributed.test_launch import finished, launched
from tests.models import tiny
from tests.stages import setup
from tests.stages.setup import metrics
from tests.tolerances import PROCESSES, PROCESSES_PPO, distance

pytestmark = pytest.mark.slow
ENGINES = ("ddp", "zero2", "zero3")
SFT = {
    "unfreeze": [
        {"train": {"last": 1}, "updates": 3, "learning_rate": 0.01},
        {"train": "all", "updates": 4, "learning_rate": 0.002},
    ],
    "evaluations": 2,
    "optim": {"batch_size": 8, "microbatch_size": 2, "epochs": 2.0, "weight_decay": 0.1},
}
PPO = {
    "optim": {"learning_rate": 5e-3, "value_learning_rate": 1e-2, "microbatch_size": 1},
    "freeze": {"policy": {"parts": ["embeddings"]}},
    "unfreeze": {
        "policy": [{"train": {"last": 1}, "steps": 1, "learning_rate": 0.003}, {"train": "all"}],
        "value_model": [{"train": {"parts": ["score"]}, "steps": 2}, {"train": "all"}],
    },
}


@pytest.fixture(scope="module")
def runs(tiny_model_dir: Path, files: Any, run_stage: Any, tmp_path_factory: Any) -> dict[tuple[str, str], Path]:
    """(stage, engine) -> run directory."""
    top = tmp_path_factory.mktemp("phases")
    configs = setup.configs(top, str(tiny_model_dir), files)
    for stage in ("sft", "reward"):
        run_stage(stage, configs[stage])
    data = configs["sft"]["data"] | {"validation_fraction": 1 / 3}
    made = {"sft": configs["sft"] | SFT | {"data": data}, "ppo": configs["ppo"] | PPO}
    found = {}
    for stage, config in made.items():
        for engine in ("one", *ENGINES):
            found[stage, engine] = top / engine / stage
            whole = config | {"output_dir": str(found[stage, engine])}
            if engine == "one":
                run_stage(stage, whole)
            else:
                finished(launched(engine, [stage, setup.write(top / engine, stage, whole)]))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unfreeze_keeps_every_number(engine: str, runs: Any) -> None:
    ours, theirs = metrics(runs["sft", engine]), metrics(runs["sft", "one"])
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for name in {"loss", "grad_norm", "eval_loss", "learning_rate"} & set(other):
            assert mine[name] == pytest.approx(other[name], rel=PROCESSES, abs=PROCESSES), (other["step"], name)


@pytest.mark.parametrize("engine", ENGINES)
def test_so_it_does_inside_ppo(engine: str, runs: Any) -> None:
    ours, theirs = metrics(runs["ppo", engine]), metrics(runs["ppo", "one"])
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("score", "kl", "policy_loss", "value_loss", "grad_norm", "learning_rate"):
            assert mine[name] == pytest.approx(other[name], rel=PROCESSES_PPO, abs=PROCESSES_PPO), (other["step"], name)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("engine", ENGINES)
def test_its_model_loads_without_the_engine_and_is_that_of_one_process(engine: str, stage: str, runs: Any) -> None:
    one, other = (
        torch.cat([p.detach().flatten() for p in load_causal(tiny.source(runs[stage, name])).parameters()])
        for name in ("one", engine)
    )
    assert distance(other, one) < PROCESSES_PPO
