"""Supervised fine-tuning of a pretrained LM on demonstrations."""

from __future__ import annotations

from typing import Any

from rlhf.config.schema import SFTConfig
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.collate import mean_reply_tokens
from rlhf.errors import ConfigError
from rlhf.models.adapters import add_adapter, continued_config, load_adapter
from rlhf.models.load import check_context, context_length, grow_embeddings, is_adapter, resolve_model
from rlhf.models.packed_batch import packed_rows
from rlhf.models.policy import load_causal
from rlhf.runs.memory_phase import phase
from rlhf.stages.lifecycle import RunResult, begin_run, load_data, open_tokenizer, read_template, start_run
from rlhf.trainers.phase_setup import set_up_phases
from rlhf.trainers.supervised.probe_data import load_probe
from rlhf.trainers.supervised.run import train_language_model


def run(config: SFTConfig, console: Console) -> RunResult:
    """Fine-tune a model and write the run directory. Assistant tokens carry loss, including each turn's end token."""
    directory, state = begin_run("sft", config, console)
    if state == "finished":
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    tokenizer, renderer = open_tokenizer(config.model, console, template=read_template(config.chat_template))
    train, validation, fingerprints = load_data("demonstration", config.data, config.seed, console)
    train_rows = tokenize.tokenize_demonstrations(train, renderer, config.data, "training", console)
    valid_rows = tokenize.tokenize_demonstrations(validation, renderer, config.data, "validation", console)
    model = _model(config, len(tokenizer), console)
    soft_prompt = config.peft.prompt_tokens if config.peft.method == "prompt" else 0
    check_context(config.data.max_length + soft_prompt, context_length(model), "data.max_length")
    from rlhf.trainers.supervised.sft import build_sft_trainer, to_dataset

    length = config.data.max_length if config.packing else None
    rows = len(train_rows) if length is None else packed_rows([len(row.ids) for row in train_rows], length)
    schedule = set_up_phases(model, config, rows=rows, evaluate=bool(valid_rows), console=console)
    probe_data = load_probe(
        config,
        config.data,
        config.model,
        renderer,
        console,
        kind="demonstration",
        evaluate=bool(valid_rows),
        scorer=False,
        render=lambda records: to_dataset(
            tokenize.tokenize_demonstrations(records, renderer, config.data, "probe", console)
        ),
    )
    start_run(directory, "sft", config)
    directory.note(data=fingerprints)
    summary = train_language_model(
        "sft",
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
        evaluations=config.evaluations,
        probe_data=probe_data,
        reply_tokens=mean_reply_tokens(train_rows),
        build=lambda args, report: build_sft_trainer(
            model, tokenizer, train_rows, valid_rows, args, report, packing=length
        ),
    )
    return RunResult(directory.path, summary)


@phase("loading")
def _model(config: SFTConfig, vocab_size: int, console: Console) -> Any:
    if not config.peft.enabled:
        return load_causal(config.model, vocab_size=vocab_size)
    folder = resolve_model(config.model)
    if is_adapter(folder):
        from transformers import AutoModelForCausalLM

        adapter = continued_config(config.peft, folder, "CAUSAL_LM")
        return load_adapter(config.model, folder, AutoModelForCausalLM, trainable=True, config=adapter)
    model = load_causal(config.model)
    added = vocab_size - model.get_input_embeddings().weight.shape[0]
    if added > 0:
        if config.peft.method == "prompt":
            raise ConfigError(
                "a soft prompt cannot be trained with new tokens: their embeddings would not be saved",
                found=f"{added} added tokens",
                where="peft.method",
                do="set peft.method=lora, or keep the tokenizer's own chat template",
            )
        console.note(f"adapters do not train embeddings: {added} added tokens keep the mean embedding of the others")
        grow_embeddings(model, vocab_size)
    return add_adapter(model, config.peft, "CAUSAL_LM")
