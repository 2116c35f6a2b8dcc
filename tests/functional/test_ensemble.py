"""The combination of the scores of an ensemble."""

import pytest
import torch

from rlhf import functional as F
from tests import oracles
from tests.tolerances import assert_close, assert_quoted

KINDS = ("mean", "worst", "uncertainty")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_follows_the_equation(kind, dtype):
    scores = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found = F.ensemble_score(scores, kind=kind, penalty=0.7)
    assert found.dtype == dtype
    assert_close(found, oracles.ensemble_score(scores, kind, 0.7))


def test_it_gives_the_tabulated_numbers():
    scores = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    found = torch.cat([F.ensemble_score(scores, kind=kind, penalty=0.5) for kind in KINDS])
    assert_quoted(found, [2.3333, 1.0, 1.5556], coarsely=True)


@pytest.mark.parametrize("wrong", [{"kind": "median"}, {"kind": "uncertainty", "penalty": -1.0}])
def test_it_refuses_other_kinds_and_a_negative_penalty(wrong):
    with pytest.raises(ValueError, match="ensemble_score"):
        F.ensemble_score(torch.ones(2, 3), **wrong)
    with pytest.raises(ValueError, match="M >= 1"):
        F.ensemble_score(torch.ones(0, 3), kind="mean")
