"""Log-probabilities and entropies of a language model's tokens, without a tensor of all its logits.

With a vocabulary of 150 000, the logits of 16 sequences of 1 000 tokens take 9.6 GB in float32, and autograd keeps them
twice. Here only the positions that are read reach the output layer, and where their logits would not fit, they are
computed in tiles, forward and backward (`trl.kernels.ChunkedLogProbFunction`).

The output layer is called once in each forward pass, whatever the number of tiles: under ZeRO-3 every call gathers its
weights from all ranks, and ranks whose numbers of calls differ would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.functional import token_entropy, token_logprobs
from rlhf.functional.bits import unpack_bits
from rlhf.models.load import backbone

MAX_LOGITS_AT_ONCE = 2**25
"""Logits of one forward pass that are computed as one tensor on a CPU (128 MiB in float32); more are tiled."""
TILE_WIDTH = 8192
"""Vocabulary entries of one tile of `ChunkedLogProbFunction`, which takes up to 4096 tokens at once."""


class TokenNumbers(NamedTuple):
    """What a language model computes about n given tokens."""

    logprobs: Tensor  # [n] nats
    entropy: Tensor | None  # [n] nats, of the distributions that the tokens are drawn from
    states: Tensor | None  # [b * L, H], last hidden states of all positions


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its output layer's values before they are logits: multiply, then cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Return the logits: softcap tanh(scale x / softcap)."""
        values = values if self.scale == 1.0 else values * self.scale
        return values if self.softcap is None else self.softcap * torch.tanh(values / self.softcap)


def next_token_positions(mask: Tensor) -> Tensor:
    """Return where the tokens of right-padded sequences are predicted from, as `token_numbers` takes positions.

    Args:
        mask: [B, T] bool, True = a token to score; the first column is never scored, since nothing predicts it.
    Returns: [n] int64 into the flattened [B * T] positions, in the order of `mask[:, 1:].nonzero()`.
    """
    return torch.nn.functional.pad(mask[:, 1:], (0, 1)).flatten().nonzero().squeeze(1)


def token_numbers(
    model: Any,
    inputs: dict[str, Any],
    positions: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
    allowed: Tensor | None = None,
    states: bool = False,
) -> TokenNumbers:
    """Run a causal language model and return the log-probabilities of given next tokens.

    Args:
        model: causal language model, adapter wrapping included; trained or frozen.
        inputs: keyword arguments of its forward pass, of [b, L] sequences.
        positions: [n] int64 into the flattened [b * L] positions: where each token is predicted from.
        targets: [n] int64, the tokens.
        temperature: dimensionless, > 0.
        entropy: also return the entropy of each of the n distributions; with `entropy_gradient` it is differentiable.
        allowed: [n, ceil(V / 8)] uint8, packed bits: the distribution is restricted to these tokens; None = to none.
        states: also return the last hidden states.
    """
    if not hasattr(model, "config"):  # a model with a soft prompt, whose trunk sees more positions than `inputs` has
        logits = model(**inputs).logits.flatten(0, 1)[positions]
        return TokenNumbers(*_from_logits(logits, targets, temperature, entropy, entropy_gradient, allowed), None)
    head, transform = output_layer(model), logit_transform(model)
    if transform is None:
        with _reads_only(head, positions):
            output = model(**inputs, output_hidden_states=states)
        numbers = _from_logits(output.logits[0], targets, temperature, entropy, entropy_gradient, allowed)
        return TokenNumbers(*numbers, output.hidden_states[-1].flatten(0, 1) if states else None)
    hidden = backbone(model)(**inputs).last_hidden_state.flatten(0, 1)
    if _tiled(hidden, len(positions), model.config.get_text_config().vocab_size):
        with _computes_numbers(head, targets, temperature, entropy, entropy_gradient, allowed, transform):
            found = head(hidden[positions])
        spread = found[1] if entropy else None
        numbers = (found[0], spread if spread is None or entropy_gradient else spread.detach())
    else:
        logits = transform(head(hidden[positions]))
        numbers = _from_logits(logits, targets, temperature, entropy, entropy_gradient, allowed)
    return TokenNumbers(*numbers, hidden if states else None)


