"""What `rlhf.distributed.engine` relies on in other libraries, and what it guarantees."""

from __future__ import annotations

import inspect
import os
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from rlhf.distributed import engine, launch_env
from rlhf.errors import TrainingError
from tests.models import tiny

HINT = "this release was never run: read its changes, run the tests, then widen TESTED and pyproject.toml"


@pytest.mark.parametrize("package", sorted(engine.TESTED_VERSIONS))
def test_the_installed_release_is_one_that_was_tested(package: str) -> None:
    lowest, above = engine.TESTED_VERSIONS[package]
    assert Version(lowest) <= Version(version(package)) < Version(above), f"{package} {version(package)}: {HINT}"


def test_the_ranges_are_those_of_the_package() -> None:
    import tomllib

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    lines = tomllib.loads(text)["project"]["dependencies"]
    for package, (lowest, above) in engine.TESTED_VERSIONS.items():
        wanted = next(line.removeprefix(package) for line in lines if line.startswith(package + ">"))
        bounds = {s.operator: Version(s.version) for s in SpecifierSet(wanted)}
        assert bounds == {">=": Version(lowest), "<": Version(above)}, package


def test_trl_still_has_what_is_used_under_zero_3() -> None:
    from trl.models.utils import add_hooks, remove_hooks

    for function in (add_hooks, remove_hooks):
        assert list(inspect.signature(function).parameters) == ["model"]


def test_trl_trainers_still_have_the_methods_that_are_overridden() -> None:
    from trl import RewardTrainer, SFTTrainer

    from rlhf.trainers.supervised.reward import RewardModelTrainer

    parameters = list(inspect.signature(RewardTrainer.compute_loss).parameters)
    assert parameters == list(inspect.signature(RewardModelTrainer.compute_loss).parameters)
    assert "labels" in inspect.getsource(SFTTrainer._set_signature_columns_if_needed)
    source = inspect.getsource(RewardTrainer._set_signature_columns_if_needed)
    assert "chosen_ids" in source
    assert "rejected_ids" in source
    assert list(inspect.signature(RewardTrainer.log).parameters) == ["self", "logs", "start_time"]


def test_accelerate_still_takes_what_it_is_given() -> None:
    from accelerate import Accelerator, InitProcessGroupKwargs

    assert {"cpu", "kwargs_handlers", "step_scheduler_with_optimizer"} <= set(
        inspect.signature(Accelerator.__init__).parameters
    )
    assert {"backend", "timeout"} <= set(inspect.signature(InitProcessGroupKwargs).parameters)


# World size


@pytest.mark.parametrize("variable", ["WORLD_SIZE", launch_env.EXPECTED_PROCESSES])
def test_a_wrong_number_of_processes_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", launch_env.EXPECTED_PROCESSES):
        monkeypatch.delenv(name, raising=False)
    launch_env.check_world_size(1)
    monkeypatch.setenv(variable, "2")
    launch_env.check_world_size(2)
    with pytest.raises(TrainingError, match="1 instead of 2"):
        launch_env.check_world_size(1)


def test_an_accelerator_that_is_alone_where_two_were_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch_env.EXPECTED_PROCESSES, "2")
    with pytest.raises(TrainingError, match="1 instead of 2"):
        engine.make_accelerator()


def test_only_rank_0_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert launch_env.is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not launch_env.is_main_process()


# Telemetry


@pytest.fixture
def pings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the usage pings that would be sent; they are caught in the queue, the last step before the network."""
    import huggingface_hub.constants
    from huggingface_hub.utils import _telemetry

    for name in (
        "CI",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_DISABLE_TELEMETRY",
        "DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", False)
    sent: list[Any] = []
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: None)
    monkeypatch.setattr(_telemetry._TELEMETRY_QUEUE, "put", sent.append)
    return sent


def make_trainer(folder: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    from rlhf.data.render import Rendered
    from rlhf.trainers.supervised.sft import to_dataset

    rows = to_dataset([Rendered(ids, [True] * len(ids)) for ids in tiny.rows(1, [8, 8])])
    args = SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, max_length=None)
    SFTTrainer(model=tiny.new(), args=args, processing_class=tiny.tokenizer(), train_dataset=rows)


def test_no_usage_ping_leaves_with_telemetry_off(pings: list[Any], tmp_path: Path) -> None:
    engine.quiet_libraries(telemetry=False)
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    make_trainer(tmp_path)
    assert pings == []


def test_the_ping_check_sees_one(pings: list[Any], tmp_path: Path) -> None:
    engine.quiet_libraries(telemetry=True)
    make_trainer(tmp_path)
    assert len(pings) == 1


# Saving


def test_a_model_is_saved_as_a_plain_folder(tmp_path: Path) -> None:
    accelerator = engine.make_accelerator()
    model = accelerator.prepare(tiny.new(2))
    engine.save_model(model, str(tmp_path / "model"), accelerator=accelerator)
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(tiny.rows(1, [9]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded(ids).logits, tiny.new(2)(ids).logits)


def test_versions_name_every_library_that_shapes_a_run() -> None:
    assert {"torch", "transformers", "trl", "peft", "accelerate"} <= set(engine.library_versions())


def test_a_stage_forgets_the_precision_of_the_one_before() -> None:
    """accelerate keeps mixed precision for the whole process: PPO would train under an earlier autocast."""
    from accelerate import Accelerator

    engine.reset_accelerator_state()
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    assert engine.make_accelerator().mixed_precision == "bf16"  # what would happen
    engine.reset_accelerator_state()
    assert engine.make_accelerator().mixed_precision == "no"


def test_every_group_of_processes_gets_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes the groups that DeepSpeed creates, to which no timeout can be passed."""
    import torch.distributed.distributed_c10d as c10d

    monkeypatch.setattr(c10d, "default_pg_timeout", c10d.default_pg_timeout)  # put back afterwards
    monkeypatch.setenv("RLHF_TIMEOUT", "20")
    engine.set_process_group_timeout()
    assert c10d._get_default_timeout("gloo") == timedelta(seconds=20)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert engine.trainer_arguments("float32")["ddp_timeout"] == 20
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "ddp_timeout" not in engine.trainer_arguments("float32")


@pytest.mark.parametrize(("has", "native"), [({"avx2": True}, False), ({"avx512_bf16": True}, True), ({}, False)])
def test_native_is_bfloat16_where_the_processor_has_it(
    has: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processors emulate bfloat16 at a fraction of the speed."""
    monkeypatch.setattr(engine, "use_cpu", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    chosen = {name: engine.wants_bfloat16(name) for name in ("auto", "native", "float32", "bfloat16")}
    assert chosen == {"auto": False, "native": native, "float32": False, "bfloat16": True}
