"""Conversations: prompts with history, demonstrations, and pretraining transcripts with reacting users.

In the transcripts the next user turn often reacts to the quality of the reply before it. This makes a language model
represent the quality of a reply at its end. Otherwise nothing after the reply would depend on how good the reply was,
and a reward model, which reads the last position, would start from features that were never trained.
"""

from __future__ import annotations

import random
from typing import Any

from . import phrases
from .asks import Ask, Context, held_out
from .questions import FAMILIES, Questions
from .replies import Manner, Writer
from .styles import CROWD, QUIZ, SFT, drift

Message = dict[str, str]
MAX_PROMPT_WORDS = 60
QUIZZES = 0.4  # share of the transcripts
_VERDICT = {"right": "right", "wrong": "wrong", "evasive": "missing", "off": "missing"}


def words_in(messages: list[Message]) -> int:
    """Return the number of words of all turns together."""
    return sum(len(message["content"].split()) for message in messages)


class Chats:
    """Draws conversations from one random generator."""

    def __init__(self, rng: random.Random) -> None:
        """Create writers of questions and replies that share the random generator `rng`."""
        self.rng = rng
        self.writer = Writer(rng)
        self.usual = Questions(rng)
        self.novel = Questions(rng, ood=True)

    def _training_ask(self, context: Context) -> Ask:
        """Return a question that is not set aside for evaluation."""
        while True:
            ask = self.usual.tell(context) if self._tells(context) else self.usual.ask(context)
            if not held_out(ask.text):
                return ask

    def _tells(self, context: Context) -> bool:
        return not context.told and self.rng.random() < 0.08

    def _history(self, turns: int) -> tuple[list[Message], Context]:
        """Return earlier exchanges, answered in the manner of the demonstrations."""
        messages: list[Message] = []
        context = Context()
        for _ in range(turns):
            ask = self._training_ask(context)
            reply = self.writer.reply(ask.task, SFT.draw(self.rng))
            messages += [{"role": "user", "content": ask.text}, {"role": "assistant", "content": reply}]
            context.advance(ask)
        return messages, context

    def prompt(self, *, kind: str = "train") -> tuple[list[Message], Ask]:
        """Return a prompt and its last question; kind: train, heldout (set-aside strings), ood (reserved wordings)."""
        while True:
            turns = self.rng.choices((0, 1, 2), (0.70, 0.26, 0.04))[0]
            messages, context = self._history(turns)
            if kind == "train":
                ask = self._training_ask(context)
            elif kind == "ood":
                ask = self.novel.ask(context)
            else:
                family = self.rng.choices(list(FAMILIES), list(FAMILIES.values()))[0]
                ask = self.usual.ask(context, family)
                for _ in range(200):
                    if held_out(ask.text):
                        break
                    ask = self.usual.ask(context, family)
            if (kind == "heldout") != held_out(ask.text) and kind != "ood":
                continue
            messages = [*messages, {"role": "user", "content": ask.text}]
            if words_in(messages) <= MAX_PROMPT_WORDS:
                return messages, ask

    def demonstration(self) -> list[Message]:
        """Return a prompt followed by a reply of the demonstration writers."""
        messages, ask = self.prompt()
        return [*messages, {"role": "assistant", "content": self.writer.reply(ask.task, SFT.draw(self.rng))}]

    def transcript(self) -> list[Message]:
        """Return a quiz, or two to four exchanges with one persona and a user who reacts."""
        if self.rng.random() < QUIZZES:
            return self.quiz()
        rng, context, messages = self.rng, Context(), list[Message]()
        persona = CROWD.draw(rng)
        reaction = ""
        for _ in range(rng.choices((2, 3, 4), (0.35, 0.40, 0.25))[0]):
            while True:
                ask = self._training_ask(context)
                turn = f"{reaction} {ask.text}".strip()
                if not held_out(turn):
                    break
            manner = persona if not messages else drift(rng, persona)
            reply = self.writer.reply(ask.task, manner)
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": reply}]
            context.advance(ask)
            persona, reaction = manner, self.react(ask.task, manner)
        return messages

    def quiz(self) -> list[Message]:
        """Return four to six questions whose answers the user marks. Whether an answer is true decides the next word,
        so a language model learns to judge it, and to carry the judgement past the end of the reply."""
        rng, context, messages = self.rng, Context(), list[Message]()
        mark = ""
        for _ in range(rng.randint(4, 6)):
            while True:
                ask = self._training_ask(context)
                turn = f"{mark} {ask.text}".strip()
                if ask.task["type"] != "talk" and not held_out(turn):
                    break
            manner = QUIZ.draw(rng)
            messages += [
                {"role": "user", "content": turn},
                {"role": "assistant", "content": self.writer.reply(ask.task, manner)},
            ]
            context.advance(ask)
            mark = self.react(ask.task, manner)
        return messages

    def react(self, task: dict[str, Any], manner: Manner) -> str:
        """Return what the user says about a reply: first whether it answers, then what else was striking.

        The verdict is always the first word and depends on the reply alone, so that the hidden state of the reply's
        last token learns to represent its quality."""
        rng = self.rng
        kind = task["type"] if task["type"] in ("talk", "unknown") else "fact"
        said = [rng.choice(phrases.VERDICTS[f"{_VERDICT[manner.answer]} {kind}"])]
        faults = [name for name in manner.defects() if name not in ("wrong", "evasive")]
        said += [rng.choice(phrases.REACTIONS[name]) for name in faults if rng.random() < 0.8]
        if not faults and manner.polite:
            said.append(rng.choice(phrases.REACTIONS["polite"]))
        return " ".join(said)
