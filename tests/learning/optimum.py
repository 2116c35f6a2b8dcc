"""A problem so small that its KL-regularised optimum is known exactly, solved by the real PPO trainer.

    J(pi) = E_x [ sum_y pi(y|x) r(x, y) - beta KL(pi || pi_ref) ]
    J*    = E_x [ beta log sum_y pi_ref(y|x) exp(r(x, y) / beta) ]

Two prompts, six tokens of which one ends the response, at most four tokens: 781 responses, all enumerated. Rewards are
drawn once for each. `python -m tests.learning.optimum` prints the share (J - J_ref) / (J* - J_ref) for every beta and
seed.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.schema import PPOConfig
from rlhf.console import Console
from rlhf.data.records import Prompt
from rlhf.data.render import Renderer
from rlhf.rollout.rewards import Rewards
from rlhf.rollout.teacher_forcing import response_logprobs
from rlhf.rollout.types import Rollout
from rlhf.trainers.ppo.inputs import TokenizedPrompts
from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.trainers.setup import Hooks, memory

SYMBOLS, END, LENGTH = 6, 5, 4
PROMPTS = [[1, 2], [3, 4, 0]]
BETAS, SEEDS = (0.1, 0.3, 1.0), (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Outcome:
    """Where a run ended. J in reward units, KL in nats."""

    reached: float
    reference: float
    best: float
    kl: float
    best_kl: float

    @property
    def share(self) -> float:
        """Share of the achievable improvement."""
        return (self.reached - self.reference) / (self.best - self.reference)


@cache
def responses() -> tuple[tuple[int, ...], ...]:
    """Every response: ended by the end token, or of full length."""
    words = range(END)
    ended = [(*body, END) for n in range(LENGTH) for body in itertools.product(words, repeat=n)]
    return (*ended, *itertools.product(words, repeat=LENGTH))


def everything(prompt: list[int]) -> Rollout:
    """All responses to one prompt as a rollout."""
    said = responses()
    ids = torch.tensor([[*row, *[0] * (LENGTH - len(row))] for row in said])
    mask = torch.tensor([[True] * len(row) + [False] * (LENGTH - len(row)) for row in said])
    asked = torch.tensor([prompt] * len(said))
    return Rollout(
        asked,
        torch.ones_like(asked).bool(),
        ids,
        mask,
        torch.tensor([row[-1] == END for row in said]),
        torch.arange(len(said)),
        torch.zeros(ids.shape),
        torch.zeros((*ids.shape, 0), dtype=torch.uint8),
    )


@torch.no_grad()
def log_distribution(policy: Any) -> Tensor:
    """Log-probability of every response to every prompt, [prompts, responses] float64."""
    return torch.stack([response_logprobs(policy, everything(p), 1.0)[0].double().sum(dim=1) for p in PROMPTS])


class Symbols(Renderer):
    """Stands in for a renderer: this language has numbers and no text."""

    def __init__(self) -> None:
        self.end_id, self.pad_id, self.tokenizer = END, 0, SimpleNamespace(decode=str)


class Table:
    """The reward of a response: a number drawn once."""

    name = "table"

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.values = torch.randn(len(PROMPTS), len(responses()), generator=generator, dtype=torch.float64)
        self.index = {row: i for i, row in enumerate(responses())}

    def __call__(self, part: Rollout, prompts: list[Prompt], *, packed: bool | None = None) -> Tensor:
        found = [
            self.values[prompt.record["n"], self.index[tuple(part.response_ids[i][part.response_mask[i]].tolist())]]
            for i, prompt in enumerate(prompts)
        ]
        return torch.stack(found).float()


class Prefixes:
    """Stands in for a key-value cache: the tokens read so far, -1 where there is padding."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep some rows."""
        self.ids = self.ids[rows]


class Lookup(nn.Module):
    """A vector of its own for every prefix of a response: any distribution over responses can be written down.

    A transformer of this size cannot be told apart from a wrong trainer here: it reached 0.77 on average.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        prefixes = [
            (*p, *body)
            for p in PROMPTS
            for n in range(LENGTH + 1)
            for body in itertools.product(range(END + 1), repeat=n)
        ]
        index = torch.zeros((SYMBOLS + 1) ** (LENGTH + max(map(len, PROMPTS))), dtype=torch.long)
        for row, prefix in enumerate(prefixes, 1):
            index[sum((token + 1) * (SYMBOLS + 1) ** (len(prefix) - 1 - i) for i, token in enumerate(prefix))] = row
        self.register_buffer("index", index)
        self.weight = nn.Parameter(torch.zeros(len(prefixes) + 1, width))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        """Vectors at every position: last_hidden_state [B, T, width]."""
        return SimpleNamespace(last_hidden_state=self.read(input_ids.masked_fill(attention_mask == 0, -1)))

    def read(self, ids: Tensor) -> Tensor:
        """ids [B, T], -1 on padding."""
        codes, code = [], torch.zeros_like(ids[:, 0])
        for column in ids.T:
            code = torch.where(column < 0, code, code * (SYMBOLS + 1) + column + 1)
            codes.append(code)
        rows = torch.stack(codes, dim=1).clamp_max(len(self.index) - 1)  # padding after a full response leads nowhere
        return self.weight[self.index[rows]]


class TablePolicy(nn.Module):
    """A causal LM whose logits are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Lookup(SYMBOLS)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Prefixes | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> Any:
        """As a transformers model."""
        fresh = input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, -1)
        ids = fresh if past_key_values is None else torch.cat([past_key_values.ids, fresh], dim=1)
        return SimpleNamespace(logits=self.table.read(ids)[:, -logits_to_keep:], past_key_values=Prefixes(ids))


