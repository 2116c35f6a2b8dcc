"""The equations of `rlhf.functional`, transcribed as slow loops over Python floats (float64).

Nothing here is clever: one loop for each sum of an equation, and no code shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GARBAGE = 1e3
"""Size of the numbers that stand on padding in the inputs of tests."""


def ragged_mask(seed: int, rows: int, columns: int) -> Tensor:
    """[rows, columns] bool, a non-empty prefix in each row; row 0 is full and row 1 (if any) has one token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    lengths[0] = columns
    if rows > 1:
        lengths[1] = 1
    return torch.arange(columns) < lengths[:, None]


def ragged(seed: int, mask: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers of the given scale where the mask is True, large finite garbage elsewhere."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    return torch.where(mask, scale * x, GARBAGE * (x + 1)).to(dtype)


def _kept(x: Tensor, mask: Tensor) -> list[float]:
    pairs = zip(x.double().flatten().tolist(), mask.flatten().tolist(), strict=True)
    return [value for value, counts in pairs if counts]


def _elementwise(function: Callable[..., float], *tensors: Tensor) -> Tensor:
    columns = [t.detach().double().flatten().tolist() for t in tensors]
    flat = [function(*row) for row in zip(*columns, strict=True)]
    return torch.tensor(flat, dtype=torch.float64).reshape(tensors[0].shape)


def masked_sum(x: Tensor, mask: Tensor) -> float:
    total = 0.0
    for value in _kept(x, mask):
        total += value
    return total


def masked_mean(x: Tensor, mask: Tensor) -> float:
    return masked_sum(x, mask) / len(_kept(x, mask))


def masked_moments(x: Tensor, mask: Tensor) -> list[float]:
    values = _kept(x, mask)
    return [float(len(values)), sum(values), sum(value * value for value in values)]


def _variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def masked_whiten(x: Tensor, mask: Tensor, center: bool = True) -> Tensor:
    values = _kept(x, mask)
    mean = sum(values) / len(values)
    scale = max(math.sqrt(_variance(values)), 1e-3, 1e-6 * abs(mean))
    shift = 0.0 if center else mean

    def one(value: float, counts: float) -> float:
        return (value - mean) / scale + shift if counts else 0.0

    return _elementwise(one, x, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    v, g = _kept(values, mask), _kept(returns, mask)
    errors = [g_i - v_i for v_i, g_i in zip(v, g, strict=True)]
    return 1.0 - _variance(errors) / _variance(g)


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    rows = logits.double().reshape(-1, logits.shape[-1]).tolist()
    result = []
    for row, token in zip(rows, ids.flatten().tolist(), strict=True):
        largest = max(row)
        total = sum(math.exp((z - largest) / temperature) for z in row)
        result.append((row[token] - largest) / temperature - math.log(total))
    return torch.tensor(result, dtype=torch.float64).reshape(ids.shape)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    vocabulary = logits.shape[-1]
    total = torch.zeros(logits.shape[:-1], dtype=torch.float64)
    for token in range(vocabulary):
        logp = token_logprobs(logits, torch.full(logits.shape[:-1], token), temperature)
        total = total - _elementwise(lambda lp: math.exp(lp) * lp if lp > -math.inf else 0.0, logp)
    return total


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    def one(logp: float, ref: float) -> float:
        ratio = math.exp(ref - logp)
        if kind == "k1":
            return -math.log(ratio)
        if kind == "k2":
            return 0.5 * math.log(ratio) ** 2
        return ratio - 1.0 - math.log(ratio)

    return _elementwise(one, logprobs, ref_logprobs)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, preference: Tensor) -> Tensor:
    def nats(gap: float) -> float:  # - log sigma(gap), without overflow
        return math.log1p(math.exp(-gap)) if gap > 0 else math.log1p(math.exp(gap)) - gap

    def one(c: float, r: float, m: float, p: float) -> float:
        return p * nats(c - r - m) + (1 - p) * nats(r - c - m)

    return _elementwise(one, chosen, rejected, margin, preference)


def classification_loss(logits: Tensor, target: Tensor, multi_label: bool, weight: Tensor) -> Tensor:
    losses = []
    for z, t in zip(logits.double().tolist(), target.double().tolist(), strict=True):
        loss = 0.0
        if multi_label:
            for z_n, t_n, w_n in zip(z, t, weight.tolist(), strict=True):
                yes = math.log1p(math.exp(-abs(z_n))) + max(-z_n, 0.0)  # - log sigma(z), without overflow
                loss += (w_n * t_n * yes + (1 - t_n) * (yes + z_n)) / len(z)  # - log sigma(-z) = - log sigma(z) + z
        else:
            largest = max(z)
            total = largest + math.log(sum(math.exp(z_n - largest) for z_n in z))
            for z_n, t_n, w_n in zip(z, t, weight.tolist(), strict=True):
                loss += w_n * t_n * (total - z_n)
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


def balanced_weights(target: Tensor, multi_label: bool) -> Tensor:
    rows = target.double().tolist()
    weights = []
    for n in range(len(rows[0])):
        holds = sum(row[n] for row in rows)
        weights.append((len(rows) - holds) / holds if multi_label else len(rows) / (len(rows[0]) * holds))
    return torch.tensor(weights, dtype=torch.float64)


def ensemble_score(scores: Tensor, kind: str, penalty: float) -> Tensor:
    out = []
    for column in scores.double().T.tolist():
        mean = sum(column) / len(column)
        variance = sum((s - mean) ** 2 for s in column) / len(column)
        out.append({"mean": mean, "worst": min(column), "uncertainty": mean - penalty * variance}[kind])
    return torch.tensor(out, dtype=torch.float64)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    rewards = torch.zeros(kl.shape, dtype=torch.float64)
    for b in range(kl.shape[0]):
        tokens = sum(mask[b].tolist())
        for t in range(tokens):
            rewards[b, t] = -kl_coef * float(kl[b, t])
            if t == tokens - 1:
                rewards[b, t] += float(scores[b])
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The sum over later temporal differences, written out: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        tokens = sum(mask[b].tolist())
        r, v = rewards[b, :tokens].tolist(), [*values[b, :tokens].tolist(), 0.0]
        for t in range(tokens):
            for later in range(t, tokens):
                delta = r[later] + gamma * v[later + 1] - v[later]
                advantages[b, t] += (gamma * lam) ** (later - t) * delta
    return advantages


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None
) -> Tensor:
    def one(logp: float, logp_old: float, a: float) -> float:
        ratio = math.exp(min(max(logp - logp_old, -20.0), 20.0))
        loss = max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))
        return min(loss, -dual_clip * a) if dual_clip is not None and a < 0 else loss

    return _elementwise(one, logprobs, old, advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
    def one(v: float, v_old: float, g: float) -> float:
        clipped = v if clip_range is None else v_old + min(max(v - v_old, -clip_range), clip_range)
        return 0.5 * max((v - g) ** 2, (clipped - g) ** 2)

    return _elementwise(one, values, old_values, returns)


def majority_vote(votes: Tensor, classes: int) -> Tensor:
    out = []
    for row in votes.tolist():
        cast = [v for v in row if v != -1]
        out.append([cast.count(n) / len(cast) if cast else 1 / classes for n in range(classes)])
    return torch.tensor(out, dtype=torch.float64)


def dawid_skene(
    votes: Tensor, classes: int, symmetric: bool, a: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Dawid and Skene 1979, eq. 2.3 to 2.5, by loops over records, sources and classes; a fixed number of times."""
    rows, named, sources = votes.tolist(), range(classes), range(votes.shape[1])
    q = majority_vote(votes, classes).tolist()
    objectives = []
    for _ in range(iterations):
        prior = [1 / classes] * classes
        if not symmetric:
            heard = [i for i, row in enumerate(rows) if max(row) > -1]
            prior = [(sum(q[i][n] for i in heard) + a) / (len(heard) + a * classes) for n in named]
        theta = []
        for s in sources:
            on = [i for i, row in enumerate(rows) if row[s] != -1]
            if symmetric:
                p = (sum(q[i][rows[i][s]] for i in on) + a) / (len(on) + a * classes) if on or a else 1 / classes
                theta.append([[p if v == n else (1 - p) / (classes - 1) for v in named] for n in named])
                continue
            matrix = []
            for n in named:
                mass = sum(q[i][n] for i in on) + a * classes
                matrix.append([(sum(q[i][n] for i in on if rows[i][s] == v) + a) / mass for v in named])
            theta.append(matrix)
        total = 0.0
        for i, row in enumerate(rows):
            joint = [prior[n] * math.prod(theta[s][n][row[s]] for s in sources if row[s] != -1) for n in named]
            q[i] = [x / sum(joint) for x in joint]
            total += math.log(sum(joint))
        if a and symmetric:
            total += a * sum(math.log(x) for matrix in theta for x in matrix[0])
        elif a:
            total += a * sum(math.log(x) for matrix in theta for line in matrix for x in line)
            total += a * sum(math.log(x) for x in prior)
        objectives.append(total)
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (q, theta, prior))
    return (*tensors, objectives)  # type: ignore[return-value]


def vote_accuracy(votes: Tensor, labels: Tensor) -> Tensor:
    out = []
    for s in range(votes.shape[1]):
        right = [float(labels[i, v]) for i, v in enumerate(votes[:, s].tolist()) if v != -1]
        out.append(sum(right) / len(right) if right else math.nan)
    return torch.tensor(out, dtype=torch.float64)


def vote_shares(votes: Tensor) -> list[list[float]]:
    """[coverage, overlap, conflict] of every source."""
    rows, out = votes.tolist(), []
    for s in range(votes.shape[1]):
        others = [[v for k, v in enumerate(row) if k != s and v != -1] for row in rows if row[s] != -1]
        own = [row[s] for row in rows if row[s] != -1]
        differ = [any(v != mine for v in some) for mine, some in zip(own, others, strict=True)]
        out.append([len(own) / len(rows), sum(bool(some) for some in others) / len(rows), sum(differ) / len(rows)])
    return out
