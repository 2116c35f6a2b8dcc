"""Configuration sections that several stages share. Imports no torch.

A field's description is what `rlhf show` and the configuration reference print. Only what a user decides is a field;
quantities that follow from other settings are methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from rlhf.errors import ConfigError

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base class of all sections: frozen; unknown keys and non-finite numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, values: Any) -> Any:
        """Fill a partly given inner section with the defaults that this class sets for it."""
        if not isinstance(values, dict):
            return values
        defaults = {n: f.default for n, f in cls.model_fields.items() if isinstance(f.default, BaseModel)}
        part = {n: d.model_dump(exclude_unset=True) for n, d in defaults.items() if isinstance(values.get(n), dict)}
        return values | {n: d | values[n] for n, d in part.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a boolean where another type is expected; pydantic would read true as 1 or 1.0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(
                f"expected no boolean, got {value} (YAML reads yes, no, on and off as booleans; put quotes around text)"
            )
        return value


Precision = Literal["auto", "native", "float32", "bfloat16"]
PRECISION = (
    "auto = bfloat16 on a GPU that supports it, else float32; native = bfloat16 also on a CPU with bfloat16 "
    "instructions (other CPUs emulate it slowly, so they use float32)"
)


class Saving(Section):
    """When checkpoints are saved, how many are kept, and how long a run may take to end after SIGTERM."""

    keep: Count = Field(
        2, description="number of checkpoints kept; with early stopping the best one is kept in addition"
    )
    share: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.02,
        description="largest share of the training time that may be spent on checkpoints beyond the regular ones; "
        "how often they are saved follows from how long saving takes, at most once a PPO step or, in the other stages, "
        "once a logged update; 0 = only the regular checkpoints",
    )
    grace_seconds: Positive = Field(
        25.0,
        description="seconds after SIGTERM within which a checkpoint is saved at the next safe point and the process "
        "ends; if no safe point is reached in that time, the process ends without saving",
    )


class ModelSource(Section):
    """Where a model is loaded from, and how."""

    path: str = Field(
        description="model folder (written by a stage or any save_pretrained), run directory of a finished stage, or "
        "hub id"
    )
    revision: str | None = Field(
        None, description="commit, tag or branch of a hub id; set a commit to make runs repeatable"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of the weights in memory; auto = float32; bfloat16 halves the memory of frozen models and "
        "of LoRA bases",
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4 = store the frozen linear layers below an adapter in 4 bits (QLoRA, arXiv:2305.14314), except "
        "the output layer and score heads; needs peft.method other than none and pip install 'rlhf[quantize]'; "
        "null = not quantized",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto",
        description="attention implementation; auto = the default of transformers; eager is faster for bfloat16 on a "
        "CPU with short sequences",
    )
    trust_remote_code: bool = Field(False, description="allow Python code that comes with a hub model to run")


class Peft(Section):
    """Parameter-efficient fine-tuning: a small trained part on top of frozen weights. LoRA (Hu et al. 2021,
    arXiv:2106.09685) and its variants, IA3 (Liu et al. 2022, arXiv:2205.05638) or a soft prompt (Lester et al. 2021,
    arXiv:2104.08691)."""

    method: Literal["none", "lora", "ia3", "prompt"] = Field(
        "none",
        description="none = train all weights; lora = low-rank adapters; ia3 = one learned factor for each key, value "
        "and feed-forward feature; prompt = learned embeddings in front of the text (SFT only)",
    )
    r: Count = Field(16, description="lora: rank of the adapters")
    alpha: Positive = Field(32.0, description="lora: scale; the adapter's output is multiplied by alpha / r")
    dropout: Unit = Field(0.0, description="lora: dropout probability on the adapter's input; PPO requires 0")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="modules that get an adapter: a list of name endings, or a regular expression; all-linear = with "
        "lora all linear layers of the trunk, with ia3 the key and value projections and the last layer of each "
        "feed-forward block",
    )
    rslora: bool = Field(
        False, description="lora: multiply by alpha / sqrt(r) instead, for ranks above 32 (arXiv:2312.03732)"
    )
    dora: bool = Field(
        False,
        description="lora: learn the norm of each weight row separately from its direction (DoRA); helps at small "
        "ranks (arXiv:2402.09353)",
    )
    lora_plus: Positive | None = Field(
        None,
        description="lora: ratio of the learning rate of matrix B to that of matrix A (arXiv:2402.12354 uses 16); "
        "null = 1",
    )
    prompt_tokens: Count = Field(20, description="prompt: number of learned embeddings")

    @property
    def enabled(self) -> bool:
        """Whether the base model stays frozen and only an adapter or soft prompt is trained."""
        return self.method != "none"

    @model_validator(mode="after")
    def _refuse_unused_settings(self) -> Peft:
        """Refuse a setting that the chosen method does not read, unless it has its default value."""
        for name, field in type(self).model_fields.items():
            methods = [method for method, names in READ_BY.items() if name in names]
            if name != "method" and self.method not in methods and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name} has no effect with method={self.method}: set peft.method={' or '.join(methods)}, or "
                    f"remove {name}"
                )
        return self


def quantized_sources(section: BaseModel, key: str = "") -> Iterator[tuple[str, ModelSource]]:
    """Yield (dotted key, model source) of every model in a configuration that is loaded quantized."""
    if isinstance(section, ModelSource) and section.quantize is not None:
        yield key, section
    for name in type(section).model_fields:
        value = getattr(section, name)
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
        inner = [(f"{name}.{part}", member) for part, member in parts] or [(name, value)]
        for inner_key, member in inner:
            if isinstance(member, BaseModel):
                yield from quantized_sources(member, f"{key}.{inner_key}" if key else inner_key)


def require_adapter_on_quantized(config: Any) -> Any:
    """Refuse a quantized model in a stage that would train all of its weights, or that trains nothing.

    Raises: ValueError that names the model.
    """
    peft = getattr(config, "peft", None)
    for key, source in quantized_sources(config):
        if peft is None:
            raise ValueError(
                f"{key}.quantize={source.quantize}: only stages that train an adapter quantize its base; remove "
                "quantize, and the adapter is evaluated on the base as it is stored"
            )
        if not peft.enabled:
            raise ValueError(
                f"{key}.quantize={source.quantize}: quantized weights cannot be trained, and peft.method=none trains "
                f"all weights; set peft.method=lora, or remove {key}.quantize"
            )
    return config


READ_BY = {
    "lora": ("r", "alpha", "dropout", "target_modules", "rslora", "dora", "lora_plus"),
    "ia3": ("target_modules",),
    "prompt": ("prompt_tokens",),
}
"""Method -> the settings of `Peft` that it reads."""


class Source(Section):
    """One data set: where it is, how its records are recognised, and how much of it is used."""

    path: str = Field(
        description="file (.jsonl, .json, .csv, .tsv, .parquet or .txt; text files may be gzipped), folder written by "
        "datasets.save_to_disk, or hub id"
    )
    split: str = Field("train", description="split of a saved folder or hub data set")
    name: str | None = Field(None, description="configuration (subset) of a hub data set")
    revision: str | None = Field(
        None, description="commit of a hub data set; required for a hub id, so that runs are repeatable"
    )
    format: Literal[
        "auto",
        "text",
        "messages",
        "prompt-completion",
        "preference",
        "implicit-preference",
        "prompt",
        "alpaca",
        "sharegpt",
        "transcript",
    ] = Field("auto", description="record format; auto = recognised from the column names and reported")
    columns: dict[str, str] = Field(
        default_factory=dict, description="renames columns: name in the record contract -> name in the file"
    )
    weight: Positive = Field(
        1.0,
        description="share of this source in the mixture, relative to the other sources; equal weights = use every "
        "record",
    )
    limit: Count | None = Field(
        None, description="use at most this many records, a random sample drawn with the seed; null = all"
    )


class Data(Section):
    """Training and validation records of a stage."""

    train: tuple[Source, ...] = Field(min_length=1, description="sources of the training records")
    validation: tuple[Source, ...] = Field(
        (), description="sources of the held-out records; empty = a part of the training records is held out"
    )
    validation_fraction: Unit = Field(
        0.05,
        description="share of the training records to hold out if validation is empty; records with the same prompt "
        "stay on one side; 0 = none",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(1024, description="largest length of a sequence, in tokens")
    too_long: Literal["error", "drop", "truncate"] = Field(
        "drop",
        description="what happens to a longer sequence: stop with an error, drop the record, or truncate it on the "
        "right; the share of such records is reported",
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error",
        description="what happens to rows that break the record contract: stop with an error that lists them, or drop "
        "and count them by reason",
    )
    deduplicate: bool = Field(True, description="drop exact duplicates of a record")
    loss_on: Literal["assistant", "all"] = Field(
        "assistant",
        description="SFT: tokens that the loss is computed on: the assistant's turns with their end tokens, or all "
        "tokens",
    )


class Optim(Section):
    """AdamW and its learning-rate schedule. Batch sizes count over all processes, so that the number of processes does
    not change the result."""

    learning_rate: Positive = Field(2e-5, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="shape of the learning rate after the warm-up; linear and cosine decay to 0"
    )
    warmup_fraction: Unit = Field(
        0.03, description="share of all updates in which the learning rate rises linearly from 0 to its peak"
    )
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay of AdamW")
    adam_beta1: Unit = Field(0.9, description="Adam's decay rate of the first moment")
    adam_beta2: Unit = Field(0.999, description="Adam's decay rate of the second moment")
    adam_eps: Positive = Field(
        1e-8, description="Adam's epsilon, added to the square root of the second moment in the denominator"
    )
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this global norm")
    epochs: Positive = Field(1.0, description="number of passes over the training records; may be a fraction")
    max_updates: Count | None = Field(
        None, description="stop after this many optimizer updates, if the epochs have not ended before; null = off"
    )
    patience: Count | None = Field(
        None,
        description="early stopping: stop after this many evaluations in a row without a lower held-out loss, and "
        "keep the best weights; null = off",
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="layer-wise learning-rate decay: each block's learning rate is this factor times that of the block "
        "above it; 1 = the same rate for all",
    )
    head_factor: Positive = Field(
        1.0,
        description="learning rate of a new output layer (score or classification head), as a factor of the others'",
    )
    precision: Precision = Field(
        "auto",
        description=f"dtype of the forward and backward computation (trained weights keep their dtype); {PRECISION}",
    )
    batch_size: Count = Field(64, description="sequences (pairs for a reward model) per update, over all processes")
    microbatch_size: Count = Field(
        16,
        description="largest number of sequences (or pairs) per backward pass on one process; smaller saves memory and "
        "changes nothing else",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep only the input of each layer for the backward pass and recompute the rest: less memory, "
        "about a third more computation",
    )

    def accumulation(self, processes: int) -> int:
        """Return the number of backward passes per update on each process.

        Raises: ConfigError if the batch cannot be shared equally (see `split_batch`).
        """
        return split_batch(self.batch_size, self.microbatch_size, processes, "optim")


def split_batch(batch: int, microbatch: int, processes: int, where: str) -> int:
    """Return how many microbatches each process runs per update.

    A process whose share of the batch is smaller than a microbatch runs its share in one.

    Args:
        batch: sequences per update, over all processes.
        microbatch: largest number of sequences per backward pass.
        processes: number of processes.
        where: section of the configuration that the sizes come from, for the message.
    Raises: ConfigError if the processes' shares differ, or a share is not a whole number of microbatches.
    """
    if batch % processes:
        near = sorted({max(1, batch // processes) * processes, (batch // processes + 1) * processes})
        raise ConfigError(
            f"batch_size {batch} cannot be shared equally by {processes} processes",
            where=f"{where}.batch_size",
            do=f"use one of the nearest: {', '.join(map(str, near))}",
        )
    share = batch // processes
    size = min(microbatch, share)
    if share % size:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        raise ConfigError(
            f"{share} sequences per process and update are not whole microbatches of {size}",
            where=f"{where}.microbatch_size",
            do=f"choose one of {', '.join(map(str, divisors))}",
        )
    return share // size


class Sampling(Section):
    """How responses are sampled. The model's own generation_config is not used."""

    max_new_tokens: Count = Field(256, description="largest length of a response, in tokens")
    min_new_tokens: Annotated[int, Field(ge=0)] = Field(
        0,
        description="smallest length of a response, in tokens, end token included; the end token cannot be sampled "
        "before",
    )
    stop: tuple[str, ...] = Field(
        (), description="strings that end a response, besides the end token; they remain part of the response"
    )
    temperature: NonNegative = Field(
        1.0, description="logits are divided by it before the softmax; 0 = greedy decoding (the most likely token)"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="nucleus sampling: sample from the smallest set of most likely tokens whose probabilities sum to "
        "at least this; 1 = off",
    )
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="sample from the k most likely tokens only; 0 = off")
    batch_size: Count = Field(256, description="number of prompts that one process decodes at the same time")
    compile: Literal["auto", "always", "off"] = Field(
        "auto",
        description="decode in buffers of fixed shape, so that a GPU can replay each step as a CUDA graph: auto = on a "
        "GPU, if the model allows it; always = also on a CPU, where it is slower; off = never",
    )
