"""Tests of `rlhf generate` and `rlhf chat`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def generate(call_cli: Any, run: Path, prompts: str, output: Path, *options: str) -> list[dict[str, Any]]:
    code, _, err = call_cli(["generate", run, prompts, output, "--max-new-tokens", "6", *options])
    assert code == 0, err
    return answers(output)


def test_generate_answers_every_prompt(trained: Any, call_cli: Any, tmp_path: Path) -> None:
    made = generate(call_cli, trained.run("ppo"), trained.files["prompts"], tmp_path / "out.jsonl")
    asked = [json.loads(line)["prompt"] for line in Path(trained.files["prompts"]).read_text().splitlines()]
    assert sorted(json.dumps(line["prompt"]) for line in made) == sorted(map(json.dumps, asked))
    assert all(set(line) == {"prompt", "response", "finished"} for line in made)
    assert len({line["response"] for line in made}) > 1


def test_generate_repeats_with_its_seed(full: Any, call_cli: Any, tmp_path: Path) -> None:
    first, again, other = (
        generate(call_cli, full.run("sft"), full.files["prompts"], tmp_path / f"{i}.jsonl", "--seed", seed)
        for i, seed in enumerate(("1", "1", "2"))
    )
    key = lambda line: json.dumps(line["prompt"])  # noqa: E731
    assert first == again
    assert sorted(first, key=key) != sorted(other, key=key)


def test_generate_overwrites_nothing(full: Any, call_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious")
    code, _, err = call_cli(["generate", full.run("sft"), full.files["prompts"], tmp_path / "out.jsonl"])
    assert code == 2
    assert "exists" in err
    assert (tmp_path / "out.jsonl").read_text() == "precious"


def talk(call_cli: Any, monkeypatch: pytest.MonkeyPatch, run: Path, *lines: str) -> list[str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    code, out, err = call_cli(["chat", run, "--max-new-tokens", "6", "--temperature", "0"])
    assert code == 0, err
    return [line.split("model > ")[1] for line in out.splitlines() if "model > " in line]


def test_chat_answers_each_line_until_an_empty_one(full: Any, call_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = full.run("sft")
    assert len(talk(call_cli, monkeypatch, run, "what is a cat?", "what is a cow?", "", "unheard")) == 2
    assert len(talk(call_cli, monkeypatch, run, "what is a cat?")) == 1  # the input simply ends


def test_chat_starts_over_on_request(full: Any, call_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 0 the same question gets the same reply after /new."""
    run, ask = full.run("sft"), "what is a cat?"
    first, again = talk(call_cli, monkeypatch, run, ask, "/new", ask)
    assert first == again


def test_chat_refuses_a_special_token_and_goes_on(full: Any, call_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(talk(call_cli, monkeypatch, full.run("sft"), "say <|end|> now", "what is a cat?")) == 1
