"""A pipeline gives each stage the models of earlier ones; its overrides and those of the command line win."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config.load import PipelineStep, ResolvedPipeline, load_pipeline
from rlhf.errors import ConfigError

Write = Callable[[str, str], Path]
FILES = {
    "pretrain.yaml": "output_dir: own\ndata: {train: [{path: t.jsonl}]}\n",
    "sft.yaml": "output_dir: own\nseed: 5\nmodel: {path: base}\ndata: {train: [{path: s.jsonl}]}\n",
    "reward.yaml": "output_dir: own\nmodel: {path: own-sft}\ndata: {train: [{path: r.jsonl}]}\n",
    "ppo.yaml": "output_dir: own\npolicy: {path: p}\nreward_model: {path: r}\ndata: {prompts: [{path: q.jsonl}]}\n",
    "evaluate.yaml": "output_dir: own\nmodels: {base: {path: b}, sft: {path: s}, ppo: {path: p}}\n"
    "reward_model: {path: r}\nprompts: {held-out: {path: h.jsonl}}\n",
}
PIPELINE = """\
output_dir: runs/all
pretrain: {enabled: false, config: pretrain.yaml}
sft: {config: sft.yaml}
reward: {config: reward.yaml}
ppo:
  config: ppo.yaml
  kl: {coef: 0.3}
evaluate: {config: evaluate.yaml}
"""


@pytest.fixture
def pipeline_yaml(write_yaml: Write) -> Path:
    """A pipeline of five stages whose first is off."""
    for name, text in FILES.items():
        write_yaml(name, text)
    return write_yaml("pipeline.yaml", PIPELINE)


def stage(pipeline: ResolvedPipeline, name: str) -> PipelineStep:
    """One stage by name."""
    return next(s for s in pipeline.stages if s.name == name)


def test_enabled_stages_in_order_and_fed_by_the_earlier_ones(pipeline_yaml: Path) -> None:
    pipeline = load_pipeline(pipeline_yaml)
    assert [s.name for s in pipeline.stages] == ["sft", "reward", "ppo", "evaluate"]
    configs = {s.name: s.loaded.config for s in pipeline.stages}
    assert [c.output_dir for c in configs.values()] == [
        "runs/all/1-sft",
        "runs/all/2-reward",
        "runs/all/3-ppo",
        "runs/all/4-evaluate",
    ]
    assert configs["sft"].model.path == "base"  # nothing was pretrained here
    assert configs["reward"].model.path == configs["ppo"].policy.path == "runs/all/1-sft/model"
    assert configs["ppo"].reward_model.path == configs["evaluate"].reward_model.path == "runs/all/2-reward/model"
    paths = {name: source.path for name, source in configs["evaluate"].models.items()}
    assert paths == {"base": "b", "sft": "runs/all/1-sft/model", "ppo": "runs/all/3-ppo/model"}
    assert stage(pipeline, "reward").loaded.origins["model.path"] == "pipeline"


def test_pretrain_enabled_feeds_sft_and_evaluation(pipeline_yaml: Path) -> None:
    pipeline = load_pipeline(pipeline_yaml, ["pretrain.enabled=true"])
    assert pipeline.stages[0].name == "pretrain"
    assert stage(pipeline, "sft").loaded.config.model.path == "runs/all/0-pretrain/model"
    assert stage(pipeline, "evaluate").loaded.config.models["base"].path == "runs/all/0-pretrain/model"


def test_a_disabled_stage_leaves_its_followers_their_own_paths(pipeline_yaml: Path) -> None:
    pipeline = load_pipeline(pipeline_yaml, ["sft.enabled=false"])
    assert stage(pipeline, "reward").loaded.config.model.path == "own-sft"
    assert stage(pipeline, "ppo").loaded.config.policy.path == "p"


def test_one_seed_for_all_or_each_stages_own(pipeline_yaml: Path) -> None:
    assert [s.loaded.config.seed for s in load_pipeline(pipeline_yaml).stages] == [5, 1, 1, 1]
    assert [s.loaded.config.seed for s in load_pipeline(pipeline_yaml, ["seed=9"]).stages] == [9, 9, 9, 9]
    mixed = load_pipeline(pipeline_yaml, ["seed=9", "ppo.seed=4"])
    assert [s.loaded.config.seed for s in mixed.stages] == [9, 9, 4, 9]


def test_stage_overrides_and_their_origins(pipeline_yaml: Path) -> None:
    ppo = stage(load_pipeline(pipeline_yaml, ["ppo.ppo.steps=3", "ppo.policy.path=mine", "ppo.launcher=ddp"]), "ppo")
    assert ppo.launcher == "ddp"
    assert (ppo.loaded.config.kl.coef, ppo.loaded.config.ppo.steps, ppo.loaded.config.policy.path) == (0.3, 3, "mine")
    assert ppo.loaded.origins["kl.coef"] == f"{pipeline_yaml}:7"
    assert ppo.loaded.origins["ppo.steps"] == ppo.loaded.origins["policy.path"] == "command line"
    assert ppo.loaded.origins["data.prompts.0.path"] == f"{pipeline_yaml.with_name('ppo.yaml')}:4"


def test_the_output_folder_moves_every_stage(pipeline_yaml: Path) -> None:
    pipeline = load_pipeline(pipeline_yaml, ["output_dir=elsewhere"])
    assert stage(pipeline, "reward").loaded.config.model.path == "elsewhere/1-sft/model"


def test_list_items_of_a_stage_are_reached_by_index(pipeline_yaml: Path) -> None:
    sft = stage(load_pipeline(pipeline_yaml, ["sft.data.train.0.limit=7"]), "sft")
    assert (sft.loaded.config.data.train[0].limit, sft.loaded.config.data.train[0].path) == (7, "s.jsonl")


def test_a_list_replaced_in_the_pipeline_is_blamed_on_the_pipeline(pipeline_yaml: Path, write_yaml: Write) -> None:
    write_yaml("pipeline.yaml", "output_dir: o\nsft:\n  config: sft.yaml\n  data: {train: [{pth: z.jsonl}]}\n")
    with pytest.raises(ConfigError, match="did you mean") as caught:
        load_pipeline(pipeline_yaml)
    assert f"{pipeline_yaml}:4: unknown key 'data.train.0.pth'" in str(caught.value)


def test_a_list_replaced_on_the_command_line_forgets_the_old_lines(pipeline_yaml: Path, write_yaml: Write) -> None:
    write_yaml("sft.yaml", FILES["sft.yaml"].replace("{path: s.jsonl}", "{path: s.jsonl, limit: 3}"))
    sft = stage(load_pipeline(pipeline_yaml, ["sft.data.train=[{path: z.jsonl}]"]), "sft").loaded
    assert (sft.config.data.train[0].path, sft.config.data.train[0].limit) == ("z.jsonl", None)
    assert sft.origins["data.train.0.path"] == "command line"
    assert "data.train.0.limit" not in sft.origins


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.kl.coeff=1", "command line: unknown key 'kl.coeff'; did you mean 'kl.coef'?"),
        ("pppo.kl.coef=1", "command line: unknown key 'pppo'; did you mean 'ppo'?"),
        ("sft.config=nope.yaml", "nope.yaml: no such configuration file"),
        ("sft=3", "command line: 'sft': expected"),
    ],
)
def test_wrong_overrides(pipeline_yaml: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pipeline(pipeline_yaml, [override])
    assert message in str(caught.value)
