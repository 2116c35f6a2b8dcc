"""Responses of several models to the same held-out prompts, and the table that compares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf.config.schema import EvaluateConfig
from rlhf.console import Console
from rlhf.data.records import Prompt
from rlhf.data.render import Renderer
from rlhf.distributed.engine import all_gather_objects
from rlhf.distributed.launch_env import get_rank, world_size
from rlhf.evaluation.answers import GeneratedResponse, generate_responses, on_device, perplexity
from rlhf.evaluation.judge import Judge
from rlhf.evaluation.stats import best_of_n_kl, bootstrap_mean, win_indicators

TableRow = dict[str, Any]
"""One row of a results table, as results.json holds it."""


@dataclass(frozen=True)
class EvaluationInputs:
    """What every model is measured with: tokenized prompts of each split, held-out text, judge and reward model."""

    records: Mapping[str, Sequence[Prompt]]  # split -> prompts
    ids: Mapping[str, list[list[int]]]  # split -> token ids of the prompts
    text: list[list[int]]  # token ids of held-out text for the perplexity; empty = not measured
    judge: Judge | None
    measures: Mapping[str, Judge]
    reward_model: Any
    renderer: Renderer
    device: torch.device


@dataclass(frozen=True)
class ModelAnswers:
    """What one model generated."""

    responses: dict[str, list[GeneratedResponse]]  # split -> one response for each prompt, in the prompts' order
    perplexity: float | None = None  # of the held-out text


def answer_with_every_model(
    config: EvaluateConfig, inputs: EvaluationInputs, load: Callable[[Any], Any], console: Console
) -> dict[str, ModelAnswers]:
    """Generate a response to every prompt with every model; several processes share the prompts.

    Args:
        load: loads the model of a `ModelSource`, in evaluation mode; it is moved to the device while it is used.

    Returns: model name -> its answers. Best-of-n of the reference is one more name if `best_of` and a reward model
    are given.
    """
    reference = load(config.models[config.reference])
    answers: dict[str, ModelAnswers] = {}
    rounds = len(config.models) + config.best_of
    with console.progress("evaluate", rounds, "round") as bar:
        for done, (name, source) in enumerate(config.models.items()):
            model = reference if name == config.reference else load(source)
            responses = {
                split: _answer_prompts(model, ids, config, inputs, reference=reference)
                for split, ids in inputs.ids.items()
            }
            answers[name] = ModelAnswers(responses, _perplexity(model, inputs))
            bar.update(done + 1, {})
        if config.best_of and inputs.reward_model is not None:
            answers[f"{config.reference} best-of-{config.best_of}"] = ModelAnswers(
                {split: _best_of_n(reference, ids, config, inputs) for split, ids in inputs.ids.items()}
            )
        bar.update(rounds, {})
    return answers


def _perplexity(model: Any, inputs: EvaluationInputs) -> float | None:
    if not inputs.text:
        return None
    with on_device(model, inputs.device):
        return perplexity(model, inputs.text, inputs.renderer.pad_id)


def _answer_prompts(
    model: Any,
    ids: Sequence[list[int]],
    config: EvaluateConfig,
    inputs: EvaluationInputs,
    *,
    draw: int = 0,
    reference: Any = None,
) -> list[GeneratedResponse]:
    """Return a response to every prompt on every process; each process generates its share of them."""
    processes = world_size()
    own = range(get_rank(), len(ids), processes)
    responses = generate_responses(
        model,
        [ids[i] for i in own],
        inputs.renderer,
        config.sampling,
        seed=config.seed,
        draw=draw,
        reference=reference,
        reward_model=inputs.reward_model,
        numbers=own,
        device=inputs.device,
    )
    if processes == 1:
        return responses
    shares = all_gather_objects(responses, processes)
    return [shares[i % processes][i // processes] for i in range(len(ids))]


def _best_of_n(
    reference: Any, ids: Sequence[list[int]], config: EvaluateConfig, inputs: EvaluationInputs
) -> list[GeneratedResponse]:
    """Return, for every prompt, the response of `best_of` independent ones that the reward model scores highest."""
    pool = [_answer_prompts(reference, ids, config, inputs, draw=1 + draw) for draw in range(config.best_of)]
    return [max(drawn, key=lambda response: response.score) for drawn in zip(*pool, strict=True)]


def comparison_table(
    config: EvaluateConfig, inputs: EvaluationInputs, answers: Mapping[str, ModelAnswers]
) -> list[TableRow]:
    """Return one row for each split and model: win rate against the reference, KL, length, score, user measures."""
    rows = []
    for split, records in inputs.records.items():
        utilities: dict[str, list[float]] = {}
        if inputs.judge is not None:
            utilities = {
                name: judge_responses(inputs.judge, records, model.responses[split]) for name, model in answers.items()
            }
        for name, model in answers.items():
            responses = model.responses[split]
            kls = [response.kl for response in responses if response.kl is not None]
            row: TableRow = {
                "split": split,
                "model": name,
                "prompts": len(responses),
                "kl": float(np.mean(kls)) if kls else best_of_n_kl(config.best_of),
                "length": float(np.mean([response.length for response in responses])),
                "ended": float(np.mean([response.finished for response in responses])),
                "perplexity": model.perplexity,
            }
            if inputs.reward_model is not None:
                row["score"] = float(np.mean([response.score for response in responses]))
            for measure, function in inputs.measures.items():
                values = judge_responses(function, records, responses)
                row.setdefault("measures", {})[measure] = float(np.mean(values))
            if inputs.judge is not None:
                win = bootstrap_mean(
                    win_indicators(utilities[name], utilities[config.reference]),
                    resamples=config.bootstrap,
                    seed=config.seed,
                )
                row |= {"utility": float(np.mean(utilities[name])), "win": win.mean, "low": win.low, "high": win.high}
            rows.append(row)
    return rows


def judge_responses(judge: Judge, records: Sequence[Prompt], responses: Sequence[GeneratedResponse]) -> list[float]:
    """Return the judge's number for every response."""
    return [
        judge(record.messages, response.text, record.record, response.finished)
        for record, response in zip(records, responses, strict=True)
    ]


def side_by_side(
    config: EvaluateConfig, inputs: EvaluationInputs, answers: Mapping[str, ModelAnswers]
) -> list[TableRow]:
    """Return `show` prompts of each split, spread evenly over it, with every model's response."""
    shown: list[TableRow] = []
    for split, records in inputs.records.items():
        for i in range(min(config.show, len(records))):
            row = i * len(records) // max(config.show, 1)
            replies = {name: model.responses[split][row].text for name, model in answers.items()}
            shown.append({"split": split, "prompt": records[row].messages, "replies": replies})
    return shown
