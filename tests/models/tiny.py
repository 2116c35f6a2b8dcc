"""A tiny Llama (30k parameters), its tokenizer, and token rows, which tests of models, rollouts and trainers share."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema import Architecture
from rlhf.config.sections import ModelSource, Peft
from rlhf.data.collate import pad_left, pad_right
from rlhf.data.render import Renderer
from rlhf.models.load import disable_dropout, set_stop_tokens
from rlhf.models.model_metadata import save_tokenizer_and_handover
from rlhf.rollout.types import Rollout
from rlhf.stages.pretrain import new_model, new_tokenizer

TEXTS = ["the cat sat on the mat", "what is a dog? a dog is an animal", "good day to you", "yes or no, please tell me"]
LORA = Peft(method="lora", r=4, alpha=8.0)
METHODS = {
    "LoRA": LORA,
    "rsLoRA": Peft(method="lora", r=4, alpha=8.0, rslora=True),
    "DoRA": Peft(method="lora", r=4, alpha=8.0, dora=True),
    "IA3": Peft(method="ia3"),
}
"""Adapters that every stage can train."""
PROMPT = Peft(method="prompt", prompt_tokens=5)
VOCABULARY, HIDDEN = 320, 32


@cache
def tokenizer() -> Any:
    """Return a byte-level BPE tokenizer with the chat template of `rlhf pretrain`."""
    return new_tokenizer(iter(TEXTS * 3), VOCABULARY)


@cache
def renderer() -> Renderer:
    """Return the renderer of `tokenizer`."""
    return Renderer(tokenizer())


def new(seed: int = 0, *, spread: float = 1.0, layers: int = 2) -> Any:
    """Return a causal LM whose weights are large enough for distinct next-token probabilities (`spread` nats)."""
    torch.manual_seed(seed)
    a = Architecture(vocab_size=300, hidden_size=HIDDEN, layers=layers, heads=2, intermediate_size=48, context=128)
    model = new_model(a, renderer(), len(tokenizer()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed" in name:
                p.normal_(0.0, spread * HIDDEN**-0.5)
            elif p.dim() == 2:
                p.normal_(0.0, 1.5 * p.shape[1] ** -0.5)
    disable_dropout(model)
    model.set_attn_implementation("sdpa")  # as it will be when it is loaded again
    return model.eval()


def save(model: Any, folder: Path, *, with_tokenizer: bool = True) -> str:
    """Write a model as a stage does, and return the folder."""
    if hasattr(model, "generation_config"):
        set_stop_tokens(model, renderer())
    model.save_pretrained(str(folder))
    if with_tokenizer:
        save_tokenizer_and_handover(folder, "sft", renderer(), tokenizer())
    return str(folder)


def source(path: Any, dtype: str = "float32") -> ModelSource:
    """Return a model source for a local folder."""
    return ModelSource(path=str(path), dtype=dtype)


def rows(seed: int, lengths: list[int]) -> list[list[int]]:
    """Return rows of ordinary token ids (no special tokens) of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, VOCABULARY - 30, (n,), generator=generator).tolist() for n in lengths]


def rollout(seed: int, prompts: list[int], responses: list[int], *, finished: list[bool] | None = None) -> Rollout:
    """Return a rollout of random tokens with the given lengths; finished rows end with the end token."""
    asked, said = rows(seed, prompts), rows(seed + 1, responses)
    ended = finished if finished is not None else [True] * len(said)
    said = [[*r[:-1], renderer().end_id] if e else r for r, e in zip(said, ended, strict=True)]
    prompt_ids, prompt_mask = pad_left(asked, renderer().pad_id)
    response_ids, response_mask = pad_right(said, renderer().pad_id)
    made = Rollout(
        prompt_ids,
        prompt_mask,
        response_ids,
        response_mask,
        torch.tensor(ended),
        torch.arange(len(said)),
        torch.zeros(response_ids.shape),
        torch.zeros((*response_ids.shape, 0), dtype=torch.uint8),
    )
    made.validate()
    return made


def widen(made: Rollout, left: int, right: int, fill: int) -> Rollout:
    """Return the same episodes with more padding on both sides."""
    pad = torch.nn.functional.pad
    return type(made)(
        **vars(made)
        | {
            "prompt_ids": pad(made.prompt_ids, (left, 0), value=fill),
            "prompt_mask": pad(made.prompt_mask, (left, 0)),
            "response_ids": pad(made.response_ids, (0, right), value=fill),
            "response_mask": pad(made.response_mask, (0, right)),
            "sampled_logprobs": pad(made.sampled_logprobs, (0, right)),
            "support": pad(made.support, (0, 0, 0, right), value=255),
        }
    )


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the names of the parameters that are no longer bit-equal to a snapshot."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
