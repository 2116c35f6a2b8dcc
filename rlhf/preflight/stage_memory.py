"""Estimate of the peak memory of a stage on each process: `memory_formulas` applied to the stage's configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf.config.run_plan import SupervisedPlan
from rlhf.config.schema import PPOConfig, PretrainConfig, SFTConfig
from rlhf.distributed.engine import cpu_has_bfloat16
from rlhf.models.output_layer import MAX_LOGITS_AT_ONCE
from rlhf.models.packed_batch import pack, packed_rows
from rlhf.preflight import memory_formulas as formulas
from rlhf.preflight.activation_trace import trace_activations
from rlhf.preflight.memory_formulas import (
    ActivationBytes,
    MemoryEstimate,
    MemoryPart,
    ProcessOverhead,
    Sharding,
    WeightCounts,
)
from rlhf.preflight.model_shapes import ModelShape, PPOModelShapes, TrainablePhase


@dataclass(frozen=True)
class DataProfile:
    """Numbers and lengths of the records of a stage: from the data audit, or the configuration's limits without one."""

    records: int
    tokens: int
    longest: int  # tokens of the longest record
    loss_share: float  # share of tokens that carry loss
    lengths: tuple[int, ...] = ()  # tokens of every record, sorted; () if unknown

    def typical_lengths(self, rows: int) -> list[int]:
        """Return the lengths of `rows` records at evenly spaced quantiles, as a random batch would contain."""
        if not self.lengths:
            return [self.longest] * rows
        return [self.lengths[(2 * i + 1) * len(self.lengths) // (2 * rows)] for i in range(rows)]

    def rows_per_epoch(self, config: Any) -> int:
        """Return the rows of an epoch: the records, or the sequences into which they are packed."""
        if isinstance(config, SFTConfig) and config.packing:
            return packed_rows(self.lengths, config.data.max_length)
        return self.records


@dataclass(frozen=True)
class EstimateInput:
    """Everything on which an estimate depends."""

    stage: str
    config: Any
    models: ModelShape | PPOModelShapes
    data: DataProfile
    sharding: Sharding
    gpu: bool
    response_tokens: int | None = None  # mean length of PPO's responses, if known

    @property
    def bfloat16(self) -> bool:
        """Whether passes run in bfloat16; the same rule as `wants_bfloat16` on the machine of the run."""
        precision = self.config.optim.precision
        if self.gpu:
            return precision != "float32"
        return precision == "bfloat16" or (precision == "native" and cpu_has_bfloat16())


_trace_cache: dict[Any, ActivationBytes] = {}


def traced_activations(model: ModelShape, rows: int, length: int, bfloat16: bool) -> ActivationBytes:
    """Return the traced activations of a model; each model and batch shape is traced once."""
    key = (id(model), rows, length, bfloat16)
    if key not in _trace_cache:
        _trace_cache[key] = trace_activations(
            model.build_for_trace(bfloat16), rows=rows, length=length, bfloat16=bfloat16
        )
    return _trace_cache[key]


def estimate_memory(inputs: EstimateInput) -> MemoryEstimate:
    """Return the estimated memory of a stage that trains, phase by phase."""
    if isinstance(inputs.config, PPOConfig):
        assert isinstance(inputs.models, PPOModelShapes)
        return _estimate_ppo(inputs, inputs.config, inputs.models)
    assert isinstance(inputs.models, ModelShape)
    return _estimate_supervised(inputs, inputs.models)


def _estimate_supervised(inputs: EstimateInput, model: ModelShape) -> MemoryEstimate:
    """Estimate a stage on a transformers Trainer, where the update is the largest phase."""
    config, s, data = inputs.config, inputs.sharding, inputs.data
    rows = SupervisedPlan(config.optim, s.processes, 0).microbatch
    length, loss_share = data.longest, data.loss_share
    if isinstance(config, PretrainConfig) or (isinstance(config, SFTConfig) and config.packing):
        length = config.data.max_length
    if inputs.stage == "reward":
        rows *= 2  # the chosen and the rejected response
    soft_prompt = config.peft.prompt_tokens if isinstance(config, SFTConfig) and config.peft.method == "prompt" else 0
    activations = traced_activations(model, rows, length + soft_prompt, inputs.bfloat16)
    transient = [formulas.gathered_part(model.weights, model.blocks, s), _restored_layer([model], inputs.gpu)]
    if inputs.stage == "pretrain":
        transient.append(
            MemoryPart(
                "output layer and loss",
                formulas.logit_bytes(rows * length, model.vocabulary, formulas.CROSS_ENTROPY_BYTES),
            )
        )
    elif inputs.stage == "sft":
        columns = min(model.vocabulary, formulas.FUSED_LOSS_COLUMNS)
        transient.append(
            MemoryPart(
                "output layer and loss",
                formulas.logit_bytes(rows * length * loss_share, columns, formulas.FUSED_LOSS_BYTES),
            )
        )
    records = MemoryPart("records", formulas.record_bytes(data.records, data.tokens), host=True)
    updates = []
    for phase in model.phases:
        kept = formulas.activation_part(
            activations, phase.blocks_with_activations, recompute=config.optim.activation_checkpointing
        )
        updates.append(
            formulas.with_runtime(
                [*formulas.state_parts(model.weights, s, phase.weights), records],
                [MemoryPart("activations", kept), *transient],
                ProcessOverhead.for_device(inputs.gpu),
            )
        )
    return _with_largest_update({}, updates, inputs)


def _with_largest_update(
    others: dict[str, list[MemoryPart]], updates: list[list[MemoryPart]], inputs: EstimateInput
) -> MemoryEstimate:
    """Return an estimate of `others` and the updates of that training phase whose updates need the most memory.

    The name of the result contains the number of the phase if there are several.
    """
    all_updates = MemoryEstimate({str(i): parts for i, parts in enumerate(updates, 1)}, device_is_host=not inputs.gpu)
    number = all_updates.largest_phase
    name = "update" if len(updates) == 1 else f"update, phase {number} of {len(updates)}"
    return MemoryEstimate(others | {name: list(all_updates.phases[number])}, device_is_host=not inputs.gpu)


def _estimate_ppo(inputs: EstimateInput, config: PPOConfig, shapes: PPOModelShapes) -> MemoryEstimate:
    """Estimate PPO: sampling, scoring and the largest update."""
    s, data, runtime = inputs.sharding, inputs.data, ProcessOverhead.for_device(inputs.gpu)
    trained, base_embeddings = _trained_weights(inputs, config, shapes)
    offloaded, on_device_for_scoring = _offloaded_parts(inputs, config, shapes)
    permanent = [
        *_frozen_parts(inputs, config, shapes),
        *base_embeddings,
        *offloaded,
        MemoryPart("records", formulas.record_bytes(data.records, data.tokens), host=True),
        MemoryPart("rollout", _rollout_bytes(config, data, shapes.policy.vocabulary)),
    ]
    if inputs.bfloat16 and not inputs.gpu:
        copies = min(formulas.ONEDNN_COPIES, config.sampling.batch_size)
        counts = shapes.policy.weights
        unquantized = counts.trained + counts.frozen - counts.quantized
        permanent.append(MemoryPart("kernels' copies of weights", 2.0 * copies * unquantized))
    if config.ppo.ema is not None:
        permanent.append(MemoryPart("averaged policy", float(4 * shapes.policy.weights.trained)))
    if inputs.bfloat16 and inputs.gpu and s.zero < 3:
        permanent.append(MemoryPart("bfloat16 copy for sampling", 2.0 * shapes.policy.weights.trained))
    share = config.ppo.rollout_size // config.ppo.minibatches // s.processes
    microbatch = min(config.optim.microbatch_size, share)
    max_response = config.sampling.max_new_tokens
    response = min(max_response, max(config.sampling.min_new_tokens, inputs.response_tokens or max_response))
    if config.optim.microbatch_tokens is not None:
        mean = sum(data.typical_lengths(microbatch)) / microbatch + response
        microbatch = max(1, min(microbatch, int(config.optim.microbatch_tokens // mean)))
    packed_shape = _packed_shape([length + response for length in data.typical_lengths(microbatch)])
    models = [shapes.policy] if shapes.value is None else [shapes.policy, shapes.value]
    traces = [traced_activations(model, *packed_shape, inputs.bfloat16) for model in models]
    vocabulary = shapes.policy.vocabulary
    tokens = min(microbatch * response, max(1, MAX_LOGITS_AT_ONCE // vocabulary))
    # One graph at a time where the two models share nothing and no engine counts the backward passes.
    one_by_one = shapes.value is not None and not shapes.shared_base and s.processes == 1 and not s.deepspeed
    restored = _restored_layer([*models, *shapes.reward_models], inputs.gpu)
    score = [
        restored,
        MemoryPart("activations", max(trace.fixed + trace.block for trace in traces)),
        MemoryPart("output layer and loss", formulas.logit_bytes(tokens, vocabulary, formulas.CROSS_ENTROPY_BYTES)),
        formulas.gathered_part(trained, shapes.policy.blocks, s, whole=True),
    ]
    decode_rows = min(config.sampling.batch_size, max(1, config.ppo.rollout_size // s.processes))
    cache = _kv_cache_bytes(shapes.policy, decode_rows, data.longest + max_response, inputs.bfloat16)
    sample = [
        restored,
        MemoryPart("KV cache", cache),
        MemoryPart("output layer and loss", formulas.logit_bytes(decode_rows, vocabulary, formulas.SAMPLING_BYTES)),
        formulas.gathered_part(shapes.policy.weights, shapes.policy.blocks, s, whole=True),
    ]
    # There are no gradients outside of updates.
    outside_updates = [*(part for part in formulas.state_parts(trained, s) if part.name != "gradients"), *permanent]
    updates = []
    for phases in _common_phases(models, config.ppo.steps):
        kept = [
            formulas.activation_part(
                trace, phase.blocks_with_activations, recompute=config.optim.activation_checkpointing
            )
            for trace, phase in zip(traces, phases, strict=True)
        ]
        activations = max(kept) if one_by_one else sum(kept)
        others_kept = activations - kept[0] if one_by_one else sum(kept[1:])
        head = MemoryPart("output layer and loss", _output_layer_bytes(config, tokens, vocabulary, others_kept))
        gathered = formulas.gathered_part(trained, shapes.policy.blocks, s)
        update = [MemoryPart("activations", activations), head, gathered, restored]
        states = formulas.state_parts(trained, s, sum(phase.weights for phase in phases))
        updates.append(formulas.with_runtime([*states, *permanent], update, runtime))
    others = {
        "sample": formulas.with_runtime(outside_updates, sample, runtime),
        "score": formulas.with_runtime([*outside_updates, *on_device_for_scoring], score, runtime),
    }
    return _with_largest_update(others, updates, inputs)


def _restored_layer(models: list[ModelShape], gpu: bool) -> MemoryPart:
    """Return the memory of the largest quantized layer, restored for its product in the dtype that it computes in."""
    largest = max(model.largest_quantized for model in models)
    return MemoryPart("restored 4-bit layer", float(largest * (2 if gpu else 4)))


def _trained_weights(
    inputs: EstimateInput, config: PPOConfig, shapes: PPOModelShapes
) -> tuple[WeightCounts, list[MemoryPart]]:
    """Return the weights of policy and value model together; a shared base counts once.

    The linear layers of an adapter's base are stored in the computing precision, but its embeddings are not: what
    those take more is returned as a part of its own.
    """
    halved = config.peft.enabled and _stores_linear_weights(inputs, config) and not inputs.sharding.deepspeed
    models = [shapes.policy] if shapes.value is None else [shapes.policy, shapes.value]
    counts, more = [], 0.0
    for number, model in enumerate(models):
        weights = model.weights
        if number and shapes.shared_base:
            weights = WeightCounts(weights.trained, 0, weights.trained_bytes)
        elif halved and weights.frozen_bytes == 4:
            weights = replace(weights, frozen_bytes=2)
            more += 2.0 * _embedding_weights(model)
        counts.append(weights)
    total = counts[0] if len(counts) == 1 else counts[0] + counts[1]
    return total, [MemoryPart("embeddings in float32", more)] if more else []


def _stores_linear_weights(inputs: EstimateInput, config: PPOConfig) -> bool:
    """Return whether frozen linear layers are stored in the computing precision (`rlhf.models.frozen_weights`)."""
    return inputs.bfloat16 and config.frozen_dtype == "auto"


def _embedding_weights(model: ModelShape) -> int:
    """Return the number of weights of the embeddings, which stay in float32."""
    return model.vocabulary * int(model.config.hidden_size)


def _common_phases(models: list[ModelShape], steps: int) -> list[tuple[TrainablePhase, ...]]:
    """Return the phases of all models in each part of the run in which none of them changes its phase."""
    starts = sorted({phase.first_step for model in models for phase in model.phases if phase.first_step < steps})
    return [tuple([p for p in model.phases if p.first_step <= start][-1] for model in models) for start in starts]


def _output_layer_bytes(config: PPOConfig, tokens: int, vocabulary: int, others_kept: float) -> float:
    """Return the bytes of the policy's output layer beyond all activations.

    The peak is either while only the policy's forward pass has run, so that `others_kept` bytes of the activations do
    not exist yet, or during the backward pass.
    """
    more = formulas.FILTER_BYTES if _sampling_is_filtered(config) else 0
    return max(
        formulas.logit_bytes(tokens, vocabulary, formulas.POLICY_PASS_BYTES + more) - others_kept,
        formulas.logit_bytes(tokens, vocabulary, formulas.POLICY_KEPT_BYTES + more),
    )


def _packed_shape(lengths: list[int]) -> tuple[int, int]:
    """Return (rows, length) of the batch into which a microbatch of sequences is packed."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows, length = pack(torch.zeros_like(mask, dtype=torch.long), mask).ids.shape
    return int(rows), int(length)


def offloadable(shapes: PPOModelShapes) -> tuple[str, ...]:
    """Return the roles whose models could be offloaded to CPU memory."""
    return (
        *(["reference"] if shapes.reference else []),
        *(["reward"] if shapes.reward_models and not shapes.shared_base else []),
    )


def _frozen_model_bytes(inputs: EstimateInput, config: PPOConfig, shapes: PPOModelShapes) -> dict[str, float]:
    """Return role -> bytes of the frozen models that have their own weights; they are unsharded on every process."""

    def stored(model: ModelShape) -> float:
        halved = _stores_linear_weights(inputs, config) and model.weights.frozen_bytes == 4
        linear = model.weights.frozen - model.weights.quantized - _embedding_weights(model) if halved else 0
        return float(model.weights.bytes - 2 * max(linear, 0))

    reference = 0.0 if shapes.reference is None else stored(shapes.reference)
    reward = 0.0 if shapes.shared_base else sum(stored(model) for model in shapes.reward_models)
    return {"reference": reference, "reward": reward}


ROLE_NAMES = {"reference": "reference", "reward": "reward models"}


def _frozen_parts(inputs: EstimateInput, config: PPOConfig, shapes: PPOModelShapes) -> list[MemoryPart]:
    """Return the reference and reward models that stay on the device, or their adapters on the policy's base."""
    if shapes.shared_base:
        adapter = float(shapes.policy.weights.trained * shapes.policy.weights.trained_bytes)
        return [
            MemoryPart("reference adapter", adapter),
            MemoryPart("reward models' adapters", adapter * len(shapes.reward_models)),
        ]
    return [
        MemoryPart(ROLE_NAMES[role], size)
        for role, size in _frozen_model_bytes(inputs, config, shapes).items()
        if not inputs.gpu or role not in config.offload
    ]


def _offloaded_parts(
    inputs: EstimateInput, config: PPOConfig, shapes: PPOModelShapes
) -> tuple[list[MemoryPart], list[MemoryPart]]:
    """Return the offloaded models in CPU memory, and their part on the device while scoring: one role at a time."""
    frozen = _frozen_model_bytes(inputs, config, shapes)
    sizes = {role: size for role, size in frozen.items() if inputs.gpu and role in config.offload}
    in_cpu_memory = [MemoryPart(f"{ROLE_NAMES[role]}, offloaded", size, host=True) for role, size in sizes.items()]
    return in_cpu_memory, [MemoryPart("largest offloaded model", max(sizes.values(), default=0.0))]


def _rollout_bytes(config: PPOConfig, data: DataProfile, vocabulary: int) -> float:
    """Return the bytes of a rollout, which every process holds completely.

    Each token takes 9 bytes and each response token 33 more. If sampling is filtered, each response token also takes
    one bit per entry of the vocabulary, for the set of tokens that could be sampled.
    """
    size, response = config.ppo.rollout_size, config.sampling.max_new_tokens
    support = response * -(-vocabulary // 8) if _sampling_is_filtered(config) else 0
    return float(size * (9 * (data.longest + response) + 33 * response + support))


def _sampling_is_filtered(config: PPOConfig) -> bool:
    s = config.sampling
    return bool(s.top_k or s.top_p < 1.0 or s.min_new_tokens)


def _kv_cache_bytes(model: ModelShape, rows: int, length: int, bfloat16: bool) -> float:
    c = model.config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    number = 2 if bfloat16 else model.weights.frozen_bytes
    return formulas.kv_cache_bytes(model.blocks, heads, width, rows, length, number)


def device_bytes() -> float | None:
    """Return the memory of this machine's first GPU in bytes; None if there is no GPU."""
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(0).total_memory)
