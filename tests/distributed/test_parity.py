"""Two processes of every engine give the numbers, samples and models of one process, in runs that can show errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.models.policy import load_causal
from tests.distributed.cases import ENGINES, ONE, UPDATES
from tests.distributed.parity import PPO, TRAINED, Parity, accepted, compare, deviation, responses, unlike, updates
from tests.models import tiny
from tests.stages.setup import info, metrics
from tests.tolerances import PROCESSES, PROCESSES_PPO, distance

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # a busy machine
BY_BATCH = ("token_accuracy", "entropy")
"""TRL averages them over microbatches, whatever the number of tokens in each: they depend on who has which rows."""
EXTRAS = ("full/sft-phases", "full/sft-packed", "full/ppo-phases", "full/ppo-text", "full/ppo-text-balanced")


@pytest.fixture(scope="module")
def one(tiny_model_dir: Path, tmp_path_factory: Any) -> Parity:
    """All runs, planned; those of one process and the broken ones are done."""
    parity = Parity(tmp_path_factory.mktemp("parity"), tiny_model_dir)
    parity.run(ONE)
    return parity


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, one: Parity) -> str:
    """An engine whose runs are done as well."""
    one.run(request.param)
    return request.param


def test_every_loss_and_every_gradient_norm_is_that_of_one_process(engine: str, one: Parity) -> None:
    beyond = {
        (case.folder, name): apart
        for case in one.of(engine)
        for name, apart in one.compare(engine, case).items()
        if apart > PROCESSES
    }
    assert beyond == {}


def test_so_is_everything_else_that_is_written(engine: str, one: Parity) -> None:
    for case in one.of(engine):
        ours, theirs = (metrics(one.folder(name, case)) for name in (engine, ONE))
        assert [line.keys() for line in ours] == [line.keys() for line in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.pop("first_ratio_error", 0.0) < PROCESSES_PPO
            for name, value in mine.items():
                if case.stage == "sft" and name in BY_BATCH:
                    continue
                expected = pytest.approx(other[name], abs=PROCESSES_PPO, rel=PROCESSES_PPO)
                assert value == expected, (case.folder, other["step"], name)


def test_every_sampled_token_is_the_same(engine: str, one: Parity) -> None:
    """PPO's losses are then of the same rollouts, and rollouts do not depend on the number of processes."""
    assert unlike(one, [engine]) == []


def test_its_models_are_those_of_one_process(engine: str, one: Parity) -> None:
    for case in one.of(engine):
        ours, theirs = (one.folder(name, case) for name in (engine, ONE))
        files = sorted(path.relative_to(theirs) for path in theirs.glob("*model/*.safetensors"))
        assert len(files) == (2 if case.stage == "ppo" else 1)
        for file in files:
            mine, other = (load_file(run / file) for run in (ours, theirs))
            assert [(name, mine[name].shape) for name in sorted(other)] == [(n, other[n].shape) for n in sorted(other)]
            whole, expected = (torch.cat([w[name].flatten() for name in sorted(other)]) for w in (mine, other))
            assert distance(whole, expected) < PROCESSES_PPO, (case.folder, file)


@pytest.mark.parametrize("folder", ["full/sft", "full/ppo"])
def test_they_load_without_the_engine(engine: str, folder: str, one: Parity) -> None:
    models = [load_causal(tiny.source(one.top / name / folder)) for name in (engine, ONE)]
    mine, other = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    assert distance(mine, other) < PROCESSES_PPO


def test_its_runs_had_two_processes(engine: str, one: Parity) -> None:
    for case in one.of(engine):
        for name, processes in ((engine, 2), (ONE, 1)):
            run = info(one.folder(name, case))
            assert (run["status"], run["processes"]) == ("finished", processes), case.folder


def test_these_runs_can_tell(one: Parity) -> None:
    """The comparison is meaningful.

    There are enough updates, the numbers change by far more than the tolerance, a clip is active, and responses differ.
    """
    for case in one.cases:
        run = one.folder(ONE, case)
        lines = [line for line in metrics(run) if "grad_norm" in line]
        assert case.folder in EXTRAS or updates(run, case.stage) >= UPDATES
        for name in PPO if case.stage == "ppo" else ("loss", "grad_norm"):
            values = [line[name] for line in lines]
            assert max(values) - min(values) > 100 * PROCESSES * max(map(abs, values)), (case.folder, name)
        assert max(line["grad_norm"] for line in lines) > case.config["optim"]["max_grad_norm"], case.folder
        if case.stage == "ppo":
            said = [tuple(response) for step in responses(run) for response in step]
            assert len(set(said)) > len(said) / 2, case.folder
        assert ("ptx_loss" in lines[-1]) == ("text" in case.folder)


def test_a_broken_run_is_not_accepted(one: Parity) -> None:
    assert accepted(one) == []
    for broken, right in one.twins:
        apart = compare(one.folder(ONE, broken), one.folder(ONE, right), broken.stage)
        assert max(apart.values()) > 1000 * PROCESSES, broken.name
        if broken.stage == "ppo":
            assert responses(one.folder(ONE, broken)) != responses(one.folder(ONE, right))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [([], []), ([1.0], [1.0, 1.0]), ([math.nan], [1.0]), ([1.0], [math.nan]), ([math.inf], [math.inf])],
)
def test_what_cannot_be_compared_is_far_apart(ours: list[float], theirs: list[float]) -> None:
    lines = ([{"step": i, "loss": x} for i, x in enumerate(values)] for values in (ours, theirs))
    assert deviation("loss", *lines) == math.inf


def test_a_deviation_is_the_largest_one_and_relative() -> None:
    lines = [{"step": 1, "loss": 2.0, "kl": 0.5}, {"step": 2, "loss": 0.25, "kl": 4.0}, {"step": 3, "eval_loss": 1.0}]
    moved = [{"step": 1, "loss": 2.5, "kl": 0.75}, {"step": 2, "loss": 0.5, "kl": 4.5}, {"step": 3, "eval_loss": 1.0}]
    assert {name: deviation(name, moved, lines) for name in (*TRAINED, "kl") if name != "grad_norm"} == {
        "loss": 1.0,
        "eval_loss": 0.0,
        "kl": 0.25,
    }
