"""`rlhf generate` and `rlhf chat`: replies of a model to a file of prompts, or in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config.sections import ModelSource, Sampling, Source
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.render import Renderer
from rlhf.data.sources import load_records
from rlhf.data.write import refuse_existing_output, write_jsonl
from rlhf.distributed.engine import inference_device, quiet_libraries
from rlhf.errors import DataError
from rlhf.evaluation.answers import generate_responses
from rlhf.models.load import check_context, context_length, resolve_model
from rlhf.models.soft_prompt import load_for_generation
from rlhf.stages.lifecycle import open_tokenizer


def load_chat_model(model: str, console: Console) -> tuple[Any, Renderer]:
    """Load a causal LM for sampling, and its renderer."""
    source = ModelSource(path=model)
    resolve_model(source)
    quiet_libraries(telemetry=False)
    tokenizer, renderer = open_tokenizer(source, console)
    loaded = load_for_generation(source, vocab_size=len(tokenizer))
    return loaded.to(inference_device()).eval(), renderer


def generate_file(
    model: str, prompts: str, output: Path, *, temperature: float, max_new_tokens: int, seed: int, console: Console
) -> None:
    """Generate one response to each prompt, and write them as JSON lines with prompt, response and finished.

    Args:
        model: run directory, model folder or hub id.
        prompts: file of prompts, in any format that PPO reads.
        output: file to write.
        temperature: temperature of the sampling; 0 = greedy.
        max_new_tokens: largest length of a response.
        seed: seed of the sampling.
        console: where notes and progress are printed.
    Raises: ConfigError if the output exists or its folder does not; DataError for a malformed prompt, or one that is
        too long for the model's context.
    """
    refuse_existing_output(output)
    records = load_records("prompt", [Source(path=prompts)], seed=seed, on_bad_row="error", deduplicate=False).records
    loaded, renderer = load_chat_model(model, console)
    context = context_length(loaded)
    max_prompt_tokens = (context or 1 << 30) - max_new_tokens
    check_context(max_new_tokens + 1, context, "--max-new-tokens")
    ids = tokenize.tokenize_prompts(records, renderer, max_prompt_tokens, "error", "error", console)
    settings = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    answers = []
    with console.progress("generate", len(ids), "prompt") as bar:
        for start in range(0, len(ids), settings.batch_size):
            chunk = ids[start : start + settings.batch_size]
            answers += generate_responses(loaded, chunk, renderer, settings, seed=seed, draw=start)
            bar.update(len(answers), {})
    pairs = zip(records, answers, strict=True)
    write_jsonl(output, ({"prompt": r.messages, "response": a.text, "finished": a.finished} for r, a in pairs))
    console.note(f"{len(answers)} responses in {output}")


def chat_in_terminal(model: str, *, temperature: float, max_new_tokens: int, seed: int) -> None:
    """Chat in the terminal: read a line, print the model's reply, and keep the conversation.

    Args:
        model: run directory, model folder or hub id.
        temperature: temperature of the sampling; 0 = greedy.
        max_new_tokens: largest length of a reply.
        seed: seed of the sampling.
    """
    console = Console()
    loaded, renderer = load_chat_model(model, console)
    max_prompt_tokens = (context_length(loaded) or 1 << 30) - max_new_tokens
    settings = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    messages: list[dict[str, str]] = []
    turn = 0
    console.note("an empty line or Ctrl-D ends the chat; /new starts a new conversation")
    while True:
        try:
            line = input("you > ").strip()
        except EOFError:
            return
        if not line:
            return
        if line == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        try:
            ids = renderer.prompt(messages)
        except DataError as error:
            messages.pop()
            console.text(f"(not sent: {error})")
            continue
        while len(ids) > max_prompt_tokens and len(messages) > 2:  # drop the oldest exchange
            messages = messages[2:]
            console.note("(the conversation exceeds the model's context; its oldest exchange is dropped)")
            ids = renderer.prompt(messages)
        if len(ids) > max_prompt_tokens:
            messages.pop()
            console.text("(not sent: too long for the model's context)")
            continue
        reply = generate_responses(loaded, [ids], renderer, settings, seed=seed, draw=turn)[0]
        turn += 1
        console.text(f"model > {reply.text}" + ("" if reply.finished else " ..."))
        if reply.text.strip():
            messages.append({"role": "assistant", "content": reply.text})
        else:
            messages.pop()  # an empty assistant turn cannot be rendered
            console.note("(the reply is empty; this exchange is dropped)")
