"""ZeRO-3 puts together what samples, once a rollout, and nothing else."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launching import finished, launched
from tests.project.code import ROOT

pytestmark = pytest.mark.slow


def test_only_the_policy_is_whole_while_it_samples_and_is_gathered_once(reward_folder: str) -> None:
    job = launched(
        "zero3", [reward_folder], module="tests.distributed.gathered", PYTHONPATH=str(ROOT), RLHF_TIMEOUT="120"
    )
    out = finished(job)
    told = [json.loads(line) for line in out.splitlines() if line.startswith('{"rank"')]
    assert sorted(one["rank"] for one in told) == [0, 1]
    for one in told:
        assert one["before"] == {"policy": ["NOT_AVAILABLE"], "value": ["NOT_AVAILABLE"]}
        assert len(one["steps"]) == 2
        for step in one["steps"]:
            assert step["policy"] == ["AVAILABLE"]
            assert step["value"] == step["after"] == ["NOT_AVAILABLE"]
            assert step["tokens"] > 1
            assert (step["inside"], step["all"]) == (0, one["weights"])  # each weight once, before the first token
        assert one["losses"] == told[0]["losses"]
        assert len({round(loss, 9) for loss in one["losses"]}) == 2
