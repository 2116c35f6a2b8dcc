"""Tests of restarts: finished stages are skipped, seeds are reproducible, interrupted runs resume exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf.models.policy import load_causal
from tests.models import tiny
from tests.stages import setup
from tests.stages.setup import info, metrics

pytestmark = pytest.mark.slow
STAGES = ("sft", "reward", "classify", "ppo")


def moved(config: dict[str, Any], folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the same configuration with another output folder."""
    return config | {"output_dir": str(folder)} | changes


@pytest.mark.parametrize("stage", [*STAGES, "evaluate"])
def test_a_finished_stage_is_skipped(stage: str, full: Any, run_stage: Any) -> None:
    before = info(full.run(stage))
    assert "skipped" in run_stage(stage, full.configs[stage])
    assert info(full.run(stage)) == before


def test_another_configuration_does_not_overwrite_a_run(full: Any, call_cli: Any, tmp_path: Path) -> None:
    before = info(full.run("sft"))
    code, _, err = call_cli(["sft", setup.write(tmp_path, "sft", full.configs["sft"]), "seed=2"])
    assert code == 2
    assert "already holds another run" in err
    assert info(full.run("sft")) == before


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_numbers_and_another_does_not(
    stage: str, trained: Any, run_stage: Any, tmp_path: Path
) -> None:
    run_stage(stage, moved(trained.configs[stage], tmp_path / "again"))
    assert metrics(tmp_path / "again") == metrics(trained.run(stage))
    if not trained.adapters:
        run_stage(stage, moved(trained.configs[stage], tmp_path / "other", seed=2))
        assert metrics(tmp_path / "other") != metrics(trained.run(stage))


# Interruptions


def interrupted_at(step: int, original: Callable[..., Any], step_of: Callable[..., int]) -> Callable[..., Any]:
    """Wrap a function so that it raises KeyboardInterrupt when it is called for a step."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if step_of(*args) == step:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    return wrapped


def interrupt(name: str, config: dict[str, Any], tmp_path: Path, call_cli: Any) -> None:
    code, _, err = call_cli([name, setup.write(tmp_path, name, config)])
    assert code == 130
    assert "the same command continues" in err
    facts = info(Path(config["output_dir"]))
    assert facts["status"] == "interrupted"


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def assert_same_run(run: Path, other: Path) -> None:
    assert metrics(run) == metrics(other)
    for name in ("model", "value_model"):
        ours, theirs = weights(run / name), weights(other / name)
        assert ours.keys() == theirs.keys()
        for file, tensors in theirs.items():
            assert all(torch.equal(ours[file][key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_ppo_run_ends_as_an_uninterrupted_one(
    at: int, trained: Any, call_cli: Any, run_stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Interrupted at step 1 there is no checkpoint yet; at step 3 there is that of step 2."""
    from rlhf.stages.ppo import RunReporter

    config = moved(trained.configs["ppo"], tmp_path / "run")
    with monkeypatch.context() as patch:
        original = RunReporter.on_step_end
        patch.setattr(
            RunReporter, "on_step_end", interrupted_at(at, original, lambda _, trainer, *rest: trainer.state.step)
        )
        interrupt("ppo", config, tmp_path, call_cli)
    assert not (tmp_path / "run" / "model").exists()
    out = run_stage("ppo", config)
    assert ("continuing after step 2" in out) == (at == 3)
    assert_same_run(tmp_path / "run", trained.run("ppo"))
    assert info(tmp_path / "run")["attempts"] == 2


