"""Training of a classifier with N labels: the trunk of a causal LM with a new output layer.

The probability of a label can be a reward of PPO (`rewards: [{classifier: ..., label: ...}]`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.config.schema import ClassifyConfig
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.records import Labelled
from rlhf.errors import ConfigError, DataError
from rlhf.functional import balanced_weights
from rlhf.models.heads import head_dtype
from rlhf.models.load import check_context, context_length
from rlhf.models.reward_models import new_classifier
from rlhf.stages.lifecycle import RunResult, begin_run, load_data, open_tokenizer, start_run
from rlhf.trainers.phase_setup import set_up_phases
from rlhf.trainers.supervised.probe_data import load_probe
from rlhf.trainers.supervised.run import run_training, save_trained


def run(config: ClassifyConfig, console: Console) -> RunResult:
    """Train a classifier, write the run directory, and print precision and recall of each label on held-out records."""
    directory, state = begin_run("classify", config, console)
    if state == "finished":
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    tokenizer, renderer = open_tokenizer(config.model, console)
    train, validation, fingerprints = load_data("labelled", config.data, config.seed, console)
    labels = label_names(config, train, validation)

    def render(records: Sequence[Labelled], role: str = "probe") -> list[dict[str, Any]]:
        return tokenize.tokenize_labelled(records, renderer, config.data, labels, config.multi_label, role, console)

    rows, held_out = render(train, "training"), render(validation, "validation")
    target = torch.tensor([row["target"] for row in rows])
    _check_shares(config, labels, target)
    weight = _weight(config, labels, target)
    model = new_classifier(
        config.model,
        config.peft,
        outputs=len(labels),
        pad_id=renderer.pad_id,
        vocab_size=len(tokenizer),
        seed=config.seed,
    )
    model.config.id2label, model.config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    model.config.problem_type = "multi_label_classification" if config.multi_label else "single_label_classification"
    check_context(config.data.max_length, context_length(model), "data.max_length")
    schedule = set_up_phases(model, config, rows=len(rows), evaluate=bool(held_out), console=console)
    probe_data = load_probe(
        config,
        config.data,
        config.model,
        renderer,
        console,
        kind="labelled",
        evaluate=bool(held_out),
        scorer=True,
        render=render,
    )
    start_run(directory, "classify", config)
    directory.note(data=fingerprints)
    from rlhf.trainers.supervised.classify import ConfusionCounts, build_classifier_trainer

    counts: list[ConfusionCounts] = []

    def save(trainer: Any, folder: Path) -> dict[str, Any]:
        counts.extend(c for mode, c in trainer.counts.items() if mode == "eval")
        named = {"labels": list(labels), "multi_label": config.multi_label}
        save_trained(trainer, folder, "classify", renderer, tokenizer, head_dtype=head_dtype(model), **named)
        return {"records": len(rows), **named}

    summary, final = run_training(
        "classify",
        directory,
        config.optim,
        config.seed,
        console,
        schedule=schedule,
        saving=config.saving,
        evaluate=bool(held_out),
        build=lambda args, report: build_classifier_trainer(
            model, tokenizer, rows, held_out, args, report, multi_label=config.multi_label, weight=weight
        ),
        save=save,
        resume=state == "interrupted",
        unit="records",
        shown=("loss", "eval_loss", "gap", "eval_label_accuracy"),
        evaluations=config.evaluations,
        probe_data=probe_data,
    )
    if final:
        names = ("eval_loss", "eval_label_accuracy", "eval_macro_f1")
        summary |= {name: final[name] for name in names} | {
            "baseline_accuracy": majority_accuracy(target, held_out, config)
        }
        _print_results(labels, counts[-1], summary, console)
    directory.note(summary=summary)
    directory.finish()
    return RunResult(directory.path, summary)


def label_names(config: ClassifyConfig, train: Sequence[Labelled], validation: Sequence[Labelled]) -> tuple[str, ...]:
    """Return the labels in order: those of the configuration else those of the training records, sorted.

    Raises: DataError for a record with another label; ConfigError for too few labels.
    """
    occurring = Counter(name for record in train for name, p in record.labels.items() if p > 0)
    labels = config.labels or tuple(sorted(occurring))
    fewest = 1 if config.multi_label else 2
    if len(labels) < fewest:
        raise ConfigError(
            f"a classifier needs at least {fewest} labels",
            found=", ".join(labels) or "none",
            where="labels",
            do="check the column 'label', or set multi_label=true for one label that may hold or not",
        )
    for record in (*train, *validation):
        other = sorted(set(record.labels) - set(labels))
        if other:
            raise DataError(
                f"label '{other[0]}' is not one of the classifier's",
                found=f"labels {', '.join(labels)}",
                where=record.where,
                do="name it in labels, or correct the row",
            )
    return labels


def _check_shares(config: ClassifyConfig, labels: tuple[str, ...], target: torch.Tensor) -> None:
    """Raise DataError for a label that no training record has or, with balanced weights, that all of them have."""
    shares = dict(zip(labels, target.mean(dim=0).tolist(), strict=True))
    missing = [name for name, share in shares.items() if share <= 0]
    always = [name for name, share in shares.items() if share >= 1]
    if missing:
        raise DataError(
            f"no training record has the label '{missing[0]}'",
            found=f"{len(target)} rendered records",
            where="data.train",
            do="add some, or drop the label",
        )
    if always and config.class_weights == "balanced":
        raise DataError(
            f"every training record has the label '{always[0]}'",
            where="data.train",
            do="add records without it, drop the label, or set class_weights=equal",
        )


def _weight(config: ClassifyConfig, labels: tuple[str, ...], target: torch.Tensor) -> torch.Tensor | None:
    if isinstance(config.class_weights, dict):
        other = sorted(set(config.class_weights) ^ set(labels))
        if other:
            raise ConfigError(
                "class_weights must name every label once",
                found=f"labels and weights differ in '{other[0]}'",
                where="class_weights",
                do=f"labels: {', '.join(labels)}",
            )
        return torch.tensor([config.class_weights[name] for name in labels])
    if config.class_weights == "equal":
        return None
    return balanced_weights(target, multi_label=config.multi_label)


def majority_accuracy(target: torch.Tensor, held_out: Sequence[dict[str, Any]], config: ClassifyConfig) -> float:
    """Return the held-out accuracy of the majority baseline: always the most frequent label of the training records."""
    true = torch.tensor([row["target"] for row in held_out])
    if config.multi_label:
        return float(((true > 0.5) == (target.mean(dim=0) > 0.5)).float().mean())
    return float((true.argmax(dim=1) == target.sum(dim=0).argmax()).float().mean())


def _print_results(labels: tuple[str, ...], counts: Any, summary: dict[str, Any], console: Console) -> None:
    rows = [
        [name, f"{int(count)}", f"{100 * precision:.1f} %", f"{100 * recall:.1f} %"]
        for name, count, precision, recall in zip(
            labels, counts.true_positives + counts.false_negatives, counts.precision, counts.recall, strict=True
        )
    ]
    console.table("Held-out records", ["label", "records", "precision", "recall"], rows)
    console.note(
        f"classify: held-out accuracy {summary['eval_label_accuracy']:.3f} (majority baseline: "
        f"{summary['baseline_accuracy']:.3f}), macro F1 {summary['eval_macro_f1']:.3f}, loss {summary['eval_loss']:.4f}"
        " nats"
    )
