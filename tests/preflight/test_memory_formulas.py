"""Memory formulas: values computed by hand for a tiny model on each sharding, and laws that hold for every model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from rlhf.preflight import memory_formulas
from rlhf.preflight.memory_formulas import ActivationBytes, MemoryPart, ProcessOverhead, Sharding, WeightCounts
from tests.project.code import ROOT

TINY = WeightCounts(trained=1000, frozen=200, trained_bytes=4, frozen_bytes=2)
ZERO = {stage: Sharding(4, stage, deepspeed=True) for stage in (1, 2, 3)}


def bytes_of(w: WeightCounts, s: Sharding) -> dict[str, float]:
    """Return name -> bytes of the parts of the training state."""
    return {part.name: part.bytes for part in memory_formulas.state_parts(w, s)}


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        (Sharding(), {"weights": 4400, "gradients": 4000, "optimizer (Adam)": 8000}),
        (Sharding(4), {"weights": 4400, "gradients": 4000, "optimizer (Adam)": 8000, "communication": 4000}),
        (
            ZERO[1],
            {"weights": 4400, "gradients": 4000, "optimizer (Adam)": 2000, "master copy": 1000, "communication": 4000},
        ),
        (
            ZERO[2],
            {"weights": 4400, "gradients": 1000, "optimizer (Adam)": 2000, "master copy": 1000, "communication": 4000},
        ),
        (
            ZERO[3],
            {"weights": 1100, "gradients": 1000, "optimizer (Adam)": 2000, "master copy": 1000, "communication": 4000},
        ),
        (Sharding(4, 3), {"weights": 1100, "gradients": 1000, "optimizer (Adam)": 2000}),  # FSDP
    ],
)
def test_training_state_computed_by_hand(sharding: Sharding, expected: dict[str, float]) -> None:
    assert bytes_of(TINY, sharding) == expected


def test_bfloat16_weights_have_bfloat16_moments_but_not_under_deepspeed() -> None:
    half = WeightCounts(1000, 0, 2)
    assert bytes_of(half, Sharding()) == {"weights": 2000, "gradients": 2000, "optimizer (Adam)": 4000}
    assert bytes_of(half, ZERO[1])["optimizer (Adam)"] == 2000
    assert bytes_of(half, ZERO[1])["master copy"] == 1000


def test_offload_moves_bytes_to_the_host() -> None:
    s = Sharding(2, 3, deepspeed=True, offload_optimizer=True, offload_weights=True)
    where = {part.name: part.host for part in memory_formulas.state_parts(TINY, s)}
    assert where == {
        "weights": True,
        "gradients": True,
        "optimizer (Adam)": True,
        "master copy": True,
        "communication": False,
    }


def test_gathered_weights_computed_by_hand() -> None:
    whole = memory_formulas.gathered_part(TINY, 10, ZERO[3], whole=True)
    assert whole == MemoryPart("gathered weights", 4400)
    assert memory_formulas.gathered_part(TINY, 10, ZERO[2]).bytes == 0
    assert memory_formulas.gathered_part(TINY, 10, Sharding(4, 3)).bytes == 880  # FSDP: 2 blocks of 10
    big = WeightCounts(2 * memory_formulas.ZERO3_LIVE_PARAMETERS)
    assert memory_formulas.gathered_part(big, 10, ZERO[3]).bytes == 4 * memory_formulas.ZERO3_LIVE_PARAMETERS


def test_activations_computed_by_hand() -> None:
    traced = ActivationBytes(block=100.0, fixed=7.0, boundary=10.0)
    assert memory_formulas.activation_part(traced, 5, recompute=False) == 507
    assert memory_formulas.activation_part(traced, 2, recompute=False) == 207  # three frozen blocks below keep nothing
    assert memory_formulas.activation_part(traced, 5, recompute=True) == 157
    assert memory_formulas.activation_part(traced, 0, recompute=True) == 7


def test_kv_cache_and_logits_computed_by_hand() -> None:
    # keys and values, 2 layers and a copy of one, 3 heads of 4, 5 rows of 64 columns, 2 bytes
    assert memory_formulas.kv_cache_bytes(2, 3, 4, 5, 33, 2) == 2 * 3 * 3 * 4 * 5 * 64 * 2
    assert memory_formulas.logit_bytes(10, 50, memory_formulas.CROSS_ENTROPY_BYTES) == 6000


def test_the_sum_of_two_models_takes_the_larger_number_of_bytes() -> None:
    both = WeightCounts(10, 5, 4, 2) + WeightCounts(1, 2, 2, 4)
    assert (both.trained, both.frozen, both.trained_bytes, both.frozen_bytes) == (11, 7, 4, 4)


def test_runtime_overhead_scales_with_transient_memory_only() -> None:
    parts = memory_formulas.with_runtime(
        [MemoryPart("weights", 100)], [MemoryPart("activations", 50), MemoryPart("nothing", 0)], ProcessOverhead(7, 1.5)
    )
    assert [(p.name, p.bytes) for p in parts] == [
        ("weights", 100),
        ("activations", 50),
        ("libraries and allocator", 32),
    ]


def test_the_peak_is_the_largest_phase_and_excludes_cpu_memory_on_a_gpu() -> None:
    phases = {"a": [MemoryPart("x", 5), MemoryPart("y", 9, host=True)], "b": [MemoryPart("x", 7)]}
    gpu, cpu = memory_formulas.MemoryEstimate(phases, False), memory_formulas.MemoryEstimate(phases, True)
    assert (gpu.largest_phase, gpu.peak, gpu.host_bytes) == ("b", 7, 9)
    assert (cpu.largest_phase, cpu.peak, cpu.host_bytes) == ("a", 14, 0)


# --- laws ------------------------------------------------------------------------------------------------------------


def total(w: WeightCounts, s: Sharding, blocks: int = 8) -> float:
    """Return the bytes of everything except activations."""
    return sum(p.bytes for p in memory_formulas.state_parts(w, s)) + memory_formulas.gathered_part(w, blocks, s).bytes


@pytest.mark.parametrize("deepspeed", [True, False])
@pytest.mark.parametrize("size", [1, 1000, 10**9, 10**11])
def test_more_processes_under_zero3_never_need_more(size: int, deepspeed: bool) -> None:
    totals = [total(WeightCounts(size, size // 7), Sharding(n, 3, deepspeed)) for n in (1, 2, 3, 8, 64, 512)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_adapter_never_has_more_optimizer_memory(n: int, stage: int) -> None:
    s = Sharding(n, stage, stage > 0)
    full, lora = WeightCounts(10**6), WeightCounts(10**4, 10**6)
    for name in ("gradients", "optimizer (Adam)", "master copy", "communication"):
        assert bytes_of(lora, s).get(name, 0) <= bytes_of(full, s).get(name, 0)


def test_each_stage_of_zero_needs_no_more_states_than_the_one_before() -> None:
    for w, n in itertools.product((WeightCounts(10**6), WeightCounts(10**3, 10**6)), (2, 8)):
        sums = [sum(p.bytes for p in memory_formulas.state_parts(w, Sharding(n, stage, True))) for stage in (1, 2, 3)]
        assert sums == sorted(sums, reverse=True)


def test_recomputing_never_needs_more_than_keeping_two_blocks_or_more() -> None:
    traced = ActivationBytes(block=100.0, fixed=7.0, boundary=10.0)
    for blocks in range(2, 40):
        assert memory_formulas.activation_part(traced, blocks, recompute=True) <= memory_formulas.activation_part(
            traced, blocks, recompute=False
        )


@pytest.mark.parametrize(
    ("name", "zero", "offload"),
    [
        ("cpu", 0, False),
        ("single", 0, False),
        ("ddp", 0, False),
        ("zero1", 1, False),
        ("zero2", 2, False),
        ("zero3", 3, False),
        ("zero3_offload", 3, True),
        ("fsdp2", 3, False),
        ("multinode", 3, False),
    ],
)
def test_the_sharding_of_every_shipped_launcher(name: str, zero: int, offload: bool) -> None:
    settings = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text(encoding="utf-8"))
    s = Sharding.from_accelerate(settings, 2)
    assert (s.zero, s.offload_weights, s.offload_optimizer) == (zero, offload, offload)
    assert s.deepspeed is (settings["distributed_type"] == "DEEPSPEED")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("80G", 80 * 2**30),
        ("80GiB", 80 * 2**30),
        ("512m", 2**29),
        ("16", 16),
        ("1.5 G", 1.5 * 2**30),
        ("0G", None),
        ("-1G", None),
        ("much", None),
        ("", None),
        ("nanG", None),
        ("infG", None),
    ],
)
def test_amounts_of_memory_are_parsed(text: str, amount: float | None) -> None:
    assert memory_formulas.parse_bytes(text) == amount


def test_amounts_of_memory_are_formatted() -> None:
    assert memory_formulas.format_bytes(3 * 2**29) == "1.50 GiB"
    assert memory_formulas.format_bytes(5 * 2**20) == "5 MiB"


def test_the_formulas_import_no_torch() -> None:
    source = Path(memory_formulas.__file__).read_text(encoding="utf-8")
    assert "import torch" not in source


def test_a_quantized_weight_takes_4_127_bits() -> None:
    assert pytest.approx(4.127, abs=5e-4) == memory_formulas.QUANTIZED_BITS
    counts = WeightCounts(trained=10, frozen=64 * 256 + 100, trained_bytes=4, frozen_bytes=4, quantized=64 * 256)
    block_scales, their_scales = 256, 4  # bytes: one scale of 8 bits for 64 weights, one of float32 for 256 scales
    assert counts.bytes == 4 * 10 + 4 * 100 + 64 * 256 / 2 + block_scales + their_scales
    assert (counts + counts).quantized == 2 * 64 * 256
    assert (counts + counts).bytes == 2 * counts.bytes