def test_samples_are_not_written_twice(
    full: Any, call_cli: Any, run_stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run is interrupted while the checkpoint of step 2 is written, after its samples."""
    from rlhf.trainers.ppo.checkpointer import PPOCheckpointer

    config = moved(full.configs["ppo"], tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(PPOCheckpointer, "save", interrupted_at(2, PPOCheckpointer.save, lambda _, t: t.state.step))
        interrupt("ppo", config, tmp_path, call_cli)
    run_stage("ppo", config)
    ours, theirs = ((run / "samples.jsonl").read_text() for run in (tmp_path / "run", full.run("ppo")))
    assert ours == theirs


@pytest.mark.parametrize(("stage", "at"), [("sft", 3), ("sft", 5), ("reward", 5), ("classify", 5)])
def test_an_interrupted_run_on_a_trainer_ends_as_an_uninterrupted_one(
    stage: str, at: int, trained: Any, call_cli: Any, run_stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There are six updates, three per epoch, and a checkpoint after every second one."""
    from rlhf.trainers.supervised.base import MetricsCallback

    config = moved(trained.configs[stage], tmp_path / "run")
    with monkeypatch.context() as patch:
        state = lambda _, args, state, *rest: state.global_step  # noqa: E731
        patch.setattr(MetricsCallback, "on_step_end", interrupted_at(at, MetricsCallback.on_step_end, state))
        interrupt(stage, config, tmp_path, call_cli)
    run_stage(stage, config)
    assert_same_run(tmp_path / "run", trained.run(stage))


def test_an_error_is_recorded_with_the_run(
    full: Any, call_cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rlhf.errors import TrainingError
    from rlhf.trainers.ppo.trainer import PPOTrainer

    def fail(*_: Any) -> None:
        raise TrainingError("broken on purpose")

    monkeypatch.setattr(PPOTrainer, "optimizer_step", fail)
    config = moved(full.configs["ppo"], tmp_path / "run")
    code, _, err = call_cli(["ppo", setup.write(tmp_path, "ppo", config)])
    assert (code, "broken on purpose" in err) == (2, True)
    assert info(tmp_path / "run")["status"] == "failed"
    assert "broken on purpose" in info(tmp_path / "run")["error"]


# What does not fit


def test_a_reward_model_that_ends_replies_otherwise_is_refused(full: Any, call_cli: Any, tmp_path: Path) -> None:
    shutil.copytree(full.run("reward") / "model", tmp_path / "reward")
    record = json.loads((tmp_path / "reward" / "handover.json").read_text())
    (tmp_path / "reward" / "handover.json").write_text(json.dumps(record | {"end_id": 7}))
    config = moved(full.configs["ppo"], tmp_path / "run", reward_model={"path": str(tmp_path / "reward")})
    code, _, err = call_cli(["ppo", setup.write(tmp_path, "ppo", config)])
    assert code == 2
    assert "end token" in err
    assert not (tmp_path / "run").exists()


def test_sequences_beyond_the_context_are_refused(full: Any, call_cli: Any, tmp_path: Path) -> None:
    config = setup.write(tmp_path, "ppo", moved(full.configs["ppo"], tmp_path / "run"))
    code, _, err = call_cli(["ppo", config, "sampling.max_new_tokens=65"])
    assert code == 2
    assert "context of 128" in err


def bare_base(folder: Path) -> str:
    """Write a base model whose tokenizer has no chat template and no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "LoRA"])
def test_a_base_model_without_turns_or_padding_grows_and_goes_through_every_stage(
    adapters: bool, files: Any, run_stage: Any, tmp_path: Path
) -> None:
    base = bare_base(tmp_path / "base")
    made = setup.configs(tmp_path, base, files, adapters=adapters)
    longer = {"max_length": 200, "validation_fraction": 0.25}
    for stage in ("sft", "reward", "classify"):
        made[stage]["data"] |= longer
    made["ppo"]["data"]["max_prompt_tokens"] = 128
    for stage in STAGES:
        run_stage(stage, made[stage])
    plain, grown = load_causal(tiny.source(base)), load_causal(tiny.source(tmp_path / "ppo"))
    assert grown.get_input_embeddings().weight.shape[0] == plain.get_input_embeddings().weight.shape[0] + 3


# The pipeline


def test_a_pipeline_feeds_each_stage_with_the_one_before(
    tiny_model_dir: Path, files: Any, call_cli: Any, tmp_path: Path
) -> None:
    made = setup.configs(tmp_path / "elsewhere", str(tiny_model_dir), files)
    for stage in ("sft", "reward"):
        setup.write(tmp_path, stage, made[stage])
    top = tmp_path / "all"
    plan = {"output_dir": str(top), "seed": 3, "sft": {"config": "sft.yaml"}, "reward": {"config": "reward.yaml"}}
    pipeline = setup.write(tmp_path, "pipeline", plan)
    code, out, err = call_cli(["run", pipeline, "reward.optim.learning_rate=1e-3"])
    assert code == 0, err
    assert sorted(p.name for p in top.iterdir() if p.is_dir()) == ["1-sft", "2-reward"]
    saved = yaml.safe_load((top / "2-reward" / "config.yaml").read_text())
    assert saved["model"]["path"] == str(top / "1-sft" / "model")
    assert (saved["seed"], saved["optim"]["learning_rate"]) == (3, 1e-3)
    assert "finished" in out
    assert not (tmp_path / "elsewhere").exists()
    before = info(top / "2-reward")
    code, out, _ = call_cli(["run", pipeline, "reward.optim.learning_rate=1e-3"])
    assert out.count("skipped") == 2
    assert info(top / "2-reward") == before
