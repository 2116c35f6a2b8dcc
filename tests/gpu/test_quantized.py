"""Bases in 4 bits on the GPU: every stage through the command line, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.sections import ModelSource
from rlhf.models.packed_batch import can_pack
from rlhf.models.policy import load_causal, policy_with_adapter
from rlhf.models.quantization import bitsandbytes_is_installed, is_quantized, quantized_layers
from rlhf.trainers.ppo.policy_for_sampling import BFloat16Copy
from tests.models import tiny
from tests.models.fixtures import shake
from tests.models.test_quantization import restore
from tests.stages import setup
from tests.stages.test_quantized import in_four_bits
from tests.tolerances import distance

pytestmark = pytest.mark.skipif(
    not bitsandbytes_is_installed(), reason="bitsandbytes is not installed: pip install 'rlhf[quantize]'"
)
ROWS = tiny.rows(4, [14, 14])


@pytest.mark.timeout(600)
def test_every_stage(tiny_model_dir: Path, files: setup.Files, run_stage: Any, tmp_path: Path) -> None:
    configs = setup.configs(tmp_path, str(tiny_model_dir), files, adapters=True)
    for stage in ("sft", "reward", "classify", "ppo"):
        run_stage(stage, in_four_bits(configs[stage]))
        assert setup.info(tmp_path / stage)["status"] == "finished"
    offloaded = in_four_bits(configs["ppo"]) | {"output_dir": str(tmp_path / "apart"), "offload": ["reward"]}
    run_stage("ppo", offloaded, "roles=separate")
    assert [line["step"] for line in setup.metrics(tmp_path / "apart")] == [1, 2, 3]


def test_a_model_is_loaded_onto_the_device_and_is_close_to_the_plain_one(device: torch.device, sft_folder: str) -> None:
    plain = load_causal(tiny.source(sft_folder)).to(device)
    model = load_causal(ModelSource(path=sft_folder, quantize="nf4"))
    wanted_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert {layer.compute_dtype for layer in quantized_layers(model)} == {wanted_dtype}
    ids = torch.tensor(ROWS, device=device)
    with torch.no_grad():
        expected, found = (m(input_ids=ids, use_cache=False).logits.float() for m in (plain, model))
    assert distance(found, expected) > 0.01
    restore(plain, model)
    with torch.no_grad():
        assert distance(found, plain(input_ids=ids, use_cache=False).logits.float()) < 0.03
    assert can_pack(model)


def test_the_copy_for_sampling_and_the_gradients(device: torch.device, sft_folder: str) -> None:
    policy = shake(policy_with_adapter(ModelSource(path=sft_folder, quantize="nf4"), tiny.LORA))
    made, ids = BFloat16Copy(policy), torch.tensor(ROWS, device=device)
    packed = {id(p) for p in policy.parameters() if is_quantized(p)}
    assert packed == {id(p) for p in made.model.parameters() if is_quantized(p)}
    with torch.no_grad():
        expected, found = (m.eval()(input_ids=ids).logits.float() for m in (policy, made.model))
    assert distance(found, expected) < 0.03
    with torch.autocast(device.type, torch.bfloat16):
        policy.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = [p.grad for p in policy.parameters() if p.requires_grad]
    assert all(g is not None and bool(torch.isfinite(g).all()) and bool(g.abs().sum() > 0) for g in gradients)
