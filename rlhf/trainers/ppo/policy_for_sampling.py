"""The policy as it is sampled from: whole parameters, in the precision of the run; on a GPU a copy in bfloat16.

A decode step reads every weight once, and little else. Under autocast a GPU would read float32 weights and cast them,
at every token: several times the traffic of a copy that is cast once a rollout. On a CPU the copy is not needed,
because autocast keeps the weights that it has cast for as long as its context lasts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.distributed.engine import gathered_module, shards_parameters
from rlhf.models.quantization import quantized_layers
from rlhf.trainers.ppo.state import PPOModels


class BFloat16Copy:
    """A policy's modules once more, with its trained parameters in bfloat16.

    Parameters that are bfloat16 or quantized already (the base of an adapter) are shared, not copied. Buffers, such as
    the frequencies of rotary embeddings, keep their dtype.

    Attributes:
        model: the copy, in eval mode and without gradients.
    """

    def __init__(self, policy: nn.Module) -> None:
        """Copy the policy, whose parameters must be whole (gathered)."""
        self._pairs: list[tuple[Tensor, Tensor]] = []
        copies: dict[int, Any] = {}
        for parameter in policy.parameters():
            if parameter.dtype in (torch.float32, torch.float16):
                cast = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
                self._pairs.append((cast, parameter))
                copies[id(parameter)] = cast
            else:
                copies[id(parameter)] = parameter
        for layer in quantized_layers(policy):  # the scales beside the packed weights are shared as well
            copies[id(layer.quant_state)] = layer.quant_state
        self.model: Any = copy.deepcopy(policy, copies).eval()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the policy's current parameters."""
        for cast, parameter in self._pairs:
            cast.copy_(parameter)


class PolicyForSampling:
    """Opens the policy for a rollout.

    Attributes:
        uses_copy: whether a bfloat16 copy is sampled from. Under ZeRO-3 it would be a second whole model beside the
            gathered one, so the policy itself is sampled from.
    """

    def __init__(self, models: PPOModels) -> None:
        self.models = models
        on_gpu = models.accelerator.device.type == "cuda"
        self.uses_copy = models.pair.computes_in_bfloat16 and on_gpu and not shards_parameters(models.accelerator)
        self.copy: BFloat16Copy | None = None

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Yield the policy with whole parameters, in the precision of the run."""
        models = self.models
        with gathered_module(models.trained, models.accelerator, lambda module: module.policy) as policy:
            if not self.uses_copy:
                # The shapes of decoding change from step to step: compiled blocks would be compiled again for each.
                with models.pair.autocast(), torch.compiler.set_stance("force_eager"):
                    yield policy
                return
            if self.copy is None:
                self.copy = BFloat16Copy(policy)
            self.copy.refresh()
            yield self.copy.model
