"""What the other tests rely on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.sections import ModelSource
from rlhf.models.load import count_parameters
from rlhf.models.policy import load_causal
from tests.conftest import GPU_TESTS, NetworkForbidden, Run, only_gpu_tests
from tests.project.code import ROOT


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
def test_the_network_is_out_of_reach(address: tuple[str, int]) -> None:
    with socket.socket() as s, pytest.raises(NetworkForbidden):
        s.connect(address)
    with socket.socket() as s, pytest.raises(NetworkForbidden):
        s.connect_ex(address)


def test_this_machine_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())


def test_libraries_know_that_they_are_offline() -> None:
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # subprocesses inherit it


def test_gpus_are_invisible_here_and_in_subprocesses() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.device_count() == 0
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


@pytest.mark.parametrize(
    ("arguments", "folder", "visible"),
    [
        (["tests/gpu"], ROOT, True),
        (["-q", "-k", "ppo", "tests/gpu/conftest.py::test_x[a]"], ROOT, True),
        (["gpu"], GPU_TESTS.parent, True),
        ([], GPU_TESTS, True),
        (["tests/gpu", "--on-cpu"], ROOT, False),
        (["tests/gpu", "tests/models"], ROOT, False),
        (["tests"], ROOT, False),
        ([], ROOT, False),
        (["-m", "not slow", "-n", "2", "--dist", "loadfile"], ROOT, False),
    ],
)
def test_only_a_session_of_gpu_tests_sees_the_gpus(arguments: list[str], folder: Path, visible: bool) -> None:
    assert only_gpu_tests(arguments, folder) == visible


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1


def test_the_tiny_model(tiny_model_dir: Path, tiny_tokenizer: Any) -> None:
    model = load_causal(ModelSource(path=str(tiny_model_dir)))
    assert 20_000 < count_parameters(model)[1] < 40_000
    assert model.config.vocab_size == len(tiny_tokenizer)


def test_a_call_puts_everything_back(tmp_path: Path, call_cli: Run) -> None:
    folder, environment = Path.cwd(), dict(os.environ)
    assert call_cli(["show", "nope.yaml"], cwd=tmp_path).code == 2
    assert (Path.cwd(), dict(os.environ)) == (folder, environment)


def test_rows_of_text(tmp_path: Path, write_jsonl: Any) -> None:
    path = write_jsonl(tmp_path / "new" / "x.jsonl", [{"a": "ä"}, [1]])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [{"a": "ä"}, [1]]
