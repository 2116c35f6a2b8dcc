"""`rlhf show` prints every value with its origin and its meaning."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from rlhf.config.load import load_stage_config
from rlhf.config.schema import SFTConfig
from rlhf.config.show import config_lines
from tests.conftest import Run


def leaves(section: BaseModel, prefix: str = "") -> set[str]:
    """Dotted names of all values."""
    found = set()
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= leaves(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for i, item in enumerate(value):
                found |= leaves(item, f"{prefix}{name}.{i}.")
        else:
            found.add(prefix + name)
    return found


def test_every_value_once_with_its_origin(sft_yaml: Path) -> None:
    loaded = load_stage_config(SFTConfig, sft_yaml, ["seed=3"])
    shown = dict(line.split(" = ", 1) for line in config_lines(loaded))
    assert set(shown) == leaves(loaded.config)
    assert len(list(config_lines(loaded))) == len(shown)
    assert shown["seed"].startswith("3   # command line; ")
    assert shown["optim.learning_rate"].startswith(f"0.001   # {sft_yaml}:8; ")
    assert shown["data.train.1.path"].startswith(f"'b.jsonl'   # {sft_yaml}:6; ")
    assert shown["optim.epochs"].startswith("2.0   # default; ")


def test_the_command_prints_them(sft_yaml: Path, call_cli: Run) -> None:
    code, out, err = call_cli(["show", sft_yaml, "optim.epochs=4"])
    assert (code, err) == (0, "")
    assert (
        "optim.epochs = 4.0   # command line; number of passes over the training records; may be a fraction"
        in out.splitlines()
    )


def test_a_file_of_another_name_needs_its_stage(sft_yaml: Path, call_cli: Run) -> None:
    other = sft_yaml.rename(sft_yaml.with_name("mine.yaml"))
    code, out, err = call_cli(["show", other])
    assert (code, out) == (2, "")
    assert "no stage called 'mine'" in err
    assert "--stage" in err
    assert call_cli(["show", other, "--stage", "sft"]).code == 0
