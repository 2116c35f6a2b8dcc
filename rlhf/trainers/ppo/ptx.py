"""PPO-ptx: a next-token loss on text of the source domain in every update, so that PPO forgets less of it.

    loss = PPO loss + coef mean_i -log pi(x_i | x_<i)          Ouyang et al. 2022, arXiv:2203.02155, eq. 2

The paper's coefficient of 27.8 belongs to its own loss scaling. Here both terms are means over tokens, and a value of
about 1 is suitable. The best value depends on the sizes of the two gradients, whose ratio changes by a factor of ten
within a run. With `balance` the coefficient follows the ratio of the two gradient norms, which is measured at the first
update of every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.ppo import Ptx
from rlhf.data.collate import pad_right
from rlhf.data.render import Rendered
from rlhf.distributed.engine import backward, gradient_accumulation
from rlhf.trainers.ppo.policy_value import TextBatch
from rlhf.trainers.sample_order import cyclic_indices


class PtxMixture:
    """The documents of each update, the gradient of their loss, and its coefficient."""

    def __init__(self, rows: Sequence[Rendered], config: Ptx, *, seed: int, pad_id: int, microbatch: int) -> None:
        """Prepare the mixture. Batches are determined by `seed` and the number of the update.

        Args:
            rows: rendered documents.
            config: batch size, coefficient and balance.
            seed: seed of the order.
            pad_id: id of the pad token.
            microbatch: documents per backward pass on one process.
        """
        self.rows, self.config, self.seed, self.pad_id, self.microbatch = rows, config, seed, pad_id, microbatch
        self.coef = config.coef
        self.text_gradient: list[Tensor] | None = None

    def batch(self, update: int) -> list[Rendered]:
        """Return the documents of an update, the same on every process, from repeated passes over shuffled rows."""
        size = self.config.batch_size
        return [self.rows[i] for i in cyclic_indices(len(self.rows), update * size, size, self.seed, 3)]

    def share(
        self, update: int, *, process: int, processes: int, microbatch: int, device: torch.device
    ) -> tuple[list[TextBatch], float]:
        """Return this process's microbatches of an update, and the number of tokens with loss of all processes."""
        rows = self.batch(update)
        total = float(sum(sum(row.mask[1:]) for row in rows))
        mine = sorted(rows[process::processes], key=lambda row: len(row.ids))
        batches = []
        for start in range(0, len(mine), microbatch):
            part = mine[start : start + microbatch]
            ids, mask = pad_right([row.ids for row in part], self.pad_id)
            counts = torch.zeros_like(mask)
            for i, row in enumerate(part):
                counts[i, : len(row.mask)] = torch.tensor(row.mask)
            batches.append(TextBatch(ids.to(device), mask.to(device), counts.to(device)))
        return batches, total

    def accumulate(
        self,
        model: nn.Module,
        accelerator: Any,
        update: int,
        sums: dict[str, Tensor],
        *,
        measure: bool,
    ) -> None:
        """Run the backward pass over this process's documents of an update, and add to sums["ptx_loss"].

        Args:
            model: `PolicyAndValue`, wrapped by its engine.
            accelerator: the Accelerator.
            update: number of the update.
            sums: sums of the step's metrics.
            measure: with `balance`, keep a copy of this gradient to compare its norm with that of PPO.
        """
        a = accelerator
        parts, total = self.share(
            update, process=a.process_index, processes=a.num_processes, microbatch=self.microbatch, device=a.device
        )
        measure = measure and self.config.balance is not None
        for part in parts:
            # Gradients are synchronized only by the backward pass of the PPO loss that follows.
            with gradient_accumulation(model, a, last=False):
                loss = model(part) / total
                backward(self.coef * loss * a.num_processes, model, a)
            sums["ptx_loss"] = sums.get("ptx_loss", torch.zeros((), device=a.device)) + loss.detach()
        if measure:
            self.store_gradient(a.unwrap_model(model).trained_policy().values())

    def store_gradient(self, policy: Iterable[nn.Parameter]) -> None:
        """Copy this process's gradient of the text term, before that of PPO is added to it."""
        self.text_gradient = [_gradient(p).clone() for p in policy]

    def rebalance(self, policy: Iterable[nn.Parameter], accelerator: Any) -> None:
        """Move the coefficient half of the way (in logs) to |coef g_text| = balance |g_PPO|, by at most a factor of 2.

        The parameters' gradients are means over processes at this point. The stored gradient of the text term is not:
        an engine would wait for gradients of the value model, which text does not use. It is averaged here.
        """
        if self.text_gradient is None or self.config.balance is None:
            return
        total = [_gradient(p) for p in policy]
        text = [accelerator.reduce(gradient, "mean") for gradient in self.text_gradient]
        text_norm, ppo_norm = _norm(text), _norm([whole - part for whole, part in zip(total, text, strict=True)])
        self.text_gradient = None
        if text_norm > 0.0 and ppo_norm > 0.0:
            self.coef *= min(max(math.sqrt(self.config.balance * ppo_norm / text_norm), 0.5), 2.0)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.float().square().sum() for t in tensors]).sum().sqrt())
