"""One public name has one meaning in the whole package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from tests.project.code import Code, inside, package

# The one function that every stage has: rlhf.stages.STAGE.run(config, console).
SHARED = {"run": "rlhf.stages"}


def public_names(source: str) -> Iterator[str]:
    """Functions, classes and constants that a module defines at its top level and offers to others."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def twice(code: Code) -> list[str]:
    """Public names that two modules define."""
    where: dict[str, list[str]] = defaultdict(list)
    for module, source in code.items():
        for name in set(public_names(source)):
            if not (name in SHARED and inside(module, SHARED[name])):
                where[name].append(module)
    return [f"{name}: {', '.join(modules)}" for name, modules in sorted(where.items()) if len(modules) > 1]


def test_a_public_name_has_one_meaning() -> None:
    assert twice(package()) == []


def test_a_planted_second_meaning_is_seen() -> None:
    code = package() | {"rlhf.data.new": "def masked_mean(rows):\n    return rows\n\nclass Rollout:\n    pass\n"}
    assert [line.split(":")[0] for line in twice(code)] == ["Rollout", "masked_mean"]
