"""Formulas for the memory of training, in bytes, from numbers of parameters, tokens and processes.

The functions here depend on no stage and no configuration: `rlhf.preflight.stage_memory` applies them to the
configuration of a stage. They create no tensor, and this module imports no torch.

Bytes on each of n processes, for P trained and F frozen parameters of b and f bytes each:

    part            one, DDP      ZeRO-1      ZeRO-2      ZeRO-3, FSDP
    weights         b P + f F     b P + f F   b P + f F   (b P + f F) / n, plus the parameters gathered at a time
    gradients       b T           b P         b P / n     b P / n     T = parameters that the current phase trains
    Adam            2 b P         8 P / n     8 P / n     8 P / n (FSDP: 2 b P / n)
    master copy     0             4 P / n     4 P / n     4 P / n (FSDP: 0)
    communication   DDP: b P      b min(P, B) ...         B = 5e8 elements, the default bucket size of DeepSpeed

    activations     fixed + k A                     k blocks that are differentiated, A bytes of one block
      recomputed    fixed + k H + A                 H bytes of a block's input
    output layer    tokens x V x bytes per logit
    quantized       4.127 bits for each weight of the frozen linear layers that are quantized, instead of 8 f
    KV cache        2 L heads width x rows x columns x bytes

Blocks below the first trained weight keep no activations: k counts the blocks from the lowest trained one upwards, and
all blocks if the embeddings are trained. A and `fixed` are traced (`rlhf.preflight.activation_trace`) rather than
derived from the architecture. With DeepSpeed's offload the same bytes are in CPU memory instead of device memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEEPSPEED_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once (its default)
ZERO3_LIVE_PARAMETERS = 1_000_000_000  # parameters that ZeRO-3 keeps gathered (its default)
KV_CACHE_STEP = 32  # columns by which the KV cache of sampling grows
# Bytes per logit while the values of the output layer exist:
CROSS_ENTROPY_BYTES = 12  # a full cross-entropy and its gradient (float32 logits, log-softmax, gradient)
FUSED_LOSS_BYTES = 16  # TRL's loss for SFT, over tokens with loss only and FUSED_LOSS_COLUMNS of the vocabulary at once
FUSED_LOSS_COLUMNS = 32768
POLICY_PASS_BYTES = 24  # PPO's forward pass: logits, log-softmax, and the intermediate values of the entropy
POLICY_KEPT_BYTES = 8  # the part of POLICY_PASS_BYTES that is kept until the backward pass
FILTER_BYTES = 9  # added to both if sampling was filtered: a bool and masked logits
SAMPLING_BYTES = 16  # sampling of a token: logits, probabilities and their cumulative sums
QUANTIZED_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # nf4 with double quantization (arXiv:2305.14314, section 3)
ONEDNN_COPIES = 120  # oneDNN (bfloat16 on CPU) caches up to this many packed copies of a weight, one per batch shape
RECORD_BYTES, TOKEN_BYTES = 2048, 56  # Python objects of a record and of a token, in rows and data set together


@dataclass(frozen=True)
class Sharding:
    """Sharding of weights, gradients and optimizer state over processes."""

    processes: int = 1
    zero: int = 0  # ZeRO stage; 3 also for FSDP
    deepspeed: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False

    @classmethod
    def from_accelerate(cls, settings: Mapping[str, Any], processes: int) -> Sharding:
        """Return the sharding that the settings of an accelerate file describe."""
        kind, deep = settings.get("distributed_type"), settings.get("deepspeed_config") or {}
        if kind == "FSDP":
            offload = bool((settings.get("fsdp_config") or {}).get("fsdp_offload_params"))
            return cls(processes, 3, False, offload, offload)
        if kind != "DEEPSPEED":
            return cls(processes)
        return cls(
            processes,
            int(deep.get("zero_stage", 2)),
            True,
            deep.get("offload_optimizer_device", "none") != "none",
            deep.get("offload_param_device", "none") != "none",
        )

    def share(self, bytes: float, stage: int) -> float:
        """Return the bytes on one process of values that are sharded from ZeRO stage `stage` on."""
        return bytes / self.processes if self.zero >= stage else bytes


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of parameters of one model, or of several models that are trained as one."""

    trained: int
    frozen: int = 0
    trained_bytes: int = 4  # bytes per trained parameter
    frozen_bytes: int = 4  # bytes per frozen parameter that is not quantized
    quantized: int = 0  # how many of the frozen parameters are quantized

    @property
    def bytes(self) -> float:
        """Bytes of all parameters, unsharded."""
        whole = self.trained * self.trained_bytes + (self.frozen - self.quantized) * self.frozen_bytes
        return whole + self.quantized * QUANTIZED_BITS / 8

    def __add__(self, other: WeightCounts) -> WeightCounts:
        """Return the sum of both; the larger number of bytes per parameter counts for both, as an upper bound."""
        return WeightCounts(
            self.trained + other.trained,
            self.frozen + other.frozen,
            max(self.trained_bytes, other.trained_bytes),
            max(self.frozen_bytes if self.frozen else 0, other.frozen_bytes if other.frozen else 0) or 4,
            self.quantized + other.quantized,
        )


