"""Under ZeRO-3, PPO gathers only the policy for sampling, and once a rollout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launching import finished, launched
from tests.project.code import ROOT

pytestmark = pytest.mark.slow


def test_only_the_policy_is_whole_while_it_samples_and_is_gathered_once(reward_folder: str, tmp_path: Path) -> None:
    finished(
        launched(
            "zero3",
            [reward_folder, str(tmp_path)],
            module="tests.distributed.gathered",
            PYTHONPATH=str(ROOT),
            RLHF_TIMEOUT="120",
        )
    )
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["0.json", "1.json"]
    told = [json.loads(path.read_text(encoding="utf-8")) for path in files]
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
