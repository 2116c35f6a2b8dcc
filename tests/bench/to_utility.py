"""Time to the same gold utility on the demo: our PPO beside that of TRL 1.12.0, each at its best of the same settings.

    python -m tests.bench.to_utility --sft FOLDER --reward FOLDER [--target 1.0] [--steps 24] [--episodes 384]
        [--threads 2] [--every 3] [--settings 4] [--seed 1]

The folders hold the demo's trained SFT and reward model. Policy and reference are the SFT model; the value model starts
from the reward model, whose head is divided, once and for both sides, by the deviation of its scores. Both sides try
the same learning rates and passes, with the same KL coefficient, response limit, temperature, penalty, number of
episodes and prompts; the learning rate falls to 0 over all steps.

Beyond that each side has what its user has: ours configs/demo/ppo.yaml (bfloat16, plain attention, a step that warms up
the value model, which learns 4 times as fast as the policy), TRL its defaults, in float32, since its bfloat16 has no
effect on a CPU, and without gradient accumulation, which would undo its minibatches.

Each run is a fresh process. The clock runs while it trains, first step included: sampling, scoring, update. It stands
still during imports, loading and, every few steps, an examination of the policy: one response to each of the first
held-out prompts of configs/demo/evaluate.yaml, drawn by our sampler with that file's settings and seed for both sides,
and judged by its judge. What trains never sees what the judge says. A run ends when the mean utility reaches the
target, when it falls clearly below the SFT model's, or with its budget of steps. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from rlhf.config.load import load_stage_config
from rlhf.config.schema import EvaluateConfig, PPOConfig
from rlhf.config.sections import ModelSource
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.sources import load_records
from rlhf.errors import TrainingError
from rlhf.evaluation.answers import generate_responses
from rlhf.evaluation.judge import load_judge
from rlhf.models import model_metadata
from rlhf.models.heads import rescale_head
from rlhf.models.load import resolve_model
from rlhf.models.model_metadata import save_tokenizer_and_handover
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import load_scorer
from rlhf.stages.lifecycle import open_tokenizer
from tests.bench.against_trl import SIDES, install
from tests.bench.sides import THEIR_TRAINER, Meter, our_meter, our_trainer, their_trainer
from tests.bench.work import ROOT, Result, Work, machine, run

TRL_FOLDER = ROOT / "build" / "trl-1.12.0"
GRID = tuple((rate, epochs) for epochs in (1, 4) for rate in (3e-4, 1e-3))
VALUE_RATE = 4.0  # times the policy's learning rate, ours
PROMPTS = 200  # that a policy is examined on
COLLAPSE = 0.5  # below the SFT model's utility
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Race(Work):
    """A run to a utility. `steps` are all of its steps."""

    sft: str = ""  # folders as given
    reward: str = ""
    target: float = 1.0
    floor: float = 0.0  # a utility below it ends the run
    every: int = 3  # steps from one examination to the next

    def config(self) -> PPOConfig:
        """configs/demo/ppo.yaml with the settings of the race."""
        settings = {
            "output_dir": self.path("ours"),
            "seed": self.seed,
            "policy.path": self.path("policy"),
            "reward_model.path": self.path("reward"),
            "sampling.max_new_tokens": self.response,
            "ppo.steps": self.steps,
            "ppo.rollout_size": self.episodes,
            "ppo.epochs": self.epochs,
            "ppo.minibatches": self.minibatches,
            "ppo.normalize_scores": "raw",
            "ppo.missing_end_penalty": self.penalty,
            "kl.coef": self.kl_coef,
            "kl.target": "null",
            "optim.learning_rate": self.learning_rate,
            "optim.value_learning_rate": VALUE_RATE * self.learning_rate,
            "optim.schedule": "linear",
        }
        return load_stage_config(
            PPOConfig, "configs/demo/ppo.yaml", [f"{key}={value}" for key, value in settings.items()]
        ).config


class Enough(Exception):
    """The run need not go on."""


class Examiner:
    """The gold judge's mean utility of a policy's responses, and their KL to the SFT model."""

    def __init__(self, race: Race) -> None:
        self.config = load_stage_config(EvaluateConfig, "configs/demo/evaluate.yaml").config
        self.tokenizer, self.renderer = open_tokenizer(ModelSource(path=race.sft), QUIET)
        self.reference = load_causal(ModelSource(path=race.sft)).eval()
        held_out, seed = self.config.prompts["held-out"], self.config.seed
        self.records = load_records("prompt", [held_out], seed=seed, on_bad_row="error", deduplicate=False).records
        self.records = self.records[:PROMPTS]
        longest = self.config.max_prompt_tokens
        self.rows = tokenize.tokenize_prompts(self.records, self.renderer, longest, "error", "error", QUIET)
        self.judge = load_judge(self.config.judge or "")

    def __call__(self, policy: Any) -> tuple[float, float]:
        """Utility, and nats per response."""
        settings, seed = self.config.sampling, self.config.seed
        drawn = generate_responses(policy, self.rows, self.renderer, settings, seed=seed, reference=self.reference)
        pairs = zip(self.records, drawn, strict=True)
        judged = [self.judge(r.messages, a.text, r.record, a.finished) for r, a in pairs]
        return statistics.mean(judged), statistics.mean(a.kl or 0.0 for a in drawn)


class Clock:
    """Seconds of training. It stops after each step, and goes on when the policy has been examined."""

    def __init__(self, race: Race, meter: Meter) -> None:
        self.race, self.meter, self.examine = race, meter, Examiner(race)
        self.seconds, self.steps, self.found, self.since = 0.0, 0, list[dict[str, float]](), 0.0

    def train(self, trainer: Any) -> Result:
        """Let it train; says why it ended, and what the best examination found ({} if it came to none)."""
        ended, self.since = "not reached", time.perf_counter()
        try:
            trainer.train()
        except Enough as reason:
            ended = str(reason)
        except (TrainingError, RuntimeError) as error:  # torch cannot sample from what is no number
            traceback.print_exc()
            ended = str(error).splitlines()[0]
        best = max(self.found, key=lambda f: f["utility"], default={})
        numbers = {"seconds": self.seconds, "steps": self.steps, "updates": self.meter.updates}
        return {"ended": ended, "best": best} | numbers

    def after_step(self, policy: Any) -> None:
        """Raises: Enough, at the target or in a collapse."""
        self.seconds += time.perf_counter() - self.since
        self.steps += 1
        if self.steps % self.race.every == 0 or self.steps == self.race.steps:
            utility, kl = self.examine(policy)
            self.found.append({"steps": self.steps, "seconds": self.seconds, "utility": utility, "kl": kl})
            if utility >= self.race.target:
                raise Enough("reached")
            if utility < self.race.floor:
                raise Enough("collapsed")
        self.since = time.perf_counter()


def build(race: Race) -> Result:
    """What both sides read: the SFT model, the reward model with a rescaled head, configs/demo/ppo.yaml's prompts."""
    examine = Examiner(race)
    Path(race.path("policy")).symlink_to(Path(resolve_model(ModelSource(path=race.sft))).resolve())
    record = model_metadata.read_handover(resolve_model(ModelSource(path=race.reward)))
    if record is None or not record.score_std:
        raise RuntimeError(f"{race.reward} carries no deviation of its scores")
    model = load_scorer(ModelSource(path=race.reward))
    rescale_head(model, record.score_std)
    model.save_pretrained(race.path("reward"))
    save_tokenizer_and_handover(Path(race.path("reward")), "reward", examine.renderer, examine.tokenizer)
    data = race.config().data
    loaded = load_records("prompt", data.prompts, seed=race.seed, on_bad_row="error", deduplicate=data.deduplicate)
    rows = tokenize.tokenize_prompts(
        loaded.records, examine.renderer, data.max_prompt_tokens, data.too_long, "error", QUIET
    )
    Path(race.path("prompts.json")).write_text(json.dumps(rows), encoding="utf-8")
    return {"utility": examine(examine.reference)[0], "prompts": len(rows)}


