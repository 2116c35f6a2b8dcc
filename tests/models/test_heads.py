"""Scores and values: where they are read, in which precision, and what a new head looks like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.sections import Peft
from rlhf.data.collate import pad_left, pad_right
from rlhf.errors import CheckpointError
from rlhf.models import heads, reward_models
from rlhf.models.adapters import add_adapter
from rlhf.models.heads import (
    Float32Head,
    last_index,
    position_ids,
    score_head,
    sequence_outputs,
    sequence_scores,
    token_scores,
    trunk_owner,
)
from rlhf.models.load import backbone
from rlhf.models.packed_batch import PackedBatch
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import load_scorer, new_reward_model
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import QUANTUM, assert_close, distance

PAD, END = tiny.renderer().pad_id, tiny.renderer().end_id


def scores_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Scores of every token, [B, T]."""
    return token_scores(model, PackedBatch.for_model(trunk_owner(model), ids, mask))


@pytest.fixture
def model(reward_folder: str) -> Any:
    return load_scorer(tiny.source(reward_folder)).eval()


def alone(model: Any, rows: list[list[int]]) -> Tensor:
    """Each row's score in a batch of its own, without padding."""
    scores = []
    for row in rows:
        ids = torch.tensor([row])
        scores.append(sequence_scores(model, ids, torch.ones_like(ids, dtype=torch.bool)))
    return torch.cat(scores).detach()


ROWS = [*tiny.rows(3, [3, 17, 9, 1])]
WITH_PADS = [[PAD, *ROWS[0], PAD, 50, PAD], [*ROWS[1], END], [60, PAD, PAD, 61, END], [PAD]]
"""Content in which the pad id is an ordinary token: in the middle, at the end, alone."""


@pytest.mark.parametrize("rows", [ROWS, WITH_PADS], ids=["plain", "pad id in content"])
@pytest.mark.parametrize("pad", [pad_left, pad_right])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_a_score_does_not_depend_on_padding_or_neighbours(model: Any, rows: Any, pad: Any, extra: int) -> None:
    ids, mask = pad([*rows, [20] * (max(map(len, rows)) + extra)], PAD)
    assert_close(sequence_scores(model, ids, mask)[: len(rows)], alone(model, rows).tolist())


@pytest.mark.parametrize("fill", [PAD, END, 0, 77])
def test_what_stands_on_padding_does_not_matter(model: Any, fill: int) -> None:
    ids, mask = pad_right(ROWS, fill)
    assert_close(sequence_scores(model, ids, mask), alone(model, ROWS).tolist())


def test_the_padding_check_sees_pooling_by_token_id(model: Any) -> None:
    """The library's own classifier looks for the last token that is no pad, and so misreads these rows."""
    ids, mask = pad_right(WITH_PADS[:3], PAD)
    theirs = model(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
    wrong = (theirs - alone(model, WITH_PADS[:3])).abs() > 0.01
    assert wrong.tolist() == [True, False, False]


def test_the_padding_check_sees_a_mask_or_positions_that_are_off(model: Any) -> None:
    ids, mask = pad_left(ROWS[:2], PAD)
    right = alone(model, ROWS[:2])
    assert (sequence_scores(model, ids, torch.ones_like(mask))[0] - right[0]).abs() > 0.01
    assert (sequence_scores(model, ids, mask.roll(-1, 1))[0] - right[0]).abs() > 0.01


def test_values_at_every_position_do_not_depend_on_padding(model: Any) -> None:
    row = ROWS[1]
    whole = scores_of(model, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))[0]
    for pad, span in ((pad_left, slice(4, None)), (pad_right, slice(0, len(row)))):
        ids, mask = pad([row, [20] * (len(row) + 4)], PAD)
        assert_close(scores_of(model, ids, mask)[0, span], whole.tolist())


def test_a_score_sees_prompt_and_response(model: Any) -> None:
    first, second = tiny.rows(8, [6, 6])
    scores = alone(model, [first + second, second + first, first, [9, *second]])
    assert len({round(s, 3) for s in scores.tolist()}) == 4


def test_positions_and_last_index_by_hand() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2], [0, 0, 0, 0]]
    assert last_index(mask).tolist() == [3, 2, 1]


# A new reward model


def make(folder: str, *, seed: int = 1, dtype: str = "float32", peft: Peft | None = None) -> Any:
    return new_reward_model(
        tiny.source(folder, dtype), peft or Peft(), pad_id=PAD, vocab_size=len(tiny.tokenizer()), seed=seed
    )


def test_it_starts_with_the_trunk_of_the_sft_model_bit_for_bit(sft_folder: str, adapter_folder: str) -> None:
    for folder in (sft_folder, adapter_folder):
        trunk, expected = backbone(make(folder)), backbone(load_causal(tiny.source(folder)))
        ours, theirs = trunk.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("width", [tiny.HIDDEN, 4096])
def test_its_head_is_float32_seeded_and_of_the_stated_size(width: int, sft_folder: str) -> None:
    from rlhf.models.reward_models import _init_head

    model = make(sft_folder)
    assert model.score.weight.dtype == torch.float32
    assert model.score.bias is None
    assert torch.equal(model.score.weight, make(sft_folder).score.weight)
    assert not torch.equal(model.score.weight, make(sft_folder, seed=2).score.weight)
    head = Float32Head(width, 1)
    _init_head(head, 1)
    wanted, slack = (width + 1) ** -0.5, 4 / (2 * width) ** 0.5  # four standard errors of a standard deviation
    assert abs(float(head.weight.detach().std()) / wanted - 1) < slack
    assert head.bias.item() == 0.0


