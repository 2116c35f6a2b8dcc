"""What training holds in memory, in bytes: formulas from counts. No tensor is made here; imports no torch.

Of P trained and F frozen parameters of b and f bytes each, on n processes:

    part            one, DDP      ZeRO-1      ZeRO-2      ZeRO-3, FSDP
    weights         b P + f F     b P + f F   b P + f F   (b P + f F) / n, and what is gathered at a time
    gradients       b T           b P         b P / n     b P / n     T = those of P that the phase trains
    Adam            2 b P         8 P / n     8 P / n     8 P / n (FSDP: 2 b P / n)
    master copy     0             4 P / n     4 P / n     4 P / n (FSDP: 0)
    communication   DDP: b P      b min(P, B) ...         B = 5e8 numbers, DeepSpeed's bucket

    activations     fixed + k A                     k blocks that are differentiated, A bytes of one block
      recomputed    fixed + k H + A                 H bytes of a block's input
    output layer    tokens x V x bytes a logit
    KV cache        2 L heads width x rows x columns x bytes

A block below the first trained weight keeps nothing: k counts from the lowest block that is trained, and all blocks if
the embeddings are. A and fixed are traced (`rlhf.preflight.activation_trace`), not guessed from the architecture. Where
DeepSpeed offloads, the same bytes lie in the machine's memory instead of the device's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BUCKET = 500_000_000  # numbers that DeepSpeed reduces at once, its default
LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps gathered, its default
CACHE_COLUMNS = 32  # by which the cache of sampling grows
LOSS = 12  # bytes a logit while a full cross-entropy and its gradient exist (float32 logits, log-softmax, gradient)
FUSED = 16  # the same in TRL's head for SFT, which sees the tokens with loss only and VOCABULARY_PART columns at once
VOCABULARY_PART = 32768
POLICY = 24  # the same in PPO's forward pass: logits, log-softmax, and what the entropy is made of
POLICY_KEPT = 8  # of it, what stays until the backward pass
FILTERED = 9  # more of both where sampling was filtered: a bool and masked logits
DRAWN = 16  # the same where a token is drawn: logits, probabilities and their sums
ONEDNN_COPIES = (
    120  # of a weight, that CPU kernels of bfloat16 keep rearranged: one for each number of rows that they met
)
RECORD, TOKEN = 2048, 56  # bytes of a record and of a token as Python keeps them, rows and data set together


@dataclass(frozen=True)
class Sharding:
    """How weights, gradients and optimizer are spread."""

    processes: int = 1
    zero: int = 0  # ZeRO stage; 3 also for FSDP
    deepspeed: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any], processes: int) -> Sharding:
        """Of an accelerate file."""
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
        """Of something that is spread from a ZeRO stage on: what one process holds."""
        return bytes / self.processes if self.zero >= stage else bytes


@dataclass(frozen=True)
class WeightCounts:
    """Parameters of one model, or of several that are trained as one."""

    trained: int
    frozen: int = 0
    trained_bytes: int = 4  # each
    frozen_bytes: int = 4

    @property
    def bytes(self) -> int:
        """Of all of them, whole."""
        return self.trained * self.trained_bytes + self.frozen * self.frozen_bytes

    def __add__(self, other: WeightCounts) -> WeightCounts:
        """Both together; the wider numbers count for both, so that nothing is counted too small."""
        return WeightCounts(
            self.trained + other.trained,
            self.frozen + other.frozen,
            max(self.trained_bytes, other.trained_bytes),
            max(self.frozen_bytes if self.frozen else 0, other.frozen_bytes if other.frozen else 0) or 4,
        )


@dataclass(frozen=True)
class MemoryPart:
    """Some bytes with a name, on the device or in the machine's memory (host)."""

    name: str
    bytes: float
    host: bool = False


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that autograd keeps and needs for one microbatch: of one block, beside the blocks, and a block's input."""

    block: float
    fixed: float
    boundary: float


def state_parts(w: WeightCounts, s: Sharding, active: int | None = None) -> list[MemoryPart]:
    """Weights, gradients, optimizer, master copy and communication of what is trained, on one process.

    Args:
        active: how many weights take gradients in the phase; None = all that are ever trained. The optimizer is one for
            all phases, and DeepSpeed has room for every gradient throughout.
    """
    now = w.trained if active is None or s.deepspeed else active
    adam = 8 if s.deepspeed else 2 * w.trained_bytes
    ranks = s.processes > 1
    bucket = min(w.trained, BUCKET) if s.deepspeed else w.trained if ranks and s.zero == 0 else 0
    parts = [
        MemoryPart("weights", s.share(w.bytes, 3), s.offload_weights),
        MemoryPart("gradients", s.share(now * w.trained_bytes, 2), s.offload_optimizer),
        MemoryPart("optimizer (Adam)", s.share(adam * w.trained, 1), s.offload_optimizer),
        MemoryPart("master copy", s.share(4 * w.trained, 1) if s.deepspeed else 0.0, s.offload_optimizer),
        MemoryPart("communication", float(bucket * w.trained_bytes)),
    ]
    return [part for part in parts if part.bytes]


