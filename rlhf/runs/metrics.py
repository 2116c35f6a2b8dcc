"""One table of every number a run writes: unit, meaning, healthy range. An undeclared name is refused."""

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
    """A declared number."""

    unit: str
    meaning: str
    low: float = -math.inf  # healthy range, inclusive
    high: float = math.inf

    def healthy(self, value: float) -> bool:
        """Whether a value lies in the healthy range."""
        return self.low <= value <= self.high


METRICS: dict[str, Metric] = {
    "loss": Metric("nats", "mean loss of the update", 0.0),
    "eval_loss": Metric("nats", "mean loss on the validation records; of a language model over all their tokens", 0.0),
    "gap": Metric(
        "nats", "held-out loss minus the mean training loss since the evaluation before; grows by over-fitting"
    ),
    "text_loss": Metric("nats", "mean loss per token of the probe's text, read by the source's output layer", 0.0),
    "forgetting": Metric("nats", "text_loss above that before training: what fine-tuning costs on the source domain"),
    "drift": Metric("1", "mean change |h - h0| / |h0| of the last hidden state at the end of the probe's texts", 0.0),
    "ood_loss": Metric("nats", "the same on the probe's records of another distribution", 0.0),
    "ood_accuracy": Metric("share", "pairs of them whose chosen response scores higher", 0.5, 1.0),
    "ood_margin": Metric("score", "mean score of chosen minus rejected of them", 0.0),
    "ood_label_accuracy": Metric("share", "decisions on them that are right", 0.0, 1.0),
    "ood_macro_f1": Metric("1", "macro_f1 on them", 0.0, 1.0),
    "learning_rate": Metric("1", "learning rate of the update", 0.0),
    "grad_norm": Metric("1", "global gradient norm before clipping", 0.0, 100.0),
    "epoch": Metric("epochs", "passes over the training records", 0.0),
    "tokens": Metric("tokens", "tokens trained on so far", 0.0),
    "token_accuracy": Metric("share", "loss-carrying tokens predicted right", 0.0, 1.0),
    "entropy": Metric("nats", "mean entropy of the next-token distribution on response tokens", 0.05),
    "updates": Metric("updates", "optimizer updates of this step; fewer than epochs x minibatches if ended early", 0.0),
    "accuracy": Metric("share", "pairs whose chosen response scores higher", 0.5, 1.0),
    "eval_accuracy": Metric("share", "held-out pairs whose chosen response scores higher", 0.5, 1.0),
    "margin": Metric("score", "mean score of chosen minus rejected", 0.0),
    "eval_margin": Metric("score", "the same on held-out pairs", 0.0),
    "label_accuracy": Metric("share", "decisions that are right: one a record, or a record and label", 0.0, 1.0),
    "eval_label_accuracy": Metric("share", "the same on held-out records", 0.0, 1.0),
    "macro_f1": Metric("1", "mean over labels of the harmonic mean of precision and recall", 0.0, 1.0),
    "eval_macro_f1": Metric("1", "the same on held-out records", 0.0, 1.0),
    "score": Metric("score", "mean reward of the rollout: all parts by weight, before clip and end-token rule"),
    "score_normalized": Metric("score", "mean score after rescaling, clip and end-token rule"),
    "score_length_correlation": Metric("1", "Pearson correlation of reward and response length", -0.9, 0.9),
    "score_std": Metric("score", "deviation of the raw scores over the rollout", 1e-3),
    "kl": Metric("nats", "mean over responses of the summed k1 estimate of KL(policy || reference)", -0.5, 20.0),
    "kl_k2": Metric("nats", "the same KL by the k2 estimate, biased upwards far from the reference", 0.0),
    "kl_k3": Metric("nats", "the same KL by the k3 estimate, never negative", 0.0, 20.0),
    "kl_coef": Metric("1", "weight of the KL penalty used for this rollout", 0.0),
    "response_length": Metric("tokens", "mean response length, end token included", 1.0),
    "length_drift": Metric("1", "mean response length over that of the run's first rollout", 0.2, 5.0),
    "sampling_mismatch": Metric("nats", "largest gap of log-probs while sampling and teacher-forced", 0.0, 0.5),
    "finished": Metric("share", "responses that ended with the end token", 0.5, 1.0),
    "policy_loss": Metric("1", "clipped surrogate, mean over response tokens"),
    "ptx_coef": Metric("1", "weight of the ptx loss", 0.0),
    "ptx_loss": Metric("nats", "mean negative log-likelihood of the ptx documents, per token", 0.0),
    "value_loss": Metric("score^2", "clipped value loss, mean over response tokens", 0.0),
    "clip_fraction": Metric("share", "tokens whose ratio left the clip range", 0.0, 0.4),
    "approx_kl": Metric("nats", "mean k3 of the rollout's policy to the current one, per token", 0.0, 0.2),
    "first_ratio_error": Metric("1", "largest |ratio - 1| in a step's first minibatch; 0 by construction", 0.0, 0.05),
    "explained_variance": Metric("1", "1 - Var(return - value) / Var(return) of the rollout's values", -5.0, 1.0),
    "episodes": Metric("episodes", "prompt-response pairs so far", 0.0),
    "step": Metric("steps", "rollouts (PPO) or optimizer updates (other stages) so far", 0.0),
    "time_sample": Metric("s", "seconds spent sampling", 0.0),
    "time_score": Metric("s", "seconds spent scoring", 0.0),
    "time_update": Metric("s", "seconds spent updating", 0.0),
}


class MetricsWriter:
    """Appends to metrics.jsonl. `step` is the first key of every line."""

    def __init__(
        self, path: Path, *, main: bool = True, keep_until: int | None = None, keep_lines: int | None = None
    ) -> None:
        """Open the file.

        Args:
            keep_until: on resume, lines of later steps are dropped; None starts an empty file.
            keep_lines: and so are lines beyond this number: those written after the checkpoint, at its own step.
        """
        self._file: IO[str] | None = None
        self.lines = 0
        if not main:
            return
        self.lines = truncate_jsonl(path, -1 if keep_until is None else keep_until, keep_lines)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line.

        Raises: TrainingError on a name that the table does not declare.
        """
        unknown = sorted(set(values) - set(METRICS))
        if unknown:
            raise TrainingError("undeclared metric", found=", ".join(unknown), do="declare it in rlhf/runs/metrics.py")
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **{k: round_metric(v) for k, v in values.items()}}) + "\n")
            self._file.flush()
            self.lines += 1

    def sync(self) -> None:
        """Have the disk hold every line, before a checkpoint counts on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def round_metric(value: float) -> float:
    """A number as it is written, so that what is computed from it is the same after a resume."""
    return round(float(value), 8)


def truncate_jsonl(path: Path, until: int, lines: int | None = None) -> int:
    """Drop the lines of a JSONL file that are of later steps, or beyond a number of lines. Returns: how many stay.

    The file is replaced as a whole: a kill meanwhile loses none of them.
    """
    found = read_jsonl(path) if path.is_file() else iter(())
    kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in found if line.get("step", 0) <= until][:lines]
    write_text(path, "".join(kept))
    return len(kept)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a JSONL file of ours; a last line cut by a crash is skipped."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return
