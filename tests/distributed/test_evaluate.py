"""Evaluation shares its prompts among processes, one process writes, and the numbers equal those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import finished, launched
from tests.stages import setup

pytestmark = pytest.mark.slow


def test_two_processes_measure_what_one_does(tiny_model_dir: Path, files: Any, call_cli: Any, tmp_path: Path) -> None:
    config = {
        "models": {"sft": {"path": str(tiny_model_dir)}},
        "prompts": {"all": {"path": files["prompts"]}},
        "text": [{"path": files["text"]}],
        "max_prompt_tokens": 64,
        "sampling": {"max_new_tokens": 8},
        "bootstrap": 20,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    process = launched("ddp", ["evaluate", setup.write(tmp_path, "two", config | {"output_dir": str(two)})])
    code, _, err = call_cli(["evaluate", setup.write(tmp_path, "one", config | {"output_dir": str(one)})])
    assert code == 0, err
    finished(process)
    for name in ("results.json", "answers.jsonl"):
        assert (two / name).read_text() == (one / name).read_text(), name
    assert json.loads((two / "results.json").read_text())["models"][0]["prompts"] > 2
