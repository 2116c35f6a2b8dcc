"""Tests of PPO's settings through the whole stage, from YAML to a saved model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.config.schema import PPOConfig
from rlhf.config.sections import ModelSource
from rlhf.console import Console
from rlhf.data.render import Renderer
from rlhf.distributed.engine_limits import check_deepspeed
from rlhf.errors import ConfigError
from rlhf.models.heads import sequence_scores
from rlhf.models.load import load_tokenizer
from rlhf.models.model_metadata import save_tokenizer_and_handover
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import load_scorer
from rlhf.stages.ppo import load_components
from rlhf.stages.pretrain import new_tokenizer
from tests.models import tiny
from tests.stages import setup
from tests.stages.setup import adapter, metrics


def longer(prompt: Any, response: str, record: dict[str, Any]) -> float:
    """Return a reward that depends on the whole record."""
    assert record["prompt"] == prompt
    return len(response) / 10


def config(full: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of these tests with another output folder and changed sections."""
    found = dict(full.configs["ppo"]) | {"output_dir": str(folder)}
    for key, value in changes.items():
        merged = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = {**found[key], **value} if merged else value
    return found


def test_a_function_alone_is_reward_enough(full: Any, run_stage: Any, tmp_path: Path) -> None:
    out = run_stage(
        "ppo",
        config(
            full,
            tmp_path / "run",
            reward_model=None,
            rewards=[{"function": "tests.stages.test_ppo_settings:longer", "weight": 2.0}],
            ppo={"normalize_scores": "running", "score_clip": 3.0, "value_warmup": 1},
        ),
    )
    assert "the first 1 steps train only the value model" in out
    lines = metrics(tmp_path / "run")
    assert lines[0]["score"] > 0
    assert lines[0]["explained_variance"] == pytest.approx(0.0, abs=0.2)  # values start at 0 everywhere
    assert lines[1]["kl"] == lines[0]["kl"] == 0.0  # the policy waited


def test_frozen_models_that_rest_change_no_number(full: Any, run_stage: Any, tmp_path: Path) -> None:
    run_stage("ppo", config(full, tmp_path / "run", offload=["reference", "reward"]))
    assert metrics(tmp_path / "run") == metrics(full.run("ppo"))


def test_a_reward_model_on_the_shared_base_cannot_rest(adapted: Any, tmp_path: Path) -> None:
    found = PPOConfig.model_validate(config(adapted, tmp_path / "run", offload=["reward"]))
    with pytest.raises(ConfigError, match=r"offload: there is no reward model to offload .* set roles=separate"):
        load_components(found, Console(quiet=True))
    load_components(found.model_copy(update={"roles": "separate"}), Console(quiet=True))


