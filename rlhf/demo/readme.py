"""The README that travels with the demo data."""

from __future__ import annotations

_FILES = (
    (
        "corpus.jsonl.gz",
        '`{"text"}`',
        "plain paragraphs about the world, two of five a true-or-false game: pretraining",
    ),
    ("corpus_valid.jsonl", '`{"text"}`', "unseen paragraphs: perplexity"),
    (
        "dialogues.jsonl.gz",
        '`{"messages"}`',
        "chats and quizzes of 2-6 exchanges, good and bad personas, users who react: pretraining",
    ),
    ("sft.jsonl", '`{"messages"}`', "demonstrations of mixed quality; the last turn is the assistant's"),
    ("sft_valid.jsonl", '`{"messages"}`', "more of them, prompts not in `sft.jsonl`"),
    ("preferences.jsonl", '`{"prompt", "chosen", "rejected", "preference"}`', "comparisons for the reward model"),
    ("preferences_valid.jsonl", "same", "prompts not in `preferences.jsonl`"),
    ("prompts.jsonl", '`{"prompt"}`', "prompts for PPO"),
    ("eval/heldout.jsonl", '`{"prompt", "task", "family"}`', "known wordings and facts, unseen prompts"),
    ("eval/ood.jsonl", "same", "wordings never used in training, about facts never asked there where a fact is asked"),
    (
        "eval/preferences_test.jsonl",
        '`{"prompt", "chosen", "rejected", "preference", "task"}`',
        "comparisons whose prompts are in neither of the other two",
    ),
)

_HEAD = """# Demo data: a small English world

About ninety everyday animals, foods, plants, things and jobs, what is true of them, and people who ask an assistant
about them, about themselves, or just want to talk. Everything is written by `rlhf.demo` from tables and a seed;
nothing is taken from elsewhere. Rebuild it byte for byte with

    rlhf data demo

| file | record | rows | what it is |
|---|---|---:|---|
"""

_TAIL = """
`messages` and `prompt` are lists of `{"role": "user" | "assistant", "content": text}`. A `prompt` ends with a user
turn and has at most 60 words. `preference` is 1.0 if `chosen` was preferred and 0.5 if the rater called a tie (then
the order of the two means nothing). A `task` says what a right answer must state; only `eval/` has tasks, so that
scoring need not parse prompts, and no file holds a gold score.

**How the pieces fit.** Transcripts in `dialogues.jsonl.gz` have one assistant persona each (truthful or not, polite or
rude, brief or rambling, ...), and the next user turn begins with a word on the last reply: "Right", "Wrong" or "No
answer", then what else was striking. In the chat template these words follow the reply's end token at once. So a
language model learns to know at the end of a reply how good it was, and that is where a reward model reads. The games
of true and false in `corpus.jsonl.gz` teach it to check facts, for which it would need many more transcripts.
Demonstrations are mostly right, but a reply that is right, polite once and has nothing superfluous answers only about
one prompt in six: imitation alone stays well below what preferences ask for. The simulated rater follows
Bradley-Terry on a gold utility, agrees with the gold order on about 77 % of the pairs it decides, and calls about 6 %
ties, so accuracy on `eval/preferences_test.jsonl` has a ceiling, which evaluation computes from its tasks.

**What is kept apart.** About 5 % of all question strings (by content hash) are never a user turn in training; the
held-out prompts end in those. About a quarter of the wordings and 12 % of the (entity, attribute) pairs are never
used in questions outside `eval/ood.jsonl`; the facts themselves are stated in `corpus.jsonl.gz`.

**What this world can and cannot show.** It can show that the pipeline works from end to end, with a model that trains
on a CPU in minutes and replies that anybody can judge by reading: supervised imitation, a reward model learnt from
noisy comparisons, a policy that becomes more truthful, kinder and briefer, and also over-optimisation, because the
judge is a program that knows the truth. It cannot show anything about the size of such effects in real language
models. The judge reads only this world's grammar, honesty here means a table look-up, politeness is a list of
sentences, and the rater is unbiased and errs independently from pair to pair, which people do not. A method that wins
here has passed a necessary test, not a sufficient one.

Licence: Apache-2.0, as the rest of the project.
"""


def readme(counts: dict[str, int]) -> str:
    """Return the text of `README.md`, with the number of rows of each file."""
    rows = [f"| `{name}` | {record} | {counts[name]} | {what} |" for name, record, what in _FILES]
    return _HEAD + "\n".join(rows) + "\n" + _TAIL
