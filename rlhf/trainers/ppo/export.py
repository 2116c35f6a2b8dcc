"""Write the trained models of a PPO run as plain folders that transformers loads."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlhf.data.render import Renderer
from rlhf.distributed.launch_env import is_main_process
from rlhf.distributed.zero_gather import gathered_parameters
from rlhf.models.load import set_stop_tokens
from rlhf.models.model_metadata import save_tokenizer_and_handover
from rlhf.trainers.ppo.state import PPOModels


def save_trained_models(
    models: PPOModels, renderer: Renderer, folder: Path, value_model: Path | None, reply_tokens: float | None
) -> None:
    """Write the policy with its tokenizer and hand-over record, and the value model if a folder is given. Collective.

    Args:
        models: the models of the run.
        renderer: renderer of the policy's tokenizer.
        folder: folder of the policy.
        value_model: folder of the value model; None = it is not written.
        reply_tokens: mean tokens of the policy's responses, for the hand-over record.
    """
    pair, average = models.pair, models.average
    set_stop_tokens(pair.policy, renderer)
    averaged = average.applied(pair.trained_policy()) if average is not None else nullcontext()
    with averaged, gathered_parameters(pair.parameters()):
        _save_model(pair.policy, folder, models.accelerator)
        if value_model is not None:
            _save_model(pair.value_model, value_model, models.accelerator)
    if is_main_process():
        save_tokenizer_and_handover(folder, "ppo", renderer, renderer.tokenizer, reply_tokens=reply_tokens)


def _save_model(model: Any, folder: Path, accelerator: Any) -> None:
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        # Only the trained adapter: the frozen reference copy is the SFT model, which has its own folder.
        options = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}
        model.save_pretrained(str(folder), **options)
    accelerator.wait_for_everyone()
