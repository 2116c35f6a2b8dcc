"""Weak supervision: labels of pairs or classes from the votes of rules, functions and annotators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rlhf.config.labeling import WeakLabelConfig
from rlhf.console import Console
from rlhf.data.write import refuse_existing_output, write_jsonl
from rlhf.errors import DataError
from rlhf.functional import dawid_skene, majority_vote, vote_accuracy, vote_shares
from rlhf.labeling.votes import VoteTable, read_votes
from rlhf.rollout.rewards import import_reward_function

MIN_SOURCES = 3
"""Minimum number of sources for Dawid-Skene; the agreement of two sources does not determine their accuracies."""


def make_weak_labels(config: WeakLabelConfig, console: Console) -> None:
    """Label all records, write the file and print a table of the sources.

    Args:
        config: the records, the sources and the label model.
        console: where notes and the table are printed.
    Raises: ConfigError if the file exists or a function does not import; DataError for what cannot be read, for too
        few sources, or if no record is left.
    """
    output = Path(config.output)
    console.title(f"weak -> {output}")
    refuse_existing_output(output)
    named = [source.function for source in config.sources if source.function]
    functions = {name: import_reward_function(name, what="labelling function", where="sources") for name in named}
    table = read_votes(config, functions)
    for note in table.notes:
        console.note(note)
    votes = torch.tensor(table.votes, dtype=torch.int64).reshape(len(table.rows), len(table.sources))
    _check_votes(config, votes, table)
    labels = _labels(config, votes, table, console)
    written = (votes >= 0).any(dim=1) if config.no_votes == "drop" else torch.ones(len(votes), dtype=torch.bool)
    count = write_jsonl(output, _rows(config, table, labels, written))
    _print_sources(votes, table, labels, console)
    without_vote = int((votes < 0).all(dim=1).sum())
    console.note(
        f"{count} records in {output}; {without_vote} without a vote "
        + ("dropped (no_votes=keep keeps them)" if config.no_votes == "drop" else "kept")
    )


def _check_votes(config: WeakLabelConfig, votes: Tensor, table: VoteTable) -> None:
    if not bool((votes >= 0).any()):
        raise DataError(
            "no source votes on any record",
            found=f"sources {', '.join(table.sources) or 'none'}",
            where=config.data.path,
            do="check the columns, rules and functions under sources",
        )
    active = int((votes >= 0).any(dim=0).sum())
    together = int((votes >= 0).sum(dim=1).max())
    if config.label_model.kind == "dawid-skene" and (active < MIN_SOURCES or together < 2):
        raise DataError(
            f"accuracies can be estimated only if at least {MIN_SOURCES} sources vote on common records",
            found=f"{active} sources that vote, at most {together} on one record",
            where=config.data.path,
            do="add sources, or set label_model.kind=majority",
        )


def _labels(config: WeakLabelConfig, votes: Tensor, table: VoteTable, console: Console) -> Tensor:
    """Return P(class | votes), [R, N]."""
    settings, classes = config.label_model, len(table.labels)
    if settings.kind == "majority":
        return majority_vote(votes, classes=classes)
    single_accuracy = _one_accuracy(config, votes, table)
    found = dawid_skene(
        votes,
        classes=classes,
        symmetric=single_accuracy,
        smoothing=settings.smoothing,
        tolerance=settings.tolerance,
        max_iterations=settings.max_iterations,
    )
    ended = "converged" if found.converged else "STOPPED BEFORE IT CONVERGED (label_model.max_iterations)"
    parameters = "one accuracy" if single_accuracy else "a confusion matrix"
    console.note(f"dawid-skene: {parameters} per source; {ended} after {len(found.objective)} iterations")
    return found.posterior


def _one_accuracy(config: WeakLabelConfig, votes: Tensor, table: VoteTable) -> bool:
    """Return whether a source has one accuracy instead of a confusion matrix.

    Raises: DataError if a confusion matrix is asked for but cannot be estimated.
    """
    if config.kind == "comparison" or config.label_model.accuracy == "one":
        return True
    one_sided = [
        name for name, row in zip(table.sources, votes.T, strict=True) if len(set(row[row >= 0].tolist())) == 1
    ]
    if one_sided and config.label_model.accuracy == "per-class":
        raise DataError(
            f"'{one_sided[0]}' votes for one class only, so its confusion matrix cannot be estimated",
            where=config.data.path,
            do="set label_model.accuracy=one",
        )
    return bool(one_sided)


def _rows(config: WeakLabelConfig, table: VoteTable, labels: Tensor, written: Tensor) -> Iterator[dict[str, Any]]:
    for row, values, wanted in zip(table.rows, labels.tolist(), written.tolist(), strict=True):
        if not wanted:
            continue
        if config.kind == "comparison":
            yield row | {"preference": round(values[0], 6)}
        else:
            yield row | {"label": {name: round(p, 6) for name, p in zip(table.labels, values, strict=True)}}


def _print_sources(votes: Tensor, table: VoteTable, labels: Tensor, console: Console) -> None:
    """Print the table of sources; with gold also the accuracy of the sources, the labels and the majority vote."""
    header = ["source", "coverage", "overlap", "conflict", "estimated accuracy"]
    columns = [*vote_shares(votes), vote_accuracy(votes, labels)]
    gold = torch.tensor(table.gold, dtype=torch.int64)
    known = gold >= 0
    if bool(known.any()):
        header.append("true accuracy")
        columns.append(vote_accuracy(votes[known], one_hot(gold[known], labels.shape[1])))
    rows = [[name, *(_percent(float(column[s])) for column in columns)] for s, name in enumerate(table.sources)]
    console.table("Sources", header, rows)
    chance = 1 / labels.shape[1]
    worse = [name for name, share in zip(table.sources, columns[3].tolist(), strict=True) if share < chance]
    if worse:
        console.note(
            f"estimated worse than chance: {', '.join(worse)}. Either this is true, or most other sources make the "
            f"same mistakes: compare with label_model.kind=majority, and look at some records"
        )
    if bool(known.any()):
        voted = known & (votes >= 0).any(dim=1)
        majority = majority_vote(votes, classes=labels.shape[1])
        console.text(
            f"labels right: {_percent(label_accuracy(labels[voted], gold[voted]))} (majority of the votes: "
            f"{_percent(label_accuracy(majority[voted], gold[voted]))}), of {int(voted.sum())} records with votes and "
            "gold"
        )


def label_accuracy(labels: Tensor, gold: Tensor) -> float:
    """Return the share of records whose most likely class is the true one; a tie of k classes with it counts 1 / k.

    Args:
        labels: [R, N], probabilities.
        gold: [R], index of the true class.
    """
    best = (labels >= labels.amax(dim=1, keepdim=True) - 1e-12).double()
    return float((best / best.sum(dim=1, keepdim=True)).gather(1, gold[:, None]).mean())


def _percent(share: float) -> str:
    return "–" if share != share else f"{100 * share:.1f} %"