def ours(race: Race) -> Result:
    """Our trainer runs the race."""
    clock = Clock(race, our_meter())
    trainer = our_trainer(race.config(), lambda *_: clock.after_step(trainer.model.policy))
    return clock.train(trainer)


def trl(race: Race) -> Result:
    """TRL's trainer runs the race."""
    clock = Clock(race, Meter(THEIR_TRAINER))
    set_seed(race.seed)  # it leaves out numpy's, which shuffles its minibatches
    episodes = race.steps * race.episodes
    trainer = their_trainer(race, total_episodes=episodes, lr_scheduler_type="linear", adam_epsilon=1e-8)
    trainer.log = lambda *_, **__: clock.after_step(trainer.policy_model)  # called once, at the end of a step
    return clock.train(trainer)


def main() -> None:
    """Print a line for each run, and the best of each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", required=True, type=Path)
    parser.add_argument("--reward", required=True, type=Path)
    parser.add_argument("--target", type=float, default=Race.target, help="utility")
    parser.add_argument("--steps", type=int, default=24, help="budget of each run")
    parser.add_argument("--episodes", type=int, default=384, help="of a step, a multiple of 4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=Race.every, help="steps from one examination to the next")
    parser.add_argument("--settings", type=int, default=len(GRID), help="only the first so many of the grid")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    install(TRL_FOLDER)
    shared = {name: getattr(options, name) for name in ("target", "steps", "episodes", "threads", "every", "seed")}
    print(f"{machine(options.threads)}; {options.steps} steps x {options.episodes} episodes at most", flush=True)
    with tempfile.TemporaryDirectory() as where:
        race = Race(
            "to utility",
            folder=where,
            response=48,
            decoded=64,
            kl_coef=0.1,
            sft=str(options.sft.resolve()),
            reward=str(options.reward.resolve()),
            **shared,
        )
        built = run("build", race, module="tests.bench.to_utility")
        race = replace(race, prompts=built["prompts"], floor=built["utility"] - COLLAPSE)
        print(f"the SFT model's utility is {built['utility']:.3f}, the target {race.target:.3f}")
        print("side  rate     passes  target        | best utility      KL  after step | steps  updates  s/step")
        best: dict[str, float] = {}
        for rate, epochs in GRID[: options.settings]:
            for side in SIDES:
                one = replace(race, learning_rate=rate, epochs=epochs)
                path = str(TRL_FOLDER) if side == "trl" else ""
                result = run(side, one, first_on_path=path, module="tests.bench.to_utility")
                show(side, one, result)
                if result["ended"] == "reached":
                    best[side] = min(result["seconds"], best.get(side, float("inf")))
    for side in SIDES:
        print(f"{side}: {best[side]:.1f} s at its best" if side in best else f"{side}: not reached")
    if len(best) == len(SIDES):
        print(f"trl / ours: {best['trl'] / best['ours']:.2f}")


def show(side: str, race: Race, result: Result) -> None:
    """The line of a run; its best examination is the last one if that reached the target."""
    reached, best = result["ended"] == "reached", result["best"]
    target = f"{result['seconds']:.1f} s" if reached else "not reached"
    found = f"{best['utility']:12.3f} {best['kl']:7.2f} {best['steps']:4d}: {best['seconds']:.1f} s" if best else ""
    pace = result["seconds"] / max(result["steps"], 1)
    print(
        f"{side:4s}  {race.learning_rate:<7g}  {race.epochs} x {race.minibatches}   {target:12s}  | {found:37s} | "
        f"{result['steps']:5d}  {result['updates']:7d}  {pace:6.2f}"
        + ("" if reached or result["ended"] == "not reached" else f"  ({result['ended']})"),
        flush=True,
    )


if __name__ == "__main__":
    if len(sys.argv) == 3 and (part := {"build": build, "ours": ours, "trl": trl}.get(sys.argv[1])):
        given = Race(**json.loads(sys.argv[2]))
        torch.set_num_threads(given.threads)
        print(json.dumps(part(given)))
    else:
        main()
