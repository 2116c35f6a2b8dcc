"""Run a stage from Python in the same way as its command."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rlhf.config.load import load_config
from rlhf.config.schema import STAGES, StageConfig
from rlhf.console import Console
from rlhf.distributed.launch_env import is_main_process
from rlhf.errors import ConfigError
from rlhf.stages.lifecycle import RunResult


def run_stage(
    stage: str, config: str | Path | StageConfig, overrides: Sequence[str] = (), *, quiet: bool = False
) -> RunResult:
    """Run one stage in this process: `run_stage("sft", "configs/demo/sft.yaml", ["optim.epochs=1"])`.

    Args:
        stage: pretrain, sft, reward, classify, ppo or evaluate.
        config: YAML file, or a configuration from `load_config`.
        overrides: `key=value` texts; only with a file.
        quiet: whether to print results only.
    Returns: the run directory (`path`) and the summary. A finished run of the same configuration is skipped.
    Raises: ConfigError, DataError, CheckpointError or TrainingError; the message names a remedy.
    """
    if stage not in STAGES:
        raise ConfigError(f"no stage called '{stage}'", where="run_stage(stage=)", do=f"one of {', '.join(STAGES)}")
    if isinstance(config, StageConfig):
        if overrides or not isinstance(config, STAGES[stage]):
            raise ConfigError(
                f"the configuration is not one of '{stage}', or it has overrides beside it",
                found=type(config).__name__,
                where="run_stage(config=)",
                do="give a file, or load_config(file, overrides, stage=...)",
            )
        loaded = config
    else:
        loaded = load_config(config, overrides, stage=stage)
    result: RunResult = import_module(f"rlhf.stages.{stage}").run(loaded, Console(quiet=quiet, main=is_main_process()))
    return result
