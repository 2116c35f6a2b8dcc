"""Tests of the order of rows: it depends on the given integers only, not on earlier random numbers."""

from __future__ import annotations

import torch

from rlhf.trainers.sample_order import cyclic_indices, shuffled_indices


def test_an_order_is_a_permutation_that_follows_from_its_numbers() -> None:
    order = shuffled_indices(50, 1, 2).tolist()
    assert sorted(order) == list(range(50))
    torch.manual_seed(7)
    torch.rand(3)
    assert shuffled_indices(50, 1, 2).tolist() == order
    others = [shuffled_indices(50, *parts).tolist() for parts in ((2, 1), (1, 3), (1,), (1, 2, 0))]
    assert all(other != order for other in others)


def test_drawing_an_order_leaves_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    shuffled_indices(50, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_endless_passes_can_be_continued_at_any_position() -> None:
    """Every pass has each row once, passes differ, and any split of the sequence gives the same rows."""
    whole = cyclic_indices(10, 0, 30, 5)
    assert all(sorted(whole[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert whole[:10] != whole[10:20]
    assert cyclic_indices(10, 0, 7, 5) + cyclic_indices(10, 7, 16, 5) + cyclic_indices(10, 23, 7, 5) == whole
