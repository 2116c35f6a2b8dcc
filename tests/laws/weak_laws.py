"""Laws of the label models; otherwise as `laws`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tests.tolerances import QUOTED, assert_close, assert_quoted

R, S, N = 60, 5, 3
STEPS = {"tolerance": 0.0, "max_iterations": 12}  # before it has converged: how many steps there were would tell
SETTLED = {"tolerance": 0.0, "max_iterations": 3000}


def _votes(seed: int, *, classes: int = N, records: int = R, skill: float = 0.7, coverage: float = 0.7) -> Tensor:
    """[R, S]: sources that are right more often than not, with gaps, a record and ties among them."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (records, 1), generator=generator)
    guess = torch.randint(0, classes, (records, S), generator=generator)
    votes = torch.where(torch.rand(records, S, generator=generator) < skill, truth, guess)
    votes = votes.masked_fill(torch.rand(records, S, generator=generator) > coverage, -1)
    votes[0] = -1  # nobody
    votes[1, :2], votes[1, 2:] = torch.tensor([1, 0]), -1  # a tie
    return votes


def _settings(seed: int) -> list[tuple[int, bool, float]]:
    """Classes, symmetric, smoothing."""
    return [(2, True, 1.0), (2, False, 1.0), (N, False, 0.3), (N, True, 0.3)]


def labels_are_distributions_and_a_tie_stays_a_tie(f, seed):
    votes = _votes(seed)
    for classes in (N, N + 1):
        found = f.majority_vote(votes, classes=classes)
        assert_close(found.sum(dim=1), [1.0] * R)
        assert_close(found[0], [1 / classes] * classes)
        assert_close(found[1], [0.5, 0.5] + [0.0] * (classes - 2))
    pair = f.dawid_skene(votes.clamp_max(1), classes=2, symmetric=True, **STEPS)
    assert_close(pair.posterior.sum(dim=1), [1.0] * R)
    assert_close(pair.posterior[0], [0.5, 0.5])


def an_abstention_changes_nothing(f, seed):
    """Not a source that never votes, nor a record that nobody votes on, nor the number of either."""
    for classes, symmetric, smoothing in _settings(seed):
        votes = _votes(seed, classes=classes)
        more = torch.full((R + 7, S + 2), -1)
        more[:R, 1:-1] = votes
        small, large = (
            f.dawid_skene(v, classes=classes, symmetric=symmetric, smoothing=smoothing, **STEPS) for v in (votes, more)
        )
        assert_close(large.posterior[:R], small.posterior.tolist())
        assert_close(large.confusion[1:-1], small.confusion.tolist())
        assert_close(large.prior, small.prior.tolist())
        assert_close(large.posterior[R:], small.prior.repeat(7, 1).tolist())
        assert_close(f.majority_vote(more, classes=classes)[:R], f.majority_vote(votes, classes=classes).tolist())
        labels = f.majority_vote(votes, classes=classes)
        wide = torch.cat([labels, torch.ones(7, classes).double() / classes])
        assert_close(f.vote_accuracy(more, wide)[1:-1], f.vote_accuracy(votes, labels).tolist())


def permuting_sources_permutes_the_answer(f, seed):
    order = torch.randperm(S, generator=torch.Generator().manual_seed(seed))
    for classes, symmetric, smoothing in _settings(seed):
        votes = _votes(seed, classes=classes)
        first, second = (
            f.dawid_skene(v, classes=classes, symmetric=symmetric, smoothing=smoothing, **STEPS)
            for v in (votes, votes[:, order])
        )
        assert_close(second.posterior, first.posterior.tolist())
        assert_close(second.confusion, first.confusion[order].tolist())
        for found, expected in zip(f.vote_shares(votes[:, order]), f.vote_shares(votes), strict=True):
            assert_close(found, expected[order].tolist())


def renaming_the_classes_renames_the_answer(f, seed):
    """No class is preferred, above all not the first where votes are tied."""
    for classes, symmetric, smoothing in _settings(seed):
        votes = _votes(seed, classes=classes)
        names = torch.tensor([*range(1, classes), 0])
        renamed = torch.where(votes >= 0, names[votes.clamp_min(0)], votes)
        first, second = (
            f.dawid_skene(v, classes=classes, symmetric=symmetric, smoothing=smoothing, **STEPS)
            for v in (votes, renamed)
        )
        assert_close(second.posterior[:, names], first.posterior.tolist())
        assert_close(second.confusion[:, names][:, :, names], first.confusion.tolist())
        before, after = (f.majority_vote(v, classes=classes) for v in (votes, renamed))
        assert_close(after[:, names], before.tolist())


def turning_a_pair_round_turns_its_label_round_and_no_other(f, seed):
    turned = torch.rand(R, generator=torch.Generator().manual_seed(seed + 5)) < 0.3
    votes = _votes(seed, classes=2)
    other = torch.where(turned[:, None] & (votes >= 0), 1 - votes, votes)
    first, second = (f.dawid_skene(v, classes=2, symmetric=True, **STEPS) for v in (votes, other))
    assert_close(second.posterior, torch.where(turned[:, None], first.posterior.flip(1), first.posterior).tolist())
    assert_close(second.confusion, first.confusion.tolist())


