"""`rlhf check`: its output, its exit code, and that it writes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run

Contents = Callable[[Path], dict[str, bytes]]


@pytest.mark.parametrize("stage", ["sft", "reward", "classify", "ppo"])
def test_a_good_stage(stage: str, place: Path, call_cli: Run, contents: Contents) -> None:
    before = contents(place)
    code, out, err = call_cli(["check", f"{stage}.yaml"], cwd=place)
    assert (code, err) == (0, "")
    assert contents(place) == before
    for said in (
        "records",
        "tokens: median, 95 %, longest",
        "batch: ",
        "run: ",
        "Memory of each process",
        "no problems found",
    ):
        assert said in out, said
    assert ("end token present" in out) is (stage in ("sft", "reward"))
    assert ("has the policy's tokenizer, and a handover record" in out) is (stage == "ppo")
    assert ("kernels' copies" in out, "KV cache" in out) == (False, False)


def test_numbers_that_can_be_counted(place: Path, call_cli: Run) -> None:
    out = call_cli(["check", "sft.yaml", "optim.max_updates=null", "optim.epochs=3"], cwd=place).stdout
    assert "8 used of 8" in out  # 10 records, 2 of them held out
    assert "batch: 1 process x 4 rows x 1 accumulation = 4 rows per update" in out
    assert "run: 6 updates (3 epochs of 8 records)" in out
    incomplete = ["optim.epochs=1", "optim.batch_size=3", "optim.microbatch_size=3"]
    out = call_cli(["check", "sft.yaml", "optim.max_updates=null", *incomplete], cwd=place).stdout
    assert "run: 3 updates (1 epochs of 8 records, the last batch filled up with 1 of them)" in out
    said = call_cli(["check", "sft.yaml", "optim.max_updates=null", "optim.epochs=1", "packing=true"], cwd=place).stdout
    sequences = int(said.split("8 records packed into ")[1].split()[0])
    assert 1 <= sequences < 8
    assert f"run: {-(-sequences // 4)} updates" in said
    out = call_cli(["check", "ppo.yaml", "--num-processes", "2"], cwd=place).stdout
    assert "batch: 4 episodes a step = 2 processes x 2" in out


def test_a_pipeline_whose_models_are_not_made_yet(place: Path, call_cli: Run, contents: Contents) -> None:
    before = contents(place)
    code, out, err = call_cli(["check", "pipeline.yaml"], cwd=place)
    assert (code, err) == (0, "")
    assert out.count("Memory of each process") == 2
    assert "reward (out/2-reward)" in out
    assert contents(place) == before


def test_ppo_on_models_of_the_pipeline(place: Path, call_cli: Run) -> None:
    (place / "pipeline.yaml").write_text(
        "output_dir: out\nsft: {config: sft.yaml}\nreward: {config: reward.yaml}\nppo: {config: ppo.yaml}\n"
    )
    code, out, err = call_cli(["check", "pipeline.yaml", "sft.peft.method=lora", "reward.peft.method=lora"], cwd=place)
    assert (code, err) == (0, "")
    assert "does not exist yet" in out
    assert out.count("Memory of each process") == 3


def needed(out: str) -> dict[str, float]:
    """Part -> MiB of a table printed with --json."""
    tables = [json.loads(line) for line in out.splitlines()]
    rows = next(t["rows"] for t in tables if str(t.get("table", "")).startswith("Memory"))
    return {row["part"]: float(row["bytes"].split()[0]) * (1024 if "GiB" in row["bytes"] else 1) for row in rows}


@pytest.mark.parametrize("launcher", ["ddp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_every_sharding(launcher: str, place: Path, call_cli: Run) -> None:
    code, out, err = call_cli(["check", "sft.yaml", "--launcher", launcher, "--json"], cwd=place)
    assert (code, err) == (0, "")
    assert "peak (update)" in needed(out)
    assert ("gathered weights" in out) is launcher.startswith("zero3")


def test_what_does_not_fit_comes_with_a_way_out(place: Path, call_cli: Run) -> None:
    long = ["sft.yaml", "optim.batch_size=512", "optim.microbatch_size=512", "data.max_length=128"]
    code, out, _ = call_cli(["check", *long, "--gpu-memory", "80G"], cwd=place)
    assert code == 0
    assert "fits: " in out
    code, out, _ = call_cli(["check", *long, "--gpu-memory", "630M"], cwd=place)
    assert code == 1
    assert "FAILS  sft needs" in out
    assert "the cheapest change that fits is optim.microbatch_size=" in out
    code, out, _ = call_cli(["check", *long, "--gpu-memory", "1M"], cwd=place)
    assert code == 1
    assert "no change fits; the smallest need is" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("sft.yaml --gpu-memory much", "expected an amount of memory"),
        ("sft.yaml --launcher ddp --num-processes 3", "cannot be shared equally by 3 processes"),
        ("ppo.yaml --launcher zero2 --num-processes 8", "choose a multiple of 8"),
        ("sft.yaml --launcher zero9", "no such launcher"),
        ("sft.yaml optim.epoch=1", "did you mean 'optim.epochs'"),
        ("sft.yaml data.max_length=4096", "do not fit the model's context of 128"),
        ("evaluate.yaml", "no stage that trains called 'evaluate'"),
        ("nothing.yaml", "no stage that trains called 'nothing'"),
        ("sft.yaml freeze.layers=7", "the model has blocks 0 to 1"),
    ],
)
def test_a_wrong_configuration_exits_with_2(arguments: str, says: str, place: Path, call_cli: Run) -> None:
    code, _, err = call_cli(["check", *arguments.split()], cwd=place)
    assert code == 2
    assert says in err


def append(path: Path, **row: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def test_what_would_fail_exits_with_1(place: Path, call_cli: Run) -> None:
    code, out, _ = call_cli(["check", "ppo.yaml", "reward_model.path=foreign"], cwd=place)
    assert code == 1
    assert "has a different tokenizer" in out
    assert "no mean and standard deviation of its scores" in out
    code, out, _ = call_cli(["check", "ppo.yaml", "policy.path=nowhere"], cwd=place)
    assert code == 1
    assert "FAILS  CheckpointError: nowhere: no such model" in out
    append(place / "demos.jsonl", messages=[])
    code, out, _ = call_cli(["check", "sft.yaml"], cwd=place)
    assert code == 1
    assert "FAILS  DataError: demos.jsonl row 11" in out
    code, out, _ = call_cli(["check", "sft.yaml", "data.on_bad_row=drop"], cwd=place)
    assert code == 0
    assert "1 no messages" in out or "dropped" in out


def test_rows_that_are_cut_lose_their_end_token(place: Path, call_cli: Run) -> None:
    code, out, _ = call_cli(["check", "sft.yaml", "data.max_length=16", "data.too_long=truncate"], cwd=place)
    assert "0.0 %: 0 truncated" in out or "truncated" in out
    code, out, _ = call_cli(["check", "sft.yaml", "data.max_length=8", "data.too_long=truncate"], cwd=place)
    assert code == 1
    assert "no record" in out


def test_shorter_responses_need_less(place: Path, call_cli: Run) -> None:
    def peak(*words: str) -> float:
        out = call_cli(
            ["check", "ppo.yaml", "ppo.rollout_size=512", "optim.microbatch_size=512", "--json", *words], cwd=place
        )
        return next(mib for part, mib in needed(out.stdout).items() if part.startswith("peak"))

    assert peak("--response-tokens", "1") < peak() == peak("--response-tokens", "99")


def test_responses_count_as_the_policys_record_says_and_the_longest_must_fit(place: Path, call_cli: Run) -> None:
    big = ["check", "ppo.yaml", "ppo.rollout_size=512", "optim.microbatch_size=512", "sampling.max_new_tokens=48"]
    unknown = needed(call_cli([*big, "--json"], cwd=place).stdout)
    record = place / "sft" / "handover.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"reply_tokens": 3.2}))
    known = needed(call_cli([*big, "--json"], cwd=place).stdout)
    told = needed(call_cli([*big, "--json", "--response-tokens", "4"], cwd=place).stdout)
    grown = "peak if all responses reach the maximum length"
    assert known["peak (update)"] == told["peak (update)"] < unknown["peak (update)"]
    assert known[grown] == unknown["peak (update)"]
    assert grown not in told.keys() | unknown.keys()
    _, out, _ = call_cli([*big, "--gpu-memory", "1M"], cwd=place)
    assert "the table assumes responses of 4 tokens" in out
    message = r"ppo needs (\d+) MiB \((\d+) MiB at the start\), but the limit is 1 MiB"
    most, first = map(int, re.findall(message, out)[0])
    assert first + 2 < most
    for limit, fits in ((first + 1, False), (most + 1, True)):
        code, out, _ = call_cli([*big, "--gpu-memory", f"{limit}M"], cwd=place)
        assert (code == 0, "fits: " in out) == (fits, fits)


def test_a_pipeline_knows_what_its_policy_will_have_learnt_to_say(place: Path, call_cli: Run) -> None:
    (place / "pipeline.yaml").write_text(
        "output_dir: out\nsft: {config: sft.yaml}\nreward: {config: reward.yaml}\nppo: {config: ppo.yaml}\n"
    )
    out = call_cli(["check", "pipeline.yaml"], cwd=place).stdout
    assert "the table assumes responses of" in out
    assert "the mean length recorded for the policy" in out


def test_a_reward_model_on_the_shared_base_cannot_be_offloaded(place: Path, call_cli: Run) -> None:
    (place / "pipeline.yaml").write_text(
        "output_dir: out\nsft: {config: sft.yaml}\nreward: {config: reward.yaml}\nppo: {config: ppo.yaml}\n"
    )
    words = [f"{stage}.peft.method=lora" for stage in ("sft", "reward", "ppo")]
    code, _, err = call_cli(["check", "pipeline.yaml", *words, "ppo.offload=[reward]"], cwd=place)
    assert code == 2
    assert "there is no reward model to offload" in err


def test_a_renamed_setting_is_noted(place: Path, call_cli: Run) -> None:
    code, out, err = call_cli(["check", "sft.yaml", "saving.grace=30"], cwd=place)
    assert code == 0, err
    assert "note: command line: 'saving.grace' is now called 'saving.grace_seconds'" in out
