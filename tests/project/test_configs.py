"""Every configuration that is shipped loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from rlhf.config.load import load_pipeline, load_stage_config
from rlhf.config.schema import RECIPES
from rlhf.errors import ConfigError
from tests.project.code import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def check(path: Path) -> None:
    """Load a file as what its folder or name says it is.

    Raises: ConfigError, or ValueError for a file of accelerate's.
    """
    if path.parent.name == "accelerate":
        return check_accelerate(path)
    if path.stem == "pipeline":
        load_pipeline(path)
        return None
    stage = next((s for s in RECIPES if path.stem == s or path.stem.startswith(f"{s}-")), None)
    if stage is None:
        raise ConfigError("a recipe is named after its stage", where=str(path), do=f"one of {', '.join(RECIPES)}")
    load_stage_config(RECIPES[stage], path)
    return None


def check_accelerate(path: Path) -> None:
    """Raises: ValueError on a key that accelerate, or its section for an engine, does not know, and on numbers that are
    the stage's to say: transformers stops at those that differ from its own."""
    load_config_from_file(str(path))
    known = set(vars(launch_command_parser().parse_args(["script"])))
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, prefix in (("deepspeed_config", ""), ("fsdp_config", "fsdp_")):
        for key in values.get(section, {}):
            if key not in known and prefix + key not in known:
                raise ValueError(f"{path}: {section} has an unknown key '{key}'")
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        if values.get("deepspeed_config", {}).get(key, "auto") != "auto":
            raise ValueError(f"{path}: {key} is not auto")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_it_loads(path: Path) -> None:
    check(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_it_begins_with_what_it_is_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("demo/sft.yaml", "output_dir: x\nmodel: {path: m}\ndata: {train: [{path: d}]}\noptm: {}\n"),
        ("demo/weak-mine.yaml", "output: x\ndata: {path: d}\nsources: [{regx: a}]\n"),
        ("demo/mine.yaml", "output_dir: x\n"),
        ("demo/pipeline.yaml", "output_dir: x\nsft: {config: nothing.yaml}\n"),
        ("accelerate/ddp.yaml", "distributed_type: MULTI_GPU\nnum_proceses: 2\n"),
        ("accelerate/zero.yaml", "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stag: 3}\n"),
        ("accelerate/zero.yaml", "distributed_type: DEEPSPEED\ndeepspeed_config: {gradient_clipping: 1.0}\n"),
        ("accelerate/fsdp.yaml", "distributed_type: FSDP\nfsdp_config: {fsdp_versio: 2}\n"),
    ],
)
def test_a_planted_mistake_is_seen(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises((ConfigError, ValueError)):
        check(path)


def test_a_planted_good_one_passes(tmp_path: Path) -> None:
    path = tmp_path / "accelerate" / "fsdp2.yaml"
    path.parent.mkdir()
    path.write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, offload_params: true}\n", encoding="utf-8")
    check(path)
