"""DeepSpeed with one process (NCCL on a GPU) gives the numbers of a run without it, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.parity import compare
from tests.stages import setup
from tests.tolerances import DEVICES

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path, files: setup.Files, run_stage: Any, tmp_path_factory: Any) -> dict[str, dict[str, Any]]:
    """Stage -> configuration; the stages have run without DeepSpeed."""
    made = setup.configs(tmp_path_factory.mktemp("zero"), str(tiny_model_dir), files)
    for stage in STAGES:
        made[stage] |= {"optim": made[stage]["optim"] | {"precision": "float32"}}
        run_stage(stage, made[stage])
    return made


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
def test_one_process_of_zero_repeats_a_plain_run(
    launcher: str, stage: str, plain: dict[str, dict[str, Any]], run_cli: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = setup.write(tmp_path, stage, plain[stage] | {"output_dir": str(run)})
    code, out, err = run_cli([stage, path, "--launcher", launcher, "--num-processes", "1"], timeout=280)
    assert code == 0, (out + err)[-3000:]
    apart = compare(run, Path(plain[stage]["output_dir"]), stage)
    assert apart
    assert {name: value for name, value in apart.items() if not value < DEVICES} == {}
