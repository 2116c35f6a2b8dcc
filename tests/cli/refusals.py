"""A mistake of a user: the command, what is broken before it, and the words its message must hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import Run

Prepare = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A command, what is broken before it, and words its message must hold: the place and the way out."""

    name: str
    command: str
    says: tuple[str, ...]
    prepare: Prepare | None = None


def put(name: str, content: str | bytes) -> Prepare:
    """Write a file."""

    def write(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def rows(name: str, *values: object) -> Prepare:
    """Write a JSONL file."""
    return put(name, "".join(json.dumps(v) + "\n" for v in values))


def change(name: str, **values: object) -> Prepare:
    """Change a JSON file."""

    def edit(place: Path) -> None:
        path = place / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return edit


def remove(*names: str) -> Prepare:
    """Delete files."""
    return lambda place: [(place / name).unlink() for name in names]


def other_run(place: Path) -> None:
    """A finished run of another seed in the output folder."""
    from rlhf.config.load import load_stage_config
    from rlhf.config.schema import SFTConfig
    from rlhf.runs.run_dir import RunDir

    config = load_stage_config(SFTConfig, place / "sft.yaml", ["seed=99"]).config
    run = RunDir(place / "out")
    run.start("sft", config, seed=99, processes=1, versions={}, inputs={})
    run.finish()


TALK = {"role": "user", "content": "hi"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
LONG = "a very long question " * 40
SPAM, HAM = ({"text": f"some {name}", "label": name} for name in ("spam", "ham"))


def check_refusal(
    case: Case, kind: str, place: Path, contents: Callable[[Path], dict[str, bytes]], call_cli: Run
) -> None:
    """The command ends with one message of that kind, which holds the words, and nothing in its folder has changed."""
    if case.prepare:
        case.prepare(place)
    before = contents(place)
    code, out, err = call_cli(case.command.split(), cwd=place)
    assert code == 2, out + err
    assert re.findall(r"^(\w+): ", err, re.MULTILINE)[0] == kind
    assert len(re.findall(r"^\w*(?:Error|Warning): ", err, re.MULTILINE)) == 1, err
    for words in case.says:
        assert words in err
    assert "Traceback" not in out + err
    assert contents(place) == before
