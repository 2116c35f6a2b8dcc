"""PPO-ptx: a next-token loss on text of the source domain in every update, against the alignment tax.

    loss = PPO loss + coef mean_i -log pi(x_i | x_<i)          Ouyang et al. 2022, arXiv:2203.02155, eq. 2

The paper's 27.8 belongs to its own loss scaling; both terms here are means over tokens, and about 1 is right. What is
right depends on how large either gradient is, and that changes by a factor of ten within a run: with `balance`, the
coefficient follows the ratio of the two norms, measured at the first update of every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
    """Which documents take part in which update."""

    def __init__(self, rows: Sequence[Rendered], config: Ptx, *, seed: int, pad_id: int, microbatch: int) -> None:
        """`rows` are rendered documents; batches follow from `seed` and the number of the update.

        Args: microbatch: documents per backward on one process.
        """
        self.rows, self.config, self.seed, self.pad_id, self.microbatch = rows, config, seed, pad_id, microbatch
        self.coef = config.coef
        self.held: list[Tensor] | None = None

    def batch(self, update: int) -> list[Rendered]:
        """The documents of an update, the same on every process: passes over shuffled rows."""
        size = self.config.batch_size
        return [self.rows[i] for i in cyclic_indices(len(self.rows), update * size, size, self.seed, 3)]

    def share(
        self, update: int, *, process: int, processes: int, microbatch: int, device: torch.device
    ) -> tuple[list[TextBatch], float]:
        """This process's microbatches of an update, and the number of loss-carrying tokens of all processes."""
        rows = self.batch(update)
        total = float(sum(sum(row.mask[1:]) for row in rows))
        mine = sorted(rows[process::processes], key=lambda row: len(row.ids))
        found = []
        for start in range(0, len(mine), microbatch):
            part = mine[start : start + microbatch]
            ids, mask = pad_right([row.ids for row in part], self.pad_id)
            counts = torch.zeros_like(mask)
            for i, row in enumerate(part):
                counts[i, : len(row.mask)] = torch.tensor(row.mask)
            found.append(TextBatch(ids.to(device), mask.to(device), counts.to(device)))
        return found, total

    def accumulate(
        self,
        model: nn.Module,
        accelerator: Any,
        update: int,
        computing: Callable[[], torch.autocast],
        sums: dict[str, Tensor],
        *,
        weigh: bool,
    ) -> None:
        """Backward over this process's share of the documents of an update; adds to sums["ptx_loss"].

        Args:
            model: `PolicyAndValue` in its engine. computing: the context of its forward.
            weigh: with `balance`, keep this gradient aside to compare it with that of PPO.
        """
        a = accelerator
        parts, total = self.share(
            update, process=a.process_index, processes=a.num_processes, microbatch=self.microbatch, device=a.device
        )
        weigh = weigh and self.config.balance is not None
        for part in parts:
            with gradient_accumulation(
                model, a, last=False
            ):  # the PPO loss that follows carries the sum to the other processes
                with computing():
                    loss = model(part) / total
                backward(self.coef * loss * a.num_processes, model, a)
            sums["ptx_loss"] = sums.get("ptx_loss", torch.zeros((), device=a.device)) + loss.detach()
        if weigh:
            self.hold(a.unwrap_model(model).trained_policy().values())

    def hold(self, policy: Iterable[nn.Parameter]) -> None:
        """Remember this process's gradient of the text term, before that of PPO is added to it."""
        self.held = [_gradient(p).clone() for p in policy]

    def rebalance(self, policy: Iterable[nn.Parameter], accelerator: Any) -> None:
        """Move the coefficient half of the way (in logs) to where |coef g_text| = balance |g_PPO|; by at most 2 x.

        By now gradients are means over processes. An engine cannot make that of the text term alone (it waits for the
        value model, which text does not pass through), so what was held is averaged here.
        """
        if self.held is None or self.config.balance is None:
            return
        both = [_gradient(p) for p in policy]
        held = [accelerator.reduce(gradient, "mean") for gradient in self.held]
        text, ours = _norm(held), _norm([whole - part for whole, part in zip(both, held, strict=True)])
        self.held = None
        if text > 0.0 and ours > 0.0:
            self.coef *= min(max(math.sqrt(self.config.balance * ours / text), 0.5), 2.0)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.float().square().sum() for t in tensors]).sum().sqrt())
