"""Runs whose numbers every engine must reproduce, and broken runs that a comparison must reject.

The runs use few records, which come back every second update, high learning rates, weight decay, a warm-up and a
gradient clip that is active, so that a wrong rate, gradient or decay shows in the losses that follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.stages import setup

ONE = "one"
ENGINES = ("ddp", "zero1", "zero2", "zero3")
UPDATES = 20
TRAINER = {
    "batch_size": 8,
    "microbatch_size": 2,
    "epochs": 1000,
    "max_updates": UPDATES,
    "weight_decay": 0.1,
    "warmup_fraction": 0.2,
    "max_grad_norm": 0.05,
    "precision": "float32",
}
"""Two processes accumulate two microbatches each, one process four; with adapters one each, and two."""
RATES = {
    "full": {"sft": 5e-3, "reward": 1e-3, "classify": 7e-4},
    "lora": {"sft": 5e-3, "reward": 5e-3, "classify": 2e-3},
}
"""High, but not so high that a loss jumps about: roundings would then grow from update to update."""
PPO = {"steps": UPDATES // 4, "rollout_size": 8, "epochs": 2, "minibatches": 2}
PPO_OPTIM = {
    "learning_rate": 2e-3,
    "value_learning_rate": 5e-3,
    "microbatch_size": 1,
    "weight_decay": 0.1,
    "warmup_fraction": 0.2,
    "max_grad_norm": 0.5,
    "precision": "float32",
}
LATE = {"warmup_fraction": 0.2 + 1 / UPDATES}
"""A warm-up that takes one update more: no rate falls on its update."""
SFT_PHASES: dict[str, Any] = {  # weights begin to learn, and some end before the run does
    "unfreeze": [
        {"train": {"last": 1}, "updates": 3, "learning_rate": 0.01},
        {"train": "all", "updates": 4, "learning_rate": 0.002},
        {"train": {"parts": ["attention"]}, "updates": 3, "learning_rate": 0.005},
    ],
    "evaluations": 2,
    "optim": {k: v for k, v in TRAINER.items() if k not in ("epochs", "max_updates")},
}
PPO_PHASES = {
    "freeze": {"policy": {"parts": ["embeddings"]}},
    "unfreeze": {
        "policy": [
            {"train": {"last": 1}, "steps": 1, "learning_rate": 0.003},
            {"train": "all", "steps": 2},
            {"train": {"parts": ["mlp"]}},
        ],
        "value_model": [{"train": {"parts": ["score"]}, "steps": 2}, {"train": "all"}],
    },
    "ppo": PPO | {"steps": 4},
    "checkpoint_every": 2,
}


@dataclass(frozen=True)
class Case:
    """A run of one stage; `folder` is its place below the folder of an engine."""

    folder: str
    stage: str
    config: dict[str, Any]
    engines: tuple[str, ...] = ENGINES

    @property
    def name(self) -> str:
        """Return the name of the run in a table."""
        return self.folder.replace("/", ", ").replace("-", " ")


def cases(top: Path, model: str, files: setup.Files) -> list[Case]:
    """Return the runs in an order in which each reads only what one process wrote before it, below `top`/one."""
    full = _chain(top, model, files, "full")
    lora = _chain(top, full[0].config["output_dir"], files, "lora")  # adapters of a base that says nothing learn little
    shared = lora[-1].config | {"roles": "shared"}
    sft, ppo = full[0].config, full[-1].config
    longer = {"optim": PPO_OPTIM | {"microbatch_size": 2}}
    text = (
        ppo
        | longer
        | {
            "ppo": PPO | {"steps": 3, "value_model": "trunk", "value_warmup": 1},
            "ptx": {"coef": 0.5, "data": [{"path": files["text"]}], "batch_size": 4},
        }
    )
    return [
        *full,
        *lora,
        Case("lora/ppo-shared", "ppo", shared),
        Case("full/sft-phases", "sft", sft | SFT_PHASES),
        Case("full/sft-packed", "sft", sft | {"packing": True}),
        Case("full/ppo-phases", "ppo", ppo | longer | PPO_PHASES),
        Case("full/ppo-text", "ppo", text, ENGINES[1:]),
        Case("full/ppo-text-balanced", "ppo", text | {"ptx": text["ptx"] | {"balance": 0.5}}, ("ddp",)),
    ]


def _chain(top: Path, model: str, files: setup.Files, kind: str) -> list[Case]:
    """Return the runs of SFT, reward model, classifier and PPO; `kind` is full or lora."""
    adapters = kind == "lora"
    made = setup.configs(top / ONE / kind, model, files, adapters=adapters)
    peft = {"peft": setup.adapter(True) | {"target_modules": ["q_proj", "down_proj"]}} if adapters else {}
    found = []
    for stage, rate in RATES[kind].items():
        optim = TRAINER | {"learning_rate": rate} | ({"microbatch_size": 4, "max_grad_norm": 0.01} if adapters else {})
        data = made[stage]["data"] | {"validation_fraction": 0.2}  # 19 and 5 records: incomplete batches
        found.append(
            Case(f"{kind}/{stage}", stage, made[stage] | peft | {"optim": optim, "data": data, "evaluations": 1})
        )
    ppo = {"ppo": PPO, "optim": PPO_OPTIM, "roles": "separate", "checkpoint_every": 1000, "sample_every": 1}
    if adapters:
        ppo["optim"] = PPO_OPTIM | {"learning_rate": 1e-2, "microbatch_size": 2}
    return [*found, Case(f"{kind}/ppo", "ppo", made["ppo"] | peft | ppo)]


def twins(every: list[Case]) -> list[tuple[Case, Case]]:
    """Return (broken, right) pairs of runs that a comparison must tell apart; one process runs them."""
    of = {case.folder: case for case in every}

    def broken(folder: str, name: str, **changes: Any) -> tuple[Case, Case]:
        right = of[folder]
        config = right.config | {"optim": right.config["optim"] | changes}
        return Case(f"broken/{right.stage}-{name}", right.stage, config, (ONE,)), right

    return [
        broken("full/sft", "rates-one-update-late", **LATE),
        broken("lora/sft", "half-of-the-batch", batch_size=4),
        broken("lora/ppo-shared", "rates-one-update-late", **LATE),
    ]
