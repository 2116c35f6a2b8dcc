"""Peak memory of a stage on each process: the memory model with the numbers of its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config.run_plan import SupervisedPlan
from rlhf.config.schema import PPOConfig, PretrainConfig, SFTConfig
from rlhf.distributed.engine import cpu_has_bfloat16
from rlhf.models.packed_batch import pack, packed_rows
from rlhf.preflight import memory_model as memory
from rlhf.preflight.activation_trace import trace_activations
from rlhf.preflight.memory_model import (
    ActivationBytes,
    MemoryEstimate,
    MemoryPart,
    ProcessOverhead,
    Sharding,
    WeightCounts,
)
from rlhf.preflight.model_shapes import ModelShape, PPOModelShapes, TrainablePhase
from rlhf.rollout.teacher_forcing import MAX_LOGITS_AT_ONCE


@dataclass(frozen=True)
class DataProfile:
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

    def rows(self, config: Any) -> int:
        """Rows of an epoch: the records, or the sequences that packing makes of them."""
        if isinstance(config, SFTConfig) and config.packing:
            return packed_rows(self.lengths, config.data.max_length)
        return self.records


@dataclass(frozen=True)
class EstimateInput:
    """Everything that an estimate depends on."""

    stage: str
    config: Any
    models: ModelShape | PPOModelShapes
    load: DataProfile
    sharding: Sharding
    gpu: bool
    response: int | None = None  # mean tokens of PPO's responses, if known

    @property
    def bfloat16(self) -> bool:
        """Whether passes run in bfloat16, as `wants_bfloat16` says where the run is."""
        precision = self.config.optim.precision
        if self.gpu:
            return precision != "float32"
        return precision == "bfloat16" or (precision == "native" and cpu_has_bfloat16())


_traced: dict[Any, ActivationBytes] = {}


def traced_activations(model: ModelShape, rows: int, length: int, bfloat16: bool) -> ActivationBytes:
    """The trace of a model, made once for each shape."""
    key = (id(model), rows, length, bfloat16)
    if key not in _traced:
        _traced[key] = trace_activations(model.build, rows=rows, length=length, bfloat16=bfloat16)
    return _traced[key]


def estimate_memory(case: EstimateInput) -> MemoryEstimate:
    """Of any stage that trains."""
    if isinstance(case.config, PPOConfig):
        assert isinstance(case.models, PPOModelShapes)
        return _ppo(case, case.config, case.models)
    assert isinstance(case.models, ModelShape)
    return _trainer(case, case.models)


def _trainer(case: EstimateInput, model: ModelShape) -> MemoryEstimate:
    """Of a stage on a transformers Trainer: the update is its largest phase."""
    config, s, load = case.config, case.sharding, case.load
    rows = SupervisedPlan(config.optim, s.processes, 0).microbatch
    length, loss = load.longest, load.loss_tokens
    if isinstance(config, PretrainConfig) or (isinstance(config, SFTConfig) and config.packing):
        length = config.data.max_length
    if case.stage == "reward":
        rows *= 2  # both sides
    extra = config.peft.prompt_tokens if isinstance(config, SFTConfig) and config.peft.method == "prompt" else 0
    pass_ = traced_activations(model, rows, length + extra, case.bfloat16)
    transient = [memory.gathered_part(model.weights, model.blocks, s)]
    if case.stage == "pretrain":
        transient.append(
            MemoryPart("output layer and loss", memory.logit_bytes(rows * length, model.vocabulary, memory.LOSS))
        )
    elif case.stage == "sft":
        columns = min(model.vocabulary, memory.VOCABULARY_PART)
        transient.append(
            MemoryPart("output layer and loss", memory.logit_bytes(rows * length * loss, columns, memory.FUSED))
        )
    data = MemoryPart("records", memory.record_bytes(load.records, load.tokens), host=True)
    updates = []
    for active in model.phases:
        kept = memory.activation_part(pass_, active.kept, recompute=config.optim.activation_checkpointing)
        updates.append(
            memory.with_runtime(
                [*memory.state_parts(model.weights, s, active.weights), data],
                [MemoryPart("activations", kept), *transient],
                ProcessOverhead.of(case.gpu),
            )
        )
    return _worst({}, updates, case)


def _worst(others: dict[str, list[MemoryPart]], updates: list[list[MemoryPart]], case: EstimateInput) -> MemoryEstimate:
    """Of all phases of training, the one whose updates need most; it is named if there are several."""
    whole = MemoryEstimate({str(i): parts for i, parts in enumerate(updates, 1)}, device_is_host=not case.gpu)
    name = "update" if len(updates) == 1 else f"update, phase {whole.largest} of {len(updates)}"
    return MemoryEstimate(others | {name: list(whole.phases[whole.largest])}, device_is_host=not case.gpu)


def _ppo(case: EstimateInput, config: PPOConfig, cast: PPOModelShapes) -> MemoryEstimate:
    """Of PPO: the largest of sampling, scoring and updating."""
    s, load, runtime = case.sharding, case.load, ProcessOverhead.of(case.gpu)
    trained = _trained(cast)
    resting, asked = _resting(case, config, cast)
    standing = [
        *_frozen(config, cast, case.gpu),
        *resting,
        MemoryPart("records", memory.record_bytes(load.records, load.tokens), host=True),
        MemoryPart("rollout", _rollout(config, load, cast.policy.vocabulary)),
    ]
    if case.bfloat16 and not case.gpu:
        met = min(memory.ONEDNN_COPIES, config.sampling.batch_size)
        whole = cast.policy.weights
        standing.append(MemoryPart("kernels' copies of weights", 2.0 * met * (whole.trained + whole.frozen)))
    if config.ppo.ema is not None:
        standing.append(MemoryPart("averaged policy", float(4 * cast.policy.weights.trained)))
    share = config.ppo.rollout_size // config.ppo.minibatches // s.processes
    micro = min(config.optim.microbatch_size, share)
    most = config.sampling.max_new_tokens
    response = min(most, max(config.sampling.min_new_tokens, case.response or most))
    shape = _packed([length + response for length in load.spread(micro)])
    models = [cast.policy] if cast.value is None else [cast.policy, cast.value]
    passes = [traced_activations(model, *shape, case.bfloat16) for model in models]
    vocabulary = cast.policy.vocabulary
    tokens = min(micro * response, max(1, MAX_LOGITS_AT_ONCE // vocabulary))
    together = memory.gathered_part(trained, cast.policy.blocks, s, whole=True)
    alone = memory.gathered_part(cast.policy.weights, cast.policy.blocks, s, whole=True)
    score = [
        MemoryPart("activations", max(p.fixed + p.block for p in passes)),
        MemoryPart("output layer and loss", memory.logit_bytes(tokens, vocabulary, memory.LOSS)),
        together,
    ]
    decoded = min(config.sampling.batch_size, max(1, config.ppo.rollout_size // s.processes))
    sample = [
        MemoryPart("KV cache", _cache(cast.policy, decoded, load.longest + most, case.bfloat16)),
        MemoryPart("output layer and loss", memory.logit_bytes(decoded, vocabulary, memory.DRAWN)),
        alone,
    ]
    # There are no gradients outside of updates.
    idle = [*(part for part in memory.state_parts(trained, s) if part.name != "gradients"), *standing]
    updates = []
    for phase in _phases(models, config.ppo.steps):
        kept = [
            memory.activation_part(p, active.kept, recompute=config.optim.activation_checkpointing)
            for p, active in zip(passes, phase, strict=True)
        ]
        head = MemoryPart("output layer and loss", _head(config, tokens, vocabulary, kept))
        update = [MemoryPart("activations", sum(kept)), head, memory.gathered_part(trained, cast.policy.blocks, s)]
        held = memory.state_parts(trained, s, sum(active.weights for active in phase))
        updates.append(memory.with_runtime([*held, *standing], update, runtime))
    others = {
        "sample": memory.with_runtime(idle, sample, runtime),
        "score": memory.with_runtime([*idle, *asked], score, runtime),
    }
    return _worst(others, updates, case)


def _trained(cast: PPOModelShapes) -> WeightCounts:
    """Policy and value model together; a shared base counts once."""
    trained = cast.policy.weights
    if cast.value is None:
        return trained
    own = cast.value.weights
    return trained + (WeightCounts(own.trained, 0, own.trained_bytes) if cast.shared else own)


def _phases(models: list[ModelShape], steps: int) -> list[tuple[TrainablePhase, ...]]:
    """What the models train in each stretch of a run in which none of them changes it."""
    starts = sorted({active.begins for model in models for active in model.phases if active.begins < steps})
    return [tuple([a for a in model.phases if a.begins <= start][-1] for model in models) for start in starts]


def _head(config: PPOConfig, tokens: int, vocabulary: int, kept: list[float]) -> float:
    """Of the policy's output layer, which is at its largest while only the policy has been read."""
    more = memory.FILTERED if _filtered(config) else 0
    return max(
        memory.logit_bytes(tokens, vocabulary, memory.POLICY + more) - sum(kept[1:]),
        memory.logit_bytes(tokens, vocabulary, memory.POLICY_KEPT + more),
    )


