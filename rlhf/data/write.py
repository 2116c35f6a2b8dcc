"""Writing of data files: a file is written completely or not at all, and never replaces another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError


def refuse_existing_output(output: Path) -> None:
    """Refuse an output path that cannot be written. Raises: ConfigError if the file exists or its folder does not."""
    if output.exists():
        raise ConfigError("the output file exists", where=str(output), do="choose another name")
    if not output.parent.is_dir():
        raise ConfigError("no such folder to write into", where=str(output.parent), do="create it first")


def write_jsonl(output: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line and return their number. If it fails or is interrupted, no file is left.

    Raises: ConfigError as `refuse_existing_output`.
    """
    refuse_existing_output(output)
    temporary, count = output.with_name(output.name + ".tmp"), 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return count
