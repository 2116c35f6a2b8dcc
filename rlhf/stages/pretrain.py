"""Pretraining of a small model: train a tokenizer, then a language model on packed text and conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.config.schema import Architecture, PretrainConfig
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.records import Text
from rlhf.data.render import Rendered, Renderer
from rlhf.distributed.launch_env import use_cpu
from rlhf.models.load import check_context
from rlhf.stages.lifecycle import RunResult, begin_run, load_data, start_run
from rlhf.trainers.phase_setup import set_up_phases
from rlhf.trainers.supervised.run import train_language_model

PAD, EOS, USER, ASSISTANT, END = "<|pad|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
# One special token per turn keeps sequences short. The user's next words directly follow the end token of a reply, so
# the language model must predict them at that token, whose hidden state therefore reflects how the reply was received.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{% if loop.first %}<|user|>{% endif %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def run(config: PretrainConfig, console: Console) -> RunResult:
    """Train tokenizer and model, and write the run directory."""
    directory, state = begin_run("pretrain", config, console)
    if state == "finished":
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    train, validation, fingerprints = load_data("document", config.data, config.seed, console)
    tokenizer = new_tokenizer(_texts(train), config.architecture.vocab_size)
    renderer = Renderer(tokenizer)
    console.note(f"tokenizer: {len(tokenizer)} byte-level BPE tokens trained on {len(train)} documents")
    length = config.data.max_length
    check_context(length, config.architecture.context, "data.max_length")
    model = new_model(config.architecture, renderer, len(tokenizer))
    train_rows, valid_rows = (cut_into_blocks(documents, renderer, length) for documents in (train, validation))
    schedule = set_up_phases(model, config, rows=len(train_rows), evaluate=bool(valid_rows), console=console)
    start_run(directory, "pretrain", config)
    directory.note(data=fingerprints)
    from rlhf.trainers.supervised.sft import build_pretrain_trainer

    summary = train_language_model(
        "pretrain",
        model,
        tokenizer,
        renderer,
        directory,
        config.optim,
        config.seed,
        console,
        schedule=schedule,
        saving=config.saving,
        records=len(train_rows),
        evaluate=bool(valid_rows),
        resume=state == "interrupted",
        build=lambda args, report: build_pretrain_trainer(model, tokenizer, train_rows, valid_rows, args, report),
    )
    return RunResult(directory.path, summary)


def new_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer with a chat template. Digits are split, so that no number is a single token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD, USER, ASSISTANT, END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, END],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(architecture: Architecture, renderer: Renderer, vocab_size: int) -> Any:
    """Return a Llama model with tied embeddings and weights drawn from the run's seed.

    On a CPU it uses eager attention: there the backward pass of the fused kernel in bfloat16 takes a third of the time
    of a whole update, and the sequences are short enough not to need it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    a = architecture
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=a.hidden_size,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.heads,
        intermediate_size=a.intermediate_size,
        max_position_embeddings=a.context,
        tie_word_embeddings=True,
        pad_token_id=renderer.pad_id,
        eos_token_id=renderer.end_id,
        bos_token_id=None,
        attn_implementation="eager" if use_cpu() else None,
    )
    return LlamaForCausalLM(config)


def cut_into_blocks(documents: Sequence[Any], renderer: Renderer, length: int) -> list[Rendered]:
    """Concatenate documents and cut them into blocks of equal length; the last, shorter block is kept."""
    stream: list[int] = []
    for document in documents:
        stream += tokenize.tokenize_document(document, renderer).ids
        if not isinstance(document, Text):
            stream.append(renderer.eos_id)
    rows = [stream[i : i + length] for i in range(0, len(stream), length)]
    return [Rendered(ids=row, mask=[True] * len(row)) for row in rows if len(row) > 1]


def _texts(documents: Sequence[Any]) -> Iterator[str]:
    for document in documents:
        if isinstance(document, Text):
            yield document.text
        else:
            yield from (m["content"] for m in document.messages)
