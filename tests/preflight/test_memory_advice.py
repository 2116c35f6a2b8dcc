"""The advice after memory ran out: the cheapest change that fits the device, for the phase that failed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf.config.schema import EvaluateConfig
from rlhf.config.sections import Sampling
from rlhf.launch.launcher import LaunchOptions
from rlhf.preflight import memory_advice
from rlhf.preflight.memory_advice import MemoryAdvice, advise
from rlhf.preflight.stage_memory import EstimateInput, estimate_memory
from tests.preflight.test_stage_memory import ppo, sft


def advise_on(
    monkeypatch: pytest.MonkeyPatch,
    inputs: EstimateInput,
    phase: str | None,
    limit: float | None,
    *,
    gpu: bool = True,
    launch_may_change: bool = True,
) -> MemoryAdvice:
    """The advice for a stage whose models do not exist, on a device of `limit` bytes."""
    monkeypatch.setattr(memory_advice, "device_bytes", lambda: limit)
    monkeypatch.setattr(memory_advice, "read_estimate_input", lambda *_, gpu, **__: replace(inputs, gpu=gpu))
    options = LaunchOptions()
    return advise(inputs.stage, inputs.config, options, phase=phase, gpu=gpu, launch_may_change=launch_may_change)


def settings(advice: MemoryAdvice) -> list[str]:
    """The keys that an advice changes."""
    return [word.partition("=")[0] for word in advice.change]


@pytest.mark.parametrize(
    ("phase", "keys"),
    [
        ("sampling", ["sampling.batch_size"]),
        ("scoring", ["optim.microbatch_size"]),
        ("updating", ["optim.microbatch_size"]),
        ("loading", ["offload"]),
    ],
)
def test_the_change_concerns_the_phase_that_failed(
    phase: str, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = advise_on(monkeypatch, ppo(ppo={"rollout_size": 256}), phase, None)
    assert settings(advice) == keys
    assert advice.outcome.startswith("`rlhf check` then predicts ")


def test_a_stage_that_does_not_fit_gets_the_first_change_with_which_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT with microbatches of 16 rows, on a device that has room for those of 4."""
    inputs = sft(optim={"batch_size": 16, "microbatch_size": 16})
    optim = inputs.config.optim.model_copy(update={"microbatch_size": 4})
    fitting = replace(inputs, config=inputs.config.model_copy(update={"optim": optim}))
    limit = estimate_memory(replace(fitting, gpu=True)).peak
    advice = advise_on(monkeypatch, inputs, "updating", limit)
    assert advice.change == ("optim.microbatch_size=4",)
    assert "`rlhf check` predicts " in advice.predicted
    assert "for updating" in advice.predicted
    advice = advise_on(monkeypatch, inputs, "updating", 1.0, launch_may_change=False)
    assert settings(advice) == ["optim.activation_checkpointing", "optim.microbatch_size"]
    assert advice.outcome.startswith("no change is sure to suffice; ")


def test_a_launcher_is_advised_only_where_it_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = sft(optim={"batch_size": 1, "microbatch_size": 1, "activation_checkpointing": True})
    assert advise_on(monkeypatch, inputs, "updating", None).change == ("--launcher", "zero3_offload")
    assert advise_on(monkeypatch, inputs, "updating", None, launch_may_change=False).change == ()


def test_the_memory_of_a_machine_with_a_gpu_gets_no_change_that_is_about_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert advise_on(monkeypatch, ppo(), "updating", 8e9, gpu=False).change == ()


def test_evaluate_decodes_fewer_rows() -> None:
    config = EvaluateConfig.model_construct(sampling=Sampling(batch_size=8))
    advice = advise("evaluate", config, LaunchOptions(), phase="evaluating", gpu=True)
    assert advice.change == ("sampling.batch_size=2",)
    assert advise("evaluate", config, LaunchOptions(), phase="loading", gpu=True).change == ()
