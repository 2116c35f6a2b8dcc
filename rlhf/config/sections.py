"""Sections shared by the stages. Field descriptions are the help text of `rlhf show`.

Only what a user decides is a field; sizes that follow from others are methods. Importing this file imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from rlhf.errors import ConfigError

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, values: Any) -> Any:
        """A section that is given in part keeps what its owner set as default for the rest."""
        if not isinstance(values, dict):
            return values
        defaults = {n: f.default for n, f in cls.model_fields.items() if isinstance(f.default, BaseModel)}
        part = {n: d.model_dump(exclude_unset=True) for n, d in defaults.items() if isinstance(values.get(n), dict)}
        return values | {n: d | values[n] for n, d in part.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"expected no truth value, got {value} (YAML reads yes, no, on, off as one; quote them)")
        return value


Precision = Literal["auto", "native", "float32", "bfloat16"]
PRECISION = "auto = bfloat16 on a GPU that has it; native = also on a CPU that has it (others emulate it, slowly)"


class Saving(Section):
    """Checkpoints, and how a run ends that is told to."""

    keep: Count = Field(2, description="checkpoints that stay; with patience the best one stays besides")
    share: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.02,
        description="largest share of the time for checkpoints beyond the regular ones: cheap ones come at every "
        "step (SFT and classifiers: at every update that is logged), dear ones seldom; 0 = regular ones only",
    )
    grace_seconds: Positive = Field(
        25.0,
        description="seconds after SIGTERM in which a checkpoint is saved and the process ends; without a safe point "
        "in that time it ends without one",
    )


class ModelSource(Section):
    """Where a model comes from."""

    path: str = Field(description="model folder (ours or any save_pretrained), a finished run, or a hub id")
    revision: str | None = Field(None, description="commit, tag or branch of a hub id; pin it for repeatable runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="weights in memory; auto = float32; bfloat16 halves the memory of frozen or LoRA bases"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="attention kernel; auto = transformers' choice; eager pays for bfloat16 on CPU, short rows"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with a hub model")


class Peft(Section):
    """A small trained part beside frozen weights: LoRA (Hu et al. 2021, arXiv:2106.09685) and its variants, IA3 (Liu et
    al. 2022, arXiv:2205.05638) or a soft prompt (Lester et al. 2021, arXiv:2104.08691)."""

    method: Literal["none", "lora", "ia3", "prompt"] = Field(
        "none",
        description="lora = low-rank adapters; ia3 = a factor for each key, value and feed-forward feature; prompt = "
        "learnt embeddings before the text, SFT only; none = all weights are trained",
    )
    r: Count = Field(16, description="lora: rank")
    alpha: Positive = Field(32.0, description="lora: scale; the update is multiplied by alpha / r")
    dropout: Unit = Field(0.0, description="lora: dropout on the adapter input; PPO needs 0")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="lora: which linear layers get an adapter, ends of names or a regular expression; ia3: "
        "all-linear = keys, values and what the feed-forward's last layer reads",
    )
    rslora: bool = Field(False, description="lora: multiply by alpha / sqrt(r), for ranks above 32 (arXiv:2312.03732)")
    dora: bool = Field(
        False, description="lora: the length of each weight row is learnt apart; for small ranks (arXiv:2402.09353)"
    )
    lora_plus: Positive | None = Field(
        None, description="lora: learning rate of B is this times A's (arXiv:2402.12354 uses 16); null = the same"
    )
    prompt_tokens: Count = Field(20, description="prompt: how many embeddings are learnt")

    @property
    def enabled(self) -> bool:
        """Whether the model's own weights stay frozen."""
        return self.method != "none"

    @model_validator(mode="after")
    def _no_dead_setting(self) -> Peft:
        """A setting that another method reads is a mistake, unless it says what would be anyway."""
        for name, field in type(self).model_fields.items():
            methods = [method for method, names in READ_BY.items() if name in names]
            if name != "method" and self.method not in methods and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name} has no effect with method={self.method}: set peft.method={' or '.join(methods)}, or take "
                    f"{name} away"
                )
        return self


READ_BY = {
    "lora": ("r", "alpha", "dropout", "target_modules", "rslora", "dora", "lora_plus"),
    "ia3": ("target_modules",),
    "prompt": ("prompt_tokens",),
}
"""Which settings of `Peft` a method has."""


