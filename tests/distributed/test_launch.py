"""A launch that does not start what was requested is rejected. (test_parity.py covers correct launches.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import finished, launched
from tests.stages import setup
from tests.stages.setup import info

pytestmark = pytest.mark.slow


def test_a_wrong_number_of_processes_is_refused(tiny_model_dir: Path, files: Any, tmp_path: Path) -> None:
    """Two processes are requested and the file starts one. The file for one process works."""
    config = setup.configs(tmp_path, str(tiny_model_dir), files)["sft"]
    path = setup.write(tmp_path, "sft", config)
    right = setup.write(tmp_path, "right", config | {"output_dir": str(tmp_path / "right")})
    wrong, single = (
        launched("single", ["sft", path], RLHF_EXPECTED_PROCESSES="2"),
        launched("single", ["sft", right], RLHF_EXPECTED_PROCESSES="1"),
    )
    out, _ = wrong.communicate(timeout=280)
    assert wrong.returncode != 0
    assert "1 instead of 2" in out
    assert not (tmp_path / "sft").exists()
    finished(single)
    assert info(tmp_path / "right")["processes"] == 1


def test_deepspeed_that_would_be_turned_off_is_refused(tiny_model_dir: Path, files: Any, tmp_path: Path) -> None:
    path = setup.write(tmp_path, "sft", setup.configs(tmp_path, str(tiny_model_dir), files)["sft"])
    process = launched("zero2", ["sft", path], ACCELERATE_USE_CPU="true")
    out, _ = process.communicate(timeout=280)
    assert process.returncode != 0
    assert "DeepSpeed was requested, but another engine would run" in out


def test_what_would_run_as_something_else_is_refused(tiny_model_dir: Path, files: Any, tmp_path: Path) -> None:
    """FSDP2 on a CPU would be plain data parallelism, and MULTI_CPU one process.

    Both would end with exit code 0.
    """
    path = setup.write(tmp_path, "sft", setup.configs(tmp_path, str(tiny_model_dir), files)["sft"])
    (tmp_path / "multi.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
        "num_machines: 1\nmixed_precision: 'no'\n"
    )
    running = launched("fsdp2", ["sft", path]), launched(str(tmp_path / "multi"), ["sft", path])
    for process, says in zip(
        running, ("FSDP on a CPU would silently become", "requested, but accelerate started one"), strict=True
    ):
        out, _ = process.communicate(timeout=280)
        assert process.returncode != 0
        assert says in out
    assert not (tmp_path / "sft").exists()


def test_a_batch_that_two_processes_cannot_share_is_refused_before_anything_is_written(
    tiny_model_dir: Path, files: Any, call_cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = setup.configs(tmp_path, str(tiny_model_dir), files)["sft"]
    code, _, err = call_cli(["sft", setup.write(tmp_path, "sft", config)])
    assert code == 2
    assert "cannot be shared equally by 3 processes" in err
    assert not (tmp_path / "sft").exists()
