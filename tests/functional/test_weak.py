"""The label models: majority vote, Dawid-Skene, and statistics of the sources."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from rlhf import functional as F
from rlhf.errors import ShapeError
from tests import oracles
from tests.laws.weak_laws import _votes
from tests.tolerances import assert_close

SETTINGS = [(2, True, 1.0), (2, True, 0.0), (2, False, 1.0), (3, False, 0.3), (4, False, 0.0), (4, True, 0.5)]


@pytest.mark.parametrize(("classes", "symmetric", "smoothing"), SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("iterations", [1, 2, 15])
def test_em_follows_the_equations(iterations, seed, classes, symmetric, smoothing):
    votes = _votes(seed, classes=classes, records=40)
    found = F.dawid_skene(
        votes, classes=classes, symmetric=symmetric, smoothing=smoothing, tolerance=0.0, max_iterations=iterations
    )
    posterior, confusion, prior, objective = oracles.dawid_skene(votes, classes, symmetric, smoothing, iterations)
    assert_close(found.posterior, posterior.tolist())
    assert_close(found.confusion, confusion.tolist())
    assert_close(found.prior, prior.tolist())
    assert_close(found.objective, objective)
    assert found.posterior.dtype == torch.float64


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counts_follow_their_equations(seed):
    votes = _votes(seed)
    labels = torch.randn(len(votes), 3, generator=torch.Generator().manual_seed(seed)).double().softmax(dim=1)
    assert_close(F.majority_vote(votes, classes=3), oracles.majority_vote(votes, 3).tolist())
    assert_close(F.vote_accuracy(votes, labels), oracles.vote_accuracy(votes, labels).tolist())
    assert_close(torch.stack(F.vote_shares(votes), dim=1), oracles.vote_shares(votes))


def simulated(seed, skills, records=1500, coverage=0.6):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 2, (records,), generator=generator)
    right = torch.rand(records, len(skills), generator=generator, dtype=torch.float64) < torch.tensor(skills).double()
    votes = torch.where(right, truth[:, None], 1 - truth[:, None])
    return votes.masked_fill(torch.rand(records, len(skills), generator=generator) > coverage, -1), truth


def share_right(labels, truth):
    tied = (labels - 0.5).abs().amax(dim=1) < 1e-9
    return float(torch.where(tied, 0.5, (labels.argmax(dim=1) == truth).double()).mean())


@pytest.mark.parametrize("seed", [0, 3])
def test_em_finds_who_is_good_and_beats_the_majority(seed):
    """The six annotators of the demo's experiment; records as many as make chance small."""
    votes, truth = simulated(seed, [0.92, 0.75, 0.62, 0.58, 0.55, 0.55], records=60000)
    found = F.dawid_skene(votes, classes=2, symmetric=True)
    assert found.converged
    true = F.vote_accuracy(votes, one_hot(truth, 2))
    assert (F.vote_accuracy(votes, found.posterior) - true).abs().max() < 0.03
    majority, weighed = (share_right(q, truth) for q in (F.majority_vote(votes, classes=2), found.posterior))
    assert weighed - majority > 0.06


def test_a_label_says_how_sure_it_is():
    """Among records with a label near p, the share of the class is near p."""
    votes, truth = simulated(0, [0.9, 0.75, 0.65, 0.6, 0.6], records=40000)
    p = F.dawid_skene(votes, classes=2, symmetric=True).posterior[:, 0]
    for low in (0.1, 0.3, 0.5, 0.7):
        near = (p >= low) & (p < low + 0.2)
        assert near.sum() > 500
        assert abs(float((truth[near] == 0).double().mean() - p[near].mean())) < 0.04


def test_a_matrix_shows_a_source_that_confuses_two_classes_and_one_accuracy_does_not():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (4000,), generator=generator)
    guess = torch.randint(0, 3, (4000, 4), generator=generator)
    votes = torch.where(torch.rand(4000, 4, generator=generator) < 0.7, truth[:, None], guess)
    votes[:, 0] = torch.where(truth == 1, 2, truth)  # says 2 where it is 1, and otherwise the truth
    confusion = F.dawid_skene(votes, classes=3).confusion
    assert_close((confusion[0, 1, 2] > 0.97).double(), 1.0)
    assert confusion[0, 0, 0] > 0.97
    one = F.dawid_skene(votes, classes=3, symmetric=True).confusion
    assert_close(one[0, 1, 0], float(one[0, 1, 2]))


