"""A new classifier has the source's trunk and N outputs of the stated size, read at the last real token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.sections import Peft
from rlhf.data.collate import pad_left, pad_right
from rlhf.models.heads import Float32Head, head_dtype, score_head, sequence_outputs, token_outputs, trunk_owner
from rlhf.models.load import backbone
from rlhf.models.packed_batch import PackedBatch
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import _init_head, load_classifier, new_classifier, new_reward_model
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close

PAD, END = tiny.renderer().pad_id, tiny.renderer().end_id
FORMS = pytest.mark.parametrize("peft", [Peft(), tiny.LORA], ids=["full", "LoRA"])


def make(folder: str, *, outputs: int = 3, seed: int = 1, dtype: str = "float32", peft: Peft | None = None) -> Any:
    return new_classifier(
        tiny.source(folder, dtype),
        peft or Peft(),
        outputs=outputs,
        pad_id=PAD,
        vocab_size=len(tiny.tokenizer()),
        seed=seed,
    )


@pytest.mark.parametrize("outputs", [1, 2, 5])
@FORMS
def test_it_starts_with_the_trunk_of_its_source_bit_for_bit(
    outputs: int, peft: Peft, sft_folder: str, adapter_folder: str
) -> None:
    """The weights are equal if no adapter is added; the hidden states are equal in any case."""
    ids = torch.tensor(tiny.rows(6, [12, 12]))
    for folder in (sft_folder, adapter_folder):
        trunk, expected = backbone(make(folder, outputs=outputs, peft=peft)), backbone(load_causal(tiny.source(folder)))
        if not peft.enabled:
            ours, theirs = trunk.state_dict(), expected.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        with torch.no_grad():
            found, wanted = (m(input_ids=ids).last_hidden_state for m in (trunk, expected))
        if peft.enabled and folder == adapter_folder:  # the source's adapter is merged, ours is beside its base
            assert_close(found, wanted.tolist())
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("outputs", [1, 2, 5])
@FORMS
def test_it_has_as_many_outputs_as_labels(outputs: int, peft: Peft, sft_folder: str, adapter_folder: str) -> None:
    ids, mask = pad_right(tiny.rows(2, [7, 4, 9]), PAD)
    for folder in (sft_folder, adapter_folder):
        model = make(folder, outputs=outputs, peft=peft).eval()
        assert (model.config.num_labels, len(model.config.id2label)) == (outputs, outputs)
        with torch.no_grad():
            assert sequence_outputs(model, ids, mask).shape == (3, outputs)
            assert token_outputs(model, PackedBatch.for_model(trunk_owner(model), ids, mask)).shape == (3, 9, outputs)
        assert all(p.requires_grad for p in model.parameters()) is not peft.enabled
        trained = [name for name, p in model.named_parameters() if p.requires_grad and "score" in name]
        assert len(trained) == 1


def classifier(folder: str, place: Path, peft: Peft, outputs: int = 3) -> Any:
    """Save a trained classifier with named labels, and return its folder."""
    made = shake(make(folder, outputs=outputs, peft=peft))
    made.config.id2label = {i: f"trait {i}" for i in range(outputs)}
    made.config.problem_type = "multi_label_classification"
    tiny.save(made, place)
    return load_classifier(tiny.source(place))


@pytest.mark.parametrize("outputs", [1, 3, 64])
@FORMS
@pytest.mark.parametrize("before", [Peft(), tiny.LORA], ids=["of full", "of LoRA"])
def test_it_starts_from_another_classifier_with_a_head_of_its_own(
    before: Peft, peft: Peft, outputs: int, sft_folder: str, tmp_path: Path
) -> None:
    """Every tensor but the head is the source's, whatever the number of its labels.

    The head equals that of a new classifier.
    """
    old = classifier(sft_folder, tmp_path, before)
    new = make(str(tmp_path), outputs=outputs, peft=peft)
    trunk, expected = backbone(new), backbone(old)
    if not peft.enabled:
        ours, theirs = trunk.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert [n for n, _ in new.named_parameters() if not n.startswith("model.")] == ["score.weight"]
    ids = torch.tensor(tiny.rows(6, [12, 12]))
    with torch.no_grad():
        found, wanted = (m(input_ids=ids).last_hidden_state for m in (trunk, expected))
    assert_close(found, wanted.tolist())
    fresh = Float32Head(tiny.HIDDEN, outputs, bias=False)
    _init_head(fresh, 1)
    assert torch.equal(next(p for n, p in new.named_parameters() if "score" in n and p.requires_grad), fresh.weight)
    assert list(new.config.id2label.values()) == [f"LABEL_{i}" for i in range(outputs)]
    assert new.config.problem_type is None


def test_one_that_continues_the_adapter_of_a_classifier_trains_no_old_head(sft_folder: str, tmp_path: Path) -> None:
    """The number of labels is the same as before, so that the old head would fit."""
    old = classifier(sft_folder, tmp_path, tiny.LORA)
    head = score_head(make(str(tmp_path), peft=tiny.LORA))
    assert not any(torch.equal(p, old.score.weight) for p in head.parameters())


@pytest.mark.parametrize(("width", "outputs"), [(tiny.HIDDEN, 64), (4096, 8)])
def test_its_head_is_of_the_stated_size(width: int, outputs: int) -> None:
    """The tolerance is four standard errors, for the deviation over all outputs and for the mean of each."""
    head = Float32Head(width, outputs, bias=False)
    _init_head(head, 1)
    weight, wanted = head.weight.detach(), (width + 1) ** -0.5
    assert abs(float(weight.std()) / wanted - 1) < 4 / (2 * width * outputs) ** 0.5
    assert weight.mean(dim=1).abs().max() < 4.5 * wanted / width**0.5
    assert abs(float(weight.mean())) < 4 * wanted / (width * outputs) ** 0.5


def test_its_head_is_float32_seeded_without_bias_and_differs_between_labels(sft_folder: str) -> None:
    for dtype in ("float32", "bfloat16"):
        model = make(sft_folder, dtype=dtype)
        assert head_dtype(model) == "float32"
        assert model.score.bias is None
    weight = make(sft_folder, seed=1).score.weight
    assert torch.equal(weight, make(sft_folder, seed=1).score.weight)
    assert not torch.equal(weight, make(sft_folder, seed=2).score.weight)
    assert not torch.equal(weight[0], weight[1])


def test_a_reward_model_is_one_with_one_output(sft_folder: str) -> None:
    reward = new_reward_model(
        tiny.source(sft_folder), Peft(), pad_id=PAD, vocab_size=len(tiny.tokenizer()), seed=1
    ).state_dict()
    one = make(sft_folder, outputs=1).state_dict()
    assert reward.keys() == one.keys()
    assert all(torch.equal(reward[name], one[name]) for name in one)


ROWS = [*tiny.rows(3, [3, 17, 9, 1])]
WITH_PADS = [[PAD, *ROWS[0], PAD, 50, PAD], [*ROWS[1], END], [60, PAD, PAD, 61, END], [PAD]]


@pytest.mark.parametrize("rows", [ROWS, WITH_PADS], ids=["plain", "pad id in content"])
@pytest.mark.parametrize("pad", [pad_left, pad_right])
@pytest.mark.parametrize("extra", [0, 7])
def test_its_outputs_depend_neither_on_padding_nor_on_neighbours(
    rows: list[list[int]], pad: Any, extra: int, sft_folder: str
) -> None:
    model = shake(make(sft_folder)).eval()
    alone = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            alone.append(sequence_outputs(model, ids, torch.ones_like(ids).bool())[0])
        ids, mask = pad([*rows, [20] * (max(map(len, rows)) + extra)], PAD)
        assert_close(sequence_outputs(model, ids, mask)[: len(rows)], torch.stack(alone).tolist())
        ids = torch.where(mask, ids, 77)  # what stands on padding does not matter either
        assert_close(sequence_outputs(model, ids, mask)[: len(rows)], torch.stack(alone).tolist())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@FORMS
def test_the_outputs_survive_saving(peft: Peft, dtype: str, sft_folder: str, tmp_path: Path) -> None:
    """This includes a bfloat16 trunk, whose head stays float32."""
    ids, mask = pad_right(tiny.rows(4, [12, 5]), PAD)
    made = make(sft_folder, dtype=dtype, peft=peft)
    made = (shake(made) if dtype == "float32" else made).eval()  # merging a moved adapter rounds a bfloat16 trunk
    made.save_pretrained(str(tmp_path))
    loaded = load_classifier(tiny.source(tmp_path, dtype)).eval()
    assert head_dtype(loaded) == "float32"
    assert score_head(loaded).weight.shape == (3, tiny.HIDDEN)
    with torch.no_grad():
        before, after = (sequence_outputs(m, ids, mask) for m in (made, loaded))
    assert before.dtype == after.dtype == torch.float32
    assert_close(after, before.tolist())
