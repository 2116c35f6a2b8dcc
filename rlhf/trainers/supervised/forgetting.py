"""What fine-tuning costs elsewhere: the source domain's text, and records of another distribution."""

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

ROWS_PER_BATCH = 32  # of text, read at once


@dataclass(frozen=True)
class ProbeData:
    """What a probe reads.

    Attributes:
        text: token ids of documents of the source domain.
        speaks: the model has the output layer of a language model.
        output: [V, H], the source's output layer, for a model that has another one; None if the source has none.
        ood: rows as the stage's trainer evaluates them.
        stop_above: nats per token.
    """

    text: Sequence[list[int]]
    speaks: bool
    output: Tensor | None
    ood: Sequence[Any]
    pad_id: int
    stop_above: float | None


@torch.no_grad()
def probe_text(model: Any, probed: ProbeData) -> tuple[float | None, Tensor]:
    """Mean negative log-likelihood of the text (nats per token; None without an output layer to read with), and the
    last hidden states at the end of each document, [N, H] float32."""
    device = next(model.parameters()).device
    model.eval()
    total, count, ends = 0.0, 0, []
    logprobs: Tensor | None = None
    rows = sorted(probed.text, key=len)
    for i in range(0, len(rows), ROWS_PER_BATCH):
        ids, mask = (x.to(device) for x in pad_right(rows[i : i + ROWS_PER_BATCH], probed.pad_id))
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        positions, targets = next_token_positions(mask), ids[:, 1:][mask[:, 1:]]
        if probed.speaks:
            numbers = token_numbers(model, inputs, positions, targets, states=True)
            assert numbers.states is not None
            states, logprobs = numbers.states, numbers.logprobs
        else:
            states = backbone(model)(**inputs).last_hidden_state.flatten(0, 1)
            if probed.output is not None:
                weight = probed.output.to(device, states.dtype)
                logprobs = logprobs_with_weight(states[positions], weight, targets)
        ends.append(states.view(*ids.shape, -1)[torch.arange(len(ids)), mask.sum(dim=1) - 1].float().cpu())
        if logprobs is not None:
            total -= float(logprobs.double().sum())
            count += len(targets)
    return (total / count if count else None), torch.cat(ends)


def state_drift(states: Tensor, before: Tensor) -> float:
    """Mean over documents of |h - h0| / |h0|. [N, H] each."""
    return float(((states - before).norm(dim=1) / before.norm(dim=1)).mean())


class ForgettingCallback(TrainerCallback):
    """Reads the probe before training and at each evaluation; may stop the run."""

    def __init__(self, trainer: Any, probed: ProbeData, say: Callable[[str], None]) -> None:
        """Measure the model as it is. Every process does, since a sharded model needs all of them."""
        self.trainer, self.probed, self.say = trainer, probed, say
        self.last: dict[str, float] = {}
        self.loss, self.states = probe_text(trainer.model, probed) if probed.text else (None, torch.empty(0))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """After the held-out records: the text, then the records of another distribution."""
        if not metrics or "eval_loss" not in metrics:
            return  # our own evaluation below
        if self.probed.text:
            loss, states = probe_text(self.trainer.model, self.probed)
            self.last = {"drift": state_drift(states, self.states)}
            if loss is not None and self.loss is not None:
                self.last |= {"text_loss": loss, "forgetting": loss - self.loss}
            self.trainer.log(dict(self.last))
            self.stop(state, control)
        if self.probed.ood:
            found = self.trainer.evaluate(self.ood(), metric_key_prefix="ood")
            self.last |= {name: value for name, value in found.items() if name in METRICS}

    def stop(self, state: Any, control: Any) -> None:
        """End a run that has forgotten too much."""
        limit, lost = self.probed.stop_above, self.last.get("forgetting", 0.0)
        if limit is not None and lost > limit:
            self.say(
                f"update {state.global_step}: the source's text costs {self.last['text_loss']:.3f} nats a token, "
                f"{lost:.3f} more than before training (limit {limit:g}): stopped. Lower optim.learning_rate, train "
                "fewer weights (freeze, peft), or raise probe.stop_above"
            )
            control.should_training_stop = True

    def ood(self) -> Any:
        """The rows as the trainer's own kind of data set."""
        from datasets import Dataset

        return self.probed.ood if isinstance(self.probed.ood, Dataset) else Dataset.from_list(list(self.probed.ood))
