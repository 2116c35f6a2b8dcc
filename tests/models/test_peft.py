"""Methods other than plain LoRA: what they compute and save, what can be continued, and which models share a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.schema import ClassifyConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf.config.sections import READ_BY, Peft
from rlhf.data.collate import pad_right
from rlhf.errors import ConfigError
from rlhf.models.adapters import adapter_rate_factor, add_adapter, check_same_shape, reference_policy
from rlhf.models.heads import score_head, sequence_scores
from rlhf.models.load import backbone
from rlhf.models.policy import load_causal, policy_with_adapter
from rlhf.models.reward_models import load_scorer, new_reward_model, saved_head
from rlhf.models.shared_base import REWARD, VALUE, attach_scorer
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close

PAD = tiny.renderer().pad_id
FORMS = pytest.mark.parametrize("peft", tiny.METHODS.values(), ids=tiny.METHODS)


def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.tensor(tiny.rows(4, [14, 14])), use_cache=False).logits.detach()


def scores(model: Any) -> Tensor:
    ids, mask = pad_right(tiny.rows(4, [5, 12, 9]), PAD)
    return sequence_scores(model.eval(), ids, mask).detach()


def reward_model(folder: str, peft: Peft) -> Any:
    return new_reward_model(tiny.source(folder), peft, pad_id=PAD, vocab_size=len(tiny.tokenizer()), seed=3).eval()


# The equations


def by_hand(weight: Tensor, part: dict[str, Tensor], peft: Peft) -> Tensor:
    """Return the weight [out, in] of a layer with an adapter, computed from the papers' equations.

    lora    W + alpha/r B A          rslora   W + alpha/sqrt(r) B A
    dora    m (W + s B A) / |W + s B A|, row by row: PEFT's rows are the outputs, the paper's columns
    ia3     diag(l) W for keys and values; W diag(l) for the layer that reads the feed-forward features
    """
    if peft.method == "ia3":
        scale = part["ia3_l"]
        return weight * scale  # [out, 1] or [1, in]
    factor = peft.alpha / (peft.r**0.5 if peft.rslora else peft.r)
    moved = weight + factor * part["lora_B"] @ part["lora_A"]
    if not peft.dora:
        return moved
    return part["lora_magnitude_vector"][:, None] * moved / moved.norm(dim=1, keepdim=True)


def parts(model: Any, layer: str) -> dict[str, Tensor]:
    """Return the tensors of the trained adapter on one layer, by kind."""
    start = f"base_model.model.{layer}."
    return {
        name.removeprefix(start).split(".")[0]: p.detach()
        for name, p in model.named_parameters()
        if name.startswith(start) and ".default" in name
    }


def handmade(folder: str, adapted: Any, peft: Peft) -> Any:
    """Return a plain model with the weights that follow from an adapter's tensors."""
    plain = load_causal(tiny.source(folder))
    with torch.no_grad():
        for name, module in plain.named_modules():
            part = parts(adapted, name) if isinstance(module, torch.nn.Linear) else {}
            if part:
                module.weight.copy_(by_hand(module.weight, part, peft))
    return plain


@FORMS
def test_an_adapter_computes_what_its_paper_says(peft: Peft, sft_folder: str) -> None:
    adapted = shake(add_adapter(load_causal(tiny.source(sft_folder)), peft, "CAUSAL_LM"))
    plain = logits(load_causal(tiny.source(sft_folder)))
    assert (logits(adapted) - plain).abs().max() > 0.05
    wanted = logits(handmade(sft_folder, adapted, peft)).tolist()
    assert_close(logits(adapted), wanted)
    assert_close(logits(adapted.merge_and_unload()), wanted)


@pytest.mark.parametrize(("right", "wrong"), [("rsLoRA", "LoRA"), ("LoRA", "rsLoRA"), ("DoRA", "LoRA")])
def test_the_equations_tell_the_methods_apart(right: str, wrong: str, sft_folder: str) -> None:
    adapted = shake(add_adapter(load_causal(tiny.source(sft_folder)), tiny.METHODS[right], "CAUSAL_LM"))
    other = handmade(sft_folder, adapted, tiny.METHODS[wrong])
    assert (logits(adapted) - logits(other)).abs().max() > 0.01


