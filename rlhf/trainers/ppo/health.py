"""Checks of a PPO run: invariants that hold by construction, and metrics that should stay in a healthy range.

A broken invariant is a defect of this code, a model or a library, and further training is meaningless. A metric outside
its range may be due to chance or to a bad setting. `config.ppo.Watch` configures what happens in each case.
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

# Metrics whose healthy range is checked during the run. For all others it only sets a colour in the report.
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
SETTLING_STEPS = 5  # steps after value warm-up in which explained_variance is not checked
ROWS_SCORED_TWICE = 4  # rows of a rollout that are scored again for a check


class UnhealthyError(TrainingError):
    """A health metric left its range, or a loss or gradient is not finite, and watch.unhealthy is rollback."""


@dataclass(frozen=True)
class Tolerance:
    """Tolerated difference between two computations of the same number in one dtype."""

    ratio: float  # importance ratios, and nats between policy and reference
    sampling: float  # nats, log-probs while sampling and teacher-forced
    score: float  # scores, relative to 1 + the largest score


TOLERANCES = {
    torch.float32: Tolerance(ratio=1e-3, sampling=1e-3, score=1e-3),
    torch.bfloat16: Tolerance(ratio=0.1, sampling=0.5, score=0.1),
}


def find_broken_invariants(
    e: Experience, *, kl_coef: float, whitened: bool, fresh: bool, tolerance: Tolerance
) -> list[str]:
    """Return a message for each invariant of a scored rollout that does not hold.

    Args:
        e: the rollout.
        kl_coef: the KL coefficient that its rewards were computed with.
        whitened: whether its advantages should have mean 0 and variance 1.
        fresh: whether no update has happened yet, so that the policy equals the reference.
        tolerance: tolerance for the policy's dtype.
    """
    problems = []
    mask = e.response_mask
    mismatch = float(((e.sampled_logprobs - e.old_logprobs).abs() * mask).max())
    if not mismatch <= tolerance.sampling:
        problems.append(
            f"log-probs while sampling differ from teacher-forced ones by up to {mismatch:.3g} nats: possible causes "
            "are another temperature, a sampling filter, dropout, or a defect of the KV cache"
        )
    kl = (e.old_logprobs - e.ref_logprobs) * mask
    largest = float(kl.abs().max())
    if fresh and not largest <= tolerance.ratio:
        problems.append(
            f"the KL of a fresh policy is not 0: log-probs differ from the reference by up to {largest:.3g} nats"
        )
    if not bool((kl_estimate(e.old_logprobs, e.ref_logprobs, "k3")[mask] >= 0).all()):
        problems.append("the k3 estimate of a KL is negative or not a number")
    problems += _find_misplaced_score(e, kl * kl_coef)
    if whitened:
        off = float((e.advantages - masked_whiten(e.returns - e.values * mask, mask)).abs().max())
        if not off <= 1e-3:
            problems.append(
                f"advantages differ by up to {off:.3g} from those whitened over all processes together: possible "
                "causes are another mask, or moments of one process only"
            )
    return problems


def _find_misplaced_score(e: Experience, penalty: Tensor) -> list[str]:
    """Check that rewards plus KL penalty equal the score on each response's last real token, and 0 elsewhere."""
    rest = e.rewards + penalty
    last = e.response_length - 1
    rows = torch.arange(len(e), device=last.device)
    on_last = rest[rows, last]
    elsewhere = rest.clone()
    elsewhere[rows, last] = 0.0
    scale = 1e-4 * (1.0 + float(e.scores.abs().max()) + float(penalty.abs().max()))
    if float((on_last - e.scores).abs().max()) <= scale and float(elsewhere.abs().max()) <= scale:
        return []
    return ["the score is not entirely on the last real token of its response"]


def find_wrong_first_ratio(error: float, tolerance: Tolerance) -> list[str]:
    """Return a message if the first importance ratios of a step are not 1.

    They must be: before the first update of a step, old and new log-probs come from the same weights and code path.

    Args:
        error: largest |ratio - 1| in the first minibatch.
        tolerance: tolerance for the policy's dtype.
    """
    if error <= tolerance.ratio:
        return []
    return [
        f"the first importance ratio is not 1, with an error of up to {error:.3g}: possible causes are dropout, "
        "another temperature, or log-probs of another policy"
    ]


