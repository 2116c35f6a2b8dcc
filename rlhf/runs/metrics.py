"""Declaration of every metric that a run writes (unit, meaning, healthy range), and the writer of metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf.errors import TrainingError
from rlhf.runs.run_dir import write_text


@dataclass(frozen=True)
class Metric:
    """Declaration of one metric."""

    unit: str
    meaning: str
    low: float = -math.inf  # lower end of the healthy range, inclusive
    high: float = math.inf  # upper end, inclusive

    def healthy(self, value: float) -> bool:
        """Whether a value lies in the healthy range."""
        return self.low <= value <= self.high


METRICS: dict[str, Metric] = {
    "loss": Metric("nats", "mean loss of the update", 0.0),
    "eval_loss": Metric(
        "nats", "mean loss on the validation records; for a language model, the mean over all their tokens", 0.0
    ),
    "gap": Metric(
        "nats", "eval_loss minus the mean training loss since the previous evaluation; it grows with overfitting"
    ),
    "text_loss": Metric("nats", "mean loss per token on the probe's text, with the source model's output layer", 0.0),
    "forgetting": Metric("nats", "text_loss minus its value before training: the loss of quality on the source domain"),
    "drift": Metric("1", "mean change |h - h0| / |h0| of the last hidden state at the end of the probe's texts", 0.0),
    "ood_loss": Metric("nats", "mean loss on the probe's out-of-distribution records", 0.0),
    "ood_accuracy": Metric("share", "out-of-distribution pairs whose chosen response scores higher", 0.5, 1.0),
    "ood_margin": Metric("score", "mean score of chosen minus rejected on out-of-distribution pairs", 0.0),
    "ood_label_accuracy": Metric("share", "correct decisions on out-of-distribution records", 0.0, 1.0),
    "ood_macro_f1": Metric("1", "macro_f1 on out-of-distribution records", 0.0, 1.0),
    "learning_rate": Metric("1", "learning rate of the update", 0.0),
    "grad_norm": Metric("1", "global gradient norm before clipping", 0.0, 100.0),
    "epoch": Metric("epochs", "passes over the training records", 0.0),
    "tokens": Metric("tokens", "tokens trained on so far", 0.0),
    "token_accuracy": Metric("share", "tokens of the loss that are predicted correctly", 0.0, 1.0),
    "entropy": Metric("nats", "mean entropy of the next-token distribution on response tokens", 0.05),
    "updates": Metric(
        "updates", "optimizer updates of this step; fewer than epochs x minibatches if it ended early", 0.0
    ),
    "accuracy": Metric("share", "pairs whose chosen response scores higher", 0.5, 1.0),
    "eval_accuracy": Metric("share", "held-out pairs whose chosen response scores higher", 0.5, 1.0),
    "margin": Metric("score", "mean score of chosen minus rejected", 0.0),
    "eval_margin": Metric("score", "mean score of chosen minus rejected on held-out pairs", 0.0),
    "label_accuracy": Metric("share", "correct decisions; one per record, or per record and label", 0.0, 1.0),
    "eval_label_accuracy": Metric("share", "label_accuracy on held-out records", 0.0, 1.0),
    "macro_f1": Metric("1", "mean over labels of the harmonic mean of precision and recall", 0.0, 1.0),
    "eval_macro_f1": Metric("1", "macro_f1 on held-out records", 0.0, 1.0),
    "score": Metric(
        "score", "mean reward of the rollout: weighted sum of its parts, before clipping and end-token rule"
    ),
    "score_normalized": Metric("score", "mean score after rescaling, clipping and end-token rule"),
    "score_length_correlation": Metric("1", "Pearson correlation of reward and response length", -0.9, 0.9),
    "score_std": Metric("score", "standard deviation of the raw scores over the rollout", 1e-3),
    "kl": Metric("nats", "mean over responses of the summed k1 estimate of KL(policy || reference)", -0.5, 20.0),
    "kl_k2": Metric("nats", "the KL of `kl` by the k2 estimate, biased upwards far from the reference", 0.0),
    "kl_k3": Metric("nats", "the KL of `kl` by the k3 estimate, never negative", 0.0, 20.0),
    "kl_coef": Metric("1", "weight of the KL penalty used for this rollout", 0.0),
    "response_length": Metric("tokens", "mean response length, end token included", 1.0),
    "length_drift": Metric("1", "mean response length divided by that of the run's first rollout", 0.2, 5.0),
    "sampling_mismatch": Metric("nats", "largest |log-prob from sampling - teacher-forced log-prob|", 0.0, 0.5),
    "finished": Metric("share", "responses that ended with the end token", 0.5, 1.0),
    "policy_loss": Metric("1", "clipped surrogate, mean over response tokens"),
    "ptx_coef": Metric("1", "weight of the ptx loss", 0.0),
    "ptx_loss": Metric("nats", "mean negative log-likelihood of the ptx documents, per token", 0.0),
    "value_loss": Metric("score^2", "clipped value loss, mean over response tokens", 0.0),
    "clip_fraction": Metric("share", "tokens whose ratio left the clip range", 0.0, 0.4),
    "approx_kl": Metric(
        "nats", "mean k3 estimate of the KL from the rollout's policy to the current one, per token", 0.0, 0.2
    ),
    "first_ratio_error": Metric(
        "1", "largest |ratio - 1| in a step's first minibatch; 0 in exact arithmetic", 0.0, 0.05
    ),
    "explained_variance": Metric("1", "1 - Var(return - value) / Var(return) of the rollout's values", -5.0, 1.0),
    "episodes": Metric("episodes", "prompt-response pairs so far", 0.0),
    "step": Metric("steps", "rollouts (PPO) or optimizer updates (other stages) so far", 0.0),
    "time_sample": Metric("s", "seconds spent sampling", 0.0),
    "time_score": Metric("s", "seconds spent scoring", 0.0),
    "time_update": Metric("s", "seconds spent updating", 0.0),
}


class MetricsWriter:
    """Writer that appends lines to metrics.jsonl; `step` is the first key of every line."""

    def __init__(
        self, path: Path, *, main: bool = True, keep_until: int | None = None, keep_lines: int | None = None
    ) -> None:
        """Open the file.

        Args:
            path: the file.
            main: whether this is the main process; the others check names but write nothing.
            keep_until: on resume, lines of later steps are dropped; None starts an empty file.
            keep_lines: on resume, lines beyond this number are dropped too: they were written after the checkpoint, at
                the checkpoint's own step.
        """
        self._file: IO[str] | None = None
        self.lines = 0
        if not main:
            return
        self.lines = truncate_jsonl(path, -1 if keep_until is None else keep_until, keep_lines)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line.

        Raises: TrainingError for a name that `METRICS` does not declare.
        """
        unknown = sorted(set(values) - set(METRICS))
        if unknown:
            raise TrainingError("undeclared metric", found=", ".join(unknown), do="declare it in rlhf/runs/metrics.py")
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **{k: round_metric(v) for k, v in values.items()}}) + "\n")
            self._file.flush()
            self.lines += 1

    def sync(self) -> None:
        """Flush every line to disk with fsync, before a checkpoint records their number."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def round_metric(value: float) -> float:
    """Return a number rounded as it is written to the file, so that values computed from it do not change on resume."""
    return round(float(value), 8)


def truncate_jsonl(path: Path, until: int, lines: int | None = None) -> int:
    """Drop the lines of a JSONL file that belong to steps after `until`, or come after the first `lines` lines.

    The file is replaced atomically, so a kill loses no line. A missing file becomes an empty one.
    Returns: the number of lines kept.
    """
    found = read_jsonl(path) if path.is_file() else iter(())
    kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in found if line.get("step", 0) <= until][:lines]
    write_text(path, "".join(kept))
    return len(kept)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file that a run has written, up to a line that a crash left incomplete."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return