def test_text_average_filters_and_an_early_stop_go_through_the_stage(
    full: Any, files: setup.Files, run_stage: Any, tmp_path: Path
) -> None:
    out = run_stage(
        "ppo",
        config(
            full,
            tmp_path / "run",
            ptx={"coef": 0.5, "data": [{"path": files["text"]}], "batch_size": 3},
            ppo={"ema": 0.5, "target_kl": 1e-6, "epochs": 3},
            sampling={"top_k": 40, "min_new_tokens": 2, "stop": ["z"]},
        ),
    )
    assert "ptx: " in out
    lines = metrics(tmp_path / "run")
    assert all(line["ptx_loss"] > 0 for line in lines)
    assert all(line["updates"] < 6 for line in lines)
    assert all(line["first_ratio_error"] < 1e-4 for line in lines)
    assert all(line["sampling_mismatch"] < 1e-3 for line in lines)
    assert lines[0]["response_length"] >= 2
    # What is saved is the average: it is neither the start nor what the last update made.
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "trained-00000.safetensors")
    saved = dict(load_causal(tiny.source(tmp_path / "run" / "model")).named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    start = dict(load_causal(tiny.source(full.run("sft") / "model")).named_parameters())[name]
    assert not torch.equal(saved[name], start)
    assert not torch.equal(saved[name], state[f"policy.{name}:weight"])


def test_a_reward_model_with_another_tokenizer_is_read_in_its_own_words(
    full: Any, run_stage: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(full.run("reward") / "model", folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    size = len(load_tokenizer(tiny.source(full.run("sft"))))
    other = new_tokenizer(iter(["quite other sentences make quite other tokens, and so they should"] * 3), size)
    save_tokenizer_and_handover(
        folder, "reward", Renderer(other), other, score_mean=0.0, score_std=1.0, head_dtype="float32"
    )
    out = run_stage("ppo", config(full, tmp_path / "run", reward_model={"path": str(folder)}))
    assert "has another tokenizer than the policy" in out
    assert metrics(tmp_path / "run")[0]["score_std"] > 0


def test_an_ensemble_of_one_model_twice_scores_as_the_model_alone(full: Any, run_stage: Any, tmp_path: Path) -> None:
    model = {"path": str(full.run("reward") / "model")}
    for name, rewards in (("alone", [{"model": model}]), ("twice", [{"ensemble": [model, model], "combine": "worst"}])):
        run_stage("ppo", config(full, tmp_path / name, reward_model=None, rewards=rewards, ppo={"steps": 1}))
    alone, twice = (metrics(tmp_path / name)[0]["score"] for name in ("alone", "twice"))
    assert twice == alone != 0.0


@pytest.mark.parametrize("scale", ["raw", "running"])
def test_members_of_an_ensemble_share_a_scale_whatever_else_is_rescaled(
    scale: str, full: Any, run_stage: Any, tmp_path: Path
) -> None:
    """Two copies, one with scores ten times as large and a record that says so: their minimum is neither's alone."""
    folder = tmp_path / "reward"
    shutil.copytree(full.run("reward") / "model", folder)
    large = load_scorer(tiny.source(folder))
    with torch.no_grad():
        large.score.weight.mul_(10.0)
    large.save_pretrained(folder)
    record = json.loads((folder / "handover.json").read_text())
    record |= {"score_mean": 10 * record["score_mean"], "score_std": 10 * record["score_std"]}
    (folder / "handover.json").write_text(json.dumps(record))
    model = str(full.run("reward") / "model")
    scores = []
    for name, other in (("same", model), ("larger", str(folder))):
        rewards = [{"ensemble": [{"path": model}, {"path": other}], "combine": "worst"}]
        settings = {"steps": 1, "normalize_scores": scale}
        run_stage("ppo", config(full, tmp_path / name, reward_model=None, rewards=rewards, ppo=settings))
        scores.append(metrics(tmp_path / name)[0]["score"])
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


def test_inspect_colours_the_samples_of_a_ppo_run(full: Any, call_cli: Any) -> None:
    code, out, _ = call_cli(["inspect", str(full.run("ppo")), "--step", "1", "--row", "0", "--paint", "value"])
    assert code == 0
    assert "coloured by value" in out
    assert "logprob" in out
    code, _, err = call_cli(["inspect", str(full.run("sft"))])
    assert code == 2
    assert "the folder contains no samples" in err


@pytest.mark.parametrize("peft", [False, True])
def test_the_value_model_can_share_the_policys_trunk(peft: bool, full: Any, run_stage: Any, tmp_path: Path) -> None:
    out = run_stage(
        "ppo",
        config(full, tmp_path / "run", ppo={"value_model": "trunk", "value_clip_range": None}, peft=adapter(peft)),
    )
    assert "value model: a head on the policy's own trunk" in out
    assert metrics(tmp_path / "run")[0]["explained_variance"] == pytest.approx(0.0, abs=1e-4)
    assert (tmp_path / "run" / "value_model" / "value_head.safetensors").is_file()


def test_a_value_model_from_a_reward_model_that_is_not_there_is_refused(
    full: Any, call_cli: Any, tmp_path: Path
) -> None:
    wrong = config(
        full,
        tmp_path / "run",
        reward_model=None,
        ppo={"value_model": "reward"},
        rewards=[{"function": "tests.stages.test_ppo_settings:longer"}],
    )
    code, _, err = call_cli(["ppo", setup.write(tmp_path, "ppo", wrong)])
    assert code == 2
    assert "no value model can start from the reward model" in err
    assert not (tmp_path / "run").exists()


def test_a_text_weight_that_follows_gradients_is_refused_under_deepspeed(
    full: Any, files: setup.Files, call_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ptx = {"coef": 0.5, "balance": 0.5, "data": [{"path": files["text"]}]}
    path = setup.write(tmp_path, "ppo", config(full, tmp_path / "run", ptx=ptx))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, _, err = call_cli(["ppo", path])
    assert code == 2
    assert "ptx.balance" in err
    assert not (tmp_path / "run").exists()


# Roles


def test_a_lora_chain_shares_one_base_without_being_asked(adapted: Any, run_stage: Any, tmp_path: Path) -> None:
    shared = run_stage("ppo", config(adapted, tmp_path / "shared"))
    apart = run_stage("ppo", config(adapted, tmp_path / "apart", roles="separate"))
    assert "one frozen base; policy, value and reward model are adapters" in shared
    assert "one frozen base" not in apart
    ours, theirs = metrics(tmp_path / "shared"), metrics(tmp_path / "apart")
    for name in ("score", "kl", "policy_loss", "value_loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-3, abs=1e-5)
    again = load_scorer(ModelSource(path=str(tmp_path / "shared" / "value_model")))
    other = load_scorer(ModelSource(path=str(tmp_path / "apart" / "value_model")))
    ids = torch.tensor([[5, 9, 13, 20]])
    scores = [sequence_scores(m, ids, torch.ones_like(ids, dtype=torch.bool)).item() for m in (again, other)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_a_base_that_cannot_be_shared_is_said_or_refused(
    full: Any, run_stage: Any, call_cli: Any, tmp_path: Path
) -> None:
    mixed = config(full, tmp_path / "run", peft=adapter(True))
    assert "roles: separate models, since" in run_stage("ppo", mixed)
    wrong = setup.write(tmp_path, "ppo", mixed | {"output_dir": str(tmp_path / "refused"), "roles": "shared"})
    code, _, err = call_cli(["ppo", wrong])
    assert code == 2
    assert "the roles cannot share a base" in err
    assert "is not an adapter" in err
    assert not (tmp_path / "refused").exists()
    code, _, err = call_cli(["ppo", wrong, "peft={method: none}"])
    assert code == 2
    assert "all models are adapters on one frozen base; set peft.method=lora" in err


def test_a_value_model_on_the_shared_base_can_start_from_the_policy(
    adapted: Any, run_stage: Any, tmp_path: Path
) -> None:
    out = run_stage("ppo", config(adapted, tmp_path / "run", ppo={"value_model": "policy"}))
    assert "one frozen base" in out
    assert metrics(tmp_path / "run")[0]["explained_variance"] == pytest.approx(0.0, abs=1e-4)
    assert load_scorer(ModelSource(path=str(tmp_path / "run" / "value_model"))).config.num_labels == 1


@pytest.mark.parametrize("chain", ["full", "adapted"])
def test_activation_checkpointing_reaches_every_layer_that_is_trained(
    chain: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    found = request.getfixturevalue(chain)
    for on in (True, False):
        chosen = config(found, tmp_path / "run", optim={"activation_checkpointing": on})
        made = PPOConfig.model_validate(chosen)
        trainer = load_components(made, Console(quiet=True)).trainer(made, console=Console(quiet=True))
        model = trainer.models.pair
        layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing") and hasattr(m, "self_attn")]
        assert len(layers) == (4 if chain == "full" else 2)  # two layers a model; adapters share them
        assert all(layer.gradient_checkpointing is on for layer in layers)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"ppo": {"target_kl": 0.1}}, "cannot discard the gradients"),
        ({"ptx": {"coef": 1.0, "balance": 0.5, "data": [{"path": "x"}]}}, "gives no access to the gradients"),
        ({"ptx": {"coef": 1.0, "data": [{"path": "x"}], "batch_size": 3}}, "cannot be shared equally by 2 processes"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(
    sections: dict[str, Any], words: str, full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = full.configs["ppo"]
    made = PPOConfig.model_validate(config | {k: config.get(k, {}) | v for k, v in sections.items()})
    check_deepspeed(made.settings)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=words):
        check_deepspeed(made.settings)