def test_lora_plus_multiplies_the_rate_of_b_alone(sft_folder: str) -> None:
    plus = Peft(method="lora", r=4, alpha=8.0, dora=True, lora_plus=16.0)
    policy = policy_with_adapter(tiny.source(sft_folder), plus)
    factors = {n: adapter_rate_factor(n, plus) for n, p in policy.named_parameters() if p.requires_grad}
    assert {n.split(".")[-3] for n, factor in factors.items() if factor == 16.0} == {"lora_B"}
    assert sum(factor == 16.0 for factor in factors.values()) == sum("lora_B" in n for n in factors) == 14
    assert {factor for n, factor in factors.items() if "lora_B" not in n} == {1.0}
    assert {adapter_rate_factor(n, tiny.LORA) for n in factors} == {1.0}


# Heads


@FORMS
def test_the_head_is_trained_saved_with_the_adapter_and_comes_back_bit_for_bit(
    peft: Peft, sft_folder: str, tmp_path: Path
) -> None:
    model = reward_model(sft_folder, peft)
    before = next(score_head(model).parameters()).detach().clone()
    shake(model)
    model.save_pretrained(str(tmp_path))
    [(_, saved)] = list(saved_head(str(tmp_path)))
    assert not torch.equal(saved, before)
    kept = load_scorer(tiny.source(tmp_path), trainable=True, peft=peft)
    [trained] = [p for n, p in kept.named_parameters() if p.requires_grad and "score" in n.split(".")]
    assert torch.equal(trained, saved)
    ours, theirs = (dict(m.named_parameters()) for m in (kept, model))
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items() if p.requires_grad)
    assert_close(scores(kept), scores(model).tolist())
    assert_close(scores(load_scorer(tiny.source(tmp_path))), scores(model).tolist())
    assert not (tmp_path / "model.safetensors").exists()


@FORMS
def test_a_reward_model_continues_the_sft_adapter(peft: Peft, sft_folder: str, tmp_path: Path) -> None:
    sft = shake(add_adapter(load_causal(tiny.source(sft_folder)), peft, "CAUSAL_LM")).eval()
    folder = tiny.save(sft, tmp_path / "sft")
    ids = torch.tensor(tiny.rows(4, [14, 14]))
    states = backbone(reward_model(folder, peft))(ids, use_cache=False).last_hidden_state
    assert torch.equal(states, backbone(sft)(ids, use_cache=False).last_hidden_state)


def test_a_continued_adapter_keeps_its_layers(sft_folder: str, tmp_path: Path) -> None:
    narrow = Peft(method="lora", r=4, alpha=8.0, target_modules=("q_proj", "v_proj"))
    sft = shake(add_adapter(load_causal(tiny.source(sft_folder)), narrow, "CAUSAL_LM"))
    folder = tiny.save(sft, tmp_path / "sft")
    names = {n for n, p in reward_model(folder, tiny.LORA).named_parameters() if p.requires_grad and "lora_" in n}
    assert {n.split(".")[-4] for n in names} == {"q_proj", "v_proj"}


# One base


@pytest.fixture(scope="module", params=["full SFT model", "SFT adapter"])
def start(request: pytest.FixtureRequest) -> str:
    return request.param


def chain(peft: Peft, start: str, sft_folder: str, folder: Path) -> tuple[str, str]:
    """Return the folders of an SFT model, and of a reward model that is a trained adapter on the same base."""
    sft = sft_folder
    if start == "SFT adapter":
        adapted = shake(add_adapter(load_causal(tiny.source(sft_folder)), peft, "CAUSAL_LM"))
        sft = tiny.save(adapted, folder / "sft")
    return sft, tiny.save(shake(reward_model(sft, peft), 8), folder / "reward", with_tokenizer=False)


@FORMS
def test_roles_on_one_base_compute_as_separate_models(peft: Peft, start: str, sft_folder: str, tmp_path: Path) -> None:
    sft, reward_folder = chain(peft, start, sft_folder, tmp_path)
    alone, plain = load_scorer(tiny.source(reward_folder), trainable=True, peft=peft), load_causal(tiny.source(sft))
    policy = policy_with_adapter(tiny.source(sft), peft)
    reward = attach_scorer(policy, tiny.source(reward_folder), REWARD)
    value = attach_scorer(policy, tiny.source(reward_folder), VALUE, trainable=True)
    assert_close(scores(reward), scores(alone).tolist())
    assert_close(scores(value), scores(alone).tolist())
    assert_close(logits(policy), logits(plain).tolist())
    shake(policy)
    shake(value)
    assert (logits(policy) - logits(plain)).abs().max() > 0.05
    assert (scores(value) - scores(alone)).abs().max() > 0.01
    assert_close(scores(reward), scores(alone).tolist())
    with reference_policy(policy) as reference:
        assert_close(logits(reference), logits(plain).tolist())
    value.save_pretrained(str(tmp_path / "value"))
    assert_close(scores(load_scorer(tiny.source(tmp_path / "value"))), scores(value).tolist())


