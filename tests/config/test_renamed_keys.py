"""A setting that was renamed is still accepted under its old name, with a note; both names at once are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from rlhf.config import renamed_keys
from rlhf.config.load import load_pipeline, load_stage_config
from rlhf.config.renamed_keys import RENAMED_KEYS, rename_old_keys
from rlhf.config.schema import ClassifyConfig, PPOConfig, SFTConfig
from rlhf.config.sections import Section
from rlhf.errors import ConfigError
from tests.conftest import Run

Write = Callable[[str, str], Path]
CLASSIFY = "output_dir: o\nmodel: {path: m}\ndata: {train: [{path: a.jsonl}]}\n"


class Leaf(Section):
    """A section with a renamed key."""

    new: int = 1
    other: dict[str, int] = Field(default_factory=dict)


class Tree(Section):
    """Every way in which a section can stand inside another."""

    leaf: Leaf = Leaf()
    maybe: Leaf | None = None
    choice: str | Annotated[Leaf, Field()] = "x"
    row: tuple[Leaf, ...] = ()
    named: dict[str, Leaf] = Field(default_factory=dict)


def test_each_table_names_a_setting_of_today_and_no_other() -> None:
    for schema, table in RENAMED_KEYS.items():
        assert set(table.values()) <= set(schema.model_fields)
        assert not set(table) & set(schema.model_fields)


def test_keys_are_renamed_wherever_the_section_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(renamed_keys.RENAMED_KEYS, Leaf, {"old": "new"})
    values = {
        "leaf": {"old": 2, "other": {"old": 3}},
        "maybe": {"old": 4},
        "choice": {"old": 5},
        "row": [{"new": 6}, {"old": 7}],
        "named": {"old": {"old": 8}},
        "unknown": {"old": 9},
    }
    before = repr(values)
    found = rename_old_keys(Tree, values)
    assert found.values == {
        "leaf": {"new": 2, "other": {"old": 3}},
        "maybe": {"new": 4},
        "choice": {"new": 5},
        "row": [{"new": 6}, {"new": 7}],
        "named": {"old": {"new": 8}},
        "unknown": {"old": 9},
    }
    assert found.old_keys == {
        f"{place}.old": f"{place}.new" for place in ("leaf", "maybe", "choice", "row.1", "named.old")
    }
    assert (found.clashes, repr(values)) == ({}, before)


@pytest.mark.parametrize("wrong", [7, None, "x", [1], {"old": 1}, [[{"old": 1}]]])
def test_a_value_of_another_shape_is_left_to_the_schema(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(renamed_keys.RENAMED_KEYS, Leaf, {"old": "new"})
    values = {"row": wrong, "named": wrong}
    assert rename_old_keys(Tree, values).values == values


def test_an_old_key_of_a_file_is_read_with_a_note(write_yaml: Write) -> None:
    path = write_yaml("classify.yaml", CLASSIFY + "several: true\nsaving:\n  keep: 3\n  grace: 7\n")
    loaded = load_stage_config(ClassifyConfig, path)
    assert loaded.config.multi_label is True
    assert (loaded.config.saving.keep, loaded.config.saving.grace_seconds) == (3, 7.0)
    assert loaded.notes == (
        f"{path}:4: 'several' is now called 'multi_label'; the old name still works in this release, please change it",
        f"{path}:7: 'saving.grace' is now called 'saving.grace_seconds'; the old name still works in this release, "
        "please change it",
    )
    assert (loaded.origins["multi_label"], loaded.origins["saving.grace_seconds"]) == (f"{path}:4", f"{path}:7")
    assert not {"several", "saving.grace"} & set(loaded.origins)


def test_an_old_key_of_the_command_line_is_read_with_a_note(sft_yaml: Path) -> None:
    loaded = load_stage_config(SFTConfig, sft_yaml, ["saving.grace=7"])
    assert loaded.config.saving.grace_seconds == 7.0
    assert [note.split(";")[0] for note in loaded.notes] == [
        "command line: 'saving.grace' is now called 'saving.grace_seconds'"
    ]


def test_the_new_name_brings_no_note(sft_yaml: Path) -> None:
    assert load_stage_config(SFTConfig, sft_yaml, ["saving.grace_seconds=7"]).notes == ()


def test_an_old_name_is_unknown_to_a_section_that_never_had_it(sft_yaml: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'several'"):
        load_stage_config(SFTConfig, sft_yaml, ["several=true"])


def test_a_wrong_value_under_an_old_key_names_its_line(write_yaml: Write) -> None:
    path = write_yaml("classify.yaml", CLASSIFY + "saving:\n  grace: -1\n")
    with pytest.raises(ConfigError) as caught:
        load_stage_config(ClassifyConfig, path)
    assert str(caught.value) == f"{path}:5: 'saving.grace_seconds': expected greater than 0, got -1"


@pytest.mark.parametrize("yaml", ["several: true\nmulti_label: true\n", "multi_label: true\nseveral: false\n"])
def test_both_names_in_a_file_are_refused_with_both_lines(yaml: str, write_yaml: Write) -> None:
    path = write_yaml("classify.yaml", CLASSIFY + yaml)
    old, new = (4, 5) if yaml.startswith("several") else (5, 4)
    with pytest.raises(ConfigError) as caught:
        load_stage_config(ClassifyConfig, path)
    assert str(caught.value) == (
        f"{path}:{old}: 'several' is the old name of 'multi_label', which is given too (found: {path}:{new}); "
        "remove 'several'"
    )


def test_both_names_are_refused_among_the_other_problems(write_yaml: Write) -> None:
    path = write_yaml("classify.yaml", CLASSIFY + "saving: {grace: 3}\n")
    with pytest.raises(ConfigError) as caught:
        load_stage_config(ClassifyConfig, path, ["saving.grace_seconds=4", "seed=one"])
    message = str(caught.value)
    assert message.startswith("2 problems\n")
    assert f"{path}:4: 'saving.grace' is the old name of 'saving.grace_seconds'" in message
    assert "(found: command line); remove 'saving.grace'" in message
    assert "command line: 'seed': expected a valid integer" in message


def test_a_pipeline_gathers_the_notes_of_its_stages(write_yaml: Write) -> None:
    stage = "output_dir: o\nmodel: {path: m}\ndata: {train: [{path: a.jsonl}]}\n"
    write_yaml("sft.yaml", stage + "saving: {grace: 3}\n")
    write_yaml("reward.yaml", stage)
    path = write_yaml(
        "pipeline.yaml",
        "output_dir: o\nsft: {config: sft.yaml}\nreward:\n  config: reward.yaml\n  saving: {grace: 4}\n",
    )
    pipeline = load_pipeline(path)
    assert [s.loaded.config.saving.grace_seconds for s in pipeline.stages if hasattr(s.loaded.config, "saving")] == [
        3,
        4,
    ]
    assert [note.split(":")[:2] for note in pipeline.notes] == [
        [str(path.with_name("sft.yaml")), "4"],
        [str(path), "5"],
    ]


def test_show_prints_the_note_beside_the_values(sft_yaml: Path, call_cli: Run) -> None:
    code, out, err = call_cli(["show", sft_yaml, "saving.grace=7"])
    assert code == 0
    assert err.startswith("command line: 'saving.grace' is now called 'saving.grace_seconds'")
    assert "saving.grace_seconds = 7.0   # command line; " in out


def test_the_saved_configuration_of_an_old_run_is_the_same_one() -> None:
    values = {
        "output_dir": "x",
        "policy": {"path": "p"},
        "reward_model": {"path": "r"},
        "data": {"prompts": [{"path": "d"}]},
    }
    config = PPOConfig.model_validate(values)
    saved = config.model_dump(mode="json")
    saved["saving"]["grace"] = saved["saving"].pop("grace_seconds")
    assert rename_old_keys(PPOConfig, saved).values == config.model_dump(mode="json")
