"""Every module of the package has a test file of its name in the room of its name, or a line that says which covers it.

The modules of `rlhf.demo` are tested by what they write (tests/demo).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

import pytest

from tests.project.code import Code, imports, inside, package, texts_of_tests

COVERED_ELSEWHERE = {
    "rlhf.__main__": "tests/conftest.py",
    "rlhf.checkpointing.parameters_and_adam": "tests/faults/test_checkpoints.py",
    "rlhf.cli.data": "tests/demo/test_annotators.py",
    "rlhf.cli.main": "tests/cli/test_unforeseen.py",
    "rlhf.cli.options": "tests/cli/test_startup.py",
    "rlhf.config.env_vars": "tests/launch/test_launcher.py",
    "rlhf.config.ppo": "tests/trainers/ppo/test_options.py",
    "rlhf.config.sections": "tests/config/test_schema.py",
    "rlhf.data.splits": "tests/data/test_records.py",
    "rlhf.data.tokenize": "tests/data/test_labelled.py",
    "rlhf.distributed.engine_limits": "tests/stages/test_ppo_settings.py",
    "rlhf.distributed.heartbeat": "tests/launch/test_launcher.py",
    "rlhf.distributed.launch_env": "tests/distributed/test_engine.py",
    "rlhf.distributed.zero_gather": "tests/trainers/supervised/test_phase_callback.py",
    "rlhf.functional.bits": "tests/generation/test_distribution.py",
    "rlhf.functional.reduce": "tests/functional/test_masked.py",
    "rlhf.generation.request": "tests/generation/test_static_decoder.py",
    "rlhf.generation.sampling": "tests/generation/test_distribution.py",
    "rlhf.generation.response_buffers": "tests/generation/test_static_decoder.py",
    "rlhf.generation.interface": "tests/generation/test_native.py",
    "rlhf.launch.network": "tests/launch/test_machines.py",
    "rlhf.launch.supervisor": "tests/launch/test_launcher.py",
    "rlhf.models.ema": "tests/trainers/ppo/test_options.py",
    "rlhf.models.policy": "tests/models/test_load.py",
    "rlhf.preflight.check": "tests/cli/test_check.py",
    "rlhf.preflight.data_audit": "tests/cli/test_check.py",
    "rlhf.preflight.stage_inputs": "tests/cli/test_memory_errors.py",
    "rlhf.preflight.model_shapes": "tests/preflight/test_stage_memory.py",
    "rlhf.rollout.experience": "tests/rollout/test_score.py",
    "rlhf.rollout.teacher_forcing": "tests/rollout/test_score.py",
    "rlhf.rollout.reward_loading": "tests/stages/test_ppo_settings.py",
    "rlhf.rollout.running_stats": "tests/rollout/test_score.py",
    "rlhf.stages.evaluate": "tests/stages/test_runs.py",
    "rlhf.stages.lifecycle": "tests/launch/test_rank_consistency.py",
    "rlhf.stages.pipeline": "tests/stages/test_runs.py",
    "rlhf.stages.ppo": "tests/stages/test_ppo_settings.py",
    "rlhf.stages.pretrain": "tests/rollout/test_rewards.py",
    "rlhf.stages.reward": "tests/stages/test_runs.py",
    "rlhf.stages.run_stage": "tests/test_api.py",
    "rlhf.stages.sft": "tests/stages/test_methods.py",
    "rlhf.trainers.lr_schedule": "tests/trainers/test_phase_schedule.py",
    "rlhf.trainers.phase_setup": "tests/stages/test_methods.py",
    "rlhf.trainers.ppo.callbacks": "tests/test_api.py",
    "rlhf.trainers.ppo.checkpointer": "tests/faults/test_resume.py",
    "rlhf.trainers.ppo.export": "tests/trainers/ppo/test_inputs.py",
    "rlhf.models.compiled_blocks": "tests/trainers/ppo/test_compilation.py",
    "rlhf.trainers.ppo.gradients": "tests/trainers/ppo/test_trainer.py",
    "rlhf.trainers.ppo.policy_for_sampling": "tests/trainers/ppo/test_precision.py",
    "rlhf.trainers.ppo.losses": "tests/trainers/ppo/test_options.py",
    "rlhf.trainers.ppo.scoring": "tests/trainers/ppo/test_trainer.py",
    "rlhf.trainers.ppo.state": "tests/trainers/ppo/test_trainer.py",
    "rlhf.trainers.ppo.stats": "tests/trainers/ppo/test_trainer.py",
    "rlhf.trainers.supervised.checkpoint_callback": "tests/faults/test_checkpoints.py",
    "rlhf.trainers.supervised.forgetting": "tests/trainers/supervised/test_probe_data.py",
    "rlhf.trainers.supervised.run": "tests/stages/test_methods.py",
    "rlhf.version": "tests/test_api.py",
}
"""Module -> the file that tests it, for modules whose test file has another name."""

COMMANDS = {"check": "rlhf.preflight.check", "run": "rlhf.stages.pipeline"}
"""Commands whose module has another name; a stage's command is the name of its module."""

