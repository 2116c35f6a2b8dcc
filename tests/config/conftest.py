"""A small valid SFT configuration file and a function that writes others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SFT = """\
output_dir: runs/x
model: {path: some/model}
data:
  train:
    - path: a.jsonl
    - path: b.jsonl
optim:
  learning_rate: 1e-3
"""


@pytest.fixture
def sft_yaml(tmp_path: Path) -> Path:
    """A valid SFT configuration of eight lines."""
    path = tmp_path / "sft.yaml"
    path.write_text(SFT, encoding="utf-8")
    return path


@pytest.fixture
def write_yaml(tmp_path: Path) -> Callable[[str, str], Path]:
    """write_yaml(name, text) -> path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write
