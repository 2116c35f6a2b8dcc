"""Every command that the documents show can be typed as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.project.code import ROOT
from tests.project.commands import in_markdown, in_yaml_header, problems

DOCUMENTS = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if p.is_file()]
RECIPES = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.parent.name != "accelerate"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_commands_of_a_document(path: Path) -> None:
    assert [p for line in in_markdown(path.read_text(encoding="utf-8")) for p in problems(line)] == []


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
