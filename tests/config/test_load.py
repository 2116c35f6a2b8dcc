"""The origin of every value, and the messages for wrong files and overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config.load import load_stage_config
from rlhf.config.schema import SFTConfig
from rlhf.errors import ConfigError

Write = Callable[[str, str], Path]


def refusal(path: Path, *overrides: str) -> str:
    """The message of a configuration that must not load."""
    with pytest.raises(ConfigError) as caught:
        load_stage_config(SFTConfig, path, overrides)
    return str(caught.value)


def test_default_then_yaml_then_command_line(sft_yaml: Path) -> None:
    loaded = load_stage_config(SFTConfig, sft_yaml, ["optim.epochs=7"])
    assert loaded.config.optim.batch_size == 64  # default
    assert loaded.config.optim.learning_rate == 1e-3  # YAML
    assert loaded.config.optim.epochs == 7  # command line
    assert load_stage_config(SFTConfig, sft_yaml, ["optim.learning_rate=2e-4"]).config.optim.learning_rate == 2e-4


def test_a_partly_given_section_keeps_its_other_defaults(sft_yaml: Path) -> None:
    optim = load_stage_config(SFTConfig, sft_yaml).config.optim
    assert (optim.weight_decay, optim.adam_beta2) == (0.0, 0.999)  # the section's
    assert optim.epochs == SFTConfig.model_fields["optim"].default.epochs == 2  # the stage's own


def test_every_value_has_file_and_line_or_the_command_line(sft_yaml: Path) -> None:
    origins = load_stage_config(SFTConfig, sft_yaml, ["seed=3", "data.train.1.path=c.jsonl"]).origins
    assert origins["optim.learning_rate"] == f"{sft_yaml}:8"
    assert origins["model.path"] == f"{sft_yaml}:2"
    assert origins["data.train.0.path"] == f"{sft_yaml}:5"
    assert origins["seed"] == origins["data.train.1.path"] == "command line"
    assert "optim.epochs" not in origins


def test_an_override_of_a_whole_section_takes_over_its_parts(sft_yaml: Path) -> None:
    loaded = load_stage_config(SFTConfig, sft_yaml, ["optim={epochs: 3}"])
    assert loaded.config.optim.learning_rate != 1e-3
    assert "optim.learning_rate" not in loaded.origins
    assert loaded.origins["optim"] == loaded.origins["optim.epochs"] == "command line"


def test_list_items_are_reached_by_index(sft_yaml: Path) -> None:
    loaded = load_stage_config(SFTConfig, sft_yaml, ["data.train.1.weight=2", "data.train.0={path: z.jsonl}"])
    first, second = loaded.config.data.train
    assert (first.path, second.path, second.weight) == ("z.jsonl", "b.jsonl", 2.0)


@pytest.mark.parametrize("key", ["data.train.2.path", "data.train.one.path", "data.train.2", "data.train.one"])
def test_a_wrong_index_is_refused(sft_yaml: Path, key: str) -> None:
    message = refusal(sft_yaml, f"{key}=x")
    assert "command line" in message
    assert key in message


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001"])
def test_a_number_may_be_written_without_a_point(sft_yaml: Path, text: str) -> None:
    assert load_stage_config(SFTConfig, sft_yaml, [f"optim.learning_rate={text}"]).config.optim.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("optim.learning_rate=fast", "valid number"),
        ("optim.learning_rate=-1", "greater than 0"),
        ("optim.learning_rate=.inf", "finite"),
        ("optim.learning_rate=true", "no boolean"),
        ("seed=yes", "no boolean"),
        ("optim.batch_size=2.5", "integer"),
        ("optim.warmup_fraction=1.5", "less than or equal to 1"),
        ("optim.schedule=sine", "'linear', 'cosine' or 'constant'"),
        ("model.path=7", "string"),
        ("data.train=[]", "at least 1"),
        ("peft=7", "dictionary"),
    ],
)
def test_a_wrong_value_names_key_rule_and_origin(sft_yaml: Path, override: str, rule: str) -> None:
    message = refusal(sft_yaml, override)
    assert message.startswith(f"command line: '{override.split('=')[0]}': expected ")
    assert rule in message
    assert "got" in message


def test_all_problems_at_once_each_with_its_place(write_yaml: Write) -> None:
    path = write_yaml("sft.yaml", "model: {path: m}\ndata: {train: [{paht: a}], max_lenght: 9}\noptm: {epochs: 1}\n")
    message = refusal(path, "seed=one", "nonsense.key=1")
    assert message.startswith("7 problems\n")
    assert f"{path}: missing required key 'output_dir'" in message
    assert f"{path}: missing required key 'data.train.0.path'" in message
    assert f"{path}:2: unknown key 'data.train.0.paht'; did you mean 'data.train.0.path'?" in message
    assert f"{path}:2: unknown key 'data.max_lenght'; did you mean 'data.max_length'?" in message
    assert f"{path}:3: unknown key 'optm'; did you mean 'optim'?" in message
    assert "command line: 'seed': expected a valid integer" in message
    assert "command line: unknown key 'nonsense'; valid keys: output_dir, seed," in message


def test_all_bad_overrides_at_once(sft_yaml: Path) -> None:
    message = refusal(sft_yaml, "optim.epochs", "=3", "optim.epochs={1")
    assert message.startswith("3 problems\n")
    assert "expected section.key=value, got 'optim.epochs'" in message
    assert "expected section.key=value, got '=3'" in message
    assert "'optim.epochs': not a YAML value: '{1'" in message


def test_a_missing_file_names_the_files_near_it(sft_yaml: Path) -> None:
    message = refusal(sft_yaml.with_name("stf.yaml"))
    assert message.startswith(f"{sft_yaml.with_name('stf.yaml')}: no such configuration file")
    assert str(sft_yaml) in message


def test_broken_yaml_names_the_line(write_yaml: Write) -> None:
    path = write_yaml("x.yaml", "seed: 1\nmodel: {path: a\noptim: 3\n")
    assert f"{path}:3: not valid YAML" in refusal(path)


def test_a_key_that_is_given_twice(write_yaml: Write) -> None:
    path = write_yaml("x.yaml", "seed: 1\noptim: {epochs: 1}\nmodel: {path: m}\noptim: {epochs: 2}\n")
    assert refusal(path).startswith(f"{path}:4: 'optim' is given twice")


def test_anchors_keep_their_lines(sft_yaml: Path) -> None:
    sft_yaml.write_text(
        "output_dir: o\nmodel: {path: m}\ndata:\n  train: [{path: a}]\n  validation:\n    - &v\n      path: b\n"
        "      limit: 3\n    - <<: *v\n      path: c\n",
        encoding="utf-8",
    )
    loaded = load_stage_config(SFTConfig, sft_yaml)
    assert [(s.path, s.limit) for s in loaded.config.data.validation] == [("b", 3), ("c", 3)]
    assert loaded.origins["data.validation.1.limit"] == f"{sft_yaml}:8"
    assert loaded.origins["data.validation.1.path"] == f"{sft_yaml}:10"


def test_text_that_is_no_mapping(write_yaml: Write) -> None:
    assert "expected 'key: value' lines (found: list)" in refusal(write_yaml("x.yaml", "- a\n- b\n"))


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"output_dir: caf\xe9\n")
    assert refusal(path).startswith(f"{path}: not UTF-8 text")


def test_an_empty_file_misses_its_required_keys(write_yaml: Write) -> None:
    message = refusal(write_yaml("x.yaml", ""))
    assert "missing required key 'output_dir'" in message
    assert "missing required key 'model'" in message
