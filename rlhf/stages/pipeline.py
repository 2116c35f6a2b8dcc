"""All stages in order, each under its launcher; finished stages are skipped, an interrupted one continues."""

from __future__ import annotations

import shutil
import time
from importlib import import_module
from pathlib import Path

import yaml

from rlhf.config.load import PipelineStep, ResolvedPipeline
from rlhf.console import Console
from rlhf.errors import TrainingError
from rlhf.launch.launcher import LaunchOptions, check_stage_launch, launch_stage, resolve_launch
from rlhf.runs.preemption import INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE, RunStopped
from rlhf.runs.run_dir import config_to_dict, read_json


def run(pipeline: ResolvedPipeline, console: Console) -> None:
    """Run every enabled stage; the evaluation's report.html is copied to the top of the pipeline's folder."""
    begun = time.monotonic()
    top = Path(pipeline.config.output_dir)
    for stanza in pipeline.stages:
        if stanza.launcher is not None:
            plan = resolve_launch(LaunchOptions(stanza.launcher))  # refuse a wrong one before anything has run
            check_stage_launch(stanza.name, stanza.loaded.config, plan)
    for stanza in pipeline.stages:
        if stanza.launcher is None:
            import_module(f"rlhf.stages.{stanza.name}").run(stanza.loaded.config, console)
        else:
            _launched(stanza, stanza.launcher, top)
    rows = []
    for stanza in pipeline.stages:
        info = read_json(Path(stanza.loaded.config.output_dir) / "run.json")
        seconds, memory = info["timings_s"].get("total", 0.0), info["peak_memory_gib"]
        rows.append([stanza.name, info["status"], f"{seconds:.0f} s", f"{memory:.1f} GiB"])
        report = Path(stanza.loaded.config.output_dir) / "report.html"
        if report.is_file():
            shutil.copyfile(report, top / "report.html")
    console.table("Stages", ["stage", "status", "time", "peak memory so far"], rows)
    console.note(f"pipeline: {time.monotonic() - begun:.0f} s; report: {top / 'report.html'}")
    chatty = [s.loaded.config.output_dir for s in pipeline.stages if s.name in ("sft", "ppo")]
    if chatty:
        console.note(f"talk to it: rlhf chat {chatty[-1]}")


def _launched(stanza: PipelineStep, launcher: str, top: Path) -> None:
    """One stage under `accelerate launch`, from its resolved configuration."""
    folder = top / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    resolved = folder / f"{stanza.name}.yaml"
    resolved.write_text(yaml.safe_dump(config_to_dict(stanza.loaded.config), sort_keys=False), encoding="utf-8")
    output = stanza.loaded.config.output_dir
    code = launch_stage(LaunchOptions(launcher), stanza.name, [str(resolved)], output=output)
    if code == INTERRUPTED_EXIT_CODE:
        raise KeyboardInterrupt
    if code == STOPPED_EXIT_CODE:
        raise RunStopped
    if code:
        raise TrainingError(
            f"stage {stanza.name} ended with exit code {code}", where=f"launcher {launcher}", do="see its message above"
        )
