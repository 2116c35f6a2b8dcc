"""The errors a user can cause.

Each message has four parts: what is wrong, what was found, where, and what to do. Independent problems are collected
and reported together. `assert` is used for the project's own invariants only.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class RLHFError(Exception):
    """Base class of the errors that the command line prints as a message, without a traceback, and exits non-zero."""

    def __init__(self, what: str, *, found: str = "", where: str = "", do: str = "") -> None:
        """Build the message `where: what (found: ...); do`.

        Args:
            what: what is wrong.
            found: the offending value.
            where: file, row, config key, step or rank.
            do: what the user can do about it.
        """
        self.what, self.found, self.where, self.do = what, found, where, do
        text = f"{where}: {what}" if where else what
        if found:
            text += f" (found: {found})"
        if do:
            text += f"; {do}"
        super().__init__(text)


class ConfigError(RLHFError):
    """A configuration file or command-line override is wrong."""


class DataError(RLHFError):
    """A data file or record is wrong."""


class ShapeError(RLHFError):
    """Tensors that belong together differ in shape, or a mask is empty. Raised instead of broadcasting."""


class CheckpointError(RLHFError):
    """A model folder, run directory or hand-over record is missing, damaged or does not match."""


class TrainingError(RLHFError):
    """An invariant was broken during training (non-finite loss, wrong world size, ...)."""


class OutOfMemoryError(TrainingError):
    """The memory of a GPU or of the machine did not suffice. `rlhf.runs.memory_phase` raises it."""

    def __init__(
        self,
        what: str,
        *,
        found: str = "",
        where: str = "",
        do: str = "",
        phase: str | None = None,
        gpu: bool = True,
        stage: str | None = None,
        folder: Path | None = None,
    ) -> None:
        """Build the message as `RLHFError` does.

        Args:
            what, found, where, do: as in `RLHFError`.
            phase: what was being done, such as "sampling"; None = unknown.
            gpu: whether it was a GPU's memory; else it was the machine's.
            stage: name of the stage; None = memory ran out outside of a stage.
            folder: output folder of the stage.
        """
        super().__init__(what, found=found, where=where, do=do)
        self.phase, self.gpu, self.stage, self.folder = phase, gpu, stage, folder


def combine_errors(kind: type[RLHFError], problems: Iterable[str]) -> RLHFError | None:
    """Return one error for several independent problems, or None if there are none."""
    found = list(problems)
    if not found:
        return None
    if len(found) == 1:
        return kind(found[0])
    return kind(f"{len(found)} problems\n  " + "\n  ".join(found))
