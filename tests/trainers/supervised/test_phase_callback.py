"""Tests of a Trainer with phases: which parameters change when, with which optimizer state, and after a resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rlhf.config.sections import Peft
from rlhf.config.tuning import Selection, TrainingPhase
from rlhf.distributed.zero_gather import reset_adam_steps
from rlhf.trainers.supervised.phase_callback import set_trained
from tests.models import tiny
from tests.tolerances import assert_close
from tests.trainers.on_trl import label_trainer, prepared, written
from tests.trainers.supervised.test_classify import classifier, rows

HEAD = Selection(parts=("score",))
PROBE = TrainingPhase(train=HEAD, updates=3, learning_rate=0.05)
TUNE = TrainingPhase(train="all", updates=4, learning_rate=0.01)
CONSTANT = {"schedule": "constant", "batch_size": 11, "microbatch_size": 11}


def trained(
    folder: Path, model: Any, unfreeze: Sequence[TrainingPhase], *, resume: str | None = None, **settings: Any
) -> Any:
    trainer = label_trainer(folder, model, rows(False), rows(False), unfreeze=tuple(unfreeze), **CONSTANT | settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_probe_leaves_every_other_weight_bit_for_bit_and_the_next_phase_moves_all(
    sft_folder: str, tmp_path: Path
) -> None:
    model = classifier(sft_folder)
    before = tiny.snapshot(model)
    trained(tmp_path / "probe", model, [PROBE])
    assert tiny.moved(model, before) == {"score.weight"}
    model = classifier(sft_folder)
    trained(tmp_path / "both", model, [PROBE, TUNE])
    assert tiny.moved(model, before) == set(before)


def by_hand(model: Any, batches: list[Any], *, rebuild: bool) -> dict[str, torch.Tensor]:
    """Train the same run with torch's AdamW; `rebuild` creates a new optimizer for the second phase."""
    model.train()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=0.0, weight_decay=0.0)
    for update, batch in enumerate(batches):
        probing = update < 3
        for name, p in named.items():
            p.requires_grad_(not probing or name == "score.weight")
        if rebuild and update == 3:
            optimizer = torch.optim.AdamW(named.values(), lr=0.0, weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = 0.05 if probing else 0.01
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = -(batch["target"] * logits.log_softmax(-1)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return tiny.snapshot(model)


def test_optimizer_state_survives_an_unfreeze(sft_folder: str, tmp_path: Path) -> None:
    trainer = label_trainer(tmp_path, classifier(sft_folder), rows(False), unfreeze=(PROBE, TUNE), **CONSTANT)
    seen: list[Any] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda features: seen.append(collate(features)) or seen[-1]
    trainer.train()
    assert len(seen) >= 7
    ours = weights(trainer)
    kept, rebuilt = (by_hand(classifier(sft_folder), seen[:7], rebuild=rebuild) for rebuild in (False, True))
    assert max(float((ours[name] - kept[name]).abs().max()) for name in kept) < 1e-5
    assert float((ours["score.weight"] - rebuilt["score.weight"]).abs().max()) > 1e-3  # the broken twin is told apart


def test_the_first_update_of_a_weight_has_the_size_of_its_rate(sft_folder: str, tmp_path: Path) -> None:
    """Adam's first step is rate x sign(gradient), so the weights show the learning rate of every layer."""
    model = classifier(sft_folder)
    trainer = trained(
        tmp_path,
        model,
        [TrainingPhase(train=HEAD, updates=2, learning_rate=1e-2), TrainingPhase(updates=1, learning_rate=1e-3)],
        layer_decay=0.5,
        head_factor=4.0,
        max_grad_norm=1e6,
    )
    before = tiny.snapshot(classifier(sft_folder))
    sizes = {name: float((p.detach() - before[name]).abs().max()) for name, p in trainer.model.named_parameters()}
    rates = {
        "norm.weight": 1e-3,
        "layers.1.mlp.up_proj.weight": 5e-4,
        "layers.0.mlp.up_proj.weight": 2.5e-4,
        "embed_tokens.weight": 1.25e-4,
    }
    for name, rate in rates.items():
        assert sizes[f"model.{name}"] == pytest.approx(rate, rel=0.01), name


def saved_bytes(model: Any) -> int:
    """Return the bytes that autograd saves in a forward pass, without weights."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.tensor(tiny.rows(1, [40] * 8))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("frozen", [0, 1, 2, 3, 4])
def test_blocks_below_the_first_trained_one_keep_no_activations(frozen: int, tmp_path: Path) -> None:
    model = tiny.new(layers=4)
    everything = saved_bytes(model)
    _, _, plan = prepared(
        tmp_path, model, 8, False, freeze=Selection(parts=("embeddings",), first=str(frozen) if frozen else None)
    )
    set_trained(model, plan, 0)
    share = saved_bytes(model) / everything
    assert share < 1 - frozen / 4 + 0.12
    assert share > 1 - frozen / 4 - 0.12


def test_trained_embeddings_below_frozen_blocks_keep_them_all(tmp_path: Path) -> None:
    model = tiny.new(layers=4)
    everything = saved_bytes(model)
    set_trained(model, prepared(tmp_path, model, 8, False, freeze=Selection(first="4"))[2], 0)
    assert saved_bytes(model) > 0.5 * everything


RESUMED = {
    "in the probe": ([PROBE, TUNE], 7, 2),
    "at the unfreeze": ([PROBE, TUNE], 7, 3),
    "in the second phase": ([PROBE, TUNE], 7, 5),
    "after patience ended the probe": (
        [
            TrainingPhase(train=HEAD, updates=20, learning_rate=2.0, patience=2),
            TrainingPhase(updates=4, learning_rate=0.01),
        ],
        24,
        None,
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(case: str, sft_folder: str, tmp_path: Path) -> None:
    unfreeze, evaluations, at = RESUMED[case]
    settings: dict[str, Any] = {"evaluations": evaluations, "schedule": "linear", "weight_decay": 0.1}
    one = trained(tmp_path / "one", classifier(sft_folder), unfreeze, **settings)
    switched = one.state.global_step - unfreeze[-1].updates
    if at is None:
        assert 2 <= switched < 20
        at = switched + 1
    # Only the newest two checkpoints are kept: stop the other run there, as a crash would.
    settings |= CONSTANT | {"unfreeze": tuple(unfreeze), "schedule": "linear"}
    two = label_trainer(tmp_path / "two", classifier(sft_folder), rows(False), rows(False), **settings)
    two.add_callback(StopAt(at))
    two.train()
    assert two.state.global_step == at
    checkpoint = str(tmp_path / "two" / "checkpoints" / f"checkpoint-{at}")
    resumed = label_trainer(tmp_path / "two", classifier(sft_folder), rows(False), rows(False), **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == one.state.global_step
    assert same(weights(resumed), weights(one))


class StopAt(TrainerCallback):
    """Callback that stops a run after an update."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after the checkpoint of that update."""
        control.should_training_stop = state.global_step >= self.update


def test_early_stopping_restores_the_best_weights(sft_folder: str, tmp_path: Path) -> None:
    """With a very high learning rate the loss soon rises."""
    trainer = trained(tmp_path, classifier(sft_folder), (), learning_rate=0.1, epochs=40, patience=3, evaluations=40)
    losses = [line["eval_loss"] for line in written(tmp_path) if "eval_loss" in line]
    assert trainer.state.global_step < 40
    assert min(losses) < losses[-1]
    assert losses.index(min(losses)) == len(losses) - 4
    assert_close(torch.tensor(trainer.evaluate()["eval_loss"]), min(losses))


def test_the_best_weights_are_looked_for_in_the_last_phase(sft_folder: str, tmp_path: Path) -> None:
    """The best checkpoint is one of the second phase although the first phase has a lower loss."""
    harm = TrainingPhase(updates=4, learning_rate=0.05)
    trainer = trained(tmp_path, classifier(sft_folder), [PROBE, harm], evaluations=7, batch_size=8, microbatch_size=8)
    losses = {line["step"]: line["eval_loss"] for line in written(tmp_path) if "eval_loss" in line}
    assert min(losses, key=losses.__getitem__) <= 3
    assert trainer.state.best_global_step > 3
    later = [loss for step, loss in losses.items() if step > 3]
    assert_close(torch.tensor(trainer.evaluate()["eval_loss"]), min(later))


def test_adapters_are_unfrozen_as_what_they_change(sft_folder: str, tmp_path: Path) -> None:
    adapter = Peft(method="lora", r=4, alpha=8.0)
    model = classifier(sft_folder, adapter)
    before = tiny.snapshot(model)
    trained(tmp_path / "probe", model, [PROBE])
    assert tiny.moved(model, before) == {"base_model.model.score.modules_to_save.default.weight"}
    model = classifier(sft_folder, adapter)
    before = tiny.snapshot(model)
    trained(tmp_path / "last", model, [TrainingPhase(train=Selection(last="1"), updates=2, learning_rate=0.01)])
    moved = tiny.moved(model, before)
    assert moved
    assert all(".layers.1." in name and "lora_" in name for name in moved)


def test_zero_counts_the_updates_of_a_group_from_its_beginning() -> None:
    """Stages 1 and 2 give Adam a flat tensor a group, stage 3 several sub-groups; other engines need nothing."""
    flat = [torch.zeros(3) for _ in range(3)]

    def state() -> dict[Any, Any]:
        return {p: {"step": torch.tensor(7.0)} for p in flat}

    adam = SimpleNamespace(state=state(), param_groups=[{"params": [p]} for p in flat])
    reset_adam_steps(SimpleNamespace(optimizer=SimpleNamespace(optimizer=adam)), [1])
    assert [float(adam.state[p]["step"]) for p in flat] == [7.0, 0.0, 7.0]
    adam.state = state()
    zero3 = SimpleNamespace(optimizer=adam, sub_group_to_group_id={0: 0, 1: 1, 2: 1}, fp32_partitioned_groups_flat=flat)
    reset_adam_steps(SimpleNamespace(optimizer=zero3), [1])
    assert [float(adam.state[p]["step"]) for p in flat] == [7.0, 0.0, 0.0]
    reset_adam_steps(SimpleNamespace(optimizer=adam), [1])
