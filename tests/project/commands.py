"""Commands and configurations in text: find them, and say what is wrong with each without running it."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from rlhf.cli.main import app
from rlhf.config.load import load_pipeline, load_stage_config, read_yaml, validate_config
from rlhf.config.schema import RECIPES
from rlhf.errors import RLHFError
from tests.project.code import ROOT

FENCE = re.compile(r"^```(?:bash|sh|shell|console)\s*$(.*?)^```", re.MULTILINE | re.DOTALL)
YAML_FENCE = re.compile(r"(?:^<!-- config: (\S+) -->\n)?^```ya?ml[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SAMPLE_CONFIGS = {
    "classify": "demo/experiments/classify-rules.yaml",
    "weak": "demo/experiments/weak.yaml",
}
"""Shipped configuration of a stage that has no configs/demo/STAGE.yaml."""
OPERATORS = {"&&", "||", ";", "|", "&"}


def in_markdown(text: str) -> Iterator[str]:
    """The lines of its shell blocks, continued lines joined."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.strip().removeprefix("$ ")


def yaml_in_markdown(text: str) -> Iterator[tuple[str, str]]:
    """Yield (stage, text) of its YAML blocks; the stage is '' unless a comment `<!-- config: STAGE -->` names it."""
    yield from YAML_FENCE.findall(text)


def yaml_problems(stage: str, text: str) -> list[str]:
    """What is wrong with a YAML block; one of a stage is checked as a part of that stage's shipped configuration."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"not valid YAML: {error}"]
    if not stage:
        return []
    if stage not in RECIPES:
        return [f"no such stage '{stage}'"]
    shipped, origins = read_yaml(ROOT / "configs" / SAMPLE_CONFIGS.get(stage, f"demo/{stage}.yaml"))
    try:
        validate_config(RECIPES[stage], _merged(shipped, values), origins, "YAML block")
    except RLHFError as error:
        return [str(error)]
    return []


def _merged(shipped: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the shipped values with those of a block in their place; `data` keeps what the block does not give."""
    merged = shipped | values
    if isinstance(merged.get("data"), dict) and isinstance(shipped.get("data"), dict):
        merged["data"] = shipped["data"] | merged["data"]
    return merged


def in_yaml_header(text: str) -> Iterator[str]:
    """What a configuration says about how to run it: '# Run: COMMAND  (a remark after two blanks)'."""
    for line in text.splitlines():
        if match := re.match(r"#\s*Run: (.*)", line):
            yield re.split(r"\s{2,}", match[1])[0]


def problems(line: str) -> list[str]:
    """What is wrong with a line that starts with rlhf, accelerate launch or make; nothing for others."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        return [f"{line}: {error}"]
    found: list[str] = []
    command: list[str] = []
    for word in [*words, ";"]:
        if word in OPERATORS:
            found += [f"{line}: {what}" for what in _check(command)]
            command = []
        elif word.endswith(";"):
            found += [f"{line}: {what}" for what in _check([*command, word[:-1]])]
            command = []
        else:
            command.append(word)
    return found


def _check(words: list[str]) -> list[str]:
    words = [w for i, w in enumerate(words) if not re.match(r"\d?>", w) and not (i and re.match(r"\d?>", words[i - 1]))]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:2] == ["accelerate", "launch"]:
        return _accelerate(words[2:])
    if words[:3] in (["python", "-m", "rlhf"], ["python3", "-m", "rlhf"]):
        return _rlhf(words[3:])
    if words and Path(words[0]).name == "rlhf":
        return _rlhf(words[1:])
    if words[:1] == ["make"]:
        return _make(words[1:])
    return []


def _rlhf(arguments: list[str]) -> list[str]:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if not arguments or arguments[0] in ("-h", "--help"):
        return []
    name = arguments[0]
    while name in commands and hasattr(commands[name], "commands"):  # a group, which alone shows its help
        commands, arguments = commands[name].commands, arguments[1:]
        if not arguments or arguments[0] in ("-h", "--help"):
            return []
        name = arguments[0]
    if name not in commands:
        return [f"no such command '{name}'"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            values = commands[name].make_context(name, arguments[1:]).params
    except typer.Exit:  # --help
        return []
    except Exception as error:
        return [getattr(error, "format_message", error.__str__)()]
    if "config" not in values or str(values["config"]).isupper():  # a word like CONFIG stands for any file
        return []
    found = _launcher(values.get("launcher"))
    try:
        _load(name, ROOT / values["config"], values.get("stage"), list(values.get("overrides") or []))
    except RLHFError as error:
        found.append(str(error))
    return found


def _load(command: str, config: Path, stage: str | None, overrides: list[str]) -> None:
    if command == "run" or (command == "check" and (stage or config.stem) == "pipeline"):
        load_pipeline(config, overrides)
    else:
        load_stage_config(RECIPES[stage or (command if command in RECIPES else config.stem)], config, overrides)


def _launcher(name: str | None) -> list[str]:
    if name is None or (ROOT / name).is_file() or (ROOT / "configs" / "accelerate" / f"{name}.yaml").is_file():
        return []
    return [f"no such launcher '{name}'"]


def _accelerate(arguments: list[str]) -> list[str]:
    from accelerate.commands.launch import launch_command_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            values = launch_command_parser().parse_args(arguments)
    except SystemExit:
        return [said.getvalue().strip().splitlines()[-1]]
    found = [] if values.config_file is None or (ROOT / values.config_file).is_file() else ["no such --config_file"]
    if values.module and values.training_script == "rlhf":
        found += _rlhf(values.training_script_args)
    return found


def _make(arguments: list[str]) -> list[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([A-Za-z][\w-]*):", text, re.MULTILINE))
    wanted = [a for a in arguments if not a.startswith("-") and "=" not in a]
    return [f"no such target '{target}'" for target in wanted if target not in targets]
