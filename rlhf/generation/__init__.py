"""Sampling of responses to prompts: the interface of generators, and a decoding loop with a KV cache.
Scoring the responses is in `rlhf.rollout`."""
