"""Record which parameters are gathered while PPO samples under ZeRO-3; each process writes FOLDER/RANK.json.

accelerate launch --config_file configs/accelerate/zero3.yaml -m tests.distributed.gathered REWARD_MODEL FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed

from rlhf.distributed.engine import make_accelerator, quiet_libraries, set_deepspeed_batch_size
from rlhf.distributed.launch_env import get_rank, leave_process_groups_at_exit
from rlhf.generation import native
from rlhf.models.reward_models import load_scorer
from tests.models import tiny
from tests.trainers.setup import make, sometimes_ending

COLLECTIVES = ("all_gather_into_tensor", "all_gather", "_all_gather_base", "all_gather_coalesced")


def counted() -> list[str]:
    """Return a list to which the name of every later gathering collective is added.

    Call it before DeepSpeed starts, because DeepSpeed keeps references to the functions.
    """
    calls: list[str] = []
    for name in COLLECTIVES:
        if hasattr(torch.distributed, name):
            original = getattr(torch.distributed, name)

            def noted(*arguments: Any, original: Any = original, name: str = name, **words: Any) -> Any:
                calls.append(name)
                return original(*arguments, **words)

            setattr(torch.distributed, name, noted)
    return calls


def status(model: Any) -> list[str]:
    """Return the ZeRO-3 states of a model's parameters: AVAILABLE (gathered) or NOT_AVAILABLE (sharded)."""
    return sorted({p.ds_status.name for p in model.parameters()})


def main(folder: str, out: str) -> None:
    """Run two steps of PPO and record the state of the parameters."""
    quiet_libraries(telemetry=False)
    calls = counted()
    # Before there is an accelerator: transformers would load shards afterwards.
    policy, reference = sometimes_ending(tiny.new(1)), tiny.new(2).requires_grad_(False)
    value, reward = (load_scorer(tiny.source(folder)) for _ in range(2))
    accelerator = make_accelerator()
    set_deepspeed_batch_size(accelerator, 3, 1.0)
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = 0  # else weights as small as these are never shared out
    found: list[dict[str, Any]] = []
    lines: list[dict[str, float]] = []
    trainer = make(
        folder,
        policy=policy,
        reference=reference,
        value_model=value,
        reward_model=reward.requires_grad_(False),
        report=lambda _, __, stats: lines.append(stats),
    )
    module = trainer.accelerator.unwrap_model(trainer.models.trained)
    before = {"policy": status(module.policy), "value": status(module.value_model)}
    draw, sample = native.generate_rollout, trainer.sample

    def drawn(model: Any, *arguments: Any, **words: Any) -> Any:
        seen = {"policy": status(module.policy), "value": status(module.value_model)}
        begun = len(calls)
        rollout = draw(model, *arguments, **words)
        found.append(seen | {"inside": len(calls) - begun, "tokens": int(rollout.response_ids.shape[1])})
        return rollout

    def sampled() -> Any:
        begun = len(calls)
        rollout = sample()
        found[-1] |= {"all": len(calls) - begun, "after": status(module.policy)}
        return rollout

    native.generate_rollout, trainer.sample = drawn, sampled  # type: ignore[method-assign]
    trainer.train()
    weights = len(list(module.policy.parameters()))
    losses = [line["policy_loss"] for line in lines]
    told = {"before": before, "steps": found, "weights": weights, "losses": losses}
    Path(out, f"{get_rank()}.json").write_text(json.dumps(told), encoding="utf-8")
    leave_process_groups_at_exit()


if __name__ == "__main__":
    main(*sys.argv[1:])
