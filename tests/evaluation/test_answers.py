"""Tests of measurements on responses: perplexity, order of scores, KL of a model to itself."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.config.sections import ModelSource, Sampling
from rlhf.data.render import Renderer
from rlhf.evaluation.answers import generate_responses, perplexity
from rlhf.generation.native import generate_rollout
from rlhf.models.policy import load_causal
from rlhf.rollout.teacher_forcing import response_logprobs
from tests.tolerances import assert_close


class Uniform(torch.nn.Module):
    """Model that gives every token the same probability."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(vocabulary))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.weight.expand(*input_ids.shape, -1))


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    """Return the tiny model."""
    return load_causal(ModelSource(path=str(tiny_model_dir), dtype="float32")).eval()


def test_a_uniform_model_is_as_perplexed_as_it_has_tokens() -> None:
    assert_close(torch.tensor(perplexity(Uniform(7), [[1, 2, 3], [4, 5]], pad_id=0)), 7.0)


def test_perplexity_counts_real_tokens_only_and_each_once(model: Any) -> None:
    rows = [[5, 6, 7, 8, 9, 10], [11, 12]]
    nats = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1].detach().double().log_softmax(-1)
        nats -= float(sum(logits[i, token] for i, token in enumerate(row[1:])))
    assert_close(torch.tensor(perplexity(model, rows, pad_id=1)), math.exp(nats / 6))


def test_answers_repeat_with_the_seed_and_differ_with_the_draw(model: Any, tiny_tokenizer: Any) -> None:
    renderer = Renderer(tiny_tokenizer)
    prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in ("hello", "what does a cow say?")]
    settings = Sampling(max_new_tokens=8)
    first, again, other = (
        generate_responses(model, prompts, renderer, settings, seed=1, draw=d, reference=model) for d in (0, 0, 1)
    )
    assert first == again
    assert [a.text for a in first] != [a.text for a in other]
    for a in first + other:
        assert 1 <= a.length <= 8
        assert a.kl == 0.0  # against itself
        assert a.score is None


def test_kl_is_the_summed_log_ratio_by_two_forwards(model: Any, tiny_tokenizer: Any) -> None:
    renderer = Renderer(tiny_tokenizer)
    prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in ("hello", "what does a cow say?")]
    other = load_causal(ModelSource(path=model.config._name_or_path, dtype="float32")).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    for temperature in (0.7, 1.0, 0.0):
        found = generate_responses(
            model, prompts, renderer, Sampling(max_new_tokens=8, temperature=temperature), seed=1, reference=other
        )
        for prompt, a in zip(prompts, found, strict=True):
            rollout = generate_rollout(
                model,
                [(0, prompt)],
                Sampling(max_new_tokens=8, temperature=temperature),
                seed=1,
                step=0,
                end_id=renderer.end_id,
                pad_id=renderer.pad_id,
                device=torch.device("cpu"),
            )
            if prompt is prompts[0]:
                with torch.no_grad():
                    ours, theirs = (response_logprobs(m, rollout, temperature or 1.0)[0] for m in (model, other))
                assert_close(torch.tensor(a.kl), float((ours - theirs).sum()))
                assert abs(float((ours - theirs).sum())) > 1e-3


def test_one_model_is_on_the_device_at_a_time(model: Any, tiny_tokenizer: Any, tiny_model_dir: Path) -> None:
    """Each is moved there before it computes, and back before the next one is moved."""
    moves: list[tuple[str, str]] = []
    renderer = Renderer(tiny_tokenizer)
    policy, reference = (load_causal(ModelSource(path=str(tiny_model_dir), dtype="float32")).eval() for _ in range(2))
    for name, one in (("policy", policy), ("reference", reference)):
        original = one.to
        one.to = lambda device, n=name, to=original: moves.append((n, str(device))) or to(device)
    prompts = [renderer.prompt([{"role": "user", "content": "hello"}])]
    settings, cpu = Sampling(max_new_tokens=4), torch.device("cpu")
    generate_responses(policy, prompts, renderer, settings, seed=1, reference=reference, device=cpu)
    assert moves == [(n, "cpu") for n in ("policy", "policy", "reference", "reference")]
