"""Broken twins of the label models; otherwise as `twins`."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from rlhf import functional as F

# majority_vote


def majority_ties_to_the_first(votes, *, classes):
    shares = F.majority_vote(votes, classes=classes)
    return one_hot(shares.argmax(dim=1), classes).double()


def majority_counts_abstentions(votes, *, classes):
    """-1 as an index: the last class."""
    return F.majority_vote(votes.remainder(classes), classes=classes)


def majority_over_all_sources(votes, *, classes):
    cast = (votes >= 0).sum(dim=1, keepdim=True)
    return F.majority_vote(votes, classes=classes) * cast / votes.shape[1]


# dawid_skene


def em_counts_abstentions(votes, *, classes, **options):
    return F.dawid_skene(votes.remainder(classes), classes=classes, **options)


def em_switches_labels(votes, *, classes, **options):
    """The other solution of equal likelihood."""
    found = F.dawid_skene(votes, classes=classes, **options)
    return found._replace(
        posterior=found.posterior.roll(1, dims=1), confusion=found.confusion.roll(1, dims=1), prior=found.prior.roll(1)
    )


def em_prefers_a_place(votes, *, classes, symmetric=False, **options):
    """Pairs as any two classes: a prior for the first and a matrix."""
    return F.dawid_skene(votes, classes=classes, symmetric=False, **options)


def em_breaks_ties_towards_class_0(votes, *, classes, **options):
    found = F.dawid_skene(votes, classes=classes, **options)
    nudge = torch.zeros(classes, dtype=torch.float64)
    nudge[0] = 1e-6
    posterior = found.posterior + nudge
    return found._replace(posterior=posterior / posterior.sum(dim=1, keepdim=True))


def em_transposes_the_matrix(votes, *, classes, **options):
    found = F.dawid_skene(votes, classes=classes, **options)
    return found._replace(confusion=found.confusion.mT)


def em_forgets_the_prior(votes, *, classes, **options):
    found = F.dawid_skene(votes, classes=classes, **options)
    posterior = found.posterior / found.prior
    return found._replace(posterior=posterior / posterior.sum(dim=1, keepdim=True))


def em_is_the_majority(votes, *, classes, **options):
    return F.dawid_skene(votes, classes=classes, **options)._replace(posterior=F.majority_vote(votes, classes=classes))


def em_stops_at_once(votes, *, classes, symmetric=False, smoothing=1.0, **options):
    return F.dawid_skene(votes, classes=classes, symmetric=symmetric, smoothing=smoothing, max_iterations=1)


def em_favours_early_sources(votes, *, classes, **options):
    weight = torch.arange(votes.shape[1], 0, -1)
    wide = votes.repeat_interleave(weight, dim=1)
    found = F.dawid_skene(wide, classes=classes, **options)
    return found._replace(confusion=found.confusion[weight.cumsum(0) - 1])


def em_reports_falling_objective(votes, *, classes, **options):
    """Minus the likelihood."""
    found = F.dawid_skene(votes, classes=classes, **options)
    return found._replace(objective=-found.objective)


# vote_accuracy


def accuracy_counts_abstentions_as_wrong(votes, labels):
    return F.vote_accuracy(votes, labels) * (votes >= 0).double().mean(dim=0)


def accuracy_reads_abstentions_as_a_class(votes, labels):
    return F.vote_accuracy(votes.remainder(labels.shape[1]), labels)


# vote_shares


def shares_of_all_who_vote(votes):
    found = F.vote_shares(votes)
    return found._replace(overlap=found.overlap / found.coverage, conflict=found.conflict / found.coverage)


def shares_meet_themselves(votes):
    found = F.vote_shares(votes)
    return found._replace(overlap=found.coverage)


def shares_conflict_with_abstentions(votes):
    found = F.vote_shares(votes)
    gap = (votes >= 0) & (votes != votes.amax(dim=1, keepdim=True)) | (votes >= 0) & (votes < 0).any(1, keepdim=True)
    return found._replace(conflict=gap.double().mean(dim=0))
