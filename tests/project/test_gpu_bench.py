"""The GPU benchmark's logic: its time budget, what becomes of a case without memory, its table, and a tiny run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import gpu
from tests.bench.gpu_cases import SHORTEST_RUN, Case, Result, cases, expected_seconds, problem_of
from tests.bench.gpu_sides import MARK, run_case
from tests.project.code import ROOT

OURS = Case("ours", "0.6b", 64, 256)
STEP = {"updates": 8.0, "step": 30.0, "sample": 20.0, "score": 4.0, "update": 6.0, "sample_tokens": 16384.0}
LIMITS = {"sample_limit": 2.0, "score_limit": 0.4, "update_limit": 0.6, "score_tokens": 2e4, "update_tokens": 2e4}
MACHINE = {
    "device": "a card",
    "gpu": True,
    "memory": 80 * 2**30,
    "versions": {"torch": "2.11"},
    "flops": 5e13,
    "flops_bfloat16": 7e14,
    "bandwidth": 2.5e12,
}


def result(**changes: Any) -> Result:
    """Return the result of a case that was measured."""
    memory = {"sample": 2.0**30, "score": 2.0**31, "update": 2.0**32}
    step = STEP | LIMITS
    found = {"status": "measured", "load": 10.0, "steps": [step, step], "peaks": memory, "predicted": memory}
    return found | changes


def test_the_command_and_its_sides_agree_on_the_mark_of_a_result() -> None:
    assert gpu.MARK == MARK


def test_the_most_important_cases_come_first_and_both_sides_do_equal_work() -> None:
    every = cases(None)
    assert [case.shape for case in every[:2]] == ["0.6b", "8b"]
    assert {(case.episodes, case.response) for case in every} == {(64, 256), (128, 512)}
    assert all(replace(case, side="ours") in every for case in every if case.side == "trl")
    assert {case.shape for case in cases("8b")} == {"8b"}
    assert {(case.side, case.lora > 0) for case in cases("tiny")} == {("ours", False), ("ours", True), ("trl", False)}


def test_the_expected_time_is_scaled_from_a_case_of_the_same_kind() -> None:
    larger = replace(OURS, episodes=128, response=512)
    assert expected_seconds(larger, []) == SHORTEST_RUN["0.6b"]
    assert expected_seconds(larger, [(replace(OURS, lora=16), result())]) == SHORTEST_RUN["0.6b"]
    assert expected_seconds(larger, [(OURS, {"status": "failed", "reason": "x"})]) == SHORTEST_RUN["0.6b"]
    # 2 x 20 s of sampling and 4 x 10 s of the rest, twice, after 10 s of loading
    assert expected_seconds(larger, [(OURS, result())]) == pytest.approx(10 + 2 * (40 + 40))


def measured(budget: float, outcome: Callable[[Case], tuple[float, Result]]) -> list[tuple[Case, Result]]:
    """Run `measure` on a pretended clock; `outcome` says how long each case takes and what comes of it."""
    now = [0.0]

    def run(arguments: list[str], seconds: float, first_on_path: str) -> Result:
        taken, found = outcome(Case(**json.loads(arguments[1])))
        assert seconds == budget - now[0]
        now[0] += taken
        return found

    return gpu.measure(cases(None), budget, Path("/nowhere"), "{}", run, lambda: now[0])


def test_cases_that_no_longer_fit_are_skipped_and_smaller_ones_still_run() -> None:
    found = measured(320, lambda case: (70.0, result()))
    assert [found_case.name for found_case, got in found if got["status"] == "measured"] == [
        "ours, 0.6b, all weights, 64 x 256",
        "ours, 8b, LoRA r16, bfloat16 base, 64 x 256",
        "ours, 0.6b, all weights, 128 x 512",
        "ours, 0.6b, LoRA r16, bfloat16 base, 64 x 256",
    ]
    reasons = {case.name: got["reason"] for case, got in found if got["status"] == "skipped"}
    assert reasons["ours, 8b, LoRA r16, bfloat16 base, 128 x 512"] == (
        "it would take about 170 s or more, and 110 s are left"
    )
    assert "pip install" in reasons["trl, 0.6b, all weights, 64 x 256"]


def test_a_case_that_runs_out_of_memory_is_a_row_and_not_the_end() -> None:
    full = {"status": "out of memory", "phase": "update", "steps": [], "notes": []}
    found = measured(1000, lambda case: (70.0, result() if case.lora else full))
    table = gpu.report(MACHINE, found)
    assert "| ours, 0.6b, all weights, 64 x 256 | out of memory in the phase 'update' |" in table
    assert "| ours, 8b, LoRA r16, bfloat16 base, 64 x 256 | sample | 20 | 819 | 10.0 % | 1.00 | 1.00 |" in table
    assert "| ours, 8b, LoRA r16, bfloat16 base, 64 x 256 | step | 30 | 546 | 10.0 % | 4.00 | 4.00 |" in table


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"), "out of memory"),
        (ValueError("another"), "failed"),
    ],
)
def test_an_error_ends_a_case_with_a_result(error: Exception, status: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(found: Result) -> None:
        found["phase"] = "score"
        raise error

    run_case(OURS, run)
    found = gpu.last_result(capsys.readouterr().out)
    assert found is not None
    assert (found["status"], found["phase"]) == (status, "score")
    assert str(error) in found["reason"]
    assert "score" in problem_of(found) or str(error) in problem_of(found)


def test_a_process_at_its_time_limit_is_ended_and_keeps_the_steps_that_it_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{MARK}{{\"steps\": [1]}}'\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found = gpu.run_side(["machine"], 1.0, "")
    assert problem_of(found) == "only the first step ended in time, which includes the warm-up"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    assert problem_of(gpu.run_side(["machine"], 1.0, "")) == "stopped: no step ended within 1 s"
    program.write_text("#!/bin/sh\necho one >&2\necho two >&2\nexit 3\n")
    assert problem_of(gpu.run_side(["machine"], 60.0, "")) == "failed: exit code 3: two"


@pytest.mark.parametrize(("release", "runs"), [("1.12.0", True), ("1.9.2", True), ("1.13.0", False)])
def test_only_a_release_of_trl_that_has_ppo_is_run(release: str, runs: bool, tmp_path: Path) -> None:
    (tmp_path / f"trl-{release}.dist-info").mkdir()
    assert (gpu.trl_problem(tmp_path) == "") == runs


def test_trl_is_compared_with_ours_only_if_both_made_equally_many_updates() -> None:
    theirs = replace(OURS, side="trl")
    slower = result(steps=[{"updates": 8.0, "step": 60.0, "sample": 50.0, "update": 10.0, "sample_tokens": 1.0}] * 2)
    assert gpu.comparison(theirs, slower, [(OURS, result())]) == [
        f"- {theirs.name}: its step takes 2.00 times as long as ours"
    ]
    fewer = result(steps=[STEP | {"updates": 4.0}])
    assert "not compared" in gpu.comparison(theirs, fewer, [(OURS, result())])[0]
    assert gpu.comparison(theirs, slower, []) == []


@pytest.mark.slow
def test_the_tiny_shape_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.gpu", "--shape", "tiny", "--out", str(tmp_path), "--trl", "/nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    *ours, trl = content["cases"]
    assert [(case["status"], len(case["steps"])) for case in ours] == [("measured", 2)] * 2
    for case in ours:
        for step in case["steps"]:
            assert step["updates"] == 2
            assert step["sample_tokens"] <= 16 * 8 < step["score_tokens"] == step["update_tokens"]
            assert all(step[f"{phase}_limit"] > 0 for phase in ("sample", "score", "update"))
        assert case["notes"] == []  # no invariant is broken
        assert case["peaks"].keys() == case["predicted"].keys() == {"sample", "score", "update"}
    assert "no TRL with PPO is installed" in trl["reason"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("| ours, tiny, all weights, 16 x 8 |") == 4


@pytest.mark.slow
def test_the_cases_mix_no_devices() -> None:
    command = [sys.executable, "-m", "tests.on_pretend_device", "bench"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
