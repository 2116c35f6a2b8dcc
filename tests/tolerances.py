"""How closely numbers must agree: one place, one line for each source of error."""

from __future__ import annotations

import torch

TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},  # a few dozen roundings of numbers of size 1 to 100
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
}
"""By the dtype that the tested function computes in."""

QUOTED = {"rtol": 0.0, "atol": 1e-6}
"""Numbers written down with six decimals."""

QUOTED_COARSELY = {"rtol": 1e-3, "atol": 0.0}
"""Numbers written down with three or four significant digits."""


def assert_close(actual: torch.Tensor, expected: torch.Tensor | float | list, message: str = "") -> None:
    """Compare in float64, with the tolerance of the dtype of `actual`. NaN is never close."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    note = (lambda text: f"{message}: {text}") if message else None
    torch.testing.assert_close(actual.detach().double(), expected, **TOLERANCE[actual.dtype], msg=note)


def assert_quoted(actual: torch.Tensor | float, expected: list | float, *, coarsely: bool = False) -> None:
    """Compare with a number from the literature or from a table, which has few digits."""
    tolerance = QUOTED_COARSELY if coarsely else QUOTED
    actual = torch.as_tensor(actual).detach().double()
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), **tolerance)


GRADIENT = 2e-5
"""Relative distance of two float32 gradients that differ in the order of summation only."""

QUANTUM = 1e-3
"""Relative; a number that went through bfloat16 is off by up to 4e-3, one that did not by far less."""


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, in float64. For vectors whose entries differ in size, such as gradients."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


PROCESSES = 1e-5
"""Losses of two processes against one: the same rows, summed in another order."""

PROCESSES_PPO = 1e-4
"""The same for PPO, where each step builds on the one before."""

DEVICES = 1e-4
"""Losses and log-probs (nats) of a GPU and of a CPU in float32: other kernels, another order of summation."""
