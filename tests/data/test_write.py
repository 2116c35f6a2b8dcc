"""A data file is written completely or not at all, and never replaces another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.write import write_jsonl
from rlhf.errors import ConfigError


def test_it_writes_one_object_a_line(tmp_path: Path) -> None:
    assert write_jsonl(tmp_path / "x.jsonl", iter([{"a": "ä\u2028"}, {"b": 1}])) == 2
    assert (tmp_path / "x.jsonl").read_bytes() == '{"a": "ä\u2028"}\n{"b": 1}\n'.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_half_a_file(error: type[BaseException], tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"a": 1}
        raise error

    with pytest.raises(error):
        write_jsonl(tmp_path / "x.jsonl", rows())
    assert list(tmp_path.iterdir()) == []


def test_it_refuses_an_existing_file_and_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"x\.jsonl: the output file exists; choose another name"):
        write_jsonl(tmp_path / "x.jsonl", [])
    assert (tmp_path / "x.jsonl").read_text() == "mine"
    with pytest.raises(ConfigError, match="no such folder to write into; create it first"):
        write_jsonl(tmp_path / "no" / "x.jsonl", [])
