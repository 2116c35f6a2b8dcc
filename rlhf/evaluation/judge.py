"""Judges: any Python function over a response."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf.errors import DataError
from rlhf.rollout.rewards import load_function

Messages = list[dict[str, str]]
Judge = Callable[[Messages, str, Mapping[str, Any], bool], float]


def load_judge(name: str) -> Judge:
    """Import 'module:function'. It is the user's own code and runs with the user's rights.

    Raises: ConfigError if there is no such function.
    """
    return load_function(name, what="judge", where="judge")


def demo_gold(prompt: Messages, response: str, record: Mapping[str, Any], finished: bool) -> float:
    """Gold utility of the demo world. Known to evaluation only; no training stage may import it."""
    from rlhf.demo.gold import utility

    if "task" not in record:
        raise DataError(
            "the demo's judge needs the column 'task'", found=f"columns {', '.join(record)}", where="judge",
            do="judge prompts of data/demo/eval with it, and others with a function of your own",
        )  # fmt: skip
    return utility(response, record["task"], finished)