class TableValue(nn.Module):
    """A scorer whose outputs are looked up, 0 at first."""

    base_model_prefix = "table"

    def __init__(self) -> None:
        super().__init__()
        self.table, self.score = Lookup(1), nn.Identity()


def models(seed: int) -> tuple[Any, Any, Any]:
    """Policy, reference (its copy; logits of deviation 0.5) and value model."""
    torch.manual_seed(seed)
    policy, reference = TablePolicy(), TablePolicy()
    with torch.no_grad():
        policy.table.weight.normal_(std=0.5)
    reference.load_state_dict(policy.state_dict())
    return policy, reference.requires_grad_(False), TableValue()


def small_models(seed: int) -> tuple[Any, Any, Any]:
    """The same as transformers, which are easier to ruin."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    size = {
        "vocab_size": SYMBOLS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
        "initializer_range": 0.3,
    }
    policy, reference = (LlamaForCausalLM(LlamaConfig(**size)) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    value = LlamaForSequenceClassification(LlamaConfig(**size, num_labels=1, pad_token_id=0))
    with torch.no_grad():
        value.score.weight.zero_()
    return policy, reference.requires_grad_(False), value


def config(beta: float, seed: int, steps: int, watch: dict[str, Any], tables: bool) -> PPOConfig:
    """Fixed KL coefficient beta; nothing else shapes the reward."""
    size, rate, value_rate = (1024, 2e-2, 1e-1) if tables else (256, 3e-3, 1e-2)
    return PPOConfig.model_validate(
        {
            "output_dir": "unused",
            "policy": {"path": "unused"},
            "reward_model": {"path": "unused"},
            "seed": seed,
            "data": {"prompts": [{"path": "unused"}]},
            "sampling": {"max_new_tokens": LENGTH, "temperature": 1.0},
            "ppo": {
                "steps": steps,
                "rollout_size": size,
                "epochs": 4,
                "minibatches": 2,
                "lam": 1.0,
                "missing_end_penalty": 0.0,
                "value_coef": 0.5,
                "value_clip_range": None,
                "normalize_scores": "raw",
            },
            "kl": {"coef": beta, "target": None},
            "watch": watch,
            "optim": {"learning_rate": rate, "value_learning_rate": value_rate, "microbatch_size": size // 2},
        }
    )


def solve(
    beta: float,
    seed: int,
    *,
    steps: int = 200,
    change: Any = None,
    watch: dict[str, Any] | None = None,
    tables: bool = True,
) -> Outcome:
    """Train and measure. `change` may break the trainer first; without `tables` small transformers stand for them."""
    policy, reference, value = models(seed) if tables else small_models(seed)
    table, settings = Table(seed), config(beta, seed, steps, watch or {}, tables)
    _, save, load = memory()
    trainer = PPOTrainer(
        policy,
        Rewards(((1.0, table),)),  # type: ignore[arg-type]
        TokenizedPrompts(PROMPTS, [Prompt([], "", {"n": n}) for n in range(len(PROMPTS))]),
        settings.settings,
        tokenizer=Symbols(),
        reference=reference,
        value_model=value,
        callbacks=[Hooks(checkpoint=save, restore=load)],
        console=Console(quiet=True),
    )
    if change is not None:
        change(trainer)
    trainer.train()
    ref, now = log_distribution(reference), log_distribution(policy.eval())
    kl = (now.exp() * (now - ref)).sum(dim=1)
    log_best = ref + table.values / beta
    norm = log_best.logsumexp(dim=1, keepdim=True)
    best = (log_best - norm).exp()
    return Outcome(
        reached=float(((now.exp() * table.values).sum(dim=1) - beta * kl).mean()),
        reference=float((ref.exp() * table.values).sum(dim=1).mean()),
        best=float(beta * norm.mean()),
        kl=float(kl.mean()),
        best_kl=float((best * (log_best - norm - ref)).sum(dim=1).mean()),
    )


def main() -> None:
    """Print the table."""
    print("| beta | seed | share of the achievable improvement | KL | KL* |\n|---|---|---|---|---|")
    for beta in BETAS:
        shares = []
        for seed in SEEDS:
            found = solve(beta, seed)
            shares.append(found.share)
            print(f"| {beta} | {seed} | {found.share:.3f} | {found.kl:.3f} | {found.best_kl:.3f} |", flush=True)
        print(f"| {beta} | mean, worst | {sum(shares) / len(shares):.3f}, {min(shares):.3f} | | |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
