"""Every command that the documents show can be typed as it stands, and every YAML snippet can be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.project.code import ROOT
from tests.project.commands import in_markdown, in_yaml_header, problems, yaml_in_markdown, yaml_problems

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "configs").rglob("*.md")),
    *sorted((ROOT / "tests").rglob("*.md")),
]
RECIPES = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.parent.name != "accelerate"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_commands_of_a_document(path: Path) -> None:
    assert [p for line in in_markdown(path.read_text(encoding="utf-8")) for p in problems(line)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_yaml_of_a_document(path: Path) -> None:
    blocks = yaml_in_markdown(path.read_text(encoding="utf-8"))
    assert [p for stage, text in blocks for p in yaml_problems(stage, text)] == []


def test_the_guides_show_checked_configurations() -> None:
    blocks = [stage for path in DOCUMENTS for stage, _ in yaml_in_markdown(path.read_text(encoding="utf-8"))]
    assert len([stage for stage in blocks if stage]) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_recipe_says_how_to_run_it(path: Path) -> None:
    lines = list(in_yaml_header(path.read_text(encoding="utf-8")))
    assert lines
    assert [p for line in lines for p in problems(line)] == []


def test_the_commands_of_the_help(call_cli: Run) -> None:
    lines = [line.strip() for line in call_cli(["--help"]).stdout.splitlines()]
    shown = [line for line in lines if line.startswith(("rlhf ", "accelerate launch"))]
    assert len(shown) >= 3
    assert [p for line in shown for p in problems(line)] == []


GOOD = """
text: rlhf nonsense
```bash
make demo && rlhf run configs/demo/pipeline.yaml ppo.kl.target=2.5   # a remark
$ OMP_NUM_THREADS=1 .venv/bin/rlhf ppo configs/demo/ppo.yaml \\
    kl.coef=0.1 --launcher zero3 > log.txt 2>&1
accelerate launch --config_file configs/accelerate/ddp.yaml -m rlhf sft configs/demo/sft.yaml seed=2
rlhf show configs/demo/ppo.yaml | less
rlhf sft CONFIG --help; cd /anywhere; pip install rlhf
rlhf generate runs/demo/1-sft prompts.jsonl out.jsonl --temperature 0
rlhf data rules --seed 1 && rlhf data weak configs/demo/experiments/weak.yaml gold=null && rlhf data && rlhf data -h
```
```python
rlhf = "nonsense"
```
"""


def test_good_commands_pass() -> None:
    lines = list(in_markdown(GOOD))
    assert len(lines) == 8  # the first is empty: what follows the fence
    assert [p for line in lines for p in problems(line)] == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("rlhf train configs/demo/sft.yaml", "no such command 'train'"),
        ("cd x && rlhf train", "no such command 'train'"),
        ("rlhf sft configs/demo/stf.yaml", "no such configuration file"),
        ("rlhf sft configs/demo/sft.yaml optim.epoch=1", "did you mean 'optim.epochs'"),
        ("rlhf ppo configs/demo/sft.yaml", "missing required key 'policy'"),
        ("rlhf sft configs/demo/sft.yaml --lancher ddp", "No such option"),
        ("rlhf sft configs/demo/sft.yaml --launcher dpp", "no such launcher 'dpp'"),
        ("rlhf run configs/demo/pipeline.yaml ppo.kl.cof=1", "unknown key 'kl.cof'"),
        ("rlhf generate a b", "Missing argument"),
        ("accelerate launch --config_file dpp.yaml -m rlhf sft configs/demo/sft.yaml", "--config_file"),
        ("accelerate launch -m rlhf stf configs/demo/sft.yaml", "no such command 'stf'"),
        ("accelerate launch --num_process many -m rlhf sft configs/demo/sft.yaml", "num_process"),
        ("rlhf data weka configs/demo/experiments/weak.yaml", "no such command 'weka'"),
        ("rlhf data weak configs/demo/experiments/weak.yaml output=x kin=labelled", "did you mean 'kind'"),
        ("rlhf data annotators --sed 1", "No such option"),
        ("make demos", "no such target 'demos'"),
        ("make -j2 demo tests", "no such target 'tests'"),
        ('rlhf show "configs', "quotation"),
    ],
)
def test_a_planted_mistake_is_seen(line: str, says: str) -> None:
    found = problems(line)
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("```yaml\na: [1\n```", "not valid YAML"),
        ("<!-- config: ppo -->\n```yaml\nkl: {coeff: 0.1}\n```", "did you mean 'kl.coef'"),
        ("<!-- config: pp0 -->\n```yaml\nkl: {coef: 0.1}\n```", "no such stage"),
        ("<!-- config: classify -->\n```yaml\nunfreeze: [{train: all}]\n```", "a phase needs a length"),
    ],
)
def test_a_planted_mistake_in_yaml_is_seen(block: str, says: str) -> None:
    found = [p for stage, text in yaml_in_markdown(f"text\n{block}\n") for p in yaml_problems(stage, text)]
    assert len(found) == 1
    assert says in found[0]


def test_good_yaml_passes() -> None:
    text = "```yaml\nanything: [1, 2]\n```\n<!-- config: sft -->\n```yaml\noptim: {epochs: 1}\n```\n"
    blocks = list(yaml_in_markdown(text))
    assert [stage for stage, _ in blocks] == ["", "sft"]
    assert [p for stage, block in blocks for p in yaml_problems(stage, block)] == []
