"""Whether the blocks of the trained models are compiled, and a note to the user about it."""

from __future__ import annotations

from rlhf.config.ppo import PPOOptim
from rlhf.console import Console
from rlhf.distributed.launch_env import under_deepspeed
from rlhf.models.compiled_blocks import compile_blocks
from rlhf.models.packed_batch import can_pack
from rlhf.models.parameter_selection import block_modules
from rlhf.models.quantization import quantized_layers
from rlhf.trainers.ppo.policy_value import PolicyAndValue

ROW_LENGTH_STEP = 64
"""Compiled blocks see packed rows of a multiple of so many tokens."""


def compile_trained_blocks(
    pair: PolicyAndValue, optim: PPOOptim, device_type: str, longest: int, console: Console
) -> None:
    """Compile the blocks of policy and value model if `optim.compile`, the device and the models allow it.

    Args:
        longest: tokens of the longest sequence of the run.
    """
    if optim.compile == "off" or (optim.compile == "auto" and device_type != "cuda"):
        return
    models = [pair.policy, pair.value_model] if pair.separate_trunks else [pair.policy]
    reason = None
    if under_deepspeed():
        reason = "DeepSpeed gathers and releases weights around every layer"
    elif optim.activation_checkpointing:
        reason = "activation checkpointing runs every block twice"
    elif any(True for model in models for _ in quantized_layers(model)):
        reason = "layers in 4 bits restore their weights in kernels of their own"
    elif not all(can_pack(model) and block_modules(model) for model in models):
        reason = "a model's blocks are not found, or it does not compute the same on packed rows"
    if reason is not None:
        console.note(f"updates: blocks are not compiled, because {reason}")
        return
    pair.row_length = -(-longest // ROW_LENGTH_STEP) * ROW_LENGTH_STEP
    for model in models:
        compile_blocks(model)
    console.note("updates: blocks are compiled in the first step, which takes a minute or more")