def test_its_trunk_and_head_are_trained(sft_folder: str) -> None:
    assert all(p.requires_grad for p in make(sft_folder).parameters())


# Saving and loading


def test_a_saved_reward_model_loads_plainly_and_scores_the_same(reward_folder: str, model: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    ids, mask = pad_right([[*row, END] for row in ROWS], PAD)
    theirs = plain(input_ids=ids, attention_mask=mask.long()).logits
    assert theirs.shape == (4, 1)
    assert_close(sequence_scores(model, ids, mask), theirs[:, 0].tolist())


@pytest.mark.parametrize("peft", [Peft(), tiny.LORA], ids=["full", "LoRA"])
def test_the_head_stays_float32_on_a_bfloat16_trunk(peft: Peft, sft_folder: str, tmp_path: Path) -> None:
    made = make(sft_folder, dtype="bfloat16", peft=peft).eval()
    made.save_pretrained(str(tmp_path / "saved"))
    loaded = load_scorer(tiny.source(tmp_path / "saved", "bfloat16")).eval()
    ids, mask = pad_right(tiny.rows(4, [30] * 64), PAD)
    for model in (made, loaded):
        assert next(backbone(model).parameters()).dtype == torch.bfloat16
        assert next(score_head(model).parameters()).dtype == torch.float32
        scores = sequence_scores(model, ids, mask)
        assert scores.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert quantised(scores) < 0.2 > quantised(sequence_scores(model, ids, mask))
    assert torch.equal(sequence_scores(made, ids, mask), sequence_scores(loaded, ids, mask))


def quantised(scores: Tensor) -> float:
    """Share of numbers that bfloat16 represents exactly."""
    return float((scores == scores.bfloat16().float()).float().mean())


def test_the_check_of_the_head_sees_bfloat16(sft_folder: str) -> None:
    model = make(sft_folder, dtype="bfloat16").eval()
    ids, mask = pad_right(tiny.rows(4, [30] * 64), PAD)
    exact = sequence_scores(model, ids, mask)
    model.score = torch.nn.Linear(tiny.HIDDEN, 1, bias=False).bfloat16()
    assert quantised(sequence_scores(model, ids, mask)) == 1.0
    assert distance(exact.bfloat16(), exact) > QUANTUM


def test_scorers_that_are_none_are_refused(sft_folder: str, reward_folder: str, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(CheckpointError, match=r"one output|not a reward model"):
        load_scorer(tiny.source(sft_folder))
    shutil.copytree(reward_folder, tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    config["id2label"] = {"0": "no", "1": "yes"}
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_scorer(tiny.source(tmp_path / "two"))


def test_a_causal_model_with_one_label_is_no_reward_model_either(sft_folder: str, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(sft_folder, tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config | {"id2label": {"0": "x"}}))
    with pytest.raises(CheckpointError, match="random"):
        load_scorer(tiny.source(tmp_path / "lm"))


def test_a_rescaled_head_gives_scores_of_the_other_scale(reward_folder: str) -> None:
    model, ids = load_scorer(tiny.source(reward_folder)).eval(), torch.tensor([[20, 30, 40]])
    mask = torch.ones_like(ids).bool()
    with torch.no_grad():
        before = sequence_scores(model, ids, mask)
        heads.rescale_head(model, 4.0)
        assert_close(sequence_scores(model, ids, mask), (before / 4.0).tolist())


def test_a_value_model_without_a_reward_model_starts_at_0(sft_folder: str, adapter_folder: str) -> None:
    ids = torch.tensor([[20, 30, 40]])
    for folder, peft in ((sft_folder, Peft()), (adapter_folder, tiny.LORA)):
        model = reward_models.new_value_model(
            tiny.source(folder), peft, pad_id=tiny.renderer().pad_id, vocab_size=len(tiny.tokenizer()), seed=1
        )
        assert not scores_of(model, ids, torch.ones_like(ids).bool()).any()
        assert any(p.requires_grad for p in heads.score_head(model).parameters())


def test_an_adapter_over_a_causal_model_can_be_a_classifier(
    sft_folder: str, adapter_folder: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(sft_folder, num_labels=3, pad_token_id=1)
    model = shake(add_adapter(base, tiny.LORA, "SEQ_CLS")).eval()
    model.save_pretrained(str(tmp_path / "classifier"))
    loaded = reward_models.load_classifier(tiny.source(tmp_path / "classifier")).eval()
    assert loaded.config.num_labels == 3
    ids = torch.tensor([[20, 30, 40]])
    with torch.no_grad():
        assert_close(sequence_outputs(loaded, ids, torch.ones_like(ids).bool()), model(ids).logits.tolist())
    with pytest.raises(CheckpointError, match="3 labels"):
        load_scorer(tiny.source(tmp_path / "classifier"))
    with pytest.raises(CheckpointError, match="no score head"):
        reward_models.load_classifier(tiny.source(adapter_folder))