def _packed(lengths: list[int]) -> tuple[int, int]:
    """Rows and their length that a microbatch of sequences is packed into."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows, length = pack(torch.zeros_like(mask, dtype=torch.long), mask).ids.shape
    return int(rows), int(length)


def offloadable(cast: PPOModelShapes) -> tuple[str, ...]:
    """Roles whose models could rest in the machine's memory."""
    return (*(["reference"] if cast.reference else []), *(["reward"] if cast.scorers and not cast.shared else []))


def _whole(cast: PPOModelShapes) -> dict[str, float]:
    """Bytes of the frozen models that have weights of their own, by role; whole on every process."""
    reference = 0.0 if cast.reference is None else float(cast.reference.weights.bytes)
    scorers = 0.0 if cast.shared else float(sum(model.weights.bytes for model in cast.scorers))
    return {"reference": reference, "reward": scorers}


ROLE_NAMES = {"reference": "reference", "reward": "reward models"}


def _frozen(config: PPOConfig, cast: PPOModelShapes, gpu: bool) -> list[MemoryPart]:
    """Reference and reward models that stay on the device, or adapters beside the policy's base."""
    if cast.shared:
        adapter = float(cast.policy.weights.trained * cast.policy.weights.trained_bytes)
        return [
            MemoryPart("reference adapter", adapter),
            MemoryPart("reward models' adapters", adapter * len(cast.scorers)),
        ]
    return [
        MemoryPart(ROLE_NAMES[role], size)
        for role, size in _whole(cast).items()
        if not gpu or role not in config.offload
    ]