Files = Mapping[str, str]  # path from the root -> text


def own_test(module: str) -> str:
    """The path of the test file that mirrors a module."""
    *rooms, name = module.split(".")[1:]
    return "/".join(["tests", *rooms, f"test_{name}.py"])


def modules_to_test(code: Code) -> list[str]:
    """The modules that need a test: not the packages' own files, and not the demo."""
    rooms = {module.rpartition(".")[0] for module in code} | {"rlhf"}
    return [module for module in code if module not in rooms and not inside(module, "rlhf.demo")]


def words(source: str) -> Iterator[str]:
    """Names and whole strings of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def offered(source: str) -> dict[str, str]:
    """Name -> module of what the package itself offers: the imports of its `__init__`."""
    froms = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {name.name: str(node.module) for node in froms for name in node.names}


def used(path: str, files: Files, code: Code) -> set[str]:
    """The modules that a test file imports or whose command it runs, and what each of these imports."""
    said = set(words(files[path]))
    found = {name for name, _ in imports(path, {**code, path: files[path]})} & set(code)
    found |= {module for name, module in offered(code["rlhf"]).items() if name in said}
    commands = COMMANDS | {m.rpartition(".")[2]: m for m in code if m.rpartition(".")[0] == "rlhf.stages"}
    found |= {module for command, module in commands.items() if command in said}
    if {"call_cli", "run_cli"} & said:
        found |= {"rlhf.cli.main", "rlhf.cli.data"}
    return found | {name for module in found if module in code for name, _ in imports(module, code)}


def unmirrored(code: Code, files: Files, elsewhere: Mapping[str, str]) -> list[str]:
    """Modules without a test, and lines of the table that are wrong or no longer needed."""
    modules = modules_to_test(code)
    wrong = [f"{m}: no {own_test(m)}" for m in modules if own_test(m) not in files and m not in elsewhere]
    for module, path in elsewhere.items():
        if module not in modules:
            wrong.append(f"{module}: there is no such module")
        elif own_test(module) in files:
            wrong.append(f"{module}: it has {own_test(module)}; the line is not needed")
        elif path not in files:
            wrong.append(f"{module}: there is no {path}")
        elif module != "rlhf.__main__" and module not in used(path, files, code):
            wrong.append(f"{module}: {path} does not use it")
    return wrong


def test_every_module_has_a_test() -> None:
    wrong = unmirrored(package(), texts_of_tests(), COVERED_ELSEWHERE)
    assert not wrong, "\n".join(wrong)


def test_the_package_is_started_as_a_module() -> None:
    """What `rlhf.__main__` is for; the fixture `run_cli` of all tests does so."""
    assert {"-m", "rlhf"} <= set(words(texts_of_tests()[COVERED_ELSEWHERE["rlhf.__main__"]]))


@pytest.mark.parametrize(
    ("module", "path", "says"),
    [
        (None, None, "rlhf.room.new: no tests/room/test_new.py"),
        ("rlhf.room.gone", "tests/room/test_old.py", "there is no such module"),
        ("rlhf.room.old", "tests/room/test_old.py", "the line is not needed"),
        ("rlhf.room.new", "tests/room/test_absent.py", "there is no tests/room/test_absent.py"),
        ("rlhf.room.new", "tests/room/test_old.py", "does not use it"),
        ("rlhf.room.new", "tests/room/test_user.py", None),
        ("rlhf.room.new", "tests/room/test_friend.py", None),
        ("rlhf.room.new", "tests/room/test_command.py", None),
    ],
)
def test_a_planted_violation_is_seen(module: str | None, path: str | None, says: str | None) -> None:
    code = dict.fromkeys(("rlhf", "rlhf.room", "rlhf.stages", "rlhf.room.old", "rlhf.room.new"), "")
    code |= {"rlhf.room.old": "import rlhf.room.new", "rlhf.stages.new": "from rlhf.room import new"}
    files = {
        "tests/room/test_old.py": "import json",
        "tests/room/test_user.py": "from rlhf.room import new",
        "tests/room/test_friend.py": "import rlhf.room.old",
        "tests/room/test_command.py": "run(['new'])",
        "tests/stages/test_new.py": "",
    }
    table = {} if module is None else {module: str(path)}
    found = [line for line in unmirrored(code, files, table) if module in (None, line.partition(":")[0])]
    assert len(found) == (says is not None)
    assert all(str(says) in line for line in found)


def test_a_test_file_lies_where_its_module_does() -> None:
    assert own_test("rlhf.trainers.ppo.state") == "tests/trainers/ppo/test_state.py"
    assert own_test("rlhf.errors") == "tests/test_errors.py"
