"""Comparison of a model's own replies by the demo's simulated rater.

With human annotators this is the labelling round after SFT: the reward model is then trained on responses of the policy
from which PPO starts (on-policy data), not only on responses from other sources.
"""

from __future__ import annotations

from pathlib import Path

from rlhf.config.sections import Sampling
from rlhf.console import Console
from rlhf.data.records import Messages
from rlhf.data.write import refuse_existing_output
from rlhf.demo.generate import DemoGenerator, write_rows
from rlhf.evaluation.answers import generate_responses
from rlhf.tools.generate import load_chat_model

PROMPTS_PER_BATCH = 256
"""Prompts between two updates of the progress bar."""


def rate_responses(model: str, output: Path, *, rows: int, max_new_tokens: int, seed: int, console: Console) -> None:
    """Generate two replies of a model to each of `rows` new demo prompts, and let the simulated rater compare them.

    Pairs of equal replies, or with a reply that reached the maximum length, are left out.

    Args:
        model: run directory, model folder or hub id.
        output: JSONL file of comparisons to write; must not exist.
        rows: number of prompts; none of them is in the comparisons that come with rlhf.
        max_new_tokens: largest length of a reply.
        seed: seed of prompts, sampling and labels.
        console: where progress is shown.
    Raises: ConfigError if the output exists or its folder does not.
    """
    refuse_existing_output(output)
    loaded, renderer = load_chat_model(model, console)
    settings = Sampling(max_new_tokens=max_new_tokens, temperature=1.0)

    def replies(prompts: list[Messages]) -> list[list[str]]:
        ids = [renderer.prompt(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # batches of similar length have little padding
        texts: list[list[str]] = [[] for _ in ids]
        with console.progress("rate", 2 * len(ids), "response") as bar:
            for start in range(0, len(order), PROMPTS_PER_BATCH):
                chunk = order[start : start + PROMPTS_PER_BATCH]
                for draw in (2 * start, 2 * start + 1):
                    drawn = generate_responses(
                        loaded, [ids[i] for i in chunk], renderer, settings, seed=seed, draw=draw
                    )
                    for i, reply in zip(chunk, drawn, strict=True):
                        # A reply that was cut off is not a finished turn, so it cannot be part of a pair.
                        texts[i].append(reply.text if reply.finished else "")
                bar.update(2 * (start + len(chunk)), {})
        return texts

    pairs = DemoGenerator(0, 1.0).rated(rows, f"rated:{seed}", replies)
    write_rows(output, pairs)
    console.note(
        f"{len(pairs)} comparisons of {model} in {output}; {rows - len(pairs)} of equal or cut-off replies left out"
    )
