"""Comparisons of a model's own replies in the demo world. With real people this is the round of labelling after SFT:
the reward model then sees the replies that PPO starts from, not only those of other writers."""

from __future__ import annotations

from pathlib import Path

from rlhf.config.sections import Sampling
from rlhf.console import Console
from rlhf.data.records import Messages
from rlhf.data.write import refuse_existing_output
from rlhf.demo.generate import DemoGenerator, write_rows
from rlhf.evaluation.answers import generate_responses
from rlhf.tools.generate import load_chat_model

PROMPTS_PER_BATCH = 256  # prompts between two updates of the progress bar


def rate_responses(model: str, output: Path, *, rows: int, max_new_tokens: int, seed: int, console: Console) -> None:
    """Ask a model fresh prompts of the demo world twice each and have the simulated rater compare the two replies.

    Args:
        output: JSONL file of comparisons; must not exist. No prompt is one of the shipped comparisons.
        rows: prompts.

    Raises: ConfigError if the output exists or its folder does not.
    """
    refuse_existing_output(output)
    loaded, renderer = load_chat_model(model, console)
    settings = Sampling(max_new_tokens=max_new_tokens, temperature=1.0)

    def replies(prompts: list[Messages]) -> list[list[str]]:
        ids = [renderer.prompt(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
        found: list[list[str]] = [[] for _ in ids]
        with console.progress("rate", 2 * len(ids), "response") as bar:
            for start in range(0, len(order), PROMPTS_PER_BATCH):
                chunk = order[start : start + PROMPTS_PER_BATCH]
                for draw in (2 * start, 2 * start + 1):
                    drawn = generate_responses(
                        loaded, [ids[i] for i in chunk], renderer, settings, seed=seed, draw=draw
                    )
                    for i, reply in zip(chunk, drawn, strict=True):
                        # A reply that was cut off cannot be written as a turn that ended.
                        found[i].append(reply.text if reply.finished else "")
                bar.update(2 * (start + len(chunk)), {})
        return found

    pairs = DemoGenerator(0, 1.0).rated(rows, f"rated:{seed}", replies)
    write_rows(output, pairs)
    console.note(
        f"{len(pairs)} comparisons of {model} in {output}; {rows - len(pairs)} of equal or cut-off replies left out"
    )