def find_unstable_scores(
    rewards: Callable[[Rollout, bool | None], Tensor], rollout: Rollout, pad_id: int, tolerance: Tolerance
) -> list[str]:
    """Return a message if reward models score the same responses differently a second time, or with more padding.

    Args:
        rewards: function (rollout, packed) -> [B] scores; packed None = as the models allow, False = padded rows.
        rollout: responses to score.
        pad_id: id of the pad token.
        tolerance: tolerance for the policy's dtype.
    """
    part = rollout.select(torch.arange(min(ROWS_SCORED_TWICE, len(rollout))))
    first, second = rewards(part, None), rewards(part, None)
    repeated = float((first - second).abs().max())
    if repeated != 0.0:
        return [
            f"the reward model gives another score the second time (difference {repeated:.3g}): it may be in training "
            "mode"
        ]
    padded = float((rewards(_add_padding(part, pad_id), False) - first).abs().max())
    if not padded <= tolerance.score * (1.0 + float(first.abs().max())):
        return [
            "the reward model's score depends on padding, or on the sequences that it is packed with (difference "
            f"{padded:.3g})"
        ]
    return []


def _add_padding(part: Rollout, pad_id: int) -> Rollout:
    """Return the same episodes with three more pad tokens on the left of prompts and on the right of responses."""
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
    """Return a message for each health metric outside its range.

    Args:
        stats: metrics of a step.
        fresh: whether the value model has been trained for few steps; explained_variance is then not checked.
    """
    problems = []
    for name in HEALTH_METRICS:
        if fresh and name == "explained_variance":
            continue
        metric = METRICS[name]
        if name in stats and not metric.healthy(stats[name]):
            wanted = f"[{metric.low:g}, {metric.high:g}] {metric.unit}"
            problems.append(f"{name} is {stats[name]:.4g}, outside {wanted}: {metric.meaning}")
    return problems


class HealthMonitor:
    """Reacts to the problems that the checks find, as configured, and saves the batch that they were found in."""

    def __init__(self, config: Watch, folder: Path | None, log: Callable[[str], None]) -> None:
        """Prepare the monitor.

        Args:
            config: what happens in each case.
            folder: where batches with problems are saved; None = this process saves none.
            log: prints a line.
        """
        self.config, self.folder, self.log = config, folder, log
        self._logged: set[str] = set()

    def broken(self, problems: list[str], step: int, batch: Rollout) -> None:
        """React to broken invariants. Raises: TrainingError unless watch.broken is 'continue'."""
        if not problems:
            return
        where = self._save_batch(step, batch)
        if self.config.broken == "stop":
            raise TrainingError(
                "; ".join(problems),
                where=f"step {step}, before the update",
                do=f"this is a defect of the code or a model, not chance{where}; to train anyway, set "
                "watch.broken=continue",
            )
        for problem in problems:
            self._log_once(f"step {step}: {problem}{where}", problem)

    def unhealthy(self, problems: list[str], step: int, batch: Rollout) -> None:
        """React to metrics outside their range. Raises: UnhealthyError for a rollback, TrainingError for a stop."""
        if not problems:
            return
        if self.config.unhealthy == "continue":
            for problem in problems:
                self._log_once(f"step {step}: {problem}", problem.split(" is ")[0])
            return
        kind = UnhealthyError if self.config.unhealthy == "rollback" else TrainingError
        raise kind(
            "; ".join(problems),
            where=f"step {step}",
            do=f"lower optim.learning_rate or raise kl.coef{self._save_batch(step, batch)}",
        )

    def not_finite(self, quantity: str, value: float, step: int, batch: Rollout) -> TrainingError:
        """Return the error for a loss or gradient that is not finite: UnhealthyError if the run may be rolled back."""
        kind = UnhealthyError if self.config.unhealthy == "rollback" else TrainingError
        return kind(
            f"{quantity} is {value}",
            where=f"step {step}, before the optimizer step",
            do=f"lower optim.learning_rate{self._save_batch(step, batch)}",
        )

    def _log_once(self, line: str, key: str) -> None:
        if key not in self._logged:
            self._logged.add(key)
            self.log(line)

    def _save_batch(self, step: int, batch: Rollout) -> str:
        """Save the batch, and return a phrase for the message that names the file."""
        if self.folder is None:
            return ""
        path = self.folder / f"trouble_step{step}.pt"
        torch.save({f.name: getattr(batch, f.name).cpu() for f in fields(batch)}, path)
        return f"; batch saved to {path}"
