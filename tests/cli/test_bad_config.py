"""Every mistake in a configuration ends with one message that says where and what to do, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.refusals import HAM, SPAM, Case, check_refusal, put, rows
from tests.conftest import Run

CONFIG = [
    Case(
        "unknown key",
        "sft sft.yaml optim.epoch=1",
        ("command line: unknown key 'optim.epoch'; did you mean 'optim.epochs",),
    ),
    Case(
        "unknown key in YAML",
        "sft sft.yaml",
        (
            "sft.yaml:1: unknown key 'ouput_dir'; did you mean 'output_dir'",
            "sft.yaml: missing required key 'output_dir'",
        ),
        put("sft.yaml", "ouput_dir: out\nmodel: {path: tiny}\ndata: {train: [{path: demos.jsonl}]}\n"),
    ),
    Case(
        "wrong type", "ppo ppo.yaml ppo.gamma=one", ("command line: 'ppo.gamma': expected a valid number", "got 'one'")
    ),
    Case(
        "a label that is named twice",
        "classify classify.yaml labels=[kind,short,kind]",
        ("labels: 'kind' is given twice",),
    ),
    Case(
        "negative",
        "ppo ppo.yaml kl.coef=-1",
        ("command line: 'kl.coef': expected greater than or equal to 0", "got -1"),
    ),
    Case("override syntax", "sft sft.yaml epochs", ("command line: expected section.key=value, got 'epochs'",)),
    Case(
        "no such configuration",
        "sft stf.yaml",
        ("stf.yaml: no such configuration file", "configuration files in that folder: ", "sft.yaml"),
    ),
    Case(
        "batch", "sft sft.yaml optim.batch_size=6", ("optim.microbatch_size: 6 sequences", "choose one of 1, 2, 3, 6")
    ),
    Case(
        "rollout",
        "ppo ppo.yaml ppo.rollout_size=5 ppo.minibatches=2",
        ("ppo.rollout_size: a rollout of 5", "choose a multiple of 2"),
    ),
    Case("greedy rollouts", "ppo ppo.yaml sampling.temperature=0", ("sampling.temperature: PPO needs more than 0",)),
    Case("no reward", "ppo ppo.yaml reward_model=null", ("there is no reward: set reward_model",)),
    Case("k3 as a reward", "ppo ppo.yaml kl.reward=k3", ("gradient that vanishes near the reference",)),
    Case(
        "reward function",
        "ppo ppo.yaml rewards=[{'function':'no.module:f'}]",
        ("rewards: the reward function does not import", "give module:function"),
    ),
    Case("context (sft)", "sft sft.yaml data.max_length=129", ("data.max_length: sequences of 129", "at most 128")),
    Case(
        "context (ppo)",
        "ppo ppo.yaml sampling.max_new_tokens=65",
        ("data.max_prompt_tokens + sampling.max_new_tokens: sequences of 129", "at most 128"),
    ),
    Case(
        "context (generate)",
        "generate sft prompts.jsonl out.jsonl --max-new-tokens 128",
        ("--max-new-tokens: sequences of 129 tokens", "at most 128"),
    ),
    Case(
        "launcher", "sft sft.yaml --launcher zero9", ("--launcher: no such launcher (found: zero9)", "one of ", "zero3")
    ),
    Case("launcher of a later stage", "run pipeline.yaml reward.launcher=zero9", ("found: zero9", "one of ", "zero3")),
    Case(
        "launcher that is no YAML",
        "sft sft.yaml --launcher bad.yaml",
        ("bad.yaml:1: not valid YAML",),
        put("bad.yaml", "a: ["),
    ),
    Case(
        "launcher that is no mapping",
        "sft sft.yaml --launcher bad.yaml",
        ("bad.yaml: expected 'key: value'",),
        put("bad.yaml", "a\n"),
    ),
    Case("pipeline stage", "run pipeline.yaml sftt.seed=1", ("unknown key 'sftt'; did you mean 'sft'?",)),
    Case(
        "later pipeline stage", "run pipeline.yaml reward.optim.epochs=x", ("command line: 'optim.epochs': expected",)
    ),
    Case(
        "judge",
        "evaluate evaluate.yaml judge=no.module:f",
        ("judge: the judge does not import", "give module:function"),
    ),
    Case("reference", "evaluate evaluate.yaml reference=ppo", ("reference 'ppo' is not one of models: sft",)),
    Case(
        "one label",
        "classify classify.yaml",
        ("labels: a classifier needs at least 2 labels (found: spam)", "set multi_label=true for one label"),
        rows("labels.jsonl", SPAM, SPAM | {"text": "more"}),
    ),
    Case(
        "one label named",
        "classify classify.yaml labels=[kind]",
        ("labels: a classifier needs at least 2 labels (found: kind)", "check the column 'label'"),
    ),
    Case(
        "no label at all",
        "classify classify.yaml multi_label=true",
        ("labels: a classifier needs at least 1 labels (found: none)", "check the column 'label'"),
        rows("labels.jsonl", SPAM | {"label": []}, HAM | {"label": {}}),
    ),
    Case(
        "a class weight too few",
        "classify classify.yaml class_weights={'kind':2.0}",
        (
            "class_weights: class_weights must name every label once (found: labels and weights differ in 'short')",
            "labels: kind, short",
        ),
    ),
    Case(
        "a class weight too many",
        "classify classify.yaml class_weights={'kind':2.0,'short':1,'rude':1}",
        (
            "class_weights must name every label once (found: labels and weights differ in 'rude')",
            "labels: kind, short",
        ),
    ),
    Case(
        "a class weight of 0",
        "classify classify.yaml class_weights={'kind':0,'short':1}",
        ("command line: 'class_weights", "expected greater than 0"),
    ),
    Case(
        "context (classify)",
        "classify classify.yaml data.max_length=129",
        ("data.max_length: sequences of 129", "at most 128"),
    ),
    Case(
        "a source that is two",
        "data weak weak.yaml sources=[{'votes':'v','column':'c'}]",
        ("command line: 'sources.0': set exactly one of votes, column,", "got votes, column"),
    ),
    Case("a rule without a name", "data weak weak.yaml sources=[{'regex':'x'}]", ("a rule needs a name",)),
    Case(
        "unknown key (weak)",
        "data weak weak.yaml label_model.kin=majority",
        ("unknown key 'label_model.kin'; did you mean 'label_model.kind'",),
    ),
    Case(
        "a labelling function that does not import",
        "data weak weak.yaml sources=[{'function':'no.module:f'}]",
        ("sources: the labelling function does not import (found: no.module:f (", "give module:function"),
    ),
    Case(
        "two sources of one name",
        "data weak weak.yaml sources=[{'column':'prompt'},{'name':'prompt','regex':'x'}]",
        ("sources: two sources are called 'prompt'", "give one of them another name"),
    ),
    Case(
        "one class",
        "data weak weak.yaml kind=labelled sources=[{'column':'label'}]",
        ("labels: at least two classes are needed (found: spam)", "name the classes under labels"),
        rows("votes.jsonl", SPAM),
    ),
]


@pytest.mark.parametrize("case", CONFIG, ids=lambda case: case.name)
def test_one_message_and_nothing_left_behind(
    case: Case, place: Path, contents: Callable[[Path], dict[str, bytes]], call_cli: Run
) -> None:
    check_refusal(case, "ConfigError", place, contents, call_cli)
