"""PPO-ptx: a next-token loss on text of the source domain in every update, against the alignment tax.

    loss = PPO loss + coef mean_i -log pi(x_i | x_<i)          Ouyang et al. 2022, arXiv:2203.02155, eq. 2

The paper's 27.8 belongs to its own loss scaling; both terms here are means over tokens, and about 1 is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.config.ppo import Ptx
from rlhf.data.collate import pad_right
from rlhf.data.render import Rendered
from rlhf.trainers.order import passes
from rlhf.trainers.policy_value import TextBatch


class TextMix:
    """Which documents take part in which update."""

    def __init__(self, rows: Sequence[Rendered], config: Ptx, *, seed: int, pad_id: int) -> None:
        """`rows` are rendered documents; batches follow from `seed` and the number of the update."""
        self.rows, self.config, self.seed, self.pad_id = rows, config, seed, pad_id

    def batch(self, update: int) -> list[Rendered]:
        """The documents of an update, the same on every process: passes over shuffled rows."""
        size = self.config.batch_size
        return [self.rows[i] for i in passes(len(self.rows), update * size, size, self.seed, 3)]

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
