"""The scripts that start several machines: rendered with stand-ins for srun and ssh, every command in them parses."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from rlhf.launch.launcher import LaunchOptions, resolve_launch
from tests.project.code import ROOT
from tests.project.commands import problems

FOLDER = ROOT / "configs" / "launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def stand_in(folder: Path, name: str, text: str) -> None:
    """A program of that name."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def rendered(script: str, arguments: list[str], place: Path, **environment: str) -> list[tuple[str, str]]:
    """(main address, command) of everything that a script would start."""
    programs, out = place / "bin", place / "said"
    programs.mkdir()
    stand_in(programs, "srun", f'{{ printf "%s\\t" "$MASTER_ADDR"; printf "%q " "$@"; echo; }} >> {out}')
    stand_in(programs, "ssh", f'shift; printf "\\t%s\\n" "$*" >> {out}')  # the host comes first
    stand_in(programs, "scontrol", "printf 'node7\\nnode8\\n'")
    clean = {"PATH": f"{programs}:{os.environ['PATH']}", **environment}
    subprocess.run(["bash", str(FOLDER / script), *arguments], cwd=ROOT, env=clean, check=True, timeout=20)
    lines = out.read_text(encoding="utf-8").splitlines()
    return [(line.split("\t")[0], line.split("\t")[1]) for line in lines]


def options(command: str) -> LaunchOptions:
    """What a command says about processes."""
    words = shlex.split(command)
    flags = {w: words[i + 1] for i, w in enumerate(words) if w.startswith("--")}
    return LaunchOptions(
        flags["--launcher"],
        int(flags["--num-processes"]),
        int(flags["--num-machines"]),
        int(flags["--machine-rank"]) if "--machine-rank" in flags else None,
        flags.get("--main-process-ip"),
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_bash_reads_it(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    help_ = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False)
    assert help_.returncode == 2
    assert "usage: " in help_.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_the_example_in_its_header_names_itself_and_a_recipe(path: Path) -> None:
    (example,) = re.findall(
        rf"^#   (?:sbatch|bash) .*{path.name} (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    words = [word for word in shlex.split(example) if not word.endswith("hostfile")]
    assert problems("rlhf " + shlex.join(words)) == []


def test_slurm(tmp_path: Path) -> None:
    environment = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[7-8]"}
    recipe = ["ppo", "configs/demo/ppo.yaml", "kl.coef=0.1"]
    ((address, command),) = rendered("slurm.sh", recipe, tmp_path, **environment)
    assert address == "node7"
    assert problems(command) == []
    assert command.startswith("rlhf ppo configs/demo/ppo.yaml kl.coef=0.1 --launcher multinode ")
    for node in ("0", "1"):  # srun starts it once on each node
        plan = resolve_launch(options(command), environment | {"SLURM_NODEID": node, "MASTER_ADDR": address})
        assert (plan.processes, plan.machines, plan.machine_rank, plan.ip) == (8, 2, int(node), "node7")


def test_a_hostfile(tmp_path: Path) -> None:
    arguments = ["configs/launch/hostfile", "sft", "configs/demo/sft.yaml", "seed=2"]
    found = sorted(command for _, command in rendered("hosts.sh", arguments, tmp_path, HF_TOKEN="hf_secret"))
    assert len(found) == 2
    assert "hf_secret" not in "".join(found)
    for rank, command in enumerate(found):
        folder, _, run = command.partition(" && ")
        assert folder == f"cd {ROOT}"
        assert problems(run) == []
        plan = resolve_launch(options(run), {})
        assert (plan.processes, plan.machines, plan.machine_rank, plan.ip) == (16, 2, rank, "10.0.0.1")


@pytest.mark.parametrize("line", ["10.0.0.1", "10.0.0.1 8", "# nobody"])
def test_a_wrong_hostfile_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text(line + "\n", encoding="utf-8")
    command = ["bash", str(FOLDER / "hosts.sh"), str(tmp_path / "hostfile"), "sft", "x.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "hostfile: " in done.stderr
