"""Labels from the votes of noisy sources: majority vote, Dawid and Skene's EM, and statistics of each source.

crowd-kit has this EM, but not the symmetric form that pairs need, and depends on nltk and pandas; hence this module.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.errors import ShapeError

ABSTAINS = -1
"""Vote of a source that abstains."""


class LabelModel(NamedTuple):
    """Result of `dawid_skene` for R records, S sources and N classes; float64.

    Attributes:
        posterior: [R, N], P(class | votes).
        confusion: [S, N, N], P(source votes v | class n) at [s, n, v].
        prior: [N], P(class).
        objective: [iterations], nats; the last value belongs to the other fields.
        converged: whether the last gain was below the tolerance.
    """

    posterior: Tensor
    confusion: Tensor
    prior: Tensor
    objective: Tensor
    converged: bool


def majority_vote(votes: Tensor, *, classes: int) -> Tensor:
    """Return each class's share of the votes on each record: the soft form of majority voting.

        q_rn = #{s: v_rs = n} / #{s: s votes on r}

    Limits: one vote decides alone; equal counts give equal shares, so that a tie stays a tie; no vote gives 1 / N.

    Args:
        votes: [R, S] int64, class 0 to N - 1, or -1 for an abstention.
        classes: N >= 2.
    Returns: [R, N] float64, rows sum to 1.
    Does not: weigh sources.
    Raises: ShapeError unless votes are [R, S]; ValueError for another number as a vote, or fewer than 2 classes.
    """
    _check("majority_vote", votes, classes)
    counts = torch.stack([(votes == n).sum(dim=1) for n in range(classes)], dim=1).double()
    total = counts.sum(dim=1, keepdim=True)
    return torch.where(total > 0, counts / total.clamp_min(1), 1 / classes)


def dawid_skene(
    votes: Tensor,
    *,
    classes: int,
    symmetric: bool = False,
    smoothing: float = 1.0,
    tolerance: float = 1e-9,
    max_iterations: int = 1000,
) -> LabelModel:
    """Estimate the classes and the confusion matrix of every source together, by expectation-maximisation.

        E   q_rn      ~ pi_n prod_{s votes on r} theta_s[n, v_rs]
        M   theta_s[n, v] = (sum_{r: v_rs = v} q_rn + a) / (sum_{r: s votes} q_rn + a N)
            pi_n          = (sum_r q_rn + a) / (#records with a vote + a N)            a = smoothing
        symmetric   theta_s[n, n] = p_s, the rest of the row equal, pi_n = 1 / N:
            p_s = (sum_{r: s votes} q_r,v_rs + a) / (#votes of s + a N)

    Dawid and Skene 1979, Applied Statistics 28(1); symmetric is the one-coin model. It starts at the vote shares, which
    fixes the names of the classes: their permutations are equally likely otherwise. The objective
    log P(votes) + a sum log theta (+ a sum log pi; symmetric: one row a source) never falls; a = 0 is their likelihood.

    Limits: sources of equal accuracy decide by majority; one that is always right decides alone. An abstention is no
    vote: a source or record without any changes nothing for the others, and such a record gets pi. Renaming classes
    or sources renames the answer. Symmetric, each record's classes may be renamed by themselves: a pair turned round
    turns its label round, and no place can be preferred. Without symmetric, a source that only ever votes for one class
    says nothing: theta = 1 for every class.

    Args:
        votes: [R, S] int64, class 0 to N - 1, or -1 for an abstention.
        classes: N >= 2.
        symmetric: one accuracy a source; for pairs, whose order means nothing, and for rules that know one class.
        smoothing: a >= 0, counts added to each cell.
        tolerance: nats per record that votes are on; a smaller gain ends the iterations.
        max_iterations: at least 1.
    Returns: LabelModel.
    Does not: find sources that copy each other, or succeed where most votes are worse than chance. Two sources alone
        cannot be told apart.
    Raises: ShapeError unless votes are [R, S]; ValueError for another number as a vote, fewer than 2 classes, a
        negative smoothing or tolerance, or no iteration.
    """
    _check("dawid_skene", votes, classes)
    if smoothing < 0 or tolerance < 0 or max_iterations < 1:
        found = f"{smoothing}, {tolerance}, {max_iterations}"
        raise ValueError(f"dawid_skene: smoothing, tolerance >= 0 and max_iterations >= 1 (found: {found})")
    posterior, objective = majority_vote(votes, classes=classes), list[Tensor]()
    counted = (votes != ABSTAINS).any(dim=1)
    converged = False
    while not converged and len(objective) < max_iterations:
        confusion, prior = _parameters(votes, posterior, counted, symmetric, smoothing)
        joint = prior.log().repeat(len(votes), 1)
        for s, row in enumerate(votes.T):
            joint[row != ABSTAINS] += confusion[s].log().T[row[row != ABSTAINS]]
        evidence = joint.logsumexp(dim=1)
        posterior = (joint - evidence[:, None]).exp()
        value = evidence[counted].sum()
        if smoothing:
            cells = confusion[:, 0] if symmetric else torch.cat([confusion.flatten(), prior])
            value = value + smoothing * cells.log().sum()
        objective.append(value)
        converged = len(objective) > 1 and bool(value - objective[-2] < tolerance * max(1, int(counted.sum())))
    return LabelModel(posterior, confusion, prior, torch.stack(objective), converged)


def _parameters(
    votes: Tensor, posterior: Tensor, counted: Tensor, symmetric: bool, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return confusion [S, N, N] and prior [N] of the M step; a row without votes and smoothing is uniform."""
    n = posterior.shape[1]
    counts = torch.zeros(votes.shape[1], n, n, dtype=posterior.dtype)
    for s, row in enumerate(votes.T):
        counts[s].T.index_add_(0, row[row != ABSTAINS], posterior[row != ABSTAINS])
    if not symmetric:
        mass = posterior[counted].sum(dim=0)
        return _shares(counts + smoothing), _shares(mass + smoothing)
    agree = counts.diagonal(dim1=1, dim2=2).sum(dim=1)
    other = (counts.sum(dim=(1, 2)) - agree).clamp_min(0.0)  # not -1e-17 where a source always agrees
    p, rest = agree + smoothing, other + smoothing * (n - 1)
    eye = torch.eye(n, dtype=posterior.dtype)
    table = p[:, None, None] * eye + rest[:, None, None] / (n - 1) * (1 - eye)
    return _shares(table), torch.full((n,), 1 / n, dtype=posterior.dtype)


def _shares(counts: Tensor) -> Tensor:
    total = counts.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, counts / total.clamp_min(math.ulp(0.0)), 1 / counts.shape[-1])


def vote_accuracy(votes: Tensor, labels: Tensor) -> Tensor:
    """Return how often each source is right, in expectation over the labels.

        acc_s = sum_{r: s votes} t_r,v_rs / #{r: s votes}

    Limits: certain labels give the share of right votes; the labels of a model give its estimate of that share. Under
    `majority_vote` every vote also agrees with itself, so that the estimate is too high.

    Args:
        votes: [R, S] int64, -1 = abstains.
        labels: [R, N], distributions over the classes: what a label model found, or one-hot truth.
    Returns: [S] float64, in [0, 1]; nan for a source without a vote.
    Raises: ShapeError unless there is one label a record; ValueError for a vote that is no class.
    """
    if labels.dim() != 2 or len(labels) != len(votes):
        found = f"{list(votes.shape)}, {list(labels.shape)}"
        raise ShapeError("labels must be [R, N], one a record", found=found, where="vote_accuracy")
    _check("vote_accuracy", votes, labels.shape[1])
    agreed = labels.double().gather(1, votes.clamp_min(0)).masked_fill(votes == ABSTAINS, 0.0)
    return agreed.sum(dim=0) / (votes != ABSTAINS).sum(dim=0)


class VoteShares(NamedTuple):
    """Result of `vote_shares`: each [S] float64, a share of all records."""

    coverage: Tensor
    overlap: Tensor
    conflict: Tensor


def vote_shares(votes: Tensor) -> VoteShares:
    """Return on which share of records each source votes, together with another source, and differently from one.

        coverage_s = #{r: s votes} / R       overlap_s = #{r: s and another vote} / R
        conflict_s = #{r: s votes and another votes otherwise} / R

    Ratner et al. 2017, arXiv:1711.10160, section 2. Limits: conflict <= overlap <= coverage <= 1.

    Args:
        votes: [R, S] int64, -1 = abstains; R >= 1.
    Returns: VoteShares.
    Raises: ShapeError unless votes are [R, S] with a record at least.
    """
    if votes.dim() != 2 or not len(votes):
        raise ShapeError("votes must be [R, S], R >= 1", found=str(list(votes.shape)), where="vote_shares")
    cast = votes != ABSTAINS
    overlap = cast & (cast.sum(dim=1, keepdim=True) > 1)
    low = votes.masked_fill(~cast, torch.iinfo(votes.dtype).max).amin(dim=1, keepdim=True)
    conflict = cast & (votes.amax(dim=1, keepdim=True) > low)
    return VoteShares(*(part.double().mean(dim=0) for part in (cast, overlap, conflict)))


def _check(where: str, votes: Tensor, classes: int) -> None:
    if votes.dim() != 2 or votes.dtype != torch.int64:
        raise ShapeError("votes must be [R, S] int64", found=f"{list(votes.shape)} {votes.dtype}", where=where)
    if classes < 2:
        raise ValueError(f"{where}: at least 2 classes (found: {classes})")
    if votes.numel() and (int(votes.min()) < ABSTAINS or int(votes.max()) >= classes):
        found = f"{int(votes.min())} to {int(votes.max())}"
        raise ValueError(f"{where}: a vote is -1 to {classes - 1} (found: {found})")
