"""`rlhf run`: all stages in order, each with its launcher. Finished stages are skipped, interrupted ones resumed."""

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
    """Run every enabled stage, and copy the evaluation's report.html into the pipeline's folder."""
    start = time.monotonic()
    top = Path(pipeline.config.output_dir)
    for step in pipeline.stages:
        if step.launcher is not None:
            plan = resolve_launch(LaunchOptions(step.launcher))  # raises before any stage has run
            check_stage_launch(step.name, step.loaded.config, plan)
    for step in pipeline.stages:
        if step.launcher is None:
            import_module(f"rlhf.stages.{step.name}").run(step.loaded.config, console)
        else:
            _launch(step, step.launcher, top)
    rows = []
    for step in pipeline.stages:
        info = read_json(Path(step.loaded.config.output_dir) / "run.json")
        seconds, memory = info["timings_s"].get("total", 0.0), info["peak_memory_gib"]
        rows.append([step.name, info["status"], f"{seconds:.0f} s", f"{memory:.1f} GiB"])
        report = Path(step.loaded.config.output_dir) / "report.html"
        if report.is_file():
            shutil.copyfile(report, top / "report.html")
    console.table("Stages", ["stage", "status", "time", "peak memory so far"], rows)
    console.note(f"pipeline: {time.monotonic() - start:.0f} s; report: {top / 'report.html'}")
    chat_models = [s.loaded.config.output_dir for s in pipeline.stages if s.name in ("sft", "ppo")]
    if chat_models:
        console.note(f"to chat with the model: rlhf chat {chat_models[-1]}")


def _launch(step: PipelineStep, launcher: str, top: Path) -> None:
    """Run one stage with `accelerate launch`, from its resolved configuration.

    Raises: KeyboardInterrupt or RunStopped if the stage ended in this way; TrainingError for any other failure.
    """
    folder = top / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    resolved = folder / f"{step.name}.yaml"
    resolved.write_text(yaml.safe_dump(config_to_dict(step.loaded.config), sort_keys=False), encoding="utf-8")
    output = step.loaded.config.output_dir
    code = launch_stage(LaunchOptions(launcher), step.name, [str(resolved)], output=output)
    if code == INTERRUPTED_EXIT_CODE:
        raise KeyboardInterrupt
    if code == STOPPED_EXIT_CODE:
        raise RunStopped
    if code:
        raise TrainingError(
            f"stage {step.name} ended with exit code {code}", where=f"launcher {launcher}", do="see its message above"
        )
