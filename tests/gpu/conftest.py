"""Tests on a GPU: skipped where there is none, or run on the CPU with --on-cpu, which shows that their own code works.

    pytest tests/gpu                on a GPU (`make test-gpu`)
    pytest tests/gpu --on-cpu       on a CPU; tests marked `gpu`, which make no sense there, are skipped

Every test takes its device from the fixture `device`. In a session that also runs other tests the GPUs are invisible
(tests/conftest.py), so all tests here are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.conftest import GPUS_VISIBLE, ON_CPU

FOLDER = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --on-cpu."""
    parser.addoption(ON_CPU, action="store_true", default=False, help="run the tests of tests/gpu on the CPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of this folder that cannot run here."""
    on_cpu = config.getoption(ON_CPU, default=False)
    visible = os.environ[GPUS_VISIBLE] == "1"
    reason = reason_to_skip(on_cpu=on_cpu, visible=visible, gpu=not on_cpu and torch.cuda.is_available())
    for item in items:
        if FOLDER not in item.path.parents:
            continue
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif on_cpu and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="this test makes no sense on a CPU"))


def reason_to_skip(*, on_cpu: bool, visible: bool, gpu: bool) -> str:
    """Return why the tests of this folder cannot run, or an empty text.

    Args:
        on_cpu: whether --on-cpu was given.
        visible: whether the session leaves the GPUs visible.
        gpu: whether there is a CUDA device.
    """
    if on_cpu or gpu:
        return ""
    if not visible:
        return "GPU tests have a session of their own: run 'make test-gpu' or 'pytest tests/gpu'"
    return "there is no CUDA device; 'pytest tests/gpu --on-cpu' runs these tests on the CPU"


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that the tests are about."""
    return torch.device("cpu" if request.config.getoption(ON_CPU) else "cuda")
