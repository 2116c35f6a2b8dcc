"""Imports go down only; the demo's gold utility is out of reach of training; library internals have one door."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.project.code import Code, imports, inside, package, reachable

FLOORS = (
    ("rlhf.errors", "rlhf.console", "rlhf.version"),
    ("rlhf.config", "rlhf.functional"),
    ("rlhf.runs",),
    ("rlhf.data", "rlhf.distributed", "rlhf.reports"),
    ("rlhf.models", "rlhf.checkpointing"),
    ("rlhf.rollout", "rlhf.launch"),
    ("rlhf.generation",),
    ("rlhf.trainers", "rlhf.evaluation"),
    ("rlhf.stages",),
    ("rlhf.tools", "rlhf.preflight"),
    ("rlhf.labeling",),
    ("rlhf", "rlhf.cli"),
    ("rlhf.__main__",),
)
DEMO = "rlhf.demo"
DEMO_USERS = ("rlhf.evaluation.judge", "rlhf.labeling.relabel", "rlhf.cli.data", DEMO)
INTERNALS = (
    "accelerate",
    "deepspeed",
    "trl.models",
    "trl.trainer",
    "trl.experimental",
    "trl.extras",
    "trl.import_utils",
)
DOOR = ("rlhf.distributed.engine", "rlhf.distributed.zero_gather", "rlhf.distributed.library_internals")
NO_TORCH = (
    "rlhf.errors",
    "rlhf.config",
    "rlhf.cli.main",
    "rlhf.cli.data",
    "rlhf.cli.output",
    "rlhf.launch.launcher",
    "rlhf.__main__",
)
TRAINING = (
    "rlhf.stages.pretrain",
    "rlhf.stages.sft",
    "rlhf.stages.reward",
    "rlhf.stages.classify",
    "rlhf.stages.ppo",
    "rlhf.labeling.weak_labels",
    "rlhf.trainers",
)


def home(module: str) -> tuple[int, str]:
    """Floor and package of a module; the longest name counts."""
    found = [(len(name), i, name) for i, floor in enumerate(FLOORS) for name in floor if inside(module, name)]
    _, floor, name = max(found)
    return floor, name


def up(code: Code) -> list[str]:
    """Imports that go up, or sideways into another package of the same floor."""
    wrong = []
    for module in code:
        if inside(module, DEMO):
            continue
        floor, name = home(module)
        for target, line in imports(module, code):
            if not inside(target, "rlhf") or inside(target, DEMO):
                continue
            other_floor, other = home(target)
            if other != name and other_floor >= floor:
                wrong.append(f"{module}:{line} imports {target}")
    return wrong


def strangers(code: Code) -> list[str]:
    """Imports of the demo by others, and of anything but the demo by the demo."""
    wrong = []
    for module in code:
        for target, line in imports(module, code):
            if inside(target, DEMO) and not any(inside(module, user) for user in DEMO_USERS):
                wrong.append(f"{module}:{line} imports {target}")
            if inside(module, DEMO) and inside(target, "rlhf") and not inside(target, DEMO):
                wrong.append(f"{module}:{line} imports {target}")
    return wrong


def intruders(code: Code) -> list[str]:
    """Imports of library internals elsewhere than in the one module for them."""
    return [
        f"{module}:{line} imports {target}"
        for module in code
        if module not in DOOR
        for target, line in imports(module, code)
        if any(inside(target, name) for name in INTERNALS)
    ]


def torch_users(code: Code) -> list[str]:
    """Imports of torch where it would make the command line slow."""
    return [
        f"{module}:{line} imports {target}"
        for module in code
        if any(inside(module, name) for name in NO_TORCH)
        for target, line in imports(module, code)
        if inside(target, "torch")
    ]


def gold_readers(code: Code) -> list[str]:
    """Training modules from which the gold utility can be reached."""
    return [
        f"{module} reaches {target}"
        for module in code
        if any(inside(module, name) for name in TRAINING)
        for target in sorted(reachable(module, code))
        if inside(target, DEMO) or inside(target, "rlhf.evaluation.judge")
    ]


def circles(code: Code) -> list[str]:
    """Modules that import each other, at any depth and for type checking too."""
    graph = {module: {t for t, _ in imports(module, code) if t in code and t != module} for module in code}
    return [f"{module} reaches itself" for module in code if module in _reached(graph[module], graph)]


def _reached(start: set[str], graph: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    queue = list(start)
    while queue:
        module = queue.pop()
        if module not in seen:
            seen.add(module)
            queue += graph[module]
    return seen


RULES = {
    "up": up,
    "circles": circles,
    "strangers": strangers,
    "intruders": intruders,
    "torch users": torch_users,
    "gold readers": gold_readers,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule: str) -> None:
    assert RULES[rule](package()) == []


@pytest.mark.parametrize(
    ("rule", "module", "line"),
    [
        ("up", "rlhf.config.new", "from rlhf.functional import gae"),
        ("up", "rlhf.data.new", "def f():\n    import rlhf.trainers.ppo.trainer"),
        ("up", "rlhf.data.new", "from rlhf.rollout.types import Rollout"),
        ("up", "rlhf.models.new", "from rlhf.rollout import sample"),
        ("up", "rlhf.trainers.new", "from ..evaluation import stats"),
        ("up", "rlhf.runs.new", "from rlhf import stages"),
        ("up", "rlhf.stages.new", "from rlhf.cli.main import app"),
        ("up", "rlhf.runs.new", "import importlib\nimportlib.import_module(f'rlhf.stages.{1}')"),
        ("circles", "rlhf.errors", "def f():\n    import rlhf.cli.main"),
        ("strangers", "rlhf.data.new", "from rlhf.demo.gold import utility"),
        ("strangers", "rlhf.evaluation.new", "from rlhf import demo"),
        ("strangers", "rlhf.demo.new", "from rlhf.data import records"),
        ("intruders", "rlhf.trainers.new", "def f():\n    import deepspeed"),
        ("intruders", "rlhf.trainers.new", "from trl.trainer.utils import pad"),
        ("intruders", "rlhf.models.new", "from accelerate.utils import gather"),
        ("torch users", "rlhf.config.new", "def f():\n    from torch import nn"),
        ("gold readers", "rlhf.stages.lifecycle", "from rlhf.evaluation.judge import load_judge"),
        ("gold readers", "rlhf.models.load", "def f():\n    from rlhf.demo import gold"),
    ],
)
def test_a_planted_violation_is_seen(rule: str, module: str, line: str) -> None:
    assert len(RULES[rule](package() | {module: line})) >= 1


def test_every_package_has_a_floor() -> None:
    for module in package():
        _, name = home(module)
        assert name != "rlhf" or module == "rlhf" or inside(module, DEMO), module
