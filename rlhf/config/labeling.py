"""Configuration of `rlhf data weak`: who votes on which records, and how votes become labels. Imports no torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf.config.sections import Count, NonNegative, Positive, Section, Source

RULE_KINDS = ("regex", "keywords", "words_over", "words_under", "longer_by")
VOTE_KINDS = ("votes", "column", "function", *RULE_KINDS)


class VoteSource(Section):
    """Who votes: exactly one of `votes`, `column`, `function` and the rules `regex`, `keywords`, `words_over`,
    `words_under`, `longer_by`. A rule looks at a response (a text, the last turn) and either holds or not."""

    name: str | None = Field(None, description="in the table; a rule needs one, others are called after what they read")
    votes: str | None = Field(None, description="column with a mapping annotator -> vote; each annotator is a source")
    column: str | None = Field(None, description="column with the votes of one source; empty = abstains")
    function: str | None = Field(
        None, description="module:function(record) -> vote, or None to abstain; your own code is run"
    )
    regex: str | None = Field(None, description="rule: this Python regular expression is found")
    keywords: tuple[str, ...] = Field((), description="rule: one of these is there, as whole words in any case")
    words_over: Count | None = Field(None, description="rule: more words than this")
    words_under: Count | None = Field(None, description="rule: fewer words than this")
    longer_by: Count | None = Field(None, description="rule for pairs: this many words longer than the other response")
    vote: str | None = Field(
        None,
        description="what a rule votes for. Pairs: 'with' (the default) = the response for which it alone holds, or "
        "'without' = the other one. Classes: the label where it holds. Otherwise it abstains",
    )

    @field_validator("regex")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _one_kind(self) -> VoteSource:
        given = [name for name in VOTE_KINDS if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(VOTE_KINDS)}; got {', '.join(given) or 'none'}")
        if given[0] in RULE_KINDS and not self.name:
            raise ValueError(f"a rule needs a name: add name to the {given[0]} rule")
        if given[0] not in RULE_KINDS and self.vote is not None:
            raise ValueError(f"vote belongs to a rule; {given[0]} brings its own votes")
        if given[0] == "votes" and self.name:
            raise ValueError("votes holds many sources, which are called after the annotators: leave name out")
        if any(not word.strip() for word in self.keywords):
            raise ValueError("keywords: one of them is blank")
        return self

    @property
    def is_rule(self) -> bool:
        """Whether it is decided by the text alone."""
        return any(getattr(self, name) for name in RULE_KINDS)


class LabelModelConfig(Section):
    """How votes become labels."""

    kind: Literal["dawid-skene", "majority"] = Field(
        "dawid-skene", description="EM over the accuracy of every source (Dawid and Skene 1979), or shares of the votes"
    )
    accuracy: Literal["auto", "one", "per-class"] = Field(
        "auto",
        description="dawid-skene: one accuracy a source, all classes equally likely beforehand; or a confusion matrix "
        "and the classes' shares; auto = one for pairs and where a source votes for one class only (a matrix then says "
        "nothing), else per-class",
    )
    smoothing: NonNegative = Field(1.0, description="dawid-skene: votes added to each cell of a source's matrix")
    tolerance: Positive = Field(1e-9, description="dawid-skene: stops at a smaller gain, in nats per record")
    max_iterations: Count = Field(2000, description="dawid-skene: stops here at the latest, and says so")


class WeakLabelData(Source):
    """The records and their votes."""

    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="what to do with a row or vote that cannot be read; drops are counted by reason"
    )

    @model_validator(mode="after")
    def _all_of_it(self) -> WeakLabelData:
        if self.weight != 1.0 or self.limit is not None:
            raise ValueError("every record is labelled: weight and limit belong to the stage that trains")
        return self


class WeakLabelConfig(Section):
    """Labels from the votes of noisy sources, as a file that `rlhf reward` or `rlhf classify` reads."""

    output: str = Field(description="JSONL file to write; must not exist")
    kind: Literal["comparison", "labelled"] = Field(
        "comparison", description="comparison = votes on pairs, for `rlhf reward`; labelled = on classes, for classify"
    )
    data: WeakLabelData = Field(description="the records and their votes; their labels, if any, are replaced")
    sources: tuple[VoteSource, ...] = Field(min_length=1, description="who votes")
    labels: tuple[str, ...] = Field((), description="kind labelled: the classes; empty = those voted for, sorted")
    label_model: LabelModelConfig = LabelModelConfig()
    no_votes: Literal["drop", "keep"] = Field(
        "drop", description="records that nobody votes on; kept, they get 0.5 (pairs) or the share of each class"
    )
    gold: str | None = Field(
        None, description="column with the truth where known: shown beside the estimates, never used and not written"
    )

    @model_validator(mode="after")
    def _rules_fit(self) -> WeakLabelConfig:
        pairs = self.kind == "comparison"
        if pairs and self.label_model.accuracy == "per-class":
            raise ValueError(
                "label_model.accuracy: the order of a pair means nothing, so its sources have one accuracy"
            )
        if pairs and self.labels:
            raise ValueError("labels: pairs have none; they belong to kind=labelled")
        if len(set(self.labels)) < len(self.labels) or len(self.labels) == 1:
            raise ValueError("labels: at least two, each named once")
        for i, source in enumerate(self.sources):
            if not source.is_rule:
                continue
            if pairs and source.vote not in (None, "with", "without"):
                raise ValueError(f"sources.{i}: the rule of pairs votes 'with' or 'without', got '{source.vote}'")
            if not pairs and (source.longer_by or not source.vote):
                raise ValueError(f"sources.{i}: a rule of classes has no longer_by, and names a label in vote")
            if self.labels and source.vote not in self.labels:
                raise ValueError(f"sources.{i}: vote '{source.vote}' is none of labels: {', '.join(self.labels)}")
        return self