@dataclass(frozen=True)
class MemoryPart:
    """Named share of memory, on the device or in CPU memory (`host`)."""

    name: str
    bytes: float
    host: bool = False


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of activations for one microbatch, forward and backward."""

    block: float  # of one block
    fixed: float  # outside of the blocks
    boundary: float  # of the input of one block


def state_parts(w: WeightCounts, s: Sharding, active: int | None = None) -> list[MemoryPart]:
    """Return weights, gradients, optimizer state, master copy and communication buffers on one process.

    Args:
        w: parameters of the model.
        s: their sharding.
        active: number of parameters that receive gradients in the current phase; None = all that are trained in any
            phase. The optimizer state covers all phases, and DeepSpeed allocates every gradient throughout.
    """
    with_gradient = w.trained if active is None or s.deepspeed else active
    adam = 8 if s.deepspeed else 2 * w.trained_bytes
    distributed = s.processes > 1
    bucket = min(w.trained, DEEPSPEED_BUCKET) if s.deepspeed else w.trained if distributed and s.zero == 0 else 0
    parts = [
        MemoryPart("weights", s.share(w.bytes, 3), s.offload_weights),
        MemoryPart("gradients", s.share(with_gradient * w.trained_bytes, 2), s.offload_optimizer),
        MemoryPart("optimizer (Adam)", s.share(adam * w.trained, 1), s.offload_optimizer),
        MemoryPart("master copy", s.share(4 * w.trained, 1) if s.deepspeed else 0.0, s.offload_optimizer),
        MemoryPart("communication", float(bucket * w.trained_bytes)),
    ]
    return [part for part in parts if part.bytes]


def gathered_part(w: WeightCounts, blocks: int, s: Sharding, *, whole: bool = False) -> MemoryPart:
    """Return the memory of sharded weights that are gathered while they are used.

    Args:
        w: parameters of the model.
        blocks: number of blocks of the model; FSDP gathers two at a time, DeepSpeed up to ZERO3_LIVE_PARAMETERS
            parameters.
        s: their sharding.
        whole: whether all weights are gathered at once, as for sampling.
    """
    if s.zero < 3:
        return MemoryPart("gathered weights", 0.0)
    numbers = w.trained + w.frozen
    share = (
        1.0
        if whole
        else min(1.0, ZERO3_LIVE_PARAMETERS / max(numbers, 1))
        if s.deepspeed
        else min(1.0, 2 / max(blocks, 1))
    )
    return MemoryPart("gathered weights", share * w.bytes)


def activation_part(traced: ActivationBytes, blocks: int, *, recompute: bool) -> float:
    """Return the bytes of activations kept for the backward pass of one microbatch.

    Args:
        traced: bytes of one block, of the rest of the model, and of a block's input.
        blocks: number of blocks that are differentiated.
        recompute: whether activation checkpointing keeps only the inputs of the blocks, and one block at a time.
    """
    if recompute and blocks:
        return traced.fixed + blocks * traced.boundary + traced.block
    return traced.fixed + blocks * traced.block


def logit_bytes(tokens: float, vocabulary: int, bytes_each: int) -> float:
    """Return the bytes of the output layer and its loss.

    Args:
        tokens: tokens that pass the output layer.
        vocabulary: size of the vocabulary.
        bytes_each: bytes per logit: one of the constants CROSS_ENTROPY_BYTES to SAMPLING_BYTES.
    """
    return tokens * vocabulary * bytes_each


def kv_cache_bytes(layers: int, heads: int, width: int, rows: int, length: int, number_bytes: int) -> float:
    """Return the bytes of the KV cache of rows being sampled; one layer's cache exists twice while it grows."""
    columns = math.ceil(length / KV_CACHE_STEP) * KV_CACHE_STEP
    return 2.0 * (layers + 1) * heads * width * rows * columns * number_bytes


