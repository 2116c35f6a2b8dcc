"""What PPO must cost: operations and bytes from shapes, and what this machine can do, measured.

    forward of a token at context c    2 N + 4 L H c          (+ 2 H V where logits are needed)
    with backward                      3 times that; 2 times if only adapters learn (no weight gradients)
    decode step of a rows              max(operations / F, (N + H V) bytes / W)
    AdamW on float32 weights           28 bytes a parameter and update

N: weights of the blocks; L layers, H width, V vocabulary; F operations and W bytes a second. A limit counts real tokens
only: no padding, no overhead, nothing computed twice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.models.adapters import adapter_parameters
from rlhf.models.heads import AdapterScorer
from rlhf.models.load import backbone

GEMM_SIZES = (256, 512, 1024)  # sides of the matrices that F is measured with: the best counts
ADAMW_BYTES = 28


@dataclass(frozen=True)
class ModelCost:
    """What the formulas need of a model."""

    blocks: int  # N: weights of the blocks, without embeddings
    layers: int
    hidden: int
    vocabulary: int
    trainable: int
    weight_bytes: int  # bytes a weight

    @classmethod
    def of(cls, model: Any) -> ModelCost:
        """Of a causal LM or a scorer; the adapter that it computes with counts as blocks, others do not."""
        adapter = "default"
        if isinstance(model, AdapterScorer):
            model, adapter = model.base, model.adapter
        config = model.config.get_text_config()
        trunk: Any = backbone(model)
        others = [name for name in getattr(model, "peft_config", {}) if name != adapter]
        foreign = {id(p) for name in others for p in adapter_parameters(model, name).values()}
        own = [p for p in model.parameters() if id(p) not in foreign]
        embedded = {id(p) for p in trunk.get_input_embeddings().parameters()} | foreign
        first = next(trunk.parameters())
        return cls(
            sum(p.numel() for p in trunk.parameters() if id(p) not in embedded),
            config.num_hidden_layers,
            config.hidden_size,
            config.vocab_size,
            sum(p.numel() for p in own if p.requires_grad),
            first.element_size(),
        )

    def forward(self, tokens: float, context: float, logits: float = 0.0) -> float:
        """Operations of a forward pass.

        Args:
            tokens: real ones, all sequences together. context: mean number of tokens that each attends to.
            logits: tokens that pass the output layer.
        """
        return tokens * (2 * self.blocks + 4 * self.layers * self.hidden * context) + logits * self.head

    @property
    def head(self) -> float:
        """Operations of the output layer for one token."""
        return 2.0 * self.hidden * self.vocabulary

    @property
    def decode_bytes(self) -> float:
        """Weights that one decode step reads."""
        return float(self.weight_bytes * (self.blocks + self.hidden * self.vocabulary))

    def backward_factor(self, whole: bool) -> float:
        """Forward and backward together, in forwards."""
        return 3.0 if whole else 2.0


@dataclass(frozen=True)
class MachineRates:
    """Measured rates of one device."""

    flops: float  # operations a second in float32
    flops_bfloat16: float
    bandwidth: float  # bytes a second, reading and writing together

    @classmethod
    def measure(cls, device: torch.device) -> MachineRates:
        """A few seconds of matrix products and copies; the best of each counts."""
        rates = {
            dtype: max(_gemm(side, dtype, device) for side in GEMM_SIZES) for dtype in (torch.float32, torch.bfloat16)
        }
        return cls(rates[torch.float32], rates[torch.bfloat16], _copy(device))

    def rate(self, bfloat16: bool) -> float:
        """Operations a second in the precision that is computed in."""
        return self.flops_bfloat16 if bfloat16 else self.flops


def _best(function: Any, device: torch.device, rounds: int = 7) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def _gemm(side: int, dtype: torch.dtype, device: torch.device) -> float:
    size = side if device.type == "cpu" else side * 8
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / _best(lambda: a @ b, device))


def _copy(device: torch.device) -> float:
    source = torch.empty(2**26, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return float(2 * source.numel() * 4 / _best(lambda: target.copy_(source), device))
