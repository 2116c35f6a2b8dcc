"""Offloaded frozen models. The meta device stands for a GPU.

Weights that were copied to it and back would have lost their contents.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlhf.models.offload import OffloadedModels
from tests.models import tiny

AWAY = torch.device("meta")


def places(model: nn.Module) -> set[str]:
    """Return the devices of a model's weights."""
    return {p.device.type for p in model.parameters()}


def two() -> dict[str, list[nn.Module]]:
    """Return a role with one model and a role with two."""
    return {
        "reference": [nn.Linear(3, 2)],
        "reward": [nn.Linear(2, 1), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))],
    }


def test_a_role_is_on_the_device_inside_the_context_and_comes_back_bit_for_bit() -> None:
    models = two()
    before = {role: [tiny.snapshot(m) for m in members] for role, members in models.items()}
    objects = [id(p) for members in models.values() for m in members for p in m.parameters()]
    frozen = OffloadedModels(AWAY, ["reference", "reward"], **models)
    for asked, other in (("reward", "reference"), ("reference", "reward"), ("reward", "reference")):
        with frozen.on_device(asked):
            assert [places(m) for m in models[asked]] == [{"meta"}] * len(models[asked])
            assert [places(m) for m in models[other]] == [{"cpu"}] * len(models[other])
    for role, members in models.items():
        for model, weights in zip(members, before[role], strict=True):
            assert places(model) == {"cpu"}
            assert not tiny.moved(model, weights)
    assert [id(p) for members in models.values() for m in members for p in m.parameters()] == objects


def test_models_are_offloaded_again_after_an_error() -> None:
    models = two()
    before = tiny.snapshot(models["reward"][0])
    frozen = OffloadedModels(AWAY, ["reward"], **models)
    with pytest.raises(RuntimeError, match="in the middle"), frozen.on_device("reward"):
        raise RuntimeError("in the middle")
    assert places(models["reward"][0]) == {"cpu"}
    assert not tiny.moved(models["reward"][0], before)


def test_so_does_one_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two models does not fit on the device."""
    models = two()
    frozen = OffloadedModels(AWAY, ["reward"], **models)
    first, second = models["reward"]
    moved = type(second).to

    def no_room(self: Any, device: Any) -> Any:
        if torch.device(device) == AWAY:
            raise RuntimeError("no room")
        return moved(self, device)

    monkeypatch.setattr(type(second), "to", no_room)
    with pytest.raises(RuntimeError, match="no room"), frozen.on_device("reward"):
        pass
    assert places(first) == places(second) == {"cpu"}


def test_a_role_that_is_not_offloaded_stays_on_the_device() -> None:
    models = two()
    frozen = OffloadedModels(AWAY, ["reference"], **models)
    assert [places(m) for m in models["reward"]] == [{"meta"}] * 2
    with frozen.on_device("reward"):
        assert places(models["reference"][0]) == {"cpu"}
    assert [places(m) for m in models["reward"]] == [{"meta"}] * 2


def test_where_the_device_is_the_cpu_nothing_ever_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    models = two()
    frozen = OffloadedModels(torch.device("cpu"), ["reference", "reward"], **models)
    monkeypatch.setattr(nn.Module, "to", lambda *_: pytest.fail("moved"))
    with frozen.on_device("reward"), frozen.on_device("reference"):
        assert all(places(m) == {"cpu"} for members in models.values() for m in members)


def test_tied_weights_stay_tied_and_all_are_in_eval_mode() -> None:
    model = tiny.new(1).train()
    frozen = OffloadedModels(torch.device("cpu"), ["reference"], reference=[model])
    assert not model.training
    pair = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    pair[1].weight = pair[0].weight
    frozen = OffloadedModels(AWAY, ["reference"], reference=[pair])
    with frozen.on_device("reference"):
        assert places(pair) == {"meta"}
    assert pair[1].weight is pair[0].weight
    assert not pair.training


def test_weights_come_back_as_they_were_and_buffers_as_they_became(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass may change a buffer, such as the frequencies of a rotary embedding."""
    model = nn.BatchNorm1d(2)
    frozen = OffloadedModels(AWAY, ["reference"], reference=[model])
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)  # a device that keeps what it is given
    with frozen.on_device("reference"):
        model.weight.data = torch.full((2,), 7.0)
        assert model.running_mean is not None
        model.running_mean += 3.0
    assert model.weight.tolist() == [1.0, 1.0]
    assert model.running_mean.tolist() == [3.0, 3.0]