def next_token_logits(model: Any, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Run a causal language model and return its logits [n, V] at some positions only.

    Args:
        inputs, positions: as for `token_numbers`.
    """
    head, transform = output_layer(model), logit_transform(model)
    if transform is None:
        with _reads_only(head, positions):
            logits: Tensor = model(**inputs).logits[0]
        return logits
    return transform(head(backbone(model)(**inputs).last_hidden_state.flatten(0, 1)[positions]))


def _tiled(hidden: Tensor, tokens: int, vocabulary: int) -> bool:
    """Return whether logits are computed in tiles. On a CPU plain logits are faster, as long as they fit."""
    return hidden.device.type == "cuda" or tokens * vocabulary > MAX_LOGITS_AT_ONCE


def _from_logits(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool, entropy_gradient: bool, allowed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probabilities [n] and the entropies [n], or None, from logits [n, V]."""
    if allowed is not None:
        logits = logits.masked_fill(~unpack_bits(allowed, logits.shape[-1]), -torch.inf)
    logprobs = token_logprobs(logits, targets, temperature=temperature)
    if not entropy:
        return logprobs, None
    if entropy_gradient:
        return logprobs, token_entropy(logits, temperature=temperature)
    with torch.no_grad():
        return logprobs, token_entropy(logits.detach() / temperature)


@contextmanager
def _reads_only(head: Any, positions: Tensor) -> Iterator[None]:
    """Context manager inside which the output layer sees some positions only: a model's logits are [1, n, V]."""
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[positions][None], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def logprobs_with_weight(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probabilities [n] nats of tokens under another model's output layer, a few tokens at a time.

    Args:
        states: [n, H], last hidden states that the tokens are predicted from. weight: [V, H]. targets: [n] int64.
    """
    size = max(1, MAX_LOGITS_AT_ONCE // len(weight))
    parts = range(0, len(states), size)
    found = [token_logprobs(states[i : i + size] @ weight.T, targets[i : i + size]) for i in parts]
    return torch.cat(found) if found else states.new_zeros(0)


@contextmanager
def _computes_numbers(
    head: Any,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    entropy_gradient: bool,
    allowed: Tensor | None,
    transform: LogitTransform,
) -> Iterator[None]:
    """Context manager inside which the output layer, called on states [n, H], returns [1 or 2, n] numbers.

    They are the tokens' log-probabilities, and in the second row their entropies if `entropy` is set.

    It is called as a module, so that an engine that shards its weights gathers them around the call and around its
    backward pass.
    """
    logits_of = head.forward

    def tiles(states: Tensor) -> Tensor:
        """Compute tile after tile of the vocabulary; needs the weights themselves, and all tokens allowed."""
        from trl.kernels import ChunkedLogProbFunction

        logprobs, spread, *_ = ChunkedLogProbFunction.apply(
            states,
            head.weight,
            head.bias,
            targets,
            temperature,
            TILE_WIDTH,
            transform.softcap,
            transform.scale,
            ("entropy",) if entropy else (),
        )
        return _stack(logprobs, spread)

    def token_chunk(states: Tensor, part: slice) -> Tensor:
        bits = None if allowed is None else allowed[part]
        logits = transform(logits_of(states))
        return _stack(*_from_logits(logits, targets[part], temperature, entropy, entropy_gradient, bits))

    def token_chunks(states: Tensor) -> Tensor:
        """Compute a few tokens at a time over the whole vocabulary, again in the backward pass."""
        size = max(1, MAX_LOGITS_AT_ONCE // head.weight.shape[0])
        return torch.cat(
            [
                checkpoint(
                    token_chunk, states[i : i + size], slice(i, i + size), use_reentrant=False, preserve_rng_state=False
                )
                for i in range(0, len(states), size)
            ],
            dim=1,
        )

    replaced = vars(head).get("forward")  # of a library that has wrapped the layer itself
    head.forward = tiles if type(head) is nn.Linear and allowed is None else token_chunks
    try:
        yield
    finally:
        del head.forward
        if replaced is not None:
            head.forward = replaced


def _stack(logprobs: Tensor, entropy: Tensor | None) -> Tensor:
    return logprobs[None] if entropy is None else torch.stack([logprobs, entropy])


def output_layer(model: Any) -> Any:
    """Return the layer that makes a causal language model's logits, adapter wrapping included."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.get_output_embeddings()


# Found out once a model, and kept for as long as it lives.
_transforms: WeakKeyDictionary[nn.Module, LogitTransform | None] = WeakKeyDictionary()


@torch.no_grad()
def logit_transform(model: Any) -> LogitTransform | None:
    """Return what a model does to its output layer's values, or None if it is something that is not known here.

    The configuration names it (`final_logit_softcapping`, `logit_scale`, `logits_scaling` and their like); what it says
    is believed only if it reproduces the model's logits of a short sequence. Call this before an engine shards the
    model: later calls then find the answer.
    """
    if not hasattr(model, "config"):  # no model of transformers: its logits are read as it returns them
        return None
    if model not in _transforms:
        ids = torch.arange(4, device=next(model.parameters()).device)[None]
        with torch.autocast(ids.device.type, enabled=False):
            logits = model(input_ids=ids, use_cache=False).logits.float()
            values = output_layer(model)(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)
        found = (t for t in _candidates(model.config.get_text_config()) if _same(t(values).float(), logits))
        _transforms[model] = next(found, None)
    return _transforms[model]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool(torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6))


def _candidates(config: Any) -> Iterator[LogitTransform]:
    """Yield the transforms that a configuration may mean, the plain one first."""
    yield LogitTransform()
    softcap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if value:
            scales += [value, 1 / value]
    for scale in scales:
        yield LogitTransform(scale, softcap)