class Source(Section):
    """One data set."""

    path: str = Field(description="JSONL, JSON, CSV or Parquet file (also .gz), a saved datasets folder, or a hub id")
    split: str = Field("train", description="split of a saved folder or hub id")
    name: str | None = Field(None, description="subset of a hub id")
    revision: str | None = Field(None, description="commit of a hub id; required, so that runs can be repeated")
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
    ] = Field("auto", description="record format; auto recognises it from the columns and says so")
    columns: dict[str, str] = Field(default_factory=dict, description="our column name -> the file's column name")
    weight: Positive = Field(1.0, description="share of this source in the mixture, relative to the others")
    limit: Count | None = Field(None, description="use only the first N records after shuffling")


class Data(Section):
    """Training and validation records of a stage."""

    train: tuple[Source, ...] = Field(min_length=1, description="mixture to train on")
    validation: tuple[Source, ...] = Field((), description="held-out records; empty = split off from train")
    validation_fraction: Unit = Field(0.05, description="share of train split off, by prompt, if validation is empty")
    max_length: Annotated[int, Field(ge=8)] = Field(1024, description="tokens per sequence")
    too_long: Literal["error", "drop", "truncate"] = Field(
        "drop", description="what to do with a longer sequence; the share is reported either way"
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="what to do with a row that breaks the record contract; drops are counted by reason"
    )
    deduplicate: bool = Field(True, description="drop exact repeats of a record")
    loss_on: Literal["assistant", "all"] = Field("assistant", description="SFT: tokens that carry loss")


class Optim(Section):
    """AdamW and its schedule. `batch_size` counts over all processes, so it does not change with their number."""

    learning_rate: Positive = Field(2e-5, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="decay to 0 after the warm-up")
    warmup_fraction: Unit = Field(0.03, description="share of all updates spent warming up")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    adam_beta1: Unit = Field(0.9, description="decay of the first moment")
    adam_beta2: Unit = Field(0.999, description="decay of the second moment")
    adam_eps: Positive = Field(1e-8, description="added to the root of the second moment")
    max_grad_norm: Positive = Field(1.0, description="global gradient norm is clipped to this")
    epochs: Positive = Field(1.0, description="passes over the training records")
    max_updates: Count | None = Field(None, description="stop after this many optimizer updates")
    patience: Count | None = Field(
        None, description="stop early after so many evaluations without a lower held-out loss; null = off"
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="each block's learning rate is this times that of the block above it; 1 = the same for all"
    )
    head_factor: Positive = Field(1.0, description="learning rate of a new output layer, relative to the others'")
    precision: Precision = Field("auto", description=f"of forward and backward (weights keep theirs); {PRECISION}")
    batch_size: Count = Field(64, description="sequences (or pairs) per optimizer update, over all processes")
    microbatch_size: Count = Field(16, description="sequences (or pairs) per backward on one process")
    activation_checkpointing: bool = Field(
        False, description="keep only each layer's input for the backward pass: less memory, a third more work"
    )

    def accumulation(self, processes: int) -> int:
        """Backward passes per update on each process.

        Raises: ConfigError if batch_size is not processes x microbatch x a whole number.
        """
        return split_batch(self.batch_size, self.microbatch_size, processes, "optim")


def split_batch(batch: int, microbatch: int, processes: int, where: str) -> int:
    """How many microbatches of at most `microbatch` each process runs per update; the microbatch may shrink to fit.

    Raises: ConfigError if the batch cannot be shared equally.
    """
    if batch % processes:
        near = sorted({max(1, batch // processes) * processes, (batch // processes + 1) * processes})
        raise ConfigError(
            f"batch_size {batch} cannot be shared equally by {processes} processes",
            where=f"{where}.batch_size",
            do=f"nearest: {', '.join(map(str, near))}",
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
    """How responses are drawn. Nothing else (no generation_config of the model) changes the distribution."""

    max_new_tokens: Count = Field(256, description="longest response, in tokens")
    min_new_tokens: Annotated[int, Field(ge=0)] = Field(
        0, description="shortest response, end token included: it cannot be drawn before"
    )
    stop: tuple[str, ...] = Field((), description="strings that also end a response; they stay part of it")
    temperature: NonNegative = Field(1.0, description="logits are divided by it; 0 = greedy")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="nucleus; 1 = off")
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="keep the k likeliest tokens; 0 = off")
    batch_size: Count = Field(256, description="prompts decoded side by side on one process")
