"""Lower bounds on the cost of PPO (operations and bytes, from model shapes), and measured rates of this machine.

    forward of a token at context c    2 N + 4 L H c          (+ 2 H V if logits are needed)
    with backward                      3 times that; 2 times if only adapters are trained (no weight gradients)
    decode step of a rows              max(operations / F, (N + H V) bytes / W)
    AdamW on float32 weights           28 bytes per parameter and update

N: weights of the blocks; L layers, H hidden size, V vocabulary; F operations and W bytes per second. A limit counts
real tokens only: no padding, no overhead, and nothing is computed twice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.models.adapters import adapter_parameters
from rlhf.models.heads import AdapterScorer
from rlhf.models.load import backbone
from rlhf.models.quantization import weight_count

GEMM_SIZES = (256, 512, 1024)  # sizes of the square matrices with which F is measured; the fastest counts
ADAMW_BYTES = 28


@dataclass(frozen=True)
class ModelCost:
    """Sizes of a model that the formulas need."""

    blocks: int  # N: weights of the blocks, without embeddings
    layers: int
    hidden: int
    vocabulary: int
    trainable: int
    weight_bytes: int  # bytes per weight

    @classmethod
    def from_model(cls, model: Any) -> ModelCost:
        """Return the sizes of a causal LM or a scorer. Its active adapter counts as blocks; other adapters do not."""
        adapter = "default"
        if isinstance(model, AdapterScorer):
            model, adapter = model.base, model.adapter
        config = model.config.get_text_config()
        trunk: Any = backbone(model)
        inactive_names = [name for name in getattr(model, "peft_config", {}) if name != adapter]
        inactive = {id(p) for name in inactive_names for p in adapter_parameters(model, name).values()}
        active = [p for p in model.parameters() if id(p) not in inactive]
        excluded = {id(p) for p in trunk.get_input_embeddings().parameters()} | inactive
        first = next(trunk.parameters())
        return cls(
            sum(weight_count(p) for p in trunk.parameters() if id(p) not in excluded),
            config.num_hidden_layers,
            config.hidden_size,
            config.vocab_size,
            sum(p.numel() for p in active if p.requires_grad),
            first.element_size(),
        )

    def forward(self, tokens: float, context: float, logits: float = 0.0) -> float:
        """Return the operations of a forward pass.

        Args:
            tokens: number of real tokens in all sequences.
            context: mean number of tokens to which each token attends.
            logits: number of tokens that pass the output layer.
        """
        return tokens * (2 * self.blocks + 4 * self.layers * self.hidden * context) + logits * self.head

    @property
    def head(self) -> float:
        """Operations of the output layer for one token."""
        return 2.0 * self.hidden * self.vocabulary

    @property
    def decode_bytes(self) -> float:
        """Bytes of weights that one decode step reads."""
        return float(self.weight_bytes * (self.blocks + self.hidden * self.vocabulary))

    def backward_factor(self, all_trained: bool) -> float:
        """Return the cost of forward and backward together, divided by the cost of the forward pass.

        Args:
            all_trained: whether all weights are trained; otherwise only adapters are.
        """
        return 3.0 if all_trained else 2.0


@dataclass(frozen=True)
class MachineRates:
    """Measured rates of one device."""

    flops: float  # operations per second in float32
    flops_bfloat16: float
    bandwidth: float  # bytes per second, reading and writing together

    @classmethod
    def measure(cls, device: torch.device, sizes: Sequence[int] = GEMM_SIZES) -> MachineRates:
        """Measure matrix products and copies for a few seconds; the fastest of each counts.

        Args:
            device: what is measured.
            sizes: rows and columns of the square matrices; on a GPU they are 8 times as large.
        """
        rates = {
            dtype: max(_measure_matmul(side, dtype, device) for side in sizes)
            for dtype in (torch.float32, torch.bfloat16)
        }
        return cls(rates[torch.float32], rates[torch.bfloat16], _measure_copy(device))

    def rate(self, bfloat16: bool) -> float:
        """Return the operations per second in bfloat16 or float32."""
        return self.flops_bfloat16 if bfloat16 else self.flops


def _fastest_seconds(function: Any, device: torch.device, rounds: int = 7) -> float:
    """Return the seconds of the fastest of `rounds` calls."""
    times = []
    for _ in range(rounds):
        started_at = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started_at)
    return min(times)


def _measure_matmul(side: int, dtype: torch.dtype, device: torch.device) -> float:
    size = side if device.type == "cpu" else side * 8
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / _fastest_seconds(lambda: a @ b, device))


def _measure_copy(device: torch.device) -> float:
    source = torch.empty(2**26, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return float(2 * source.numel() * 4 / _fastest_seconds(lambda: target.copy_(source), device))
