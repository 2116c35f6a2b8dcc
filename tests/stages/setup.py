"""Helpers: a few dozen records and a configuration of every stage, small enough to run in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

THINGS = ["cat", "dog", "cow", "fox", "hen", "owl", "pig", "bat"]
ASKS = ["what is a {}?", "tell me about the {}", "do you like the {}?"]
GOOD = "a {} is an animal, thank you"
BAD = "no {}"
Files = dict[str, str]


def user(text: str) -> dict[str, str]:
    """Return a user turn."""
    return {"role": "user", "content": text}


def judge(prompt: Any, response: str, record: Mapping[str, Any], finished: bool) -> float:
    """Reward function: longer responses are better."""
    return float(len(response)) + finished


def letters(prompt: Any, response: str, record: Mapping[str, Any], finished: bool) -> float:
    """Judge whose values are easy to compute again."""
    return float(len(response))


def write_data(folder: Path) -> Files:
    """Write demonstrations, pairs (every sixth a tie), labelled replies, prompts and text; return name -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [(ask.format(thing), thing) for ask in ASKS for thing in THINGS]
    tables = {
        "sft": [
            {"messages": [user(ask), {"role": "assistant", "content": GOOD.format(thing)}]} for ask, thing in cases
        ],
        "preferences": [
            {
                "prompt": [user(ask)],
                "chosen": GOOD.format(thing),
                "rejected": BAD.format(thing),
                "preference": 0.5 if i % 6 == 5 else 1.0,
            }
            for i, (ask, thing) in enumerate(cases)
        ],
        "labels": [
            {
                "prompt": [user(ask)],
                "completion": (BAD if i % 3 else GOOD).format(thing),
                "label": "short" if i % 3 else "kind",
            }
            for i, (ask, thing) in enumerate(cases)
        ],
        "prompts": [{"prompt": [user(ask)]} for ask, _ in cases],
        "text": [{"text": f"the {thing} sat on the mat and the dog ran"} for thing in THINGS],
    }
    files = {}
    for name, rows in tables.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = str(path)
    return files


def adapter(enabled: bool) -> dict[str, Any]:
    """Return the adapter settings of these tests."""
    return {"method": "lora", "r": 4, "alpha": 8.0} if enabled else {}


def optim(**changes: Any) -> dict[str, Any]:
    """Return optimizer settings with two passes of three updates of 8 records."""
    return {"batch_size": 8, "microbatch_size": 4, "epochs": 2, "learning_rate": 5e-3} | changes


def configs(top: Path, model: str, files: Files, *, adapters: bool = False) -> dict[str, dict[str, Any]]:
    """Return stage -> configuration, where each stage starts from the models of the stages before it."""
    data = {"max_length": 96, "validation_fraction": 0.25}
    regular = {"saving": {"share": 0.0}}
    found = {
        "sft": {
            "output_dir": str(top / "sft"),
            "model": {"path": model},
            "peft": adapter(adapters),
            "optim": optim(),
            "data": {"train": [{"path": files["sft"]}], **data},
        },
        "reward": {
            "output_dir": str(top / "reward"),
            "model": {"path": str(top / "sft")},
            "peft": adapter(adapters),
            "optim": optim(),
            "data": {"train": [{"path": files["preferences"]}], **data},
        },
        "classify": {
            "output_dir": str(top / "classify"),
            "model": {"path": str(top / "sft")},
            "peft": adapter(adapters),
            "optim": optim(),
            "data": {"train": [{"path": files["labels"]}], **data},
            "class_weights": "balanced",
        },
        "ppo": {
            "output_dir": str(top / "ppo"),
            "policy": {"path": str(top / "sft")},
            "peft": adapter(adapters),
            "reward_model": {"path": str(top / "reward")},
            "checkpoint_every": 2,
            "sample_every": 2,
            "data": {"prompts": [{"path": files["prompts"]}], "max_prompt_tokens": 64},
            "sampling": {"max_new_tokens": 8},
            "ppo": {"steps": 3, "rollout_size": 8, "epochs": 2, "minibatches": 2},
            "optim": {"learning_rate": 5e-3, "value_learning_rate": 1e-2, "microbatch_size": 2},
        },
        "evaluate": {
            "output_dir": str(top / "evaluate"),
            "models": {"sft": {"path": str(top / "sft")}, "ppo": {"path": str(top / "ppo")}},
            "prompts": {"heldout": {"path": files["prompts"], "limit": 6}},
            "reward_model": {"path": str(top / "reward")},
            "preferences": [{"path": files["preferences"]}],
            "judge": "tests.stages.setup:judge",
            "measures": {"letters": "tests.stages.setup:letters"},
            "best_of": 2,
            "sampling": {"max_new_tokens": 8},
            "bootstrap": 50,
            "text": [{"path": files["text"]}],
        },
    }
    return {name: regular | config if name != "evaluate" else config for name, config in found.items()}


def write(folder: Path, name: str, config: dict[str, Any]) -> str:
    """Write a configuration as a YAML file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def metrics(run: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time_")} for line in lines]


def info(run: Path) -> dict[str, Any]:
    """Return the content of run.json."""
    return json.loads((run / "run.json").read_text())
