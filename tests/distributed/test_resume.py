"""A checkpoint depends neither on the engine nor on the number of processes.

A run that resumes from it ends as an uninterrupted run of one process; with the same engine and number of processes,
it ends bit for bit as its own uninterrupted run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.checkpointing.files import verify_checkpoint, write_manifest
from tests.distributed.launching import finished, launched
from tests.faults.setup import differences, weights
from tests.stages import setup
from tests.stages.setup import metrics
from tests.tolerances import PROCESSES, distance

pytestmark = pytest.mark.slow
STAGES = ("sft", "ppo")
CUT = {"sft": 2, "ppo": 1}  # updates, steps; of 4 and 3
KINDS = ("full", "lora")
SHARDED = Path(__file__).with_name("zero3")  # configs/accelerate/zero3.yaml, with nothing too small to be sharded


def cut(run: Path, other: Path, last: int) -> None:
    """Copy a finished run as if it had been killed after its checkpoint of update or step `last`."""
    shutil.copytree(run, other)
    for name in ("model", "value_model"):
        shutil.rmtree(other / name, ignore_errors=True)
    facts = json.loads((other / "run.json").read_text(encoding="utf-8"))
    (other / "run.json").write_text(json.dumps(facts | {"status": "interrupted"}), encoding="utf-8")
    config = other / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(run), str(other)), encoding="utf-8")
    kept = [path for path in (other / "checkpoints").glob("*-[0-9]*") if int(path.name.split("-")[1]) <= last]
    for path in (other / "checkpoints").glob("*-[0-9]*"):
        if path not in kept:
            shutil.rmtree(path)
    assert kept


def forget_moments(run: Path) -> None:
    """Change a checkpoint as if its optimizer state had been lost."""
    for folder in (run / "checkpoints").glob("*-[0-9]*"):
        about = verify_checkpoint(folder).about
        for path in folder.glob("trained-*.safetensors"):
            save_file({k: v.contiguous() for k, v in load_file(path).items() if k.endswith(":weight")}, path)
        write_manifest(folder, **about)


class Runs:
    """Run directories by the engines that began and ended them, such as 'zero3>one'."""

    def __init__(self, top: Path, configs: dict[str, dict[str, dict[str, Any]]]) -> None:
        self.top, self.configs = top, configs

    def folder(self, name: str, kind: str, stage: str) -> Path:
        """Return the folder of a run."""
        return self.top / name / kind / stage

    def config(self, name: str, kind: str, stage: str) -> dict[str, Any]:
        """Return the configuration of a run."""
        return self.configs[kind][stage] | {"output_dir": str(self.folder(name, kind, stage))}

    def copy(self, name: str, began: str) -> None:
        """Prepare run `name` to resume from early checkpoints of run `began`."""
        for kind in KINDS:
            for stage in STAGES:
                cut(self.folder(began, kind, stage), self.folder(name, kind, stage), CUT[stage])

    def job(self, *names: str) -> str:
        """Return the list of stages for one launch."""
        pairs = [
            (stage, setup.write(self.top / "configs" / name / kind, stage, self.config(name, kind, stage)))
            for name in names
            for kind in KINDS
            for stage in STAGES
        ]
        path = self.top / f"{'-'.join(names).replace('>', '')}.json"
        path.write_text(json.dumps(pairs), encoding="utf-8")
        return str(path)


@pytest.fixture(scope="module")
def runs(tiny_model_dir: Path, files: Any, run_stage: Any, tmp_path_factory: Any) -> Runs:
    """All runs, done in three launches and one process."""
    top = tmp_path_factory.mktemp("resume")
    configs = {
        kind: setup.configs(top / "one" / kind, str(tiny_model_dir), files, adapters=kind == "lora") for kind in KINDS
    }
    for made in configs.values():
        for stage in ("sft", "reward"):
            # 19 and 5 records: incomplete batches.
            made[stage]["data"] = made[stage]["data"] | {"validation_fraction": 0.2}
        made["ppo"] |= {"checkpoint_every": 1, "sample_every": 1, "ppo": made["ppo"]["ppo"] | {"ema": 0.5}}
        for stage in STAGES:
            made[stage] |= {"saving": {"share": 0.0, "keep": 9}}
        for stage in ("sft", "reward", "ppo"):
            run_stage(stage, made[stage])
    found = Runs(top, configs)

    def launch(engine: str | Path, *names: str) -> None:
        finished(launched(engine, [found.job(*names)], module="tests.distributed.parity_job"))

    launch(SHARDED, "zero3")
    for name in ("one>zero3", "zero3>zero3", "one>zero2", "zero3>zero2", "zero3>one", "one>forgotten"):
        found.copy(name, name.split(">")[0])
    launch(SHARDED, "one>zero3", "zero3>zero3")
    launch("zero2", "one>zero2", "zero3>zero2")
    forget_moments(found.folder("one>forgotten", "full", "sft"))
    for kind in KINDS:
        for stage in STAGES:
            run_stage(stage, found.config("zero3>one", kind, stage))
    return found


def deviation(run: Path, other: Path) -> float:
    """Return the largest relative deviation of losses, norms, scores and weights."""
    ours, theirs = metrics(run), metrics(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    names = {"loss", "eval_loss", "policy_loss", "value_loss", "score", "kl", "grad_norm"}
    worst = max(
        abs(mine[name] - other[name]) / max(abs(other[name]), 0.1)
        for mine, other in zip(ours, theirs, strict=True)
        for name in names & other.keys()
    )
    one, two = (torch.cat([v.flatten() for v in weights(folder / "model").values()]) for folder in (run, other))
    return max(worst, distance(one, two))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["zero3>one", "one>zero3", "one>zero2", "zero3>zero2"])
def test_another_engine_or_number_of_processes_goes_on_with_the_same_numbers(
    name: str, kind: str, stage: str, runs: Runs
) -> None:
    assert deviation(runs.folder(name, kind, stage), runs.folder("one", kind, stage)) < PROCESSES


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_processes_go_on_bit_for_bit(kind: str, stage: str, runs: Runs) -> None:
    assert differences(runs.folder("zero3>zero3", kind, stage), runs.folder("zero3", kind, stage)) == []


def test_optimizer_state_that_is_lost_would_be_seen(run_stage: Any, runs: Runs) -> None:
    run_stage("sft", runs.config("one>forgotten", "full", "sft"))
    assert deviation(runs.folder("one>forgotten", "full", "sft"), runs.folder("one", "full", "sft")) > 100 * PROCESSES
