"""How good demonstrations are, how reliable the rater is, and that quality is readable after a reply."""

from __future__ import annotations

import ast
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

from rlhf.demo.asks import reserved_combo
from rlhf.demo.chats import Chats
from rlhf.demo.generate import DemoGenerator
from rlhf.demo.gold import explain, near_perfect, utility
from rlhf.demo.phrases import REACTIONS
from rlhf.demo.rater import Rater
from rlhf.demo.styles import CROWD, GOOD, SFT, WIDE, Style, drift
from rlhf.demo.world import world

PACKAGE = Path(__file__).resolve().parents[2] / "rlhf"


def quality(style: Style, count: int = 1500) -> tuple[float, float, float]:
    """Mean utility, share of near-perfect replies, share of right answers."""
    chats = Chats(random.Random("quality"))
    total = perfect = right = 0.0
    for _ in range(count):
        _, ask = chats.prompt()
        reply = chats.writer.reply(ask.task, style.draw(chats.rng))
        total += utility(reply, ask.task)
        perfect += near_perfect(reply, ask.task)
        right += explain(reply, ask.task)["verdict"] == "right"
    return total / count, perfect / count, right / count


def test_demonstrations_are_decent_but_seldom_perfect() -> None:
    _, perfect, right = quality(SFT)
    assert 0.12 <= perfect <= 0.18
    assert 0.75 <= right <= 0.85


def test_demonstrations_lie_between_the_crowd_and_the_good_style() -> None:
    crowd, wide, sft, good = (quality(style, 800)[0] for style in (CROWD, WIDE, SFT, GOOD))
    assert max(crowd, wide) < sft - 0.4
    assert sft < good - 0.4


def test_rater_agrees_with_gold_as_often_as_intended() -> None:
    maker = DemoGenerator(0, 1.0)
    maker.sizes["preferences"] = 3000
    pairs = maker._pairs("preferences", set())
    values = [(utility(a, ask.task), utility(b, ask.task)) for _, ask, a, b in pairs]
    rater = Rater.fitted([a - b for a, b in values])
    rng = random.Random("rater")
    labels = [rater.label(rng, a, b) for a, b in values]
    decided = [(label, a - b) for label, (a, b) in zip(labels, values, strict=True) if label != 0.5 and a != b]
    assert 0.75 <= sum((label > 0.5) == (gap > 0) for label, gap in decided) / len(decided) <= 0.80
    assert 0.05 <= labels.count(0.5) / len(labels) <= 0.08
    gaps = [abs(a - b) for a, b in values]
    tied = [gap for gap, label in zip(gaps, labels, strict=True) if label == 0.5]
    assert sum(tied) / len(tied) < 0.5 * sum(gaps) / len(gaps)


def test_rater_order_of_presentation_does_not_matter() -> None:
    rater = Rater(1.4, 0.25)
    counts = Counter(rater.label(random.Random(f"order{n}"), 1.0, 1.0) for n in range(4000))
    assert abs(counts[1.0] - counts[0.0]) < 250


def test_a_reaction_begins_with_the_verdict_on_the_answer() -> None:
    """The first word after a reply depends on whether it answers, and on nothing else."""
    chats = Chats(random.Random("reactions"))
    said: dict[str, set[str]] = {}
    for _ in range(2000):
        _, ask = chats.prompt()
        manner = CROWD.draw(chats.rng)
        said.setdefault(manner.answer, set()).add(chats.react(ask.task, manner).split()[0].strip(",."))
    assert said == {"right": {"Right"}, "wrong": {"Wrong"}, "evasive": {"No"}, "off": {"No"}}


def test_reactions_tell_good_manners_from_bad_ones() -> None:
    """What follows the verdict helps to predict the rest of a reply's quality."""
    chats = Chats(random.Random("manners"))
    pleased = set(REACTIONS["polite"])
    good, bad = [], []
    for _ in range(2000):
        _, ask = chats.prompt()
        manner = replace(CROWD.draw(chats.rng), answer="right")
        more = chats.react(ask.task, manner)
        value = utility(chats.writer.reply(ask.task, manner), ask.task)
        if any(text in more for text in pleased):
            good.append(value)
        elif any(text in more for name, texts in REACTIONS.items() if name != "polite" for text in texts):
            bad.append(value)
    assert sum(good) / len(good) > sum(bad) / len(bad) + 1.0


def test_a_persona_persists() -> None:
    rng = random.Random("persona")
    drawn = [CROWD.draw(rng) for _ in range(2000)]
    same = sum(persona.answer == drift(rng, persona).answer for persona in drawn) / len(drawn)
    assert 0.90 < same < 0.98


def test_reserved_combos_are_a_small_share_and_stated_in_the_corpus() -> None:
    combos = world().combos
    reserved = [combo for combo in combos if reserved_combo(*combo)]
    assert 0.08 < len(reserved) / len(combos) < 0.16


def test_nothing_that_trains_can_import_the_judge() -> None:
    """Only evaluation and the generator may know the truth; the generator may be reached from the command line."""
    judges = {"gold", "grammar", "rater"}
    offenders = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        generators = [Path("demo") / name for name in ("features.py", "generate.py", "gold.py", "rules.py")]
        if relative.parts[0] == "evaluation" or relative in generators:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                inside = node.level > 0 and relative.parts[0] == "demo"
                if (inside or "demo" in names) and names & judges:
                    offenders.append(str(relative))
            elif isinstance(node, ast.Import):
                offenders += [str(relative) for alias in node.names if alias.name.startswith("rlhf.demo.gold")]
    assert offenders == []
