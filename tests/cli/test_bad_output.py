"""An output that would overwrite something is refused in one message; wrong usage shows the usage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.refusals import Case, check_refusal, other_run, put
from tests.conftest import Run

OUTPUT = [
    Case(
        "foreign files",
        "sft sft.yaml",
        (
            "output_dir out: the output folder contains files that do not belong to a run (found: mine.txt)",
            "choose another output_dir",
        ),
        put("out/mine.txt", "x"),
    ),
    Case(
        "another run",
        "sft sft.yaml",
        (
            "output_dir out: the output folder already holds another run (found: sft, finished)",
            "choose another output_dir, or delete",
        ),
        other_run,
    ),
    Case("another stage", "ppo ppo.yaml", ("output_dir out: the output folder already holds another run",), other_run),
    Case("a file", "sft sft.yaml", ("output_dir out: the output folder is a file", "choose another"), put("out", "x")),
    Case(
        "an existing answer file",
        "generate sft prompts.jsonl out.jsonl",
        ("out.jsonl: the output file exists", "choose"),
        put("out.jsonl", "x"),
    ),
    Case(
        "an existing file of labels",
        "data weak weak.yaml",
        ("out.jsonl: the output file exists", "choose"),
        put("out.jsonl", "x"),
    ),
    Case(
        "a file of labels in no folder",
        "data weak weak.yaml output=no/out.jsonl",
        ("no: no such folder", "create it first"),
    ),
    Case(
        "an answer file in no folder",
        "generate sft prompts.jsonl no/out.jsonl",
        ("no: no such folder", "create it first"),
    ),
]


@pytest.mark.parametrize("case", OUTPUT, ids=lambda case: case.name)
def test_one_message_and_nothing_left_behind(
    case: Case, place: Path, contents: Callable[[Path], dict[str, bytes]], call_cli: Run
) -> None:
    check_refusal(case, "ConfigError", place, contents, call_cli)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("sfft sft.yaml", "No such command 'sfft'"),
        ("sft sft.yaml --quite", "No such option: --quite"),
        ("sft", "Missing argument"),
        ("data dmeo", "No such command 'dmeo'"),
        ("data weak", "Missing argument"),
        ("generate sft prompts.jsonl out.jsonl --max-new-tokens -1", "--max-new-tokens"),
        ("generate sft prompts.jsonl out.jsonl --temperature -0.5", "--temperature"),
        ("chat sft --max-new-tokens many", "--max-new-tokens"),
    ],
)
def test_wrong_usage_shows_the_usage(
    command: str, says: str, place: Path, contents: Callable[[Path], dict[str, bytes]], call_cli: Run
) -> None:
    before = contents(place)
    code, out, err = call_cli(command.split(), cwd=place)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ")
    assert f"Error: {says}" in err or f"Error: Invalid value for '{says}'" in err
    assert "-h' for help" in err
    assert contents(place) == before


def test_the_place_itself_is_good(place: Path, call_cli: Run) -> None:
    """Without a planted fault the same commands work, so that each case fails for its own reason."""
    stages = [f"{name} {name}.yaml output_dir=out-{name}" for name in ("sft", "reward", "classify", "ppo", "evaluate")]
    for command in (
        *stages,
        "data weak weak.yaml output=weak.jsonl",
        "generate sft prompts.jsonl out.jsonl --max-new-tokens 8",
    ):
        code, _, err = call_cli([*command.split(), "--quiet"], cwd=place)
        assert (code, err) == (0, ""), command
    assert len((place / "weak.jsonl").read_text(encoding="utf-8").splitlines()) == 10
    assert (place / "out-ppo" / "model" / "config.json").is_file()
    assert len((place / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 10


@pytest.mark.slow
def test_the_same_in_a_process_of_its_own(
    place: Path, contents: Callable[[Path], dict[str, bytes]], run_cli: Run
) -> None:
    """What the libraries print or leave behind does not show inside this process."""
    before = contents(place)
    code, _, err = run_cli(["ppo", "ppo.yaml", "reward_model.path=sft", "ppo.normalize_scores=raw"], cwd=place)
    assert code == 2
    assert err.startswith("CheckpointError: sft: not a reward model")
    assert len(err.splitlines()) == 1
    assert contents(place) == before
