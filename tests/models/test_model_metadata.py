"""What a stage tells the next one about text and tokens, and that a difference is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.render import Renderer
from rlhf.errors import CheckpointError
from rlhf.models import model_metadata


@pytest.fixture(scope="module")
def identity(tiny_tokenizer: Any) -> dict[str, Any]:
    """Of the tiny tokenizer."""
    return Renderer(tiny_tokenizer).identity()


def test_a_record_survives_writing_and_reading(identity: dict[str, Any], tmp_path: Path) -> None:
    made = model_metadata.make_handover("reward", identity, score_mean=0.5, score_std=2.0, head_dtype="float32")
    made.write(tmp_path)
    assert model_metadata.read_handover(tmp_path) == made
    assert (made.stage, made.score_mean, made.vocab_size) == ("reward", 0.5, identity["vocab_size"])
    model_metadata.verify_handover(identity, model_metadata.read_handover(tmp_path), where="x", role="the reward model")


def test_a_classifiers_labels_keep_their_order(identity: dict[str, Any], tmp_path: Path) -> None:
    model_metadata.make_handover("classify", identity, labels=["short", "kind"], multi_label=False).write(tmp_path)
    record = model_metadata.read_handover(tmp_path)
    assert record is not None
    assert (record.labels, record.multi_label) == (["short", "kind"], False)


def test_a_record_from_before_there_were_labels_is_read(identity: dict[str, Any], tmp_path: Path) -> None:
    model_metadata.make_handover("reward", identity, score_mean=0.0, score_std=1.0).write(tmp_path)
    path = tmp_path / model_metadata.HANDOVER_FILE
    old = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("labels", "multi_label")}
    path.write_text(json.dumps(old))
    record = model_metadata.read_handover(tmp_path)
    assert record is not None
    assert (record.labels, record.multi_label, record.score_std) == (None, None, 1.0)


def test_a_record_under_the_old_name_of_multi_label_is_read(identity: dict[str, Any], tmp_path: Path) -> None:
    made = model_metadata.make_handover("classify", identity, labels=["short", "kind"], multi_label=True)
    made.write(tmp_path)
    path = tmp_path / model_metadata.HANDOVER_FILE
    path.write_text(path.read_text(encoding="utf-8").replace('"multi_label"', '"several"'), encoding="utf-8")
    assert model_metadata.read_handover(tmp_path) == made


def test_a_model_that_no_stage_of_ours_made_passes(identity: dict[str, Any], tmp_path: Path) -> None:
    assert model_metadata.read_handover(tmp_path) is None
    model_metadata.verify_handover(identity, None, where="x", role="the reward model")


@pytest.mark.parametrize("name", list(model_metadata.MUST_AGREE))
def test_each_difference_is_named_with_both_values(identity: dict[str, Any], name: str) -> None:
    other = [7, 7] if name == "tail_ids" else "other" if name.endswith("sha256") else 7
    theirs = model_metadata.make_handover("reward", identity | {name: other})
    with pytest.raises(CheckpointError) as caught:
        model_metadata.verify_handover(identity, theirs, where="runs/rm", role="the reward model")
    message = str(caught.value)
    assert message.startswith("runs/rm: the reward model was trained with other text-to-token settings")
    assert f"{model_metadata.MUST_AGREE[name]} ({name} {other!r} there, {identity[name]!r} here)" in message
    assert sum(f"{words} (" in message for words in model_metadata.MUST_AGREE.values()) == 1


def test_all_differences_at_once(identity: dict[str, Any]) -> None:
    theirs = model_metadata.make_handover("reward", identity | {"end_id": 7, "pad_id": 8})
    with pytest.raises(CheckpointError, match=r"the end token .*; the pad token"):
        model_metadata.verify_handover(identity, theirs, where="x", role="this model")


@pytest.mark.parametrize(
    ("text", "message"), [('{"stage"', "damaged JSON"), ('{"stage": "sft"}', "does not have the fields")]
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / model_metadata.HANDOVER_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        model_metadata.read_handover(tmp_path)