def record_bytes(number: int, tokens: int) -> float:
    """Return the bytes of records and their tokenized rows in CPU memory."""
    return float(number * RECORD_BYTES + tokens * TOKEN_BYTES)


@dataclass(frozen=True)
class ProcessOverhead:
    """Memory of a process beside its tensors: a fixed amount, and a factor on temporary memory.

    On a CPU freed blocks stay in the heap (glibc): a forward and backward pass that holds 232 MiB makes the process
    grow by 358 MiB, and by more if shapes change. A CUDA context takes about half a GiB, and the caching allocator
    rounds up; both numbers come from experience and were not measured here.
    """

    fixed: float
    transient_factor: float

    @classmethod
    def for_device(cls, gpu: bool) -> ProcessOverhead:
        """Return the overhead of a process that computes on a GPU or on a CPU."""
        return cls(0.6 * 2**30, 1.1) if gpu else cls(130 * 2**20, 1.6)


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory of each phase of a stage; a process needs as much as the largest phase."""

    phases: Mapping[str, Sequence[MemoryPart]]
    device_is_host: bool  # the device is a CPU, so that parts in CPU memory count too

    def phase_bytes(self, phase: str) -> float:
        """Return the bytes on the device in a phase."""
        return sum(part.bytes for part in self.phases[phase] if self.device_is_host or not part.host)

    @property
    def largest_phase(self) -> str:
        """Name of the phase that needs the most memory."""
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak(self) -> float:
        """Bytes on the device in the largest phase."""
        return self.phase_bytes(self.largest_phase)

    @property
    def host_bytes(self) -> float:
        """Bytes offloaded to CPU memory; 0 if the device is a CPU, where `peak` includes them."""
        if self.device_is_host:
            return 0.0
        return max(sum(part.bytes for part in parts if part.host) for parts in self.phases.values())


def with_runtime(
    parts: Sequence[MemoryPart], transient: Sequence[MemoryPart], runtime: ProcessOverhead
) -> list[MemoryPart]:
    """Return all parts of a phase, and one for the overhead of allocator and libraries.

    Args:
        parts: memory that exists throughout the phase.
        transient: memory that is allocated and freed in it.
        runtime: overhead of the process.
    """
    extra = sum(part.bytes for part in transient) * (runtime.transient_factor - 1.0) + runtime.fixed
    return [*(p for p in (*parts, *transient) if p.bytes), MemoryPart("libraries and allocator", extra)]


BYTE_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> float | None:
    """Return an amount such as '80G', '80GiB', '512M' or '16e9' in bytes (powers of 1024); None if it is invalid."""
    short = text.strip().upper().removesuffix("IB").removesuffix("B")
    number, unit = (short[:-1], short[-1]) if short[-1:] in BYTE_UNITS and short[-1:] else (short, "")
    try:
        value = float(number) * BYTE_UNITS[unit]
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def format_bytes(amount: float) -> str:
    """Return an amount as text such as '1.20 GiB' or '340 MiB'."""
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 else f"{amount / 2**20:.0f} MiB"