def the_objective_never_falls(f, seed):
    for classes, symmetric, _ in _settings(seed):
        for smoothing in (0.0, 0.3, 2.0):
            votes = _votes(seed, classes=classes, skill=0.4)
            found = f.dawid_skene(
                votes, classes=classes, symmetric=symmetric, smoothing=smoothing, tolerance=0.0, max_iterations=60
            )
            gains = found.objective.diff()
            assert len(gains) > 3
            assert (gains > -QUOTED["atol"]).all()


def the_label_is_bayes_rule_with_the_parameters(f, seed):
    for classes, symmetric, smoothing in _settings(seed):
        votes = _votes(seed, classes=classes)
        found = f.dawid_skene(votes, classes=classes, symmetric=symmetric, smoothing=smoothing, **STEPS)
        joint = found.prior.repeat(R, 1)
        for s in range(S):
            on = votes[:, s] >= 0
            joint[on] = joint[on] * found.confusion[s][:, votes[on, s]].T
        assert_close(found.posterior, (joint / joint.sum(dim=1, keepdim=True)).tolist())
        assert_close(found.confusion.sum(dim=2), torch.ones(S, classes).tolist())


def when_it_settles_accuracies_are_the_smoothed_shares_of_right_votes(f, seed):
    for smoothing in (0.5, 1.0):
        votes = _votes(seed, classes=2)
        found = f.dawid_skene(votes, classes=2, symmetric=True, smoothing=smoothing, **SETTLED)
        cast = (votes >= 0).sum(dim=0)
        right = f.vote_accuracy(votes, found.posterior) * cast
        assert_quoted(found.confusion[:, 0, 0], ((right + smoothing) / (cast + 2 * smoothing)).tolist())
        assert_quoted(found.confusion[:, 1, 1], found.confusion[:, 0, 0].tolist())


def one_who_is_always_right_decides(f, seed):
    """Also against all others together, and classes keep the names that most votes give them."""
    generator = torch.Generator().manual_seed(seed)
    for classes, symmetric in ((2, True), (2, False), (N, False)):
        truth = torch.randint(0, classes, (2000,), generator=generator)
        votes = _votes(seed, classes=classes, records=2000, skill=0.0)
        for s in range(S):
            wrong = torch.rand(2000, generator=generator) < 0.33
            votes[:, s] = torch.where(wrong, (truth + 1) % classes, truth)
        votes[:, 2] = truth
        found = f.dawid_skene(votes, classes=classes, symmetric=symmetric)
        assert found.converged
        assert (found.posterior.argmax(dim=1) == truth).all()
        outvoted = f.majority_vote(votes, classes=classes).argmax(dim=1) != truth
        assert outvoted.sum() > 10
        assert f.vote_accuracy(votes, found.posterior).argmax() == 2
        assert f.vote_accuracy(votes, one_hot(truth, classes))[2] == 1.0


def sources_of_equal_accuracy_decide_by_majority(f, seed):
    """Every pattern of votes with all its permutations over the sources: no source differs from another."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(-1, 2, (15, 4), generator=generator)
    patterns = torch.cat([patterns, torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]])])
    votes = torch.cat([patterns[:, list(order)] for order in itertools.permutations(range(4))])
    found = f.dawid_skene(votes, classes=2, symmetric=True)
    shares = f.majority_vote(votes, classes=2)
    assert_close(found.confusion[:, 0, 0] - found.confusion[0, 0, 0], [0.0] * 4)
    assert found.confusion[0, 0, 0] > 0.5
    assert ((found.posterior - 0.5).sign().mul((found.posterior - 0.5).abs() > 1e-9) == (shares - 0.5).sign()).all()


def truth_gives_the_share_of_right_votes(f, seed):
    votes, truth = _votes(seed), torch.randint(0, N, (R,), generator=torch.Generator().manual_seed(seed + 1))
    found = f.vote_accuracy(votes, one_hot(truth, N))
    for s in range(S):
        on = votes[:, s] >= 0
        assert_close(found[s], float((votes[on, s] == truth[on]).double().mean()))


def conflict_is_part_of_overlap_and_overlap_of_coverage(f, seed):
    votes = _votes(seed)
    shares = f.vote_shares(votes)
    assert (shares.conflict <= shares.overlap).all()
    assert (shares.overlap <= shares.coverage).all()
    assert_close(shares.coverage, (votes >= 0).double().mean(dim=0).tolist())
    alone = votes.clone()
    alone[:, 1:] = -1
    assert_close(f.vote_shares(alone).overlap, [0.0] * S)
    same = torch.where(votes >= 0, 1, -1)
    assert_close(f.vote_shares(same).conflict, [0.0] * S)
    assert_close(f.vote_shares(same).overlap, shares.overlap.tolist())
    pair = torch.tensor([[0, 1, -1], [0, 0, 1]])
    assert_close(f.vote_shares(pair).conflict, [1.0, 1.0, 0.5])
