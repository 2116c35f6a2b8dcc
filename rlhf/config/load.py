"""Loading of YAML files with `key=value` overrides into a typed configuration, with the origin of every value.

Precedence: schema default < YAML < command line. All problems are reported at once, each with file and line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rlhf.config.renamed_keys import rename_old_keys
from rlhf.config.schema import PIPELINE_ORDER, STAGES, PipelineConfig, PipelineStage, StageConfig
from rlhf.errors import ConfigError, combine_errors

ConfigT = TypeVar("ConfigT", bound=BaseModel)
Origins = dict[str, str]
COMMAND_LINE = "command line"
YAML_MERGE_TAG = "tag:yaml.org,2002:merge"  # the key '<<'


@dataclass(frozen=True)
class LoadedConfig(Generic[ConfigT]):
    """A validated configuration and where each value came from ('configs/x.yaml:7', 'command line')."""

    config: ConfigT
    origins: Origins
    notes: tuple[str, ...] = ()
    """What the user should know before the run starts, such as a setting given under its old name."""


@dataclass(frozen=True)
class PipelineStep:
    """One enabled stage of a pipeline with its complete configuration."""

    name: str
    launcher: str | None
    loaded: LoadedConfig[StageConfig]


@dataclass(frozen=True)
class ResolvedPipeline:
    """A pipeline's own settings and its enabled stages in order."""

    config: PipelineConfig
    stages: tuple[PipelineStep, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of all stages; each begins with the file and line that it is about."""
        return tuple(note for stage in self.stages for note in stage.loaded.notes)


def load_stage_config(schema: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig[ConfigT]:
    """Read a stage's YAML file, apply overrides and validate the result.

    Args:
        schema: the configuration class of the stage.
        path: YAML file.
        overrides: 'section.key=value' strings; values are parsed as YAML.
    Raises: ConfigError naming every problem with file and line.
    """
    values, origins = read_yaml(Path(path))
    _apply(values, origins, _parse_overrides(overrides))
    return validate_config(schema, values, origins, str(path))


def load_config(path: str | Path, overrides: Sequence[str] = (), *, stage: str | None = None) -> StageConfig:
    """Read a stage's YAML file, apply `key=value` overrides, validate. Returns: the stage's configuration.

    Args:
        stage: whose file it is, such as "ppo"; None = the file's name says it.
    Raises: ConfigError with every problem at once.
    """
    name = Path(path).stem if stage is None else stage
    if name not in STAGES:
        raise ConfigError(f"no stage called '{name}'", where=str(path), do=f"give stage=: {', '.join(STAGES)}")
    return load_stage_config(STAGES[name], Path(path), list(overrides)).config


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedPipeline:
    """Read a pipeline file and the file of every enabled stage; later stages read the models of earlier ones.

    Raises: ConfigError naming every problem of the pipeline file, or of the first stage file that has some.
    """
    path = Path(path)
    values, origins = read_yaml(path)
    _apply(values, origins, _parse_overrides(overrides))
    own: dict[str, Any] = {}
    inline: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key in PIPELINE_ORDER and isinstance(value, dict):
            own[key] = {k: v for k, v in value.items() if k in PipelineStage.model_fields}
            inline[key] = {k: v for k, v in value.items() if k not in PipelineStage.model_fields}
        else:
            own[key] = value
    pipeline = validate_config(PipelineConfig, own, origins, str(path)).config
    stages = []
    for name in PIPELINE_ORDER:
        entry: PipelineStage | None = getattr(pipeline, name)
        if entry is None or not entry.enabled:
            continue
        stage_values, stage_origins = read_yaml(path.parent / entry.config)
        _merge(stage_values, stage_origins, pipeline_wiring(name, pipeline), "pipeline")
        prefix = name + "."
        nested = {k[len(prefix) :]: v for k, v in origins.items() if k.startswith(prefix)}
        for key, value in _leaves(inline.get(name, {})):
            _put(stage_values, key, value)
            _forget_below(key, stage_origins)
            stage_origins |= {k: v for k, v in nested.items() if k.startswith(key + ".")}
            stage_origins[key] = nested.get(key, str(path))
        loaded = validate_config(STAGES[name], stage_values, stage_origins, str(path.parent / entry.config))
        stages.append(PipelineStep(name, entry.launcher, loaded))
    return ResolvedPipeline(pipeline, tuple(stages))


def pipeline_wiring(stage: str, pipeline: PipelineConfig) -> dict[str, Any]:
    """Return the values that a stage takes from the pipeline: seed, output folder and models of earlier stages."""
    folder = {name: f"{pipeline.output_dir}/{i}-{name}" for i, name in enumerate(PIPELINE_ORDER)}

    def made(name: str) -> str | None:
        entry = getattr(pipeline, name)
        return f"{folder[name]}/model" if entry is not None and entry.enabled else None

    values: dict[str, Any] = {"output_dir": folder[stage]}
    if pipeline.seed is not None:
        values["seed"] = pipeline.seed
    links = {
        "sft": {"model.path": "pretrain"},
        "reward": {"model.path": "sft"},
        "ppo": {"policy.path": "sft", "reward_model.path": "reward"},
        "evaluate": {
            "models.base.path": "pretrain",
            "models.sft.path": "sft",
            "models.ppo.path": "ppo",
            "reward_model.path": "reward",
        },
    }
    for key, source in links.get(stage, {}).items():
        path = made(source)
        if path is not None:
            _put(values, key, path)
    return values


def read_yaml(path: Path) -> tuple[dict[str, Any], Origins]:
    """Read a YAML mapping; return its values and the file:line of each of its keys (dotted).

    Raises: ConfigError if the file is missing, not UTF-8, not YAML or not a mapping, or gives a key twice.
    """
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(
            "no such configuration file",
            where=str(path),
            do=f"configuration files in that folder: {', '.join(near)}" if near else "check the path",
        )
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8 text", found=str(error), where=str(path), do="save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            "not valid YAML",
            found=getattr(error, "problem", str(error)) or "",
            where=f"{path}{line}",
            do="correct the file at this line",
        ) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            "expected 'key: value' lines", found=type(values).__name__, where=str(path), do="write a YAML mapping"
        )
    origins: Origins = {}
    if node is not None:
        _lines(node, "", str(path), origins)
    return values, origins


def validate_config(
    schema: type[ConfigT], values: Mapping[str, Any], origins: Origins, where: str
) -> LoadedConfig[ConfigT]:
    """Check values against a schema. Keys that were renamed are accepted under their old name, with a note.

    Args:
        schema: the pydantic class that describes the values.
        values: nested values as read from YAML.
        origins: dotted key -> where its value comes from.
        where: the file to name for a problem that has no line of its own, such as a missing key.
    Raises: ConfigError with one line for each problem.
    """
    renamed = rename_old_keys(schema, values)
    problems = [_given_twice(old, new, origins, where) for old, new in renamed.clashes.items()]
    notes = tuple(
        f"{_origin(old.split('.'), origins, where)}: '{old}' is now called '{new}'; the old name still works in this "
        "release, please change it"
        for old, new in renamed.old_keys.items()
    )
    origins = _rename_origins(origins, renamed.old_keys)
    try:
        config = schema.model_validate(renamed.values)
        if not problems:
            return LoadedConfig(config, origins, notes)
    except ValidationError as error:
        errors = error.errors()
        inner = [e["loc"] for e in errors]
        # A list whose items are wrong is also reported as too short: only the items' own problems help.
        errors = [e for e in errors if not (e["type"] == "too_short" and any(_below(loc, e["loc"]) for loc in inner))]
        problems += [_explain(schema, dict(e), origins, where) for e in errors]
    raised = combine_errors(ConfigError, problems)
    assert raised is not None
    raise raised


def _given_twice(old: str, new: str, origins: Origins, where: str) -> str:
    first, second = (_origin(key.split("."), origins, where) for key in (old, new))
    return f"{first}: '{old}' is the old name of '{new}', which is given too (found: {second}); remove '{old}'"


def _rename_origins(origins: Origins, old_keys: Mapping[str, str]) -> Origins:
    """Return the origins under today's keys, so that a problem with a value names its line also under an old key."""
    return {old_keys.get(key, key): origin for key, origin in origins.items()}


def _below(inner: Sequence[Any], outer: Sequence[Any]) -> bool:
    return len(inner) > len(outer) and tuple(inner[: len(outer)]) == tuple(outer)


def _origin(parts: Sequence[str], origins: Origins, where: str) -> str:
    """Return the origin of the longest known prefix of a dotted key, else of a key below it, else the file."""
    for n in range(len(parts), 0, -1):
        if (key := ".".join(parts[:n])) in origins:
            return origins[key]
    key = ".".join(parts) + "."
    return next((origin for known, origin in origins.items() if known.startswith(key)), where)


def _explain(schema: type[BaseModel], error: dict[str, Any], origins: Origins, where: str) -> str:
    parts = [str(p) for p in error["loc"]]
    key = ".".join(parts)
    origin = _origin(parts, origins, where)
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(schema, parts[:-1])
        near = difflib.get_close_matches(parts[-1], valid, n=1)
        prefix = ".".join(parts[:-1])
        dotted = f"{prefix}." if prefix else ""
        hint = f"did you mean '{dotted}{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
        return f"{origin}: unknown key '{key}'; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing required key '{key}'"
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^\w+ should (be|have)", "expected", message).replace(" after validation", "")
    label = f"'{key}': " if key else ""
    got = "" if error["type"] == "value_error" else f", got {error['input']!r}"
    return f"{origin}: {label}{message}{got}"


def _valid_keys(schema: type[BaseModel], parts: Sequence[str]) -> list[str]:
    """Return the field names of the section at a dotted place inside a schema."""
    current: Any = schema
    for part in parts:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[part].annotation
        for _ in range(4):  # unwrap Optional[...], tuple[X, ...], dict[str, X]
            args = [a for a in get_args(current) if isinstance(a, type) and issubclass(a, BaseModel)]
            if not args or (isinstance(current, type) and issubclass(current, BaseModel)):
                break
            current = args[0]
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    parsed, problems = {}, []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            problems.append(f"{COMMAND_LINE}: expected section.key=value, got '{item}'")
            continue
        try:
            parsed[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"{COMMAND_LINE}: '{key}': not a YAML value: {text!r}")
    error = combine_errors(ConfigError, problems)
    if error:
        raise error
    return parsed


def _apply(values: dict[str, Any], origins: Origins, overrides: Mapping[str, Any]) -> None:
    for key, value in overrides.items():
        _put(values, key, value)
        _forget_below(key, origins)
        _stamp(key, value, COMMAND_LINE, origins)


def _forget_below(key: str, origins: Origins) -> None:
    """Remove the origins of the parts of a value that was replaced as a whole."""
    for stale in [k for k in origins if k.startswith(key + ".")]:
        del origins[stale]


def _stamp(key: str, value: Any, origin: str, origins: Origins) -> None:
    """Record one origin for a value and all its parts."""
    origins[key] = origin
    if isinstance(value, dict | list):
        for part, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _stamp(f"{key}.{part}", inner, origin, origins)


def _merge(values: dict[str, Any], origins: Origins, extra: Mapping[str, Any], origin: str) -> None:
    for key, value in _leaves(extra):
        _put(values, key, value)
        origins[key] = origin


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a number inside it indexes a list ('data.train.0.path')."""
    parts = key.split(".")
    current: Any = values
    for i, part in enumerate(parts[:-1]):
        if isinstance(current, list):
            if not part.isdigit() or int(part) >= len(current):
                raise ConfigError(
                    f"'{key}': '{'.'.join(parts[:i])}' is a list of {len(current)}",
                    found=part,
                    where=COMMAND_LINE,
                    do=f"use an index below {len(current)}",
                )
            current = current[int(part)]
        else:
            if not isinstance(current.get(part), dict | list):
                current[part] = {}
            current = current[part]
    last = parts[-1]
    if isinstance(current, list):
        if not last.isdigit() or int(last) >= len(current):
            raise ConfigError(
                f"'{key}': no such list item", found=last, where=COMMAND_LINE, do=f"use an index below {len(current)}"
            )
        current[int(last)] = value
    else:
        current[last] = value


def _is_list(node: yaml.Node) -> bool:
    return isinstance(node, yaml.SequenceNode)


def _lines(node: yaml.Node, prefix: str, path: str, out: Origins) -> None:
    """Collect the file:line of every key below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        merges = [value for key, value in node.value if key.tag == YAML_MERGE_TAG]
        for inner in (part for value in merges for part in (value.value if _is_list(value) else [value])):
            _lines(inner, prefix, path, out)  # '<<: *other': first, because own keys win
        own = set()
        for key_node, value_node in node.value:
            if key_node.tag == YAML_MERGE_TAG:
                continue
            key, origin = f"{prefix}{key_node.value}", f"{path}:{key_node.start_mark.line + 1}"
            if key in own:
                raise ConfigError(f"'{key}' is given twice", where=origin, do="keep one of them")
            own.add(key)
            out[key] = origin
            _lines(value_node, key + ".", path, out)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            out[f"{prefix}{i}"] = f"{path}:{item.start_mark.line + 1}"
            _lines(item, f"{prefix}{i}.", path, out)
