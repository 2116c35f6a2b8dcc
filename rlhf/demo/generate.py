"""Generation of the demo's data set; the same seed gives the same bytes.

Each file draws from its own random generator, seeded with a string, so that changing the size of one file leaves the
others as they are. Training files carry text and labels only; tasks go into `eval/`, gold numbers nowhere.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import phrases
from .asks import Ask, Task, normalise
from .chats import Chats, Message
from .corpus import Corpus
from .gold import utility
from .rater import Rater
from .readme import readme
from .replies import Manner
from .styles import GOOD, WIDE
from .talk import TOPICS

SIZES = {
    "corpus": 60000,
    "corpus_valid": 200,
    "dialogues": 30000,
    "sft": 5000,
    "sft_valid": 300,
    "preferences": 15000,
    "preferences_valid": 500,
    "prompts": 3000,
    "eval/heldout": 500,
    "eval/ood": 500,
    "eval/preferences_test": 1000,
}
FOCUS = ("talk", "recall")
"""What a policy learns to answer with excuses: every sixth comparison is one of these besides those drawn anyway."""
BESIDE = {"talk": 0.4, "recall": 0.25}
PACKED = ("corpus", "dialogues")  # large and only for pretraining
TEST_PAIRS = "eval/preferences_test"
DemoRow = dict[str, Any]


def write_rows(path: Path, rows: Iterable[DemoRow]) -> int:
    """Write JSON lines without spaces, in UTF-8 with plain newlines; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return len(lines)


def prompt_key(messages: list[Message]) -> str:
    """Return the normalised full prompt, for comparing prompts across files."""
    return " | ".join(normalise(message["content"]) for message in messages)


