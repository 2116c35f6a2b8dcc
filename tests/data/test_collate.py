"""Length limits, padding and collators."""

from __future__ import annotations

import pytest
import torch

from rlhf.data.collate import (
    IGNORED_LABEL,
    DemonstrationCollator,
    LengthReport,
    PairCollator,
    fit_pair_to_length,
    fit_to_length,
    loss_spans,
    mean_reply_tokens,
    pad_left,
    pad_right,
)
from rlhf.data.render import Rendered
from rlhf.errors import DataError, ShapeError

ROWS = [[5], [6, 7, 0], [8, 9]]


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_padding_keeps_the_tokens_and_the_mask_counts_them(pad) -> None:  # type: ignore[no-untyped-def]
    """The pad id 0 is also a real token of the second row."""
    ids, mask = pad(ROWS, 0)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert [i[m].tolist() for i, m in zip(ids, mask, strict=True)] == ROWS
    assert ids[~mask].eq(0).all()


def test_a_reply_is_a_run_of_tokens_with_loss() -> None:
    rows = [Rendered([0] * len(mask), [c == "x" for c in mask]) for mask in ("..xxx..x", "xx", "....", ".x")]
    assert [loss_spans(row) for row in rows] == [2, 1, 0, 1]
    assert mean_reply_tokens(rows) == (3 + 1 + 2 + 1) / 4
    assert mean_reply_tokens(rows[2:3]) is None


def test_sides() -> None:
    assert pad_left([[5], [6, 7]], 0)[1].tolist() == [[False, True], [True, True]]
    assert pad_right([[5], [6, 7]], 0)[1].tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_empty_rows(rows: list[list[int]]) -> None:
    with pytest.raises(ShapeError):
        pad_left(rows, 0)


def test_pairs() -> None:
    features = [
        {"chosen_ids": [1, 2], "rejected_ids": [3], "preference": 1.0},
        {"chosen_ids": [4], "rejected_ids": [5, 6, 7], "preference": 0.5},
    ]
    batch = PairCollator(0)(features)
    assert set(batch) == {"input_ids", "attention_mask", "preference"}
    assert batch["input_ids"].tolist() == [[1, 2, 0], [4, 0, 0], [3, 0, 0], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]
    assert batch["preference"].tolist() == [1.0, 0.5]
    assert batch["preference"].dtype == torch.float32
    assert PairCollator(0)([f | {"margin": 2} for f in features])["margin"].tolist() == [2.0, 2.0]
    assert "margin" not in PairCollator(0)([f | {"margin": None} for f in features])
    with pytest.raises(ShapeError, match="1 of 2"):
        PairCollator(0)([features[0] | {"margin": 2.0}, features[1]])


def test_demonstrations() -> None:
    batch = DemonstrationCollator(9)(
        [{"input_ids": [1, 9], "labels": [IGNORED_LABEL, 9]}, {"input_ids": [3], "labels": [3]}]
    )
    assert batch["input_ids"].tolist() == [[1, 9], [3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[IGNORED_LABEL, 9], [3, IGNORED_LABEL]]
    with pytest.raises(ShapeError, match="1 labels for 2 ids"):
        DemonstrationCollator(9)([{"input_ids": [1, 2], "labels": [1]}])


def rendered(prompt: int, response: int, first: int = 0) -> Rendered:
    return Rendered(list(range(first, first + prompt + response)), [False] * prompt + [True] * response)


def test_fit_counts_what_it_does() -> None:
    report = LengthReport()
    assert fit_to_length(rendered(2, 3), 5, "truncate", report) == rendered(2, 3)
    assert fit_to_length(rendered(2, 6), 5, "truncate", report) == rendered(2, 3)
    assert fit_to_length(rendered(5, 1), 5, "truncate", report) is None  # no loss left
    assert fit_to_length(rendered(2, 4), 5, "drop", report) is None
    assert (report.total, report.too_long, report.truncated, report.dropped, report.longest) == (4, 3, 1, 2, 8)
    assert report.text(5) == "3 of 4 records (75.0 %) are longer than 5 tokens (longest 8): 1 truncated, 2 dropped"


def test_fit_error_says_where_and_what_to_do() -> None:
    with pytest.raises(
        DataError, match=r"x.jsonl row 7: longer than max_length 5 \(found: 6 tokens\); raise data.max_length"
    ):
        fit_to_length(rendered(2, 4), 5, "error", where="x.jsonl row 7")


def test_fit_pair_is_one_record() -> None:
    report = LengthReport()
    assert fit_pair_to_length(rendered(1, 2), rendered(1, 3, first=50), 3, "drop", report) is None
    cut = fit_pair_to_length(rendered(1, 2), rendered(1, 3, first=50), 3, "truncate", report)
    assert cut == (rendered(1, 2), rendered(1, 2, first=50))
    assert fit_pair_to_length(rendered(1, 3), rendered(1, 4), 3, "truncate", report) is None  # now equal
    assert (report.total, report.too_long, report.truncated, report.dropped) == (3, 3, 1, 2)
