"""The documentation says what is there: the code map lists every module, links lead to files, the README is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.project.code import ROOT

README_LINES = 150
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def map_files(text: str) -> list[str]:
    """Return the files that a code map lists: rooms at the margin, their files indented below."""
    found, room = [], ""
    for line in "".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL)).splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.endswith("/"):
            room = name
        elif name:
            found.append(room + name if line.startswith(" ") else name)
    return found


def test_the_code_map_lists_every_module_once() -> None:
    listed = map_files((ROOT / "docs" / "code-map.md").read_text(encoding="utf-8"))
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT / "rlhf").rglob("*.py") if p.parent.name != "demo"}
    there -= {name for name in there if name.endswith("/__init__.py") and name != "rlhf/__init__.py"}
    assert len(listed) == len(set(listed))
    assert set(listed) - there == set(), "in docs/code-map.md, but not there"
    assert there - set(listed) == set(), "add a line to docs/code-map.md"


def test_a_code_map_is_read() -> None:
    text = "```text\na/b.py    one\n\na/c/       a room\n  d.py      two\n  e/f.py    three\n```"
    assert map_files(text) == ["a/b.py", "a/c/d.py", "a/c/e/f.py"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("path", LINKED, ids=lambda p: p.name)
def test_links_lead_to_files(path: Path) -> None:
    links = [link for link in LINK.findall(path.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
