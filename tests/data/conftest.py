"""Tiny tokenizers, trained in the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the cat sat on the mat and the dog ran",
    "hello there, how are you today?",
    "user assistant system turn said",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEWLINE = CHATML.replace("<|im_end|>{%", "<|im_end|>\n{%")
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
UNCLOSED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + NEWLINE
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks the newest question, so that a new turn changes an earlier one.
UNSTABLE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{{ ' (newest)' if m.role == 'user' and loop.index > messages | length - 2 }}\n"
    "{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "newline": NEWLINE,
    "llama": LLAMA,
    "unclosed": UNCLOSED,
    "dated": DATED,
    "think": THINK,
    "unstable": UNSTABLE,
    "none": None,
}
SPECIALS = [
    "<|endoftext|>",
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<|user|>",
    "<|assistant|>",
]

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def make() -> Make:
    """make(template, bos=, eos=, pad=, specials=, supply_bos=) -> a tokenizer."""

    def build(
        template: str,
        *,
        bos: str | None = None,
        eos: str | None = "<|endoftext|>",
        pad: str | None = "<|pad|>",
        specials: list[str] | None = None,
        supply_bos: bool = False,
    ) -> Any:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        names = (SPECIALS if specials is None else specials) + ([pad] if pad == "<|pad|>" else [])
        trainer = trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=names,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        if supply_bos:
            pair = [(bos, tokenizer.token_to_id(bos))]
            tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
        wrapped.chat_template = TEMPLATES[template]
        return wrapped

    return build
