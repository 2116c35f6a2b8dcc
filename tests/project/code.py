"""The package as text: modules, what they import, where."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Code = Mapping[str, str]  # module -> source


def package() -> dict[str, str]:
    """Every module of rlhf and its source."""
    found = {}
    for path in sorted((ROOT / "rlhf").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def texts_of_tests() -> dict[str, str]:
    """Every Python file under tests."""
    found = sorted((ROOT / "tests").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


def imports(module: str, code: Code) -> Iterator[tuple[str, int]]:
    """What a module imports at any depth, by name, with the line. `import_module` of a literal counts; of an f-string,
    its constant start does. For `from a import b` the answer is a.b if that is a module of ours, else a."""
    for node in _importing_nodes(code[module]):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node, code)
            for name in node.names:
                yield (f"{base}.{name.name}" if f"{base}.{name.name}" in code else base), node.lineno
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            yield _literal(node.args[0]), node.lineno


@functools.cache
def _importing_nodes(source: str) -> tuple[ast.Import | ast.ImportFrom | ast.Call, ...]:
    """The nodes of a text that may import. Kept, because every rule and every planted violation asks for them again."""
    nodes = ast.walk(ast.parse(source))
    return tuple(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom | ast.Call))


def _absolute(module: str, node: ast.ImportFrom, code: Code) -> str:
    if not node.level:
        return node.module or ""
    is_package = any(other.startswith(module + ".") for other in code)
    parts = module.split(".") if is_package else module.split(".")[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _literal(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return str(node.value).rstrip(".") if isinstance(node, ast.Constant) else ""


def reachable(start: str, code: Code) -> set[str]:
    """All modules of ours that importing one of them can import, packages included."""
    seen: set[str] = set()
    queue = [start]
    while queue:
        module = queue.pop()
        if module in seen or module not in code:
            continue
        seen.add(module)
        queue += [target for target, _ in imports(module, code)]
        queue += [module.rpartition(".")[0]]
    return seen


def inside(module: str, package: str) -> bool:
    """Whether a module is a package or lies in it."""
    return module == package or module.startswith(package + ".")
