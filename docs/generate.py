"""Hooks of `mkdocs build`: write the configuration reference, and take files from other folders into the site.

The pages in docs/ are written for a reader of the repository, so their links lead to real files. The build puts the
files of `ADOPTED` into the site and turns links to them into links between pages.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import griffe
from mkdocs.structure.files import File
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf.config.schema import RECIPES, PipelineConfig

ROOT = Path(__file__).resolve().parent.parent
ADOPTED = {
    "data/README.md": "data-contract.md",
    "data/demo/README.md": "demo-data.md",
    "configs/LOG.md": "log.md",
    "configs/demo/experiments/README.md": "experiments.md",
    "configs/demo/experiments/on-policy.png": "on-policy.png",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/README.md": "tests.md",
    "tests/bench/README.md": "bench.md",
    "tests/DEFECTS.md": "defects.md",
}
"""File in the repository -> its name in the site."""
NOTEBOOK = "ppo_in_python.ipynb"
SETTINGS_MARK, NOTEBOOK_MARK = "<!-- settings -->", "<!-- notebook -->"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
Schema = type[BaseModel]


def on_files(files: Any, config: Any) -> Any:
    """Add the adopted files to the site."""
    for source, name in ADOPTED.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the generated parts of a page and point its links to other pages of the site."""
    markdown = markdown.replace(SETTINGS_MARK, configuration_reference())
    if NOTEBOOK_MARK in markdown:
        markdown = markdown.replace(NOTEBOOK_MARK, notebook_as_markdown(ROOT / "docs" / NOTEBOOK))
    return link_to_pages(markdown, page.file.src_uri)


def link_to_pages(markdown: str, page: str) -> str:
    """Turn links to files of the repository into links to pages of the site.

    Args:
        page: name of the page in the site.
    """
    in_repository = {name: source for source, name in ADOPTED.items()}.get(page, f"docs/{page}")
    folder = posixpath.dirname(in_repository)

    def point(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        target = posixpath.normpath(posixpath.join(folder, link))
        if target in ADOPTED:
            link = ADOPTED[target]
        elif target.startswith("docs/"):
            link = target.removeprefix("docs/")
        return before + link + after

    return LINK.sub(point, markdown)


def notebook_as_markdown(path: Path) -> str:
    """Return the cells of a notebook, code cells as fenced blocks."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts)


def configuration_reference() -> str:
    """Return a table of the settings of each stage, and one of each section that stands in a list."""
    named: dict[str, Schema] = {}
    parts = []
    for name, schema in RECIPES.items():
        title = "rlhf data weak" if name == "weak" else f"rlhf {name}"
        parts += [f"## `{title}`", *_section(schema, named)]
    parts += ["## `rlhf run`", *_section(PipelineConfig, named)]
    parts += ["## Sections used above", "Each of these stands in a list, under a name, or may be left out."]
    described: set[str] = set()
    while waiting := sorted(set(named) - described):
        for name in waiting:
            described.add(name)
            parts += [f"### {name}", *_section(named[name], named)]
    return "\n\n".join(parts)


def _section(schema: Schema, named: dict[str, Schema]) -> list[str]:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, meaning in _rows(schema, "", None, named):
        rows.append("| " + " | ".join(_cell(text) for text in (f"`{key}`", kind, default, meaning)) + " |")
    return [" ".join((schema.__doc__ or "").split()), "\n".join(rows)]


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text).replace("*", r"\*")


def _rows(
    schema: Schema, prefix: str, values: BaseModel | None, named: dict[str, Schema]
) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of each setting; `values` are the defaults that the owner of a section chose."""
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner = getattr(values, name) if values is not None else field.default
            inner = inner if isinstance(inner, BaseModel) else None
            if inner is None or not _stands_alone(kind):
                yield from _rows(kind, f"{prefix}{name}.", inner, named)
                continue
        yield f"{prefix}{name}", _kind(field, named), _default(name, field, values), field.description or ""


def _stands_alone(kind: Schema) -> bool:
    """Whether a section is described once, below, because several places use it in the same way."""
    return kind.__name__ in ("Selection", "Peft", "Watch")


def _kind(field: FieldInfo, named: dict[str, Schema]) -> str:
    return _describe(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation, named)


def _describe(kind: Any, named: dict[str, Schema]) -> str:
    """Return a type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = {k: getattr(m, k) for m in _metadata(arguments[1:]) for k in ("ge", "gt", "le", "lt") if hasattr(m, k)}
        signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
        limits = " and ".join(f"{signs[k]} {v:g}" for k, v in bounds.items() if v is not None)
        return f"{_describe(arguments[0], named)} {limits}".strip()
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a, named) for a in arguments)
    if origin is tuple:
        return f"list of {_describe(arguments[0], named)}"
    if origin is dict:
        return f"mapping of {_describe(arguments[0], named)} to {_describe(arguments[1], named)}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        named[kind.__name__] = kind
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    return {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}[kind]


def _metadata(items: tuple[Any, ...]) -> Iterator[Any]:
    for item in items:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _default(name: str, field: FieldInfo, values: BaseModel | None) -> str:
    if values is not None:
        value = getattr(values, name)
    elif field.is_required():
        return "required"
    else:
        value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see there"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


class PlainDocstrings(griffe.Extension):
    """Make 'Returns: ...', 'Raises: ...' and 'Does not: ...' paragraphs, which the Google style would misread."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = plain_docstring(obj.docstring.value)


def plain_docstring(text: str) -> str:
    """Turn sections that begin on the line of their name into paragraphs."""
    lines = []
    inside = False
    for line in text.splitlines():
        if match := re.match(r"(Returns|Raises|Does not): (.*)", line):
            lines += ["", f"**{match[1]}:** {match[2]}"]
            inside = True
        elif inside and line.startswith("    "):
            lines.append(line.strip())
        else:
            inside = False
            lines.append(line)
    return "\n".join(lines)


logging.getLogger("mkdocs.plugins.griffe").setLevel(logging.ERROR)
