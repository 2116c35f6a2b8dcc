"""Every model that cannot be used ends with one message that says which and what to do, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.refusals import Case, change, check_refusal, put, remove
from tests.conftest import Run

MODELS = [
    Case("absent", "sft sft.yaml model.path=tny", ("tny: no such model", "train the stage that makes it first")),
    Case(
        "absent, with a finished run near",
        "sft sft.yaml model.path=runs/b/model output_dir=new",
        ("runs/b/model: no such model", "finished runs here: runs/a"),
        put("runs/a/run.json", '{"status": "finished"}'),
    ),
    Case(
        "hub id without a revision",
        "sft sft.yaml model.path=some/model",
        ("some/model", "set 'revision' to a commit hash"),
    ),
    Case(
        "without weights",
        "sft sft.yaml",
        ("tiny: no weights (.safetensors) here", "config.json"),
        remove("tiny/model.safetensors"),
    ),
    Case("no model at all", "sft sft.yaml", ("tiny: no config.json", "found: "), remove("tiny/config.json")),
    Case("a file", "sft sft.yaml model.path=demos.jsonl", ("demos.jsonl: no config.json", "a file, not a folder")),
    Case(
        "corrupt weights",
        "sft sft.yaml",
        ("tiny: the model does not load", "found: "),
        put("tiny/model.safetensors", b"\x00" * 100),
    ),
    Case(
        "cut weights",
        "ppo ppo.yaml",
        ("sft: the model does not load", "found: "),
        lambda p: (p / "sft/model.safetensors").write_bytes((p / "sft/model.safetensors").read_bytes()[:-1000]),
    ),
    Case(
        "no tokenizer",
        "sft sft.yaml",
        ("tiny: no readable tokenizer",),
        remove("tiny/tokenizer.json", "tiny/tokenizer_config.json"),
    ),
    Case(
        "damaged hand-over", "reward reward.yaml", ("sft/handover.json: damaged JSON",), put("sft/handover.json", "{")
    ),
    Case(
        "other end token",
        "ppo ppo.yaml",
        ("reward: the reward model was trained", "the end token (end_id 7 there"),
        change("reward/handover.json", end_id=7),
    ),
    Case(
        "other vocabulary without a tokenizer",
        "ppo ppo.yaml reward_model.path=foreign ppo.normalize_scores=raw",
        ("foreign: no readable tokenizer",),
        remove("foreign/tokenizer.json", "foreign/tokenizer_config.json"),
    ),
    Case(
        "no mean and deviation",
        "ppo ppo.yaml",
        ("reward: the reward model has no stored mean and deviation", "set ppo.normalize_scores=running or raw"),
        remove("reward/handover.json"),
    ),
    Case("SFT model as reward model", "ppo ppo.yaml reward_model.path=sft", ("sft: ", "train it with 'rlhf reward'")),
    Case(
        "SFT model as reward model, raw scores",
        "ppo ppo.yaml reward_model.path=sft ppo.normalize_scores=raw",
        ("sft: not a reward model: its score head would be random", "train it with 'rlhf reward'"),
    ),
    Case(
        "causal model with one label",
        "ppo ppo.yaml reward_model.path=sft ppo.normalize_scores=raw",
        ("sft: not a reward model: its score head would be random", "train it with"),
        change("sft/config.json", num_labels=1),
    ),
    Case("absent (generate)", "generate nope prompts.jsonl out.jsonl", ("nope: no such model",)),
]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_one_message_and_nothing_left_behind(
    case: Case, place: Path, contents: Callable[[Path], dict[str, bytes]], call_cli: Run
) -> None:
    check_refusal(case, "CheckpointError", place, contents, call_cli)
