"""Which weights are trained, when, and at which rate. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlhf.config.sections import Count, Positive, Section, Source, Unit

ParameterPart = Literal["embeddings", "norms", "attention", "mlp", "lm_head", "score"]
RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?|(\d+)%?-(\d+)%")


def _blocks(value: Any) -> str:
    text = str(value).replace(" ", "")
    wrong = [item for item in text.split(",") if not RANGE.fullmatch(item)]
    if isinstance(value, bool | float | list | dict) or wrong:
        raise ValueError(f"expected blocks such as 0-7, -1, -4--1, 0-50% or 0,2,4, got {value!r}")
    return text


def _some(value: Any) -> str:
    text = str(value).strip()
    share = re.fullmatch(r"(\d{1,3})%", text)
    if isinstance(value, bool) or not (text.isdigit() or (share and int(share[1]) <= 100)) or text in ("0", "0%"):
        raise ValueError(f"expected a number of blocks or a share such as 50%, got {value!r}")
    return text


Blocks = Annotated[str, BeforeValidator(_blocks)]
Some = Annotated[str, BeforeValidator(_some)]


class Selection(Section):
    """Weights of a model: what any of the fields names belongs to it."""

    layers: Blocks | None = Field(
        None, description="blocks by number, both ends included: 0-7, -1 (the last), -4--1, 0,2,4; or a share: 0-50%"
    )
    first: Some | None = Field(None, description="so many blocks from the input, or a share of them: 4, 50%")
    last: Some | None = Field(None, description="so many blocks from the output, or a share of them")
    parts: tuple[ParameterPart, ...] = Field((), description="by kind, in every block and outside of them")
    names: tuple[str, ...] = Field((), description="parameter names: globs such as '*.q_proj.*', or 're:' and a regex")

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
        """Whether it names anything."""
        return bool(self.layers or self.first or self.last or self.parts or self.names)


EMPTY_SELECTION = Selection()


class TrainedSelection(Section):
    """What a phase trains."""

    train: Literal["all", "top-down"] | Selection = Field(
        "all",
        description="weights trained in this phase (never those of 'freeze'); top-down: the head and the last block, "
        "then one block more each time, until all are trained (ULMFiT, arXiv:1801.06146)",
    )
    learning_rate: Positive | None = Field(None, description="peak rate of this phase; null = that of optim")

    @model_validator(mode="after")
    def _something(self) -> TrainedSelection:
        if isinstance(self.train, Selection) and not self.train.given:
            raise ValueError("train: name what is trained, or 'all'")
        return self


class TrainingPhase(TrainedSelection):
    """A stretch of training with its own trained weights and schedule. Exactly one of `epochs` and `updates`."""

    epochs: Positive | None = Field(None, description="its length (at most, with patience); of each block if top-down")
    updates: Count | None = Field(None, description="the same, in optimizer updates")
    patience: Count | None = Field(
        None, description="ends it early after so many evaluations without a lower held-out loss; null = off"
    )
    schedule: Literal["linear", "cosine", "constant"] | None = Field(
        None, description="decay to 0 over this phase; null = that of optim"
    )
    warmup_fraction: Unit | None = Field(None, description="share of this phase; null = that of optim")

    @model_validator(mode="after")
    def _one_length(self) -> TrainingPhase:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("a phase has a length: give exactly one of epochs and updates")
        return self


class Probe(Section):
    """What fine-tuning costs elsewhere, measured before training and at each evaluation."""

    text: tuple[Source, ...] = Field(
        (),
        description="text of the source domain; reward models and classifiers read it with the source's output layer",
    )
    ood: tuple[Source, ...] = Field((), description="records like those trained on, but from another distribution")
    stop_above: Positive | None = Field(
        None, description="stop when the text costs so many nats per token more than before training; null = only say"
    )

    @model_validator(mode="after")
    def _stop_by_something(self) -> Probe:
        if self.stop_above is not None and not self.text:
            raise ValueError("stop_above: give text, which it is measured on")
        return self


class PPOPhase(TrainedSelection):
    """The same inside PPO, counted in steps (rollouts)."""

    steps: Count | None = Field(None, description="its length; of each block if top-down; null = the rest of the run")


class Freeze(Section):
    """Weights that PPO never trains."""

    policy: Selection = Field(EMPTY_SELECTION, description="of the policy")
    value_model: Selection = Field(EMPTY_SELECTION, description="of the value model")


class Unfreeze(Section):
    """Phases of the two models that PPO trains, each in order. Empty = all at once."""

    policy: tuple[PPOPhase, ...] = Field((), description="phases of the policy")
    value_model: tuple[PPOPhase, ...] = Field((), description="phases of the value model, e.g. its head alone at first")

    @model_validator(mode="after")
    def _only_the_last_is_open(self) -> Unfreeze:
        for name in ("policy", "value_model"):
            phases = getattr(self, name)
            if any(phase.steps is None for phase in phases[:-1]):
                raise ValueError(f"{name}: only the last phase may have steps=null")
        return self
