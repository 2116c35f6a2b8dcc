"""Rollout and Experience: what `validate` rejects, and that selecting and merging rows lose nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf.errors import ShapeError
from rlhf.rollout.types import Rollout, merge_rollouts
from tests.models import tiny

PAD = tiny.renderer().pad_id


@pytest.fixture
def rollout() -> Rollout:
    return tiny.rollout(1, [3, 8, 1, 5], [4, 2, 9, 1])


def same(a: Rollout, b: Rollout) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


HOLE = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 0, 0]]).bool().expand(4, -1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"index": torch.arange(3)}, "rows"),
        ({"prompt_mask": torch.ones(4, 7, dtype=torch.bool)}, "shape"),
        ({"response_mask": torch.ones(4, 8, dtype=torch.bool)}, "shape"),
        ({"response_mask": torch.ones(4, 9, dtype=torch.long)}, "bool"),
        ({"finished": torch.ones(4)}, "bool"),
        ({"response_mask": torch.zeros(4, 9, dtype=torch.bool)}, "without a token"),
        ({"response_mask": HOLE}, "prefix"),
    ],
)
def test_what_does_not_belong_together_is_refused(rollout: Rollout, change: dict[str, Any], words: str) -> None:
    rollout.validate()
    with pytest.raises(ShapeError, match=words):
        replace(rollout, **change).validate()


def test_ids_and_mask_are_prompt_then_response(rollout: Rollout) -> None:
    assert rollout.ids.shape == rollout.mask.shape == (4, 8 + 9)
    assert rollout.mask.sum(dim=1).tolist() == [7, 10, 10, 6]
    assert rollout.response_length.tolist() == [4, 2, 9, 1]


def test_selecting_cuts_padding_that_no_row_needs(rollout: Rollout) -> None:
    part = rollout.select(torch.tensor([3, 0]))
    part.validate()
    assert part.prompt_ids.shape == (2, 5)
    assert part.response_ids.shape == (2, 4)
    assert part.index.tolist() == [3, 0]
    assert part.ids[part.mask].tolist() == [
        *rollout.ids[3][rollout.mask[3]].tolist(),
        *rollout.ids[0][rollout.mask[0]].tolist(),
    ]


@pytest.mark.parametrize("cuts", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[2], [3, 1, 0]]])
def test_what_is_cut_apart_can_be_put_together_again(rollout: Rollout, cuts: list[list[int]]) -> None:
    parts = [rollout.select(torch.tensor(rows)) for rows in cuts]
    merged = merge_rollouts(parts, PAD)
    merged.validate()
    assert same(merged.select(merged.index.argsort()), rollout)


def test_wider_padding_is_cut_off_by_selecting_everything(rollout: Rollout) -> None:
    wide = tiny.widen(rollout, 3, 2, fill=PAD)
    wide.validate()
    assert not same(wide, rollout)
    assert same(wide.select(torch.arange(4)), rollout)
