"""Two steps of PPO on a policy with a large vocabulary; each process writes FOLDER/RANK.json.

accelerate launch --config_file tests/distributed/zero3.yaml -m tests.distributed.large_vocabulary REWARD_MODEL FOLDER
VOCABULARY PRECISION

The limit of logits at once is so low that ranks need different numbers of tiles.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from rlhf.distributed.engine import quiet_libraries
from rlhf.distributed.launch_env import get_rank, leave_process_groups_at_exit
from rlhf.models import output_layer
from rlhf.models.packed_batch import can_pack
from tests.models import tiny
from tests.trainers.setup import make

TOKENS_AT_ONCE = 7


def phi(vocabulary: int, seed: int) -> Any:
    """A small model whose output layer has a bias: no token beyond the tokenizer's is ever drawn."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(seed)
    config = PhiConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.3,
        resid_pdrop=0.0,
    )
    model = PhiForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias[tiny.VOCABULARY - 30 :] = -60.0
        model.lm_head.bias[tiny.renderer().end_id] = 4.0
    return model


def main(folder: str, out: str, vocabulary: int, precision: str) -> None:
    """Train, and write the losses, gradient norms and the dtypes that the policy computes in."""
    quiet_libraries(telemetry=False)
    output_layer.MAX_LOGITS_AT_ONCE = TOKENS_AT_ONCE * vocabulary
    lines: list[dict[str, float]] = []
    policy = phi(vocabulary, 1)
    can_pack(policy)  # which runs the policy as well, once, in float32
    trainer = make(
        folder,
        policy=policy,
        reference=phi(vocabulary, 1).requires_grad_(False),
        report=lambda _, __, stats: lines.append(stats),
        optim={"precision": precision, "microbatch_size": 6},
        sampling={"max_new_tokens": 20, "top_p": 0.9},
    )
    dtypes: set[str] = set()
    policy.model.layers[0].mlp.fc2.register_forward_hook(lambda _, __, output: dtypes.add(str(output.dtype)))
    trainer.train()
    names = ("policy_loss", "value_loss", "grad_norm", "kl", "response_length")
    told = {"steps": [{name: line[name] for name in names} for line in lines], "dtypes": sorted(dtypes)}
    Path(out, f"{get_rank()}.json").write_text(json.dumps(told), encoding="utf-8")
    leave_process_groups_at_exit()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
