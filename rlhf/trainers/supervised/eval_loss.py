"""Held-out loss of a language model: over all its tokens, whoever read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.distributed.engine import count_real_rows


def _blank(inputs: dict[str, Any], accelerator: Any) -> Tensor:
    """The labels, without those of repetitions."""
    labels: Tensor = inputs["labels"]
    positions = inputs.get("position_ids")
    if positions is None:
        labels[count_real_rows(accelerator, len(labels)) :] = -100
        return labels
    starts = (positions[0] == 0).nonzero().flatten()  # the records stand one after the other in a single row
    for start in starts[count_real_rows(accelerator, len(starts)) :][:1]:
        labels[:, start:] = -100
    return labels


class TokenMeanLoss:
    """Makes a Trainer's held-out loss the mean over all held-out tokens that carry loss, nats.

    So exp of it is a perplexity, and it is the same for any batch and number of processes. The library's own is a mean
    over batches, in which a token of a short batch weighs more, and in which rows count twice that fill up a batch.
    """

    accelerator: Any
    _held: Tensor | None = None  # [2] float64: summed loss, tokens

    def prediction_step(
        self: Any, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch, 0-d, nats a token; what it is made of is added up."""
        inputs = self.inputs_on_device(inputs)
        labels = _blank(inputs, self.accelerator)
        count = (labels[:, 1:] != -100).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            mean = self.compute_loss(model, inputs).detach()
        mean = torch.where(count > 0, mean, 0.0)  # of no token it may not be a number
        sums = torch.stack([mean * count, count]).double()
        self._held = sums if self._held is None else self._held + sums
        return mean, None, None

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the loss of an evaluation; whoever called it reads the same dictionary."""
        name = next((k for k in ("eval_loss", "ood_loss") if k in logs), None)
        if name is not None and self._held is not None:
            total, count = self.accelerator.reduce(self._held, "sum").tolist()
            logs[name], self._held = total / max(count, 1.0), None
        super().log(logs, start_time)  # type: ignore[misc]
