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
from rlhf.runs.metrics import METRICS

ROWS = 32  # of text, read at once


@dataclass(frozen=True)
class Probed:
    """What a probe reads.

    Attributes:
        text: token ids of documents of the source domain.
        output: [V, H], the source's output layer, for models that have another one; None reads with the model's own.
        ood: rows as the stage's trainer evaluates them.
        stop_above: nats per token.
    """

    text: Sequence[list[int]]
    output: Tensor | None
    ood: Sequence[Any]
    pad_id: int
    stop_above: float | None


@torch.no_grad()
def text_loss(model: Any, probed: Probed) -> float:
    """Mean negative log-likelihood of the text, nats per token."""
    device = next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    rows = sorted(probed.text, key=len)
    for i in range(0, len(rows), ROWS):
        ids, mask = (x.to(device) for x in pad_right(rows[i : i + ROWS], probed.pad_id))
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        if probed.output is None:
            logits = model(**inputs).logits[:, :-1]
        else:
            states = backbone(model)(**inputs).last_hidden_state[:, :-1]
            logits = states @ probed.output.to(device, states.dtype).T
        nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        total += float((nll * mask[:, 1:]).sum())
        count += int(mask[:, 1:].sum())
    return total / max(count, 1)


class Forgetting(TrainerCallback):
    """Reads the probe before training and at each evaluation; may stop the run."""

    def __init__(self, trainer: Any, probed: Probed, say: Callable[[str], None]) -> None:
        """Measure the model as it is. Every process does, since a sharded model needs all of them."""
        self.trainer, self.probed, self.say = trainer, probed, say
        self.last: dict[str, float] = {}
        self.before = text_loss(trainer.model, probed) if probed.text else 0.0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """After the held-out records: the text, then the records of another distribution."""
        if not metrics or "eval_loss" not in metrics:
            return  # our own evaluation below
        if self.probed.text:
            now = text_loss(self.trainer.model, self.probed)
            self.last = {"text_loss": now, "forgetting": now - self.before}
            self.trainer.log(dict(self.last))
            limit = self.probed.stop_above
            if limit is not None and now - self.before > limit:
                self.say(
                    f"update {state.global_step}: the source's text costs {now:.3f} nats a token, "
                    f"{now - self.before:.3f} more than before training (limit {limit:g}): stopped. Lower "
                    "optim.learning_rate, train fewer weights (freeze, peft), or raise probe.stop_above"
                )
                control.should_training_stop = True
        if self.probed.ood:
            found = self.trainer.evaluate(self.ood(), metric_key_prefix="ood")
            self.last |= {name: value for name, value in found.items() if name in METRICS}

    def ood(self) -> Any:
        """The rows as the trainer's own kind of data set."""
        from datasets import Dataset

        return self.probed.ood if isinstance(self.probed.ood, Dataset) else Dataset.from_list(list(self.probed.ood))
