"""Probe of forgetting: how fine-tuning changes a model on source-domain text and on out-of-distribution records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rlhf.data.collate import pad_right
from rlhf.models.load import backbone
from rlhf.models.output_layer import logprobs_with_weight, next_token_positions, token_numbers
from rlhf.runs.metrics import METRICS

ROWS_PER_BATCH = 32  # documents per forward pass


@dataclass(frozen=True)
class ProbeData:
    """Data of a probe and its limit.

    Attributes:
        text: token ids of documents of the source domain.
        language_model: whether the trained model has the output layer of a language model.
        output: [V, H] output layer of the source model, for a trained model with another one; None if there is none.
        ood: out-of-distribution rows, in the form that the stage's trainer evaluates.
        pad_id: id of the pad token.
        stop_above: increase of the text loss above which the run stops, in nats per token; None = no limit.
    """

    text: Sequence[list[int]]
    language_model: bool
    output: Tensor | None
    ood: Sequence[Any]
    pad_id: int
    stop_above: float | None


@torch.no_grad()
def probe_text(model: Any, probe_data: ProbeData) -> tuple[float | None, Tensor]:
    """Return the loss of the probe's text and the last hidden state at the end of each document.

    Returns: mean negative log-likelihood in nats per token, or None without an output layer; states [N, H] float32,
        ordered by the length of the documents.
    """
    device = next(model.parameters()).device
    model.eval()
    total, count, ends = 0.0, 0, []
    logprobs: Tensor | None = None
    rows = sorted(probe_data.text, key=len)
    for i in range(0, len(rows), ROWS_PER_BATCH):
        ids, mask = (x.to(device) for x in pad_right(rows[i : i + ROWS_PER_BATCH], probe_data.pad_id))
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        positions, targets = next_token_positions(mask), ids[:, 1:][mask[:, 1:]]
        if probe_data.language_model:
            numbers = token_numbers(model, inputs, positions, targets, states=True)
            assert numbers.states is not None
            states, logprobs = numbers.states, numbers.logprobs
        else:
            states = backbone(model)(**inputs).last_hidden_state.flatten(0, 1)
            if probe_data.output is not None:
                weight = probe_data.output.to(device, states.dtype)
                logprobs = logprobs_with_weight(states[positions], weight, targets)
        ends.append(states.view(*ids.shape, -1)[torch.arange(len(ids)), mask.sum(dim=1) - 1].float().cpu())
        if logprobs is not None:
            total -= float(logprobs.double().sum())
            count += len(targets)
    return (total / count if count else None), torch.cat(ends)


def state_drift(states: Tensor, before: Tensor) -> float:
    """Return the mean over documents of |h - h0| / |h0|, for states h and earlier states h0, [N, H] each."""
    return float(((states - before).norm(dim=1) / before.norm(dim=1)).mean())


class ForgettingCallback(TrainerCallback):
    """Measures the probe before training and at each evaluation, and may stop the run."""

    def __init__(self, trainer: Any, probe_data: ProbeData, log: Callable[[str], None]) -> None:
        """Measure the model before training. Every process does so, because a sharded model needs all of them.

        Args:
            trainer: the trainer, whose model is measured.
            probe_data: data of the probe.
            log: prints a line.
        """
        self.trainer, self.probe_data, self.log = trainer, probe_data, log
        self.last: dict[str, float] = {}
        self.loss, self.states = probe_text(trainer.model, probe_data) if probe_data.text else (None, torch.empty(0))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Measure the text, then the out-of-distribution records, after the held-out records."""
        if not metrics or "eval_loss" not in metrics:
            return  # called for the out-of-distribution evaluation below
        if self.probe_data.text:
            loss, states = probe_text(self.trainer.model, self.probe_data)
            self.last = {"drift": state_drift(states, self.states)}
            if loss is not None and self.loss is not None:
                self.last |= {"text_loss": loss, "forgetting": loss - self.loss}
            self.trainer.log(dict(self.last))
            self.stop(state, control)
        if self.probe_data.ood:
            results = self.trainer.evaluate(self.ood(), metric_key_prefix="ood")
            self.last |= {name: value for name, value in results.items() if name in METRICS}

    def stop(self, state: Any, control: Any) -> None:
        """End the run if the loss of the text has risen by more than `stop_above`."""
        limit, increase = self.probe_data.stop_above, self.last.get("forgetting", 0.0)
        if limit is not None and increase > limit:
            self.log(
                f"update {state.global_step}: the loss on source-domain text is {self.last['text_loss']:.3f} nats "
                f"per token, {increase:.3f} more than before training (limit {limit:g}): stopped. Lower "
                "optim.learning_rate, train fewer weights (freeze, peft), or raise probe.stop_above"
            )
            control.should_training_stop = True

    def ood(self) -> Any:
        """Return the out-of-distribution rows as the kind of data set that the trainer evaluates."""
        from datasets import Dataset

        rows = self.probe_data.ood
        return rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
