"""The table of defects names tests that exist."""

from __future__ import annotations

import re

from tests.project.code import ROOT

TABLE = ROOT / "tests" / "DEFECTS.md"


def named(text: str) -> set[str]:
    """Test functions that a table names."""
    return set(re.findall(r"`(test_\w+)`", text))


def existing() -> set[str]:
    """All test functions of the project."""
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)}


def test_every_named_test_exists() -> None:
    assert named(TABLE.read_text(encoding="utf-8")) - existing() == set()
    assert named("| x | `test_that_is_not_there` |") - existing() == {"test_that_is_not_there"}


def test_every_defect_has_a_test_or_is_said_to_be_open() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not line.startswith("| defect")]
    assert len(rows) > 50
    assert all(named(line) or "| open" in line for line in rows)
