"""What PPO checks about itself: invariants that hold by construction, and numbers that should stay healthy.

A broken invariant is a bug (in this code, in a model, in a library), and training on is meaningless. An unhealthy
number may be bad luck or a bad setting. `config.Watch` says what happens in each case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from rlhf.config.ppo import Watch
from rlhf.errors import TrainingError
from rlhf.functional import kl_estimate, masked_whiten
from rlhf.rollout.types import Experience, Rollout
from rlhf.runs.metrics import METRICS

# Numbers whose healthy range is a condition of the run, not only a colour in a report.
HEALTH_METRICS = (
    "kl",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "finished",
    "explained_variance",
    "length_drift",
    "score_length_correlation",
)
SETTLING_STEPS = 5  # steps after the warm-up before the value model must be of use
ROWS_SCORED_TWICE = 4  # of a rollout, scored a second and a third time


class UnhealthyError(TrainingError):
    """A vital number left its healthy range and the configuration asks for a rollback."""


@dataclass(frozen=True)
class Tolerance:
    """How exact two computations of one number are, by the policy's dtype. Nats, and score units for `score`."""

    ratio: float
    sampling: float
    score: float


TOLERANCES = {
    torch.float32: Tolerance(ratio=1e-3, sampling=1e-3, score=1e-3),
    torch.bfloat16: Tolerance(ratio=0.1, sampling=0.5, score=0.1),
}


def find_broken_invariants(
    e: Experience, *, kl_coef: float, whitened: bool, fresh: bool, tolerance: Tolerance
) -> list[str]:
    """Invariants of a scored rollout that do not hold, in words.

    Args:
        kl_coef: the coefficient its rewards were made with.
        whitened: its advantages should have mean 0 and variance 1.
        fresh: no update has happened: the policy is the reference.
    """
    found = []
    mask = e.response_mask
    mismatch = float(((e.sampled_logprobs - e.old_logprobs).abs() * mask).max())
    if not mismatch <= tolerance.sampling:
        found.append(
            f"log-probs while sampling differ from teacher-forced ones by up to {mismatch:.3g} nats: another "
            "temperature, a sampling filter, dropout, or a cache that changes the numbers"
        )
    kl = (e.old_logprobs - e.ref_logprobs) * mask
    largest = float(kl.abs().max())
    if fresh and not largest <= tolerance.ratio:
        found.append(f"the KL of a fresh policy is not 0: log-probs differ from the reference by {largest:.3g}")
    if not bool((kl_estimate(e.old_logprobs, e.ref_logprobs, "k3")[mask] >= 0).all()):
        found.append("the k3 estimate of a KL is negative or not a number")
    found += _score_place(e, kl * kl_coef)
    if whitened:
        off = float((e.advantages - masked_whiten(e.returns - e.values * mask, mask)).abs().max())
        if not off <= 1e-3:
            found.append(
                f"advantages are off by up to {off:.3g} from those whitened over all processes together: another "
                "mask, or moments of one process alone"
            )
    return found


def _score_place(e: Experience, penalty: Tensor) -> list[str]:
    """The score must be the whole difference between rewards and KL penalty, on the last real token."""
    rest = e.rewards + penalty
    last = e.response_length - 1
    rows = torch.arange(len(e), device=last.device)
    on_last = rest[rows, last]
    elsewhere = rest.clone()
    elsewhere[rows, last] = 0.0
    scale = 1e-4 * (1.0 + float(e.scores.abs().max()) + float(penalty.abs().max()))
    if float((on_last - e.scores).abs().max()) <= scale and float(elsewhere.abs().max()) <= scale:
        return []
    return ["the score does not lie, whole, on the last real token of its response"]


def find_wrong_first_ratio(error: float, tolerance: Tolerance) -> list[str]:
    """Return what is wrong with a step's first importance ratios: they are 1, since one code path gives both log-probs.

    Args:
        error: largest |ratio - 1| before anything has moved.
    """
    if error <= tolerance.ratio:
        return []
    return [
        f"the first importance ratio is not 1 but off by up to {error:.3g}: dropout, another temperature, or "
        "log-probs of another policy"
    ]


