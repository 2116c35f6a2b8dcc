"""Held-out loss of a language model as the mean over all tokens, independent of batches and number of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.distributed.engine import count_real_rows


def _mask_repeated_rows(inputs: dict[str, Any], accelerator: Any) -> Tensor:
    """Set the labels of rows that only repeat others to fill the batch to -100, in place, and return all labels."""
    labels: Tensor = inputs["labels"]
    positions = inputs.get("position_ids")
    if positions is None:
        labels[count_real_rows(accelerator, len(labels)) :] = -100
        return labels
    starts = (positions[0] == 0).nonzero().flatten()  # the records are concatenated into a single row
    for start in starts[count_real_rows(accelerator, len(starts)) :][:1]:
        labels[:, start:] = -100
    return labels


class TokenMeanLoss:
    """Mixin that makes a Trainer's held-out loss the mean over all held-out tokens with loss, in nats.

    Its exponential is therefore a perplexity, and it does not depend on the batch size or the number of processes.
    transformers' own value is a mean over batches: a token in a batch with few tokens weighs more, and rows that are
    repeated to fill a batch count twice.
    """

    accelerator: Any
    _sums: Tensor | None = None  # [2] float64: summed loss, tokens

    def prediction_step(
        self: Any, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch, 0-d, in nats per token, and add its sum and token count to the running sums."""
        inputs = self.inputs_on_device(inputs)
        labels = _mask_repeated_rows(inputs, self.accelerator)
        count = (labels[:, 1:] != -100).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            mean = self.compute_loss(model, inputs).detach()
        mean = torch.where(count > 0, mean, 0.0)  # the mean over no tokens may be nan
        sums = torch.stack([mean * count, count]).double()
        self._sums = sums if self._sums is None else self._sums + sums
        return mean, None, None

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the loss of an evaluation in `logs`, in place, which is also what `evaluate` returns."""
        name = next((k for k in ("eval_loss", "ood_loss") if k in logs), None)
        if name is not None and self._sums is not None:
            total, count = self.accelerator.reduce(self._sums, "sum").tolist()
            logs[name], self._sums = total / max(count, 1.0), None
        super().log(logs, start_time)  # type: ignore[misc]