# Continuing


@pytest.mark.parametrize(
    ("made", "wanted", "said"),
    [
        ("LoRA", "rsLoRA", "rslora=False"),
        ("DoRA", "LoRA", "dora=True"),
        ("LoRA", "IA3", "method=lora"),
        ("IA3", "LoRA", "method=ia3"),
    ],
)
def test_an_adapter_is_not_continued_by_another_method(
    made: str, wanted: str, said: str, sft_folder: str, tmp_path: Path
) -> None:
    peft, other = tiny.METHODS[made], tiny.METHODS[wanted]
    folder = tiny.save(add_adapter(load_causal(tiny.source(sft_folder)), peft, "CAUSAL_LM"), tmp_path / "sft")
    reward = tiny.save(reward_model(sft_folder, peft), tmp_path / "reward", with_tokenizer=False)
    check_same_shape(peft, folder)
    for attempt in (
        lambda: policy_with_adapter(tiny.source(folder), other),
        lambda: reward_model(folder, other),
        lambda: load_scorer(tiny.source(reward), trainable=True, peft=other),
    ):
        with pytest.raises(ConfigError, match=f"was trained with {said}") as error:
            attempt()
        assert f"set peft.{said}" in str(error.value)


def test_all_differences_are_said_at_once(adapter_folder: str) -> None:
    other = Peft(method="lora", r=8, alpha=16.0, dora=True, rslora=True, target_modules=("q_proj",))
    with pytest.raises(ConfigError) as error:
        check_same_shape(other, adapter_folder)
    for part in ("r=4", "alpha=8.0", "rslora=False", "dora=False", "target_modules="):
        assert part in str(error.value)
    check_same_shape(Peft(method="lora", r=4, alpha=8.0, dropout=0.1, lora_plus=4.0), adapter_folder)


def test_a_foreign_method_is_named_and_old_folders_lack_keys(adapter_folder: str, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(adapter_folder, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    saved = json.loads(file.read_text())
    for key in ("use_dora", "use_rslora"):
        saved.pop(key)
    file.write_text(json.dumps(saved))
    check_same_shape(tiny.LORA, str(tmp_path / "a"))
    file.write_text(json.dumps(saved | {"peft_type": "LOHA"}))
    with pytest.raises(ConfigError, match="was trained with method=LOHA") as error:
        check_same_shape(tiny.LORA, str(tmp_path / "a"))
    assert "set peft.method=LOHA" not in str(error.value)


# Configuration


def test_every_setting_belongs_to_a_method_and_is_refused_elsewhere() -> None:
    other: dict[str, Any] = {
        "r": 3,
        "alpha": 3.0,
        "dropout": 0.1,
        "target_modules": ["q_proj"],
        "rslora": True,
        "dora": True,
        "lora_plus": 16.0,
        "prompt_tokens": 3,
    }
    assert {"method", *other} == set(Peft.model_fields)
    for method in ("none", "lora", "ia3", "prompt"):
        for name, value in other.items():
            if name in READ_BY.get(method, ()):
                Peft.model_validate({"method": method, name: value})
                continue
            with pytest.raises(ValueError, match=f"{name} has no effect with method={method}"):
                Peft.model_validate({"method": method, name: value})
    assert Peft.model_validate(Peft(method="ia3").model_dump()) == Peft(method="ia3")  # as a run directory keeps it


@pytest.mark.parametrize("config", [RewardConfig, ClassifyConfig, PPOConfig])
def test_a_soft_prompt_is_for_sft_only(config: type[Any]) -> None:
    data: dict[str, Any] = {"train": [{"path": "d"}]}
    values: dict[str, Any] = {"output_dir": "x", "model": {"path": "m"}, "data": data}
    if config is PPOConfig:
        model = {"path": "m"}
        values = {"output_dir": "x", "policy": model, "reward_model": model, "data": {"prompts": [{"path": "d"}]}}
    config.model_validate(values | {"peft": {"method": "ia3"}})
    with pytest.raises(ValueError, match=r"SFT only. Set peft.method=ia3"):
        config.model_validate(values | {"peft": {"method": "prompt"}})
    sft = {"output_dir": "x", "model": {"path": "m"}, "data": data, "peft": {"method": "prompt"}}
    SFTConfig.model_validate(sft)
    with pytest.raises(ValueError, match="packing=true"):
        SFTConfig.model_validate(sft | {"packing": True})
