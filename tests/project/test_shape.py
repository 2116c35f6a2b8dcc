"""Small files, small functions, every public name explained, every setting used, every metric declared."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator

import pytest
from pydantic import BaseModel

from rlhf.config import labeling, schema, sections
from rlhf.runs.metrics import METRICS
from tests.project.code import ROOT, Code, package, texts_of_tests

Rule = Callable[[Code], list[str]]
FILE_LINES, FUNCTION_LINES = 400, 80
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes of a module and of its classes, by dotted name; not those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, DEFINITIONS):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.")


def too_long(code: Code) -> list[str]:
    """Files and functions that no longer fit a reader's head."""
    wrong = []
    for module, source in code.items():
        lines = len(source.splitlines())
        if lines > FILE_LINES:
            wrong.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES:
                wrong.append(f"{module}.{node.name}: {(node.end_lineno or 0) - node.lineno + 1} lines")
    return wrong


def unexplained(code: Code) -> list[str]:
    """Modules and public names without a docstring. `forward` is torch's; its class explains it."""
    wrong = []
    for module, source in code.items():
        tree = ast.parse(source)
        if source.strip() and not ast.get_docstring(tree):
            wrong.append(module)
        for name, node in definitions(tree):
            public = not any(part.startswith("_") for part in name.split("."))
            if public and not ast.get_docstring(node) and not name.endswith(".forward"):
                wrong.append(f"{module}.{name}")
    return wrong


@pytest.mark.parametrize("rule", [too_long, unexplained])
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    assert rule(package()) == []


def test_the_tests_are_no_longer_than_the_package() -> None:
    assert too_long(texts_of_tests()) == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (too_long, '"""A."""\n' + "x = 1\n" * FILE_LINES),
        (too_long, '"""A."""\ndef f():\n' + "    x = 1\n" * FUNCTION_LINES),
        (unexplained, "x = 1\n"),
        (unexplained, '"""A."""\ndef f():\n    pass\n'),
        (unexplained, '"""A."""\nclass C:\n    """C."""\n    def f(self):\n        pass\n'),
    ],
)
def test_a_planted_violation_is_seen(rule: Rule, source: str) -> None:
    assert len(rule({"rlhf.new": source})) == 1


def unread(sections: Iterable[type[BaseModel]], code: Code) -> list[str]:
    """Settings that no line of the package reads. The stages of a pipeline are read by name."""
    trees = [ast.parse(source) for source in code.values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return [
        f"{section.__name__}.{name}"
        for section in sections
        for name in section.model_fields
        if name not in read and not (section is schema.PipelineConfig and name in schema.STAGES)
    ]


def all_sections() -> list[type[sections.Section]]:
    """Every class of settings."""
    found = {**vars(sections), **vars(schema), **vars(labeling)}.values()
    return [c for c in found if isinstance(c, type) and issubclass(c, sections.Section) and c is not sections.Section]


def test_every_setting_is_read_somewhere() -> None:
    assert len(all_sections()) >= 18
    assert unread(all_sections(), package()) == []


def test_a_planted_dead_setting_is_seen() -> None:
    class Extra(sections.Section):
        """A section with one setting in use and one that nothing reads."""

        seed: int = 1
        planted_dead_setting: int = 2

    assert unread([Extra], package()) == ["Extra.planted_dead_setting"]


def test_every_setting_is_explained() -> None:
    """`rlhf show` prints the description; a section explains itself by its docstring."""
    for section in all_sections():
        assert section.__doc__, section.__name__
        for name, field in section.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            stage = section is schema.PipelineConfig and name in schema.STAGES
            assert field.description or nested or stage, f"{section.__name__}.{name}"


def undeclared(source: str) -> list[str]:
    """String keys of dictionaries in a trainer that are no metric. Keys of optimizer groups and of `state_dict`, and
    numbers that are taken out again with `pop`, are not written."""
    tree = ast.parse(source)
    states = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "state_dict"]
    kept = {id(inner) for state in states for inner in ast.walk(state)}
    nodes = [node for node in ast.walk(tree) if id(node) not in kept]
    pops = [n.args[0] for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "pop"]
    popped = {key.value for key in pops if isinstance(key, ast.Constant)}
    wrong = []
    for key in (key for node in nodes if isinstance(node, ast.Dict) for key in node.keys):
        if isinstance(key, ast.Constant) and key.value not in {"params", "lr"} | popped | set(METRICS):
            wrong.append(str(key.value))
        if isinstance(key, ast.JoinedStr):
            start = key.values[0].value if isinstance(key.values[0], ast.Constant) else ""
            if not any(name.startswith(start) for name in METRICS if start):
                wrong.append(ast.unparse(key))
    return wrong


def test_every_number_of_the_ppo_trainer_is_declared() -> None:
    trainers = ROOT / "rlhf" / "trainers" / "ppo"
    source = "".join(
        (trainers / f"{name}.py").read_text(encoding="utf-8") for name in ("trainer", "gradients", "losses", "stats")
    )
    source = source.replace("from __future__ import annotations\n", "")
    assert undeclared(source) == []
    assert undeclared(source + '\nstats = {"kl": 0, "planted": 1}\nstats = {f"plant_{1}": 0}\n') == [
        "planted",
        "f'plant_{1}'",
    ]


def literal_tolerances(source: str) -> list[int]:
    """Lines of a test that choose their own rtol or atol."""
    return [
        word.value.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg in ("rtol", "atol") and not isinstance(word.value, ast.Attribute | ast.Name | ast.Subscript)
    ]


def test_tolerances_come_from_one_place() -> None:
    found = {path: literal_tolerances(text) for path, text in texts_of_tests().items() if path != "tests/tolerances.py"}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_planted_tolerance_is_seen() -> None:
    assert literal_tolerances("f(a, b)\nf(a, rtol=1e-3, atol=-1)\nf(a, atol=SMALL)") == [2, 2]
