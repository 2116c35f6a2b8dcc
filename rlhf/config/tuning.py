"""Configuration of which weights are trained, when, and at which learning rate. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlhf.config.sections import Count, Positive, Section, Source, Unit

ParameterPart = Literal["embeddings", "norms", "attention", "mlp", "lm_head", "score"]
RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?|(\d+)%?-(\d+)%")


def _block_ranges(value: Any) -> str:
    """Return the text of a list of block ranges. Raises: ValueError if it is none."""
    text = str(value).replace(" ", "")
    wrong = [item for item in text.split(",") if not RANGE.fullmatch(item)]
    if isinstance(value, bool | float | list | dict) or wrong:
        raise ValueError(f"expected blocks such as 0-7, -1, -4--1, 0-50% or 0,2,4, got {value!r}")
    return text


def _number_or_share(value: Any) -> str:
    """Return the text of a number of blocks or of a share of them. Raises: ValueError if it is neither."""
    text = str(value).strip()
    share = re.fullmatch(r"(\d{1,3})%", text)
    if isinstance(value, bool) or not (text.isdigit() or (share and int(share[1]) <= 100)) or text in ("0", "0%"):
        raise ValueError(f"expected a number of blocks or a share such as 50%, got {value!r}")
    return text


BlockRanges = Annotated[str, BeforeValidator(_block_ranges)]
NumberOrShare = Annotated[str, BeforeValidator(_number_or_share)]


class Selection(Section):
    """A selection of a model's weights: the union of what its fields select. Blocks are counted from 0 at the input."""

    layers: BlockRanges | None = Field(
        None,
        description="blocks by number, ranges include both ends: 0-7; 0,2,4; -1 (the last); -4--1 (the last four); or "
        "a range of shares: 0-50%",
    )
    first: NumberOrShare | None = Field(
        None, description="this many blocks from the input (4), or this share of all blocks (50%)"
    )
    last: NumberOrShare | None = Field(
        None, description="this many blocks from the output (4), or this share of all blocks (50%)"
    )
    parts: tuple[ParameterPart, ...] = Field(
        (), description="kinds of weights, inside and outside the blocks; score = the score or classification head"
    )
    names: tuple[str, ...] = Field(
        (), description="parameter names: glob patterns such as '*.q_proj.*', or 're:' and a regular expression"
    )

    @model_validator(mode="after")
    def _patterns_compile(self) -> Selection:
        for name in self.names:
            if name.startswith("re:"):
                try:
                    re.compile(name[3:])
                except re.error as error:
                    raise ValueError(f"names: '{name}' is no regular expression: {error}") from None
        return self

    @property
    def given(self) -> bool:
        """Whether any field is set."""
        return bool(self.layers or self.first or self.last or self.parts or self.names)


EMPTY_SELECTION = Selection()


class TrainedSelection(Section):
    """The weights that a phase trains, and their learning rate."""

    train: Literal["all", "top-down"] | Selection = Field(
        "all",
        description="weights trained in this phase, except those of 'freeze': all; top-down = gradual unfreezing "
        "(ULMFiT, arXiv:1801.06146), first the head and the last block, then one more block at a time until all are "
        "trained; or a selection",
    )
    learning_rate: Positive | None = Field(None, description="peak learning rate of this phase; null = that of optim")

    @model_validator(mode="after")
    def _refuse_empty_selection(self) -> TrainedSelection:
        if isinstance(self.train, Selection) and not self.train.given:
            raise ValueError("train: the selection is empty; select some weights, or set it to 'all'")
        return self


class TrainingPhase(TrainedSelection):
    """A phase of training with its own trained weights and schedule. Its length is exactly one of `epochs` and
    `updates`."""

    epochs: Positive | None = Field(
        None,
        description="length of the phase in passes over the training records (the largest length, with patience); with "
        "train=top-down the length for each block",
    )
    updates: Count | None = Field(None, description="length of the phase in optimizer updates, instead of epochs")
    patience: Count | None = Field(
        None,
        description="early stopping: end the phase after this many evaluations in a row without a lower held-out loss; "
        "null = off",
    )
    schedule: Literal["linear", "cosine", "constant"] | None = Field(
        None, description="shape of the learning rate over this phase; null = that of optim"
    )
    warmup_fraction: Unit | None = Field(
        None, description="share of this phase's updates used for warm-up; null = that of optim"
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainingPhase:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("a phase needs a length: set exactly one of epochs and updates")
        return self


class Probe(Section):
    """What is measured before training and at each evaluation to see forgetting and generalisation."""

    text: tuple[Source, ...] = Field(
        (),
        description="sources of text from the pretraining domain, on which the next-token loss is measured; reward "
        "models and classifiers use the output layer of the language model they started from",
    )
    ood: tuple[Source, ...] = Field(
        (),
        description="sources of out-of-distribution records: of the same kind as the training records, from another "
        "distribution",
    )
    stop_above: Positive | None = Field(
        None,
        description="stop when the loss on the text exceeds that before training by more than this, in nats per token; "
        "null = report only",
    )

    @model_validator(mode="after")
    def _require_text(self) -> Probe:
        if self.stop_above is not None and not self.text:
            raise ValueError("stop_above: set text, on which it is measured, or remove stop_above")
        return self


class PPOPhase(TrainedSelection):
    """A phase of PPO with its own trained weights."""

    steps: Count | None = Field(
        None,
        description="length of the phase in PPO steps; with train=top-down the length for each block; null = the rest "
        "of the run",
    )


class Freeze(Section):
    """Weights that PPO never trains."""

    policy: Selection = Field(EMPTY_SELECTION, description="weights of the policy that are never trained")
    value_model: Selection = Field(EMPTY_SELECTION, description="weights of the value model that are never trained")


class Unfreeze(Section):
    """Training phases of the policy and of the value model."""

    policy: tuple[PPOPhase, ...] = Field(
        (), description="phases of the policy, in order; empty = all weights are trained throughout"
    )
    value_model: tuple[PPOPhase, ...] = Field(
        (),
        description="phases of the value model, in order, e.g. first its head alone; empty = all weights are trained "
        "throughout",
    )

    @model_validator(mode="after")
    def _only_the_last_is_unbounded(self) -> Unfreeze:
        for name in ("policy", "value_model"):
            phases = getattr(self, name)
            if any(phase.steps is None for phase in phases[:-1]):
                raise ValueError(f"{name}: only the last phase may have steps=null; set the steps of the others")
        return self
