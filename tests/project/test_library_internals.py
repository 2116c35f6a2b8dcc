"""Private names of trl, transformers, peft, accelerate and DeepSpeed are touched in two files only."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.project.code import Code, package

ALLOWED = ("rlhf.distributed.library_internals", "rlhf.trainers.supervised.base")
# torch has no public name for these, and they have been the same for many releases.
OF_TORCH = {"_parameters", "_buffers", "_cdata", "_last_lr", "_subclasses", "_python_dispatch", "_pytree"}
OF_PYTHON = {"_exit"}


def own_names(code: Code) -> set[str]:
    """Private names that the package defines: functions, classes, attributes that it sets on itself, fields."""
    found: set[str] = set()
    for source in code.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and (node.id in ("self", "cls") or node.id[:1].isupper())


def private_uses(code: Code) -> Iterator[str]:
    """Uses of private attributes that the package has not defined itself, outside the allowed files."""
    own = own_names({module: source for module, source in code.items() if module not in ALLOWED})
    for module, source in code.items():
        if module in ALLOWED:
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            if node.attr not in own | OF_TORCH | OF_PYTHON:
                yield f"{module}:{node.lineno} {node.attr}"


def test_private_names_of_libraries_stay_in_two_files() -> None:
    assert list(private_uses(package())) == []


@pytest.mark.parametrize(
    "line",
    [
        "trainer._get_train_sampler = None",
        "def f(layer):\n    return layer._active_adapter",
        "class T:\n    def f(self, x):\n        return self._prepare_inputs(x)",
        "State._reset_state()",
    ],
)
def test_a_planted_use_is_seen(line: str) -> None:
    assert len(list(private_uses(package() | {"rlhf.trainers.new": line}))) == 1
