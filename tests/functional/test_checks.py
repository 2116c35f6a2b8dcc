"""Shapes, masks and dtypes are checked before arithmetic, and the message says what was found."""

from __future__ import annotations

import pytest
import torch

from rlhf.errors import ShapeError
from rlhf.functional.checks import as_float, bool_mask, response_prefix, same_shape


def test_nothing_is_broadcast() -> None:
    same_shape("f", a=torch.zeros(2, 3), b=torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"^f: shapes must be equal \(found: a \[2, 3\], b \[3\]\)"):
        same_shape("f", a=torch.zeros(2, 3), b=torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_mask_is_bool(dtype: torch.dtype) -> None:
    bool_mask("f", torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=rf"^f: mask must be bool .*found: {dtype}"):
        bool_mask("f", torch.ones(2, dtype=dtype))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([1, 0], r"must be \[B, R\] \(found: \[2\]\)"),
        ([[1, 0], [0, 0]], r"no real token \(found: rows \[1\]\)"),
        ([[1, 0, 1], [1, 1, 0], [0, 1, 1]], r"prefix of each row \(found: rows \[0, 2\]\)"),
    ],
)
def test_a_response_is_a_prefix_of_its_row(rows: list[int], says: str) -> None:
    response_prefix("f", torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.bool))
    with pytest.raises(ShapeError, match=says):
        response_prefix("f", torch.tensor(rows, dtype=torch.bool))


def test_numbers_are_computed_in_at_least_float32() -> None:
    kept = torch.ones(1), torch.ones(1, dtype=torch.float64)
    assert all(as_float(x) is x for x in kept)
    raised = torch.bfloat16, torch.float16, torch.int64, torch.bool
    assert all(as_float(torch.ones(1, dtype=dtype)).dtype == torch.float32 for dtype in raised)
