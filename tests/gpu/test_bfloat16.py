"""PPO in bfloat16 at the width of a 0.6B model: its self-checks hold, and its phases compute in one precision.

The models are those of tests/bench/gpu_sides.py with two layers; on a CPU they are narrow too. A broken invariant (the
first ratio is not 1, sampled log-probs differ from teacher-forced ones, ...) is a note of the trainer's monitor.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.packed_batch import can_pack
from rlhf.trainers.ppo.health import TOLERANCES
from tests.bench import gpu_cases, gpu_sides

NARROW = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 128, "vocabulary": 4096}


@pytest.fixture(params=[0, 16], ids=["all weights", "LoRA"])
def case(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> gpu_cases.Case:
    """Two steps of 16 episodes."""
    shape = replace(gpu_cases.SHAPES["0.6b"], layers=2, **(NARROW if device.type == "cpu" else {}))
    monkeypatch.setitem(gpu_cases.SHAPES, "shallow", shape)
    return gpu_cases.Case("ours", "shallow", 16, 24, request.param, shortest=8, longest=40)


def test_self_checks_hold_and_every_phase_computes_in_bfloat16(
    case: gpu_cases.Case, device: torch.device, tmp_path: Path
) -> None:
    renderer, notes = gpu_sides.new_renderer(), list[str]()
    gpu_sides.model_config(case, renderer).save_pretrained(tmp_path)
    config = gpu_sides.ppo_config(case, tmp_path)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"precision": "bfloat16"})})
    trainer, _ = gpu_sides.make_trainer(case, config, device, renderer, notes)
    result: dict[str, Any] = {}
    gpu_sides.PhaseWatch(trainer, result)
    dtypes: dict[str, set[torch.dtype]] = {}

    def note_dtype(module: Any, inputs: Any, output: torch.Tensor) -> None:
        dtypes.setdefault(result["phase"], set()).add(output.dtype)

    policy = trainer.models.pair.policy
    assert can_pack(policy)  # this runs a probe in float32 once, which must not count below
    layer = next(module for name, module in policy.named_modules() if name.endswith("layers.1.mlp.down_proj"))
    layer.register_forward_hook(note_dtype)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    assert notes == []
    assert dtypes.keys() >= {"score", "update"}  # sampling may compute with a copy of the policy
    assert all(found == {torch.bfloat16} for found in dtypes.values()), dtypes
    assert {p.device.type for p in trained.values()} == {device.type}
    assert any(not torch.equal(p, before[name]) for name, p in trained.items())
    tolerance = TOLERANCES[torch.bfloat16]
    for stats in trainer.history:
        assert all(map(math.isfinite, stats.values()))
        assert stats["first_ratio_error"] <= tolerance.ratio
        assert stats["sampling_mismatch"] <= tolerance.sampling