def find_unstable_scores(
    rewards: Callable[[Rollout, bool | None], Tensor], rollout: Rollout, pad_id: int, tolerance: Tolerance
) -> list[str]:
    """Return what is wrong with reward models that score the same responses differently the second time, or padded.

    Args:
        rewards: (rollout, packed) -> [B] scores; packed None = as suits the models, False = padded rows.
    """
    part = rollout.select(torch.arange(min(ROWS_SCORED_TWICE, len(rollout))))
    first, second = rewards(part, None), rewards(part, None)
    again = float((first - second).abs().max())
    if again != 0.0:
        return [f"the reward model gives another score the second time (by {again:.3g}): it is in training mode"]
    moved = float((rewards(_widened(part, pad_id), False) - first).abs().max())
    if not moved <= tolerance.score * (1.0 + float(first.abs().max())):
        return [f"the reward model's score depends on padding, or on what it is packed with (by {moved:.3g})"]
    return []


def _widened(part: Rollout, pad_id: int) -> Rollout:
    """The same episodes with three more places of padding on either side."""
    values = {}
    for f in fields(part):
        value = getattr(part, f.name)
        if f.name == "support":
            value = torch.nn.functional.pad(value, (0, 0, 0, 3), value=255)
        elif value.dim() == 2:
            sides = (3, 0) if f.name in ("prompt_ids", "prompt_mask") else (0, 3)
            value = torch.nn.functional.pad(value, sides, value=pad_id if f.name.endswith("_ids") else 0)
        values[f.name] = value
    return type(part)(**values)


def find_unhealthy_metrics(stats: Mapping[str, float], *, fresh: bool = False) -> list[str]:
    """Vital numbers outside their healthy range, in words. A `fresh` value model need not explain anything yet."""
    found = []
    for name in HEALTH_METRICS:
        if fresh and name == "explained_variance":
            continue
        metric = METRICS[name]
        if name in stats and not metric.healthy(stats[name]):
            wanted = f"[{metric.low:g}, {metric.high:g}] {metric.unit}"
            found.append(f"{name} is {stats[name]:.4g}, outside {wanted}: {metric.meaning}")
    return found


class HealthMonitor:
    """Acts on what the checks find, as configured, and keeps the offending batch."""

    def __init__(self, config: Watch, folder: Path | None, say: Callable[[str], None]) -> None:
        """`folder` takes offending batches (None: this process writes none); `say` prints a line."""
        self.config, self.folder, self.say = config, folder, say
        self._said: set[str] = set()

    def broken(self, problems: list[str], step: int, batch: Rollout) -> None:
        """Raises: TrainingError unless the configuration says to go on."""
        if not problems:
            return
        where = self._keep(step, batch)
        if self.config.broken == "stop":
            raise TrainingError(
                "; ".join(problems),
                where=f"step {step}, before the update",
                do=f"this is a bug, not bad luck{where}; watch.broken=continue goes on all the same",
            )
        for problem in problems:
            self._once(f"step {step}: {problem}{where}", problem)

    def unhealthy(self, problems: list[str], step: int, batch: Rollout) -> None:
        """Raises: Unhealthy for a rollback, TrainingError for a stop."""
        if not problems:
            return
        if self.config.unhealthy == "continue":
            for problem in problems:
                self._once(f"step {step}: {problem}", problem.split(" is ")[0])
            return
        kind = UnhealthyError if self.config.unhealthy == "rollback" else TrainingError
        raise kind(
            "; ".join(problems),
            where=f"step {step}",
            do=f"lower optim.learning_rate or raise kl.coef{self._keep(step, batch)}",
        )

    def not_finite(self, what: str, value: float, step: int, batch: Rollout) -> TrainingError:
        """The error for a loss or gradient that is no finite number; a run that may roll back does so."""
        kind = UnhealthyError if self.config.unhealthy == "rollback" else TrainingError
        return kind(
            f"{what} is {value}",
            where=f"step {step}, before the optimizer step",
            do=f"lower optim.learning_rate{self._keep(step, batch)}",
        )

    def _once(self, line: str, key: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self.say(line)

    def _keep(self, step: int, batch: Rollout) -> str:
        """Write the batch; returns words that say where."""
        if self.folder is None:
            return ""
        path = self.folder / f"trouble_step{step}.pt"
        torch.save({f.name: getattr(batch, f.name).cpu() for f in fields(batch)}, path)
        return f"; batch saved to {path}"
