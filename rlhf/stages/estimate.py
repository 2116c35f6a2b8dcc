"""Peak memory of a stage on each process, from its configuration: `rlhf.models.memory` with the stage's own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf.config.schema import PPOConfig, PretrainConfig, SFTConfig
from rlhf.config.sections import Peft
from rlhf.models import memory
from rlhf.models.memory import Estimate, Part, Runtime, Sharding, Traced, Weights
from rlhf.models.packing import pack
from rlhf.models.trace import trace
from rlhf.rollout.score import CHUNK
from rlhf.stages.skeleton import Cast, Skeleton


@dataclass(frozen=True)
class Load:
    """What a stage is fed: numbers of its data audit, or the configuration's limits where there is none."""

    records: int
    tokens: int
    longest: int  # tokens of the longest record
    loss_tokens: float  # share of tokens that carry loss
    lengths: tuple[int, ...] = ()  # tokens of every record, sorted; () if unknown

    def spread(self, rows: int) -> list[int]:
        """Lengths of so many records as they are drawn: evenly over all."""
        if not self.lengths:
            return [self.longest] * rows
        return [self.lengths[(2 * i + 1) * len(self.lengths) // (2 * rows)] for i in range(rows)]


@dataclass(frozen=True)
class Case:
    """Everything that an estimate depends on."""

    stage: str
    config: Any
    models: Skeleton | Cast
    load: Load
    sharding: Sharding
    gpu: bool
    response: int | None = None  # mean tokens of PPO's responses, if known

    @property
    def bfloat16(self) -> bool:
        """Whether passes run in bfloat16; 'auto' does on a GPU."""
        precision = self.config.optim.precision
        return bool(precision == "bfloat16" or (precision == "auto" and self.gpu))


_traced: dict[Any, Traced] = {}


def traced(model: Skeleton, rows: int, length: int, bfloat16: bool) -> Traced:
    """The trace of a model, made once for each shape."""
    key = (id(model), rows, length, bfloat16)
    if key not in _traced:
        _traced[key] = trace(model.build, rows=rows, length=length, bfloat16=bfloat16)
    return _traced[key]


def estimate(case: Case) -> Estimate:
    """Of any stage that trains."""
    if isinstance(case.config, PPOConfig):
        assert isinstance(case.models, Cast)
        return _ppo(case, case.config, case.models)
    assert isinstance(case.models, Skeleton)
    return _trainer(case, case.models)


def _trainer(case: Case, model: Skeleton) -> Estimate:
    """Of a stage on a transformers Trainer: the update is its largest phase."""
    config, s, load = case.config, case.sharding, case.load
    accumulation = config.optim.accumulation(s.processes)
    rows = config.optim.batch_size // s.processes // accumulation
    length, loss = load.longest, load.loss_tokens
    if isinstance(config, PretrainConfig) or (isinstance(config, SFTConfig) and config.packing):
        length = config.data.max_length
    if case.stage == "reward":
        rows *= 2  # both sides
    extra = config.peft.prompt_tokens if isinstance(config, SFTConfig) and config.peft.method == "prompt" else 0
    kept = traced(model, rows, length + extra, case.bfloat16)
    transient = [
        Part("activations", memory.activations(kept, model.kept, recompute=config.optim.activation_checkpointing)),
        memory.gathered(model.weights, model.blocks, s),
    ]
    if case.stage == "pretrain":
        transient.append(Part("output layer and loss", memory.logits(rows * length, model.vocabulary, memory.LOSS)))
    elif case.stage == "sft":
        columns = min(model.vocabulary, memory.VOCABULARY_PART)
        transient.append(Part("output layer and loss", memory.logits(rows * length * loss, columns, memory.FUSED)))
    data = Part("records", memory.records(load.records, load.tokens), host=True)
    parts = memory.with_runtime([*memory.states(model.weights, s), data], transient, Runtime.of(case.gpu))
    return Estimate({"update": parts}, device_is_host=not case.gpu)


def _ppo(case: Case, config: PPOConfig, cast: Cast) -> Estimate:
    """Of PPO: the largest of sampling, scoring and updating. Responses count as long as they may become."""
    s, load, runtime = case.sharding, case.load, Runtime.of(case.gpu)
    response, longest = config.sampling.max_new_tokens, load.longest + config.sampling.max_new_tokens
    trained = cast.policy.weights
    if cast.value is not None:
        own = cast.value.weights
        trained = trained + (Weights(own.trained, 0, own.trained_bytes) if cast.shared else own)
    states = memory.states(trained, s)
    standing = [
        *states, *_frozen(cast), Part("records", memory.records(load.records, load.tokens), host=True),
        Part("rollout", _rollout(config, load, cast.policy.vocabulary)),
    ]  # fmt: skip
    if case.bfloat16 and not case.gpu:
        met = min(memory.COPIES, config.sampling.batch_size)
        whole = cast.policy.weights
        standing.append(Part("kernels' copies of weights", 2.0 * met * (whole.trained + whole.frozen)))
    if config.ppo.ema is not None:
        standing.append(Part("averaged policy", float(4 * cast.policy.weights.trained)))
    share = config.ppo.rollout_size // config.ppo.minibatches // s.processes
    micro = min(config.optim.microbatch_size, share)
    response = min(response, case.response or response)
    shape = _packed([length + response for length in load.spread(micro)])
    passes = [traced(cast.policy, *shape, case.bfloat16)]
    models = [cast.policy]
    if cast.value is not None:
        passes.append(traced(cast.value, *shape, case.bfloat16))
        models.append(cast.value)
    recompute = config.optim.activation_checkpointing
    vocabulary = cast.policy.vocabulary
    tokens = min(micro * response, max(1, CHUNK // vocabulary))
    kept = [memory.activations(p, m.kept, recompute=recompute) for p, m in zip(passes, models, strict=True)]
    more = memory.FILTERED if _filtered(config) else 0
    # The output layer is at its largest while only the policy has been read.
    head = max(
        memory.logits(tokens, vocabulary, memory.POLICY + more) - sum(kept[1:]),
        memory.logits(tokens, vocabulary, memory.POLICY_KEPT + more),
    )
    update = [Part("activations", sum(kept)), Part("output layer and loss", head),
              memory.gathered(trained, cast.policy.blocks, s)]  # fmt: skip
    together = memory.gathered(trained, cast.policy.blocks, s, whole=True)
    score = [Part("activations", max(p.fixed + p.block for p in passes)),
             Part("output layer and loss", memory.logits(tokens, vocabulary, memory.LOSS)), together]  # fmt: skip
    decoded = min(config.sampling.batch_size, max(1, config.ppo.rollout_size // s.processes))
    sample = [Part("KV cache", _cache(cast.policy, decoded, longest, case.bfloat16)),
              Part("output layer and loss", memory.logits(decoded, vocabulary, memory.DRAWN)), together]  # fmt: skip
    idle = [part for part in standing if part.name != "gradients"]  # there are none outside of updates
    phases = {
        "sample": memory.with_runtime(idle, sample, runtime),
        "score": memory.with_runtime(idle, score, runtime),
        "update": memory.with_runtime(standing, update, runtime),
    }
    return Estimate(phases, device_is_host=not case.gpu)


def _packed(lengths: list[int]) -> tuple[int, int]:
    """Rows and their length that a microbatch of sequences is packed into."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows, length = pack(torch.zeros_like(mask, dtype=torch.long), mask).ids.shape
    return int(rows), int(length)


def _frozen(cast: Cast) -> list[Part]:
    """Reference and reward models: whole on every process, or adapters beside the policy's base."""
    found = [] if cast.reference is None else [Part("reference", float(cast.reference.weights.bytes))]
    if cast.shared:
        adapter = float(cast.policy.weights.trained * cast.policy.weights.trained_bytes)
        return [Part("reference adapter", adapter), Part("reward models' adapters", adapter * len(cast.scorers))]
    return [*found, *([Part("reward models", float(sum(m.weights.bytes for m in cast.scorers)))])]


def _rollout(config: PPOConfig, load: Load, vocabulary: int) -> float:
    """Tokens and numbers of a rollout, all of it on every process: 9 bytes a token, 33 more a response token; and one
    bit for each token that may be drawn where sampling is filtered."""
    size, response = config.ppo.rollout_size, config.sampling.max_new_tokens
    support = response * -(-vocabulary // 8) if _filtered(config) else 0
    return float(size * (9 * (load.longest + response) + 33 * response + support))


def _filtered(config: PPOConfig) -> bool:
    s = config.sampling
    return bool(s.top_k or s.top_p < 1.0 or s.min_new_tokens)


def _cache(model: Skeleton, rows: int, length: int, bfloat16: bool) -> float:
    c = model.config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    number = 2 if bfloat16 else model.weights.frozen_bytes
    return memory.kv_cache(model.blocks, heads, width, rows, length, number)


Change = tuple[str, Case]


def changes(case: Case) -> Iterator[Change]:
    """What would need less, in words, the cheapest first: smaller microbatches, recomputed activations, fewer rows
    decoded at once, sharding on the processes that there are, more processes, adapters (which train something else)."""
    optim = case.config.optim
    small = optim.microbatch_size
    while small > 1:
        small //= 2
        if _divides(case, small):
            yield f"optim.microbatch_size={small}", _with(case, "optim", microbatch_size=small)
    frugal, words = case, ""
    if not optim.activation_checkpointing:
        micro = optim.microbatch_size
        while micro >= 1:
            if _divides(case, micro):
                frugal = _with(case, "optim", activation_checkpointing=True, microbatch_size=micro)
                cut = "" if micro == optim.microbatch_size else f" optim.microbatch_size={micro}"
                words = f"optim.activation_checkpointing=true{cut}"
                yield words, frugal
            micro //= 2
    if isinstance(case.config, PPOConfig):
        rows = case.config.sampling.batch_size
        while rows > 8:
            rows //= 2
            frugal = _with(frugal, "sampling", batch_size=rows)
            yield f"{words} sampling.batch_size={rows}".strip(), frugal
    yield from _spread(frugal, words)


def _spread(case: Case, words: str) -> Iterator[Change]:
    s = case.sharding
    most = _most(case)
    for stage, name in ((1, "zero1"), (2, "zero2"), (3, "zero3")):
        if s.processes > 1 and s.zero < stage:
            yield f"--launcher {name} {words}".strip(), replace(case, sharding=replace(s, zero=stage, deepspeed=True))
    processes = s.processes * 2
    while processes <= most:
        wide = Sharding(processes, 3, True)
        yield f"--launcher zero3 --num-processes {processes} {words}".strip(), replace(case, sharding=wide)
        processes *= 2
    if case.gpu and not s.offload_weights:
        near = replace(s, zero=3, deepspeed=True, offload_optimizer=True, offload_weights=True)
        yield f"--launcher zero3_offload {words}".strip(), replace(case, sharding=near)


def _most(case: Case) -> int:
    """Processes that can share the batch, at most 64."""
    if isinstance(case.config, PPOConfig):
        return min(64, case.config.ppo.rollout_size // case.config.ppo.minibatches)
    return min(64, int(case.config.optim.batch_size))


def _divides(case: Case, micro: int) -> bool:
    """Whether a microbatch is possible."""
    if isinstance(case.config, PPOConfig):
        return True
    share = case.config.optim.batch_size // case.sharding.processes
    return bool(share % min(micro, share) == 0)


def _with(case: Case, section: str, **values: Any) -> Case:
    part = getattr(case.config, section).model_copy(update=values)
    return replace(case, config=case.config.model_copy(update={section: part}))


def adapters(config: Any) -> Any | None:
    """The same configuration with LoRA, if all weights are trained and an adapter is possible."""
    peft = getattr(config, "peft", None)
    if peft is None or peft.enabled:
        return None
    return config.model_copy(update={"peft": Peft(method="lora")})


def device_bytes() -> float | None:
    """Memory of this machine's GPU, if there is one."""
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(0).total_memory)
