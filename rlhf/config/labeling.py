"""Configuration of `rlhf data weak`: vote sources, the records they vote on, and the label model. Imports no torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf.config.sections import Count, NonNegative, Positive, Section, Source

RULE_KINDS = ("regex", "keywords", "words_over", "words_under", "longer_by")
VOTE_KINDS = ("votes", "column", "function", *RULE_KINDS)


class VoteSource(Section):
    """One source of votes (or one column with the votes of many annotators): exactly one of `votes`, `column`,
    `function` and the rules `regex`, `keywords`, `words_over`, `words_under`, `longer_by`. A rule tests a response (a
    text, or the last turn of a conversation)."""

    name: str | None = Field(
        None,
        description="name of the source in the table of results; required for a rule; default: the column's or the "
        "function's",
    )
    votes: str | None = Field(
        None, description="column that holds a mapping annotator -> vote; each annotator becomes a source"
    )
    column: str | None = Field(None, description="column that holds the votes of one source; an empty cell abstains")
    function: str | None = Field(
        None,
        description="Python function as module:function, called as function(record), that returns a vote, or None to "
        "abstain; its code runs in this process",
    )
    regex: str | None = Field(
        None, description="rule: this Python regular expression matches somewhere in the response"
    )
    keywords: tuple[str, ...] = Field(
        (), description="rule: the response contains one of these as whole words, in upper or lower case"
    )
    words_over: Count | None = Field(None, description="rule: the response has more words than this")
    words_under: Count | None = Field(None, description="rule: the response has fewer words than this")
    longer_by: Count | None = Field(
        None, description="rule for pairs: the response is at least this many words longer than the other one"
    )
    vote: str | None = Field(
        None,
        description="what a rule votes for where it holds. Pairs: 'with' (default) = the response for which it holds, "
        "'without' = the other one; it abstains where it holds for both or neither. Classes: this label; it abstains "
        "where it does not hold",
    )

    @field_validator("regex")
    @classmethod
    def _compile_regex(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a valid regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _one_kind(self) -> VoteSource:
        given = [name for name in VOTE_KINDS if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"set exactly one of {', '.join(VOTE_KINDS)}; got {', '.join(given) or 'none'}")
        if given[0] in RULE_KINDS and not self.name:
            raise ValueError(f"a rule needs a name: add name to the {given[0]} rule")
        if given[0] not in RULE_KINDS and self.vote is not None:
            raise ValueError(f"vote applies to rules only, and {given[0]} provides its own votes; remove vote")
        if given[0] == "votes" and self.name:
            raise ValueError("votes: each annotator becomes a source under its own name; remove name")
        if any(not word.strip() for word in self.keywords):
            raise ValueError("keywords: one of them is blank; remove it")
        return self

    @property
    def is_rule(self) -> bool:
        """Whether this source is a rule on the text of the response."""
        return any(getattr(self, name) for name in RULE_KINDS)


class LabelModelConfig(Section):
    """How votes become label probabilities."""

    kind: Literal["dawid-skene", "majority"] = Field(
        "dawid-skene",
        description="dawid-skene = estimate the accuracy of every source with EM and weigh votes by it (Dawid and "
        "Skene 1979); majority = share of the votes",
    )
    accuracy: Literal["auto", "one", "per-class"] = Field(
        "auto",
        description="dawid-skene: one = one accuracy per source, with all classes equally likely a priori; per-class "
        "= a confusion matrix per source and estimated class shares; auto = one for pairs and if a source votes for a "
        "single class only (a confusion matrix cannot be estimated then), else per-class",
    )
    smoothing: NonNegative = Field(
        1.0, description="dawid-skene: pseudo-count added to each cell of a source's confusion matrix"
    )
    tolerance: Positive = Field(
        1e-9, description="dawid-skene: EM has converged when the objective gains less than this, in nats per record"
    )
    max_iterations: Count = Field(
        2000, description="dawid-skene: largest number of EM iterations; a note says if EM has not converged by then"
    )


class WeakLabelData(Source):
    """The records to label."""

    on_bad_row: Literal["error", "drop"] = Field(
        "error",
        description="what happens to rows and votes that cannot be read: stop with an error that lists them, or drop "
        "the rows and count them by reason",
    )

    @model_validator(mode="after")
    def _refuse_subsets(self) -> WeakLabelData:
        if self.weight != 1.0 or self.limit is not None:
            raise ValueError("every record is labelled; remove weight and limit, and set them in the stage that trains")
        return self


class WeakLabelConfig(Section):
    """`rlhf data weak`: turn the votes of noisy sources into a file of labels for `rlhf reward` or `rlhf classify`."""

    output: str = Field(description="JSONL file to write; must not exist")
    kind: Literal["comparison", "labelled"] = Field(
        "comparison",
        description="comparison = votes on pairs, for `rlhf reward`; labelled = votes on classes, for `rlhf classify`",
    )
    data: WeakLabelData = Field(description="the records; labels that they already have are replaced")
    sources: tuple[VoteSource, ...] = Field(min_length=1, description="the sources of votes")
    labels: tuple[str, ...] = Field(
        (), description="kind=labelled: names of the classes; empty = all classes that are voted for, sorted"
    )
    label_model: LabelModelConfig = LabelModelConfig()
    no_votes: Literal["drop", "keep"] = Field(
        "drop",
        description="what happens to records without a vote: drop them, or keep them with preference 0.5 (pairs) or "
        "the estimated share of each class (classes)",
    )
    gold: str | None = Field(
        None,
        description="column with the true label where it is known; it is compared with the estimates in the table of "
        "results, and neither used for labelling nor written",
    )

    @model_validator(mode="after")
    def _check_rules(self) -> WeakLabelConfig:
        pairs = self.kind == "comparison"
        if pairs and self.label_model.accuracy == "per-class":
            raise ValueError(
                "label_model.accuracy: the order of the responses in a pair means nothing, so a source has one "
                "accuracy; set it to one or auto"
            )
        if pairs and self.labels:
            raise ValueError("labels apply to kind=labelled only; remove labels")
        if len(set(self.labels)) < len(self.labels) or len(self.labels) == 1:
            raise ValueError("labels: name at least two, each of them once")
        for i, source in enumerate(self.sources):
            if not source.is_rule:
                continue
            if pairs and source.vote not in (None, "with", "without"):
                raise ValueError(f"sources.{i}: a rule for pairs votes 'with' or 'without', got '{source.vote}'")
            if not pairs and (source.longer_by or not source.vote):
                raise ValueError(f"sources.{i}: a rule for classes needs a label as vote, and cannot be longer_by")
            if self.labels and source.vote not in self.labels:
                raise ValueError(f"sources.{i}: vote '{source.vote}' is not one of labels: {', '.join(self.labels)}")
        return self