def test_one_sided_sources_say_nothing_under_a_matrix_and_something_under_one_accuracy():
    votes = torch.tensor([[0, -1, 1], [0, -1, -1], [-1, 0, 1], [0, 0, -1], [-1, -1, 1], [0, 0, 1]] * 10)
    matrix = F.dawid_skene(votes, classes=2, smoothing=0.0)
    assert_close(matrix.confusion[0], [[1.0, 0.0], [1.0, 0.0]])
    one = F.dawid_skene(votes, classes=2, symmetric=True)
    assert one.posterior[3, 0] > 0.9
    assert one.posterior[4, 1] > 0.5 or one.confusion[2, 0, 0] < 0.5


def test_it_stops_at_the_tolerance_or_says_that_it_did_not():
    votes, _ = simulated(1, [0.9, 0.7, 0.6])
    short = F.dawid_skene(votes, classes=2, symmetric=True, max_iterations=3)
    assert (len(short.objective), short.converged) == (3, False)
    loose, tight = (F.dawid_skene(votes, classes=2, symmetric=True, tolerance=t) for t in (1e-4, 1e-9))
    assert loose.converged
    assert tight.converged
    assert len(loose.objective) < len(tight.objective)
    gains = tight.objective.diff() / int((votes >= 0).any(dim=1).sum())
    assert gains[-1] < 1e-9 <= gains[-2]


def test_smoothing_keeps_a_source_from_being_certain():
    votes = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 1]])
    assert F.dawid_skene(votes, classes=2, symmetric=True).confusion[0, 0, 0] < 0.9
    assert F.dawid_skene(votes, classes=2, symmetric=True, smoothing=0.0).confusion[0, 0, 0] > 0.99


def test_nothing_is_nothing():
    silent = torch.full((3, 2), -1)
    for symmetric in (True, False):
        found = F.dawid_skene(silent, classes=2, symmetric=symmetric, smoothing=0.0)
        assert_close(found.posterior, [[0.5, 0.5]] * 3)
        assert_close(found.confusion, [[[0.5, 0.5]] * 2] * 2)
    assert all(math.isnan(x) for x in F.vote_accuracy(silent, found.posterior).tolist())


GOOD = torch.tensor([[0, 1], [1, -1]])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: F.majority_vote(GOOD[0], classes=2), ShapeError, r"\[R, S\] int64"),
        (lambda: F.majority_vote(GOOD.double(), classes=2), ShapeError, "float64"),
        (lambda: F.majority_vote(GOOD, classes=1), ValueError, "at least 2 classes"),
        (lambda: F.dawid_skene(GOOD + 1, classes=2), ValueError, "-1 to 1 .found: 0 to 2"),
        (lambda: F.dawid_skene(GOOD - 1, classes=2), ValueError, "found: -2 to 0"),
        (lambda: F.dawid_skene(GOOD, classes=2, smoothing=-1.0), ValueError, "smoothing"),
        (lambda: F.dawid_skene(GOOD, classes=2, tolerance=-1.0), ValueError, "tolerance"),
        (lambda: F.dawid_skene(GOOD, classes=2, max_iterations=0), ValueError, "max_iterations"),
        (lambda: F.vote_accuracy(GOOD, torch.ones(3, 2)), ShapeError, "one a record"),
        (lambda: F.vote_accuracy(GOOD, torch.ones(2)), ShapeError, "one a record"),
        (lambda: F.vote_accuracy(GOOD + 1, torch.ones(2, 2)), ValueError, "a vote is"),
        (lambda: F.vote_shares(GOOD[:0]), ShapeError, "R >= 1"),
    ],
)
def test_it_refuses(call, error, says):
    with pytest.raises(error, match=says):
        call()
