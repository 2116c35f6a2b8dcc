"""Every mistake in a data file ends with one message that says where and what to do, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.refusals import HAM, LONG, PAIR, SPAM, TALK, Case, check_refusal, put, rows
from tests.conftest import Run

DATA = [
    Case(
        "missing",
        "sft sft.yaml data.train.0.path=demo.jsonl",
        ("demo.jsonl: no such file", "did you mean 'demos.jsonl"),
    ),
    Case("empty", "sft sft.yaml", ("demos.jsonl: the file is empty", "name another file"), put("demos.jsonl", "")),
    Case(
        "corrupt",
        "sft sft.yaml",
        ("demos.jsonl row 2: corrupt JSON at column 15", "repair or remove the line"),
        put("demos.jsonl", '{"messages": []}\n{"messages": [}\n'),
    ),
    Case(
        "columns",
        "sft sft.yaml",
        ("pairs.jsonl", "chosen"),
        put(
            "sft.yaml", "output_dir: out\nmodel: {path: tiny}\ndata: {train: [{path: pairs.jsonl, format: messages}]}\n"
        ),
    ),
    Case("no format", "sft sft.yaml", ("demos.jsonl", "column"), rows("demos.jsonl", {"question": "a", "reply": "b"})),
    Case(
        "not UTF-8",
        "sft sft.yaml",
        ("demos.jsonl row 2: invalid UTF-8 at byte", "save the file as UTF-8"),
        put("demos.jsonl", b'{"messages": []}\n{"messages": "caf\xe9"}\n'),
    ),
    Case(
        "empty response",
        "sft sft.yaml",
        ("demos.jsonl row 1: turn 2 (assistant) is empty", "on_bad_row=drop"),
        rows("demos.jsonl", {"messages": [TALK, {"role": "assistant", "content": " "}]}),
    ),
    Case(
        "empty chosen",
        "reward reward.yaml",
        ("pairs.jsonl row 2: chosen is empty", "fix or remove the row"),
        rows("pairs.jsonl", PAIR, PAIR | {"chosen": ""}),
    ),
    Case(
        "identical sides",
        "reward reward.yaml",
        ("pairs.jsonl row 1: 'chosen' and 'rejected' are identical", "preference 0.5"),
        rows("pairs.jsonl", PAIR | {"rejected": "b"}),
    ),
    Case(
        "two bad rows",
        "reward reward.yaml",
        ("3 problems", "row 1: ", "row 2: ", "fix or remove them"),
        rows("pairs.jsonl", PAIR | {"rejected": "b"}, PAIR | {"preference": 2}),
    ),
    Case("all too long", "sft sft.yaml data.max_length=8", ("record is left", "raise data.max_length")),
    Case(
        "prompt too long (ppo)",
        "ppo ppo.yaml",
        ("prompts.jsonl row 1: the prompt is longer than 64 tokens", "shorten it"),
        rows("prompts.jsonl", {"prompt": LONG}),
    ),
    Case(
        "prompt too long (generate)",
        "generate sft prompts.jsonl out.jsonl --max-new-tokens 8",
        ("prompts.jsonl row 1: the prompt is longer than 120 tokens", "shorten it"),
        rows("prompts.jsonl", {"prompt": LONG}),
    ),
    Case(
        "a label without a training record",
        "classify classify.yaml labels=[short,kind,rude]",
        ("data.train: no training record has the label 'rude'", "add some, or drop the label"),
    ),
    Case(
        "a label that never holds",
        "classify classify.yaml labels=[ham,spam,kind] data.validation_fraction=0",
        ("data.train: no training record has the label 'kind'", "add some, or drop the label"),
        rows("labels.jsonl", SPAM, HAM | {"label": {"ham": 1, "kind": 0}}),
    ),
    Case(
        "a label that is not the classifier's",
        "classify classify.yaml labels=[short,rude]",
        (
            "labels.jsonl row ",
            ": label 'kind' is not one of the classifier's (found: labels short, rude)",
            "name it in labels, or correct the row",
        ),
    ),
    Case(
        "a label that is not the classifier's, held out",
        "classify classify.yaml data.validation=[{'path':'other.jsonl'}]",
        ("other.jsonl row 1: label 'rude' is not one of the classifier's (found: labels kind, short)", "name it in"),
        rows("other.jsonl", {"text": "a", "label": "rude"}),
    ),
    Case(
        "a broken label",
        "classify classify.yaml",
        ("labels.jsonl row 2: 'label' must be a label (text or a whole number)", "(found: True)", "on_bad_row=drop"),
        rows("labels.jsonl", SPAM, HAM | {"label": True}),
    ),
    Case(
        "a label that always holds, balanced",
        "classify classify.yaml multi_label=true class_weights=balanced labels=[ham] data.validation_fraction=0",
        ("data.train: every training record has the label 'ham'", "class_weights=equal"),
        rows("labels.jsonl", HAM, HAM | {"text": "other"}),
    ),
    Case(
        "two labels where one may hold",
        "classify classify.yaml data.validation_fraction=0",
        ("DataError: labels.jsonl row 2: a record must have exactly one label", "set multi_label=true"),
        rows("labels.jsonl", SPAM, HAM | {"label": ["ham", "spam"]}),
    ),
    Case(
        "no label column",
        "classify classify.yaml data.train.0.path=demos.jsonl",
        ("demos.jsonl: no format of the kind 'labelled' fits (found: columns messages)", "text (text, label)"),
    ),
    Case(
        "no votes column",
        "data weak weak.yaml sources=[{'votes':'vote'}] gold=tru",
        ("2 problems", "votes.jsonl: there is no column 'tru' (found: columns", "column 'vote'", "name one of"),
    ),
    Case(
        "a vote that is none",
        "data weak weak.yaml",
        (
            "votes.jsonl row 2: the vote of 'ann' on a pair is 'chosen', 'rejected' or 'tie'",
            "(found: 'a')",
            "data.on_bad_row=drop",
        ),
        rows("votes.jsonl", PAIR | {"votes": {}}, PAIR | {"votes": {"ann": "a"}}),
    ),
    Case(
        "votes that are no mapping",
        "data weak weak.yaml",
        ("votes.jsonl row 1: 'votes' must be a mapping annotator -> vote", "(found: ['chosen'])", "fix or remove"),
        rows("votes.jsonl", PAIR | {"votes": ["chosen"]}),
    ),
    Case(
        "a bad pair (weak)",
        "data weak weak.yaml",
        ("votes.jsonl row 1: chosen is empty", "fix or remove the row"),
        rows("votes.jsonl", PAIR | {"chosen": "", "votes": {"ann": 1}}),
    ),
    Case(
        "nobody votes",
        "data weak weak.yaml",
        ("votes.jsonl: no source votes on any record (found: sources ann)", "check the columns"),
        rows("votes.jsonl", PAIR | {"votes": {"ann": "tie"}}),
    ),
    Case(
        "too few sources for accuracies",
        "data weak weak.yaml",
        ("votes.jsonl: accuracies can be estimated only if at least 3 sources vote", "set label_model.kind=majority"),
        rows("votes.jsonl", PAIR | {"votes": {"ann": 1, "bob": 1}}),
    ),
    Case(
        "a labelling function that fails",
        "data weak weak.yaml sources=[{'function':'json:loads'}]",
        ("votes.jsonl row 1: the labelling function 'json:loads' failed (found: TypeError", "or None to abstain"),
    ),
    Case("no prompts", "generate sft nope.jsonl out.jsonl", ("nope.jsonl: no such file", "did you mean '")),
]


@pytest.mark.parametrize("case", DATA, ids=lambda case: case.name)
def test_one_message_and_nothing_left_behind(
    case: Case, place: Path, contents: Callable[[Path], dict[str, bytes]], call_cli: Run
) -> None:
    check_refusal(case, "DataError", place, contents, call_cli)
