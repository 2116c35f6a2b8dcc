"""The public names of the package: imported when they are used, and a stage run from Python is the command's."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import rlhf
from rlhf import version
from rlhf.config.schema import SFTConfig
from rlhf.errors import ConfigError
from tests.project.code import ROOT
from tests.stages import setup


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, rlhf; print(sorted({'torch', 'transformers', 'trl', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_no_other() -> None:
    assert set(dir(rlhf)) == set(rlhf.__all__)
    for name in rlhf.__all__:
        assert getattr(rlhf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainr'"):
        rlhf.PPOTrainr  # noqa: B018


def test_the_version_is_that_of_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert rlhf.__version__ == version.__version__ == project["version"]


def test_a_stage_runs_from_a_file_and_from_a_configuration(tiny_model_dir: Path, files: Any, tmp_path: Path) -> None:
    config = setup.configs(tmp_path, str(tiny_model_dir), files)["sft"]
    path = setup.write(tmp_path, "sft", config)
    loaded = rlhf.load_config(path, ["seed=2"])
    assert isinstance(loaded, SFTConfig)
    assert loaded.seed == 2
    first = rlhf.run_stage("sft", path, ["optim.max_updates=1"], quiet=True)
    assert first.path == tmp_path / "sft"
    assert not first.skipped
    again = rlhf.run_stage("sft", rlhf.load_config(path, ["optim.max_updates=1"]), quiet=True)
    assert again.skipped
    assert again.summary == first.summary


def test_what_is_no_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stage called 'sfft'"):
        rlhf.run_stage("sfft", "x.yaml")
    with pytest.raises(ConfigError, match="give stage="):
        rlhf.load_config(tmp_path / "mine.yaml")
