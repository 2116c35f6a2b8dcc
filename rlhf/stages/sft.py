"""Supervised fine-tuning of a pretrained LM on demonstrations."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf.config.schema import SFTConfig
from rlhf.models.adapters import add_lora, policy_with_adapter
from rlhf.models.load import context_length, grow_embeddings, is_adapter, load_causal, resolve
from rlhf.runs.console import Console
from rlhf.stages import rendering
from rlhf.stages.common import (
    RunResult,
    begin,
    check_context,
    open_tokenizer,
    read_data,
    read_template,
    say_model,
    start,
)
from rlhf.stages.fit import fit


def run(config: SFTConfig, console: Console) -> RunResult:
    """Train; writes the run directory. Loss on assistant tokens, the end token among them."""
    directory, state = begin("sft", config, console)
    if state == "finished":
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    tokenizer, renderer = open_tokenizer(config.model, console, template=read_template(config.chat_template))
    train, validation, prints = read_data("demonstration", config.data, config.seed, console)
    train_rows = rendering.conversations(train, renderer, config.data, "training", console)
    valid_rows = rendering.conversations(validation, renderer, config.data, "validation", console)
    model = _model(config, len(tokenizer))
    check_context(config.data.max_length, context_length(model), "data.max_length")
    say_model(model, console)
    start(directory, "sft", config)
    directory.note(data=prints)
    from rlhf.trainers.sft import build

    summary = fit(
        "sft", model, tokenizer, renderer, train_rows, valid_rows, config.optim, directory, config.seed, console,
        build=partial(build, packing=config.data.max_length if config.packing else None), resume=state == "interrupted",
    )  # fmt: skip
    return RunResult(directory.path, summary)


def _model(config: SFTConfig, vocab_size: int) -> Any:
    if not config.lora.enabled:
        return load_causal(config.model, vocab_size=vocab_size)
    if is_adapter(resolve(config.model)):
        return policy_with_adapter(config.model, config.lora)
    model = load_causal(config.model)
    grow_embeddings(model, vocab_size)
    return add_lora(model, config.lora, "CAUSAL_LM")