def gathered_part(w: WeightCounts, blocks: int, s: Sharding, *, whole: bool = False) -> MemoryPart:
    """Weights that are put together again while they are used.

    Args:
        blocks: of the model; FSDP holds two at a time, DeepSpeed up to LIVE parameters.
        whole: all at once, as for sampling.
    """
    if s.zero < 3:
        return MemoryPart("gathered weights", 0.0)
    numbers = w.trained + w.frozen
    share = 1.0 if whole else min(1.0, LIVE / max(numbers, 1)) if s.deepspeed else min(1.0, 2 / max(blocks, 1))
    return MemoryPart("gathered weights", share * w.bytes)


def activation_part(traced: ActivationBytes, blocks: int, *, recompute: bool) -> float:
    """Kept for the backward pass of one microbatch.

    Args:
        blocks: that are differentiated.
        recompute: activation checkpointing: inputs of the blocks, and one block at a time.
    """
    if recompute and blocks:
        return traced.fixed + blocks * traced.boundary + traced.block
    return traced.fixed + blocks * traced.block


def logit_bytes(tokens: float, vocabulary: int, bytes_each: int) -> float:
    """Of an output layer with loss; `bytes_each` is one of LOSS, FUSED, POLICY, DRAWN."""
    return tokens * vocabulary * bytes_each


def kv_cache_bytes(layers: int, heads: int, width: int, rows: int, length: int, number_bytes: int) -> float:
    """Keys and values of rows being sampled; one layer's is held twice while it grows."""
    columns = math.ceil(length / CACHE_COLUMNS) * CACHE_COLUMNS
    return 2.0 * (layers + 1) * heads * width * rows * columns * number_bytes


def record_bytes(number: int, tokens: int) -> float:
    """Records and their rows, in the machine's memory."""
    return float(number * RECORD + tokens * TOKEN)


@dataclass(frozen=True)
class ProcessOverhead:
    """What a process holds beside its tensors: a fixed amount, and a factor on memory that comes and goes.

    On a CPU freed blocks stay in the heap (glibc): a forward and backward pass that holds 232 MiB makes the process
    grow by 358, and by more where shapes change. A CUDA context takes about half a gibibyte, and the caching allocator
    rounds up: both by experience, not measured here.
    """

    fixed: float
    heap: float

    @classmethod
    def of(cls, gpu: bool) -> ProcessOverhead:
        """Of a device."""
        return cls(0.6 * 2**30, 1.1) if gpu else cls(130 * 2**20, 1.6)


@dataclass(frozen=True)
class MemoryEstimate:
    """Phases of a stage, each with its parts; what the process needs is the largest phase."""

    phases: Mapping[str, Sequence[MemoryPart]]
    device_is_host: bool  # a CPU: everything counts

    def needed(self, phase: str) -> float:
        """Bytes on the device."""
        return sum(part.bytes for part in self.phases[phase] if self.device_is_host or not part.host)

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.needed)

    @property
    def peak(self) -> float:
        """Bytes on the device at the worst moment."""
        return self.needed(self.largest)

    @property
    def host(self) -> float:
        """Bytes that were moved to the machine's memory; 0 on a CPU, where the peak has them."""
        if self.device_is_host:
            return 0.0
        return max(sum(part.bytes for part in parts if part.host) for parts in self.phases.values())


def with_runtime(
    parts: Sequence[MemoryPart], transient: Sequence[MemoryPart], runtime: ProcessOverhead
) -> list[MemoryPart]:
    """All parts of a phase and what the allocator and the libraries add."""
    extra = sum(part.bytes for part in transient) * (runtime.heap - 1.0) + runtime.fixed
    return [*(p for p in (*parts, *transient) if p.bytes), MemoryPart("libraries and allocator", extra)]


BYTE_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> float | None:
    """'80G', '80GiB', '512M', '16e9' as bytes (powers of 1024); None if it is no amount."""
    short = text.strip().upper().removesuffix("IB").removesuffix("B")
    number, unit = (short[:-1], short[-1]) if short[-1:] in BYTE_UNITS and short[-1:] else (short, "")
    try:
        value = float(number) * BYTE_UNITS[unit]
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def format_bytes(amount: float) -> str:
    """'1.2 GiB', '340 MiB'."""
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 else f"{amount / 2**20:.0f} MiB"