def _resting(case: EstimateInput, config: PPOConfig, cast: PPOModelShapes) -> tuple[list[MemoryPart], list[MemoryPart]]:
    """Offloaded models: in the machine's memory throughout; and on the device for scoring, one role at a time."""
    away = {role: size for role, size in _whole(cast).items() if case.gpu and role in config.offload}
    at_rest = [MemoryPart(f"{ROLE_NAMES[role]}, at rest", size, host=True) for role, size in away.items()]
    return at_rest, [MemoryPart("offloaded models, the larger", max(away.values(), default=0.0))]


def _rollout(config: PPOConfig, load: DataProfile, vocabulary: int) -> float:
    """Tokens and numbers of a rollout, all of it on every process: 9 bytes a token, 33 more a response token; and one
    bit for each token that may be drawn where sampling is filtered."""
    size, response = config.ppo.rollout_size, config.sampling.max_new_tokens
    support = response * -(-vocabulary // 8) if _filtered(config) else 0
    return float(size * (9 * (load.longest + response) + 33 * response + support))


def _filtered(config: PPOConfig) -> bool:
    s = config.sampling
    return bool(s.top_k or s.top_p < 1.0 or s.min_new_tokens)


def _cache(model: ModelShape, rows: int, length: int, bfloat16: bool) -> float:
    c = model.config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    number = 2 if bfloat16 else model.weights.frozen_bytes
    return memory.kv_cache_bytes(model.blocks, heads, width, rows, length, number)


def device_bytes() -> float | None:
    """Memory of this machine's GPU, if there is one."""
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(0).total_memory)
