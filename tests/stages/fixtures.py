"""Fixtures: stages that are run once on tiny models and data, for tests of several folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.stages import setup


@dataclass(frozen=True)
class Trained:
    """Finished runs of all stages, with their files."""

    top: Path
    base: str
    files: setup.Files
    configs: dict[str, dict[str, Any]]
    adapters: bool

    def run(self, stage: str) -> Path:
        """Return a stage's run directory."""
        return self.top / stage


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> setup.Files:
    """Return the data files by name."""
    return setup.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def run_stage(call_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return run_stage(name, config, *overrides) -> printed text, which fails the test if the stage fails."""
    folder = tmp_path_factory.mktemp("configs")

    def run(name: str, config: dict[str, Any], *overrides: str) -> str:
        code, out, err = call_cli([name, setup.write(folder, name, config), *overrides])
        assert code == 0, err
        return out

    return run


def _train(top: Path, base: Path, files: setup.Files, run_stage: Any, *, adapters: bool) -> Trained:
    made = setup.configs(top, str(base), files, adapters=adapters)
    for name, config in made.items():
        run_stage(name, config)
    return Trained(top, str(base), files, made, adapters)


@pytest.fixture(scope="session")
def full(tmp_path_factory: Any, tiny_model_dir: Path, files: setup.Files, run_stage: Any) -> Trained:
    """Finished stages that trained all weights."""
    return _train(tmp_path_factory.mktemp("full"), tiny_model_dir, files, run_stage, adapters=False)


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: Any, tiny_model_dir: Path, files: setup.Files, run_stage: Any) -> Trained:
    """Finished stages that trained adapters."""
    return _train(tmp_path_factory.mktemp("lora"), tiny_model_dir, files, run_stage, adapters=True)


@pytest.fixture(params=["full", "adapted"])
def trained(request: pytest.FixtureRequest) -> Trained:
    """Finished stages of both kinds."""
    return request.getfixturevalue(request.param)