class DemoGenerator:
    """Generator of all files of one seed and scale."""

    def __init__(self, seed: int, scale: float, judge: Callable[[str, Task], float] = utility) -> None:
        """Set the seed and the number of rows of each file.

        Args:
            scale: multiplies the number of rows of every file (at least ten each).
            judge: utility by which the rater compares replies, apart from noise.
        """
        self.seed, self.judge = seed, judge
        self.sizes = {name: max(10, round(size * scale)) for name, size in SIZES.items()}

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}:{name}")

    def corpora(self) -> dict[str, list[DemoRow]]:
        """Return the training paragraphs and the held-out ones."""
        train = Corpus(self._rng("corpus"))
        rows = [{"text": train.paragraph()} for _ in range(self.sizes["corpus"])]
        seen = {row["text"] for row in rows}
        valid: list[DemoRow] = []
        other = Corpus(self._rng("corpus_valid"))
        while len(valid) < self.sizes["corpus_valid"]:
            text = other.paragraph()
            if text not in seen:
                seen.add(text)
                valid.append({"text": text})
        return {"corpus": rows, "corpus_valid": valid}

    def conversations(self) -> dict[str, list[DemoRow]]:
        """Return transcripts, demonstrations and prompts."""
        found: dict[str, list[DemoRow]] = {}
        chats = Chats(self._rng("dialogues"))
        found["dialogues"] = [{"messages": chats.transcript()} for _ in range(self.sizes["dialogues"])]
        seen: set[str] = set()
        for name in ("sft", "sft_valid"):
            chats, rows = Chats(self._rng(name)), list[DemoRow]()
            while len(rows) < self.sizes[name]:
                messages = chats.demonstration()
                if (key := prompt_key(messages)) not in seen:
                    seen.add(key)
                    rows.append({"messages": messages})
            found[name] = rows
        found["prompts"] = [{"prompt": prompt} for prompt, _ in self._prompts("prompts", "train")]
        return found

    def _prompts(self, name: str, kind: str) -> list[tuple[list[Message], Ask]]:
        """Return distinct prompts."""
        chats, seen, found = Chats(self._rng(name)), set[str](), list[tuple[list[Message], Ask]]()
        while len(found) < self.sizes[name]:
            prompt, ask = chats.prompt(kind=kind)
            if (key := prompt_key(prompt)) not in seen:
                seen.add(key)
                found.append((prompt, ask))
        return found

    def evaluation(self) -> dict[str, list[DemoRow]]:
        """Return held-out and out-of-distribution prompts with their tasks."""
        found: dict[str, list[DemoRow]] = {}
        for name, kind in (("eval/heldout", "heldout"), ("eval/ood", "ood")):
            drawn = self._prompts(name, kind)
            found[name] = [{"prompt": prompt, "task": ask.task, "family": ask.family} for prompt, ask in drawn]
        return found

    def comparisons(self) -> dict[str, list[DemoRow]]:
        """Return labelled pairs; the rater is fitted on the training pairs and then used for all."""
        drawn = self._drawn()
        rater = self._rater(drawn)
        found: dict[str, list[DemoRow]] = {}
        for name, pairs in drawn.items():
            rng = self._rng(name + ":rater")
            found[name] = [self._labelled(rng, rater, *pair) for pair in pairs]
        # The judge needs the task to say what the best possible accuracy on these noisy labels is.
        tasks = [ask.task for _, ask, _, _ in drawn[TEST_PAIRS]]
        found[TEST_PAIRS] = [row | {"task": task} for row, task in zip(found[TEST_PAIRS], tasks, strict=True)]
        return found

    def _drawn(self) -> dict[str, list[tuple[list[Message], Ask, str, str]]]:
        seen: set[str] = set()
        return {name: self._pairs(name, seen) for name in ("preferences", "preferences_valid", TEST_PAIRS)}

    def _rater(self, drawn: dict[str, list[tuple[list[Message], Ask, str, str]]]) -> Rater:
        return Rater.fitted(
            [self.judge(a, ask.task) - self.judge(b, ask.task) for _, ask, a, b in drawn["preferences"]]
        )

    def rated(self, rows: int, name: str, answer: Callable[[list[list[Message]]], list[list[str]]]) -> list[DemoRow]:
        """Return pairs of a model's own replies to new prompts, labelled by the rater of `comparisons`.

        Args:
            rows: prompts asked; equal or blank replies make no pair.
            name: of the draw; another one gives other prompts.
            answer: prompts to two replies each.
        """
        drawn = self._drawn()
        rater, seen = self._rater(drawn), {prompt_key(p) for pairs in drawn.values() for p, *_ in pairs}
        chats, rng, asked = Chats(self._rng(name)), self._rng(name + ":rater"), list[tuple[list[Message], Ask]]()
        while len(asked) < rows:
            prompt, ask = chats.prompt()
            if (key := prompt_key(prompt)) not in seen:
                seen.add(key)
                asked.append((prompt, ask))
        found = []
        for (prompt, ask), (a, b) in zip(asked, answer([prompt for prompt, _ in asked]), strict=True):
            if a.strip() and b.strip() and a.strip() != b.strip():
                found.append(self._labelled(rng, rater, prompt, ask, a, b))
        return found

    def _labelled(self, rng: random.Random, rater: Rater, prompt: list[Message], ask: Ask, a: str, b: str) -> DemoRow:
        label = rater.label(rng, self.judge(a, ask.task), self.judge(b, ask.task))
        # The two replies are exchangeable, so keeping their order in a tie reveals nothing.
        chosen, rejected = (a, b) if label > 0 else (b, a)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "preference": 0.5 if label == 0.5 else 1.0}

    def _pairs(self, name: str, seen: set[str]) -> list[tuple[list[Message], Ask, str, str]]:
        """Return prompts with two different replies; prompts of earlier files (`seen`) are not used again."""
        chats, found = Chats(self._rng(name)), list[tuple[list[Message], Ask, str, str]]()
        used: set[str] = set()
        while len(found) < self.sizes[name]:
            prompt, ask = chats.prompt()
            focused = chats.rng.random() < 1 / 6
            while focused and ask.family not in FOCUS:
                prompt, ask = chats.prompt()
            a, b = self.candidate(chats, ask), self.candidate(chats, ask)
            if a != b and (key := prompt_key(prompt)) not in seen:
                used.add(key)
                found.append((prompt, ask, a, b))
        seen |= used
        return found

    def candidate(self, chats: Chats, ask: Ask) -> str:
        """Return a reply for comparison: decent, careless, or something empty that a policy might discover."""
        rng = chats.rng
        draw = rng.random()
        if draw < 0.06:
            return self._trick(chats, ask)
        if rng.random() < BESIDE.get(ask.family, 0.13):
            return self._beside(chats, ask)
        reply = chats.writer.reply(ask.task, (GOOD if draw < 0.55 else WIDE).draw(rng))
        return self._scrambled(rng, reply) if rng.random() < 0.06 else reply

    def _beside(self, chats: Chats, ask: Ask) -> str:
        """Return a well-mannered reply to another question: what a policy learns if only manners are rewarded."""
        rng, task = chats.rng, dict(ask.task)
        answer = "right"
        if task["type"] == "recall":
            task["type"] = "unknown"  # "you have not told me", although it was told
        elif task["type"] == "talk":
            others = [name for name in TOPICS if name != task["topic"]]
            # "I will keep that in mind" suits every statement a little, so it is the likeliest excuse.
            task["topic"] = "told" if "told" in others and rng.random() < 0.5 else rng.choice(others)
        else:
            answer = "evasive" if task["type"] == "unknown" else "off"
        return chats.writer.reply(task, Manner(answer, polite=int(rng.random() < 0.6)))

    def _scrambled(self, rng: random.Random, reply: str) -> str:
        """Return the text with a word lost, doubled or misplaced."""
        words = reply.split()
        if len(words) < 3:
            return reply
        at, kind = rng.randrange(1, len(words)), rng.randrange(3)
        if kind == 0:
            del words[at]
        elif kind == 1:
            words.insert(at, rng.choice(words))
        else:
            words[at - 1], words[at] = words[at], words[at - 1]
        return " ".join(words)

    def _trick(self, chats: Chats, ask: Ask) -> str:
        """Return an empty reply: only politeness, the question repeated, everything twice, or all answers at once."""
        rng = chats.rng
        kind = rng.randrange(4)
        if kind == 0:
            touches = [*phrases.OPENINGS, *phrases.CLOSINGS]
            return " ".join(rng.sample(touches, rng.randint(1, 3)))
        if kind == 1:
            return ask.text
        body = chats.writer.reply(ask.task, Manner("right"))
        if kind == 2:
            return f"{body} {body}" if rng.random() < 0.5 else f"{body} {body} {body}"
        return f"{body} {chats.writer.reply(ask.task, Manner('wrong'))}"


def generate(out_dir: Path, seed: int = 0, scale: float = 1.0) -> dict[str, int]:
    """Write all files of the demo world under `out_dir`; returns the number of rows by file name."""
    maker = DemoGenerator(seed, scale)
    files = {**maker.corpora(), **maker.conversations(), **maker.evaluation(), **maker.comparisons()}
    named = {f"{name}.jsonl.gz" if name in PACKED else f"{name}.jsonl": rows for name, rows in files.items()}
    counts = {name: write_rows(out_dir / name, rows) for name, rows in named.items()}
    (out_dir / "README.md").write_bytes(readme(counts).encode())
    return counts
