"""Check PPO's settings against the limits of a DeepSpeed engine before training starts."""

from __future__ import annotations

from rlhf.config.ppo import PPOSettings
from rlhf.distributed.launch_env import under_deepspeed, world_size
from rlhf.errors import ConfigError


def check_deepspeed(settings: PPOSettings) -> None:
    """Reject settings that a DeepSpeed engine does not support; without DeepSpeed, accept all.

    Raises: ConfigError.
    """
    if not under_deepspeed():
        return
    if settings.ptx.balance is not None:
        raise ConfigError(
            "DeepSpeed gives no access to the gradients that this setting compares",
            found=f"ptx.balance={settings.ptx.balance}",
            where="ptx.balance",
            do="set ptx.balance=null and choose ptx.coef, or launch without DeepSpeed",
        )
    if settings.target_kl is not None:
        raise ConfigError(
            "DeepSpeed cannot discard the gradients of an update that is skipped",
            found=f"ppo.target_kl={settings.target_kl}",
            where="ppo.target_kl",
            do="set ppo.target_kl=null and fewer ppo.epochs, or launch without DeepSpeed",
        )
    if settings.ptx.data and settings.ptx.batch_size % world_size():
        raise ConfigError(
            f"{settings.ptx.batch_size} documents cannot be shared equally by {world_size()} processes",
            where="ptx.batch_size",
            do=f"choose a multiple of {world_size()}",
        )
