"""What an engine cannot do, said before it is asked to."""

from __future__ import annotations

from rlhf.config.ppo import PPOSettings
from rlhf.distributed.launch_env import under_deepspeed, world_size
from rlhf.errors import ConfigError


def check_deepspeed(settings: PPOSettings) -> None:
    """Refuse what a DeepSpeed engine cannot do.

    Raises: ConfigError.
    """
    if not under_deepspeed():
        return
    if settings.ptx.balance is not None:
        raise ConfigError(
            "DeepSpeed keeps gradients where they cannot be compared",
            found=f"ptx.balance={settings.ptx.balance}",
            where="ptx.balance",
            do="set ptx.balance=null and choose ptx.coef, or launch without DeepSpeed",
        )
    if settings.target_kl is not None:
        raise ConfigError(
            "DeepSpeed cannot take back the gradients of an update that is not made",
            found=f"ppo.target_kl={settings.target_kl}",
            where="ppo.target_kl",
            do="set ppo.target_kl=null and fewer ppo.epochs, or launch without DeepSpeed",
        )
    if settings.ptx.data and settings.ptx.batch_size % world_size():
        raise ConfigError(
            f"{settings.ptx.batch_size} documents cannot be shared equally by {world_size()} processes",
            where="ptx.batch_size",
            do="choose a multiple",
        )
