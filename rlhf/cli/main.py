"""The command line. Thin: a stage is imported inside its command, so help and configuration errors are instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf import __version__
from rlhf.cli import options as opt
from rlhf.cli.data import data
from rlhf.cli.output import make_console, print_ending, print_notes
from rlhf.errors import ConfigError, RLHFError
from rlhf.runs import preemption

app = typer.Typer(
    name="rlhf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a pretrained language model and human preferences to an aligned chat model.\n\n"
    "The stages in order: pretrain (optional), sft, reward, ppo, evaluate; 'run' chains them, 'classify' stands "
    "beside. Each takes a YAML file "
    "and key=value overrides:\n\n"
    "  rlhf run configs/demo/pipeline.yaml\n\n"
    "  rlhf ppo configs/demo/ppo.yaml kl.target=2.5 seed=2\n\n"
    "\b\n  accelerate launch --config_file configs/accelerate/ddp.yaml -m rlhf sft configs/demo/sft.yaml",
)

UNFORESEEN = 70  # exit code after an error that no check foresaw (sysexits.h: an internal software error)


def _stage(
    name: str, config: Path, overrides: list[str] | None, how: tuple[Any, ...], quiet: bool, as_json: bool
) -> None:
    from importlib import import_module

    from rlhf.config.load import load_stage_config
    from rlhf.config.schema import STAGES
    from rlhf.launch.launcher import LaunchOptions, check_stage_launch, launch_stage, resolve_launch

    loaded, options = load_stage_config(STAGES[name], config, overrides or []), LaunchOptions(*how)
    if options.launcher is not None:
        check_stage_launch(name, loaded.config, resolve_launch(options))
        flags = [*(["--quiet"] if quiet else []), *(["--json"] if as_json else [])]
        arguments = [str(config), *(overrides or []), *flags]
        code = launch_stage(options, name, arguments, output=loaded.config.output_dir)
        raise preemption.RunStopped if code == preemption.STOPPED_EXIT_CODE else typer.Exit(code)
    if options.given:
        raise ConfigError(
            "processes are started by a launcher",
            found=" ".join(options.flags()),
            where="command line",
            do="add --launcher, e.g. --launcher ddp",
        )
    console = make_console(quiet, as_json)
    print_notes(loaded.notes, console)
    import_module(f"rlhf.stages.{name}").run(loaded.config, console)


def _add_stage(name: str) -> None:
    @app.command(name, help=opt.STAGE_HELP[name])
    def command(
        config: opt.ConfigArg,
        overrides: opt.OverridesArg = None,
        launcher: opt.LauncherOpt = None,
        num_processes: opt.ProcessesOpt = None,
        num_machines: opt.MachinesOpt = None,
        machine_rank: opt.RankOpt = None,
        main_process_ip: opt.IpOpt = None,
        main_process_port: opt.PortOpt = None,
        max_restarts: opt.RestartsOpt = 0,
        timeout: opt.TimeoutOpt = None,
        quiet: opt.QuietOpt = False,
        as_json: opt.JsonOpt = False,
    ) -> None:
        how = (launcher, num_processes, num_machines, machine_rank, main_process_ip, main_process_port)
        _stage(name, config, overrides, (*how, max_restarts, timeout), quiet, as_json)


for _name in opt.STAGE_HELP:
    _add_stage(_name)


@app.command("run")
def run_command(
    config: opt.ConfigArg, overrides: opt.OverridesArg = None, quiet: opt.QuietOpt = False, as_json: opt.JsonOpt = False
) -> None:
    """All stages in order. Finished stages are skipped, an interrupted one continues.

    Overrides start with the stage: ppo.kl.target=2.5, pretrain.enabled=true, sft.launcher=ddp, seed=2.
    """
    from rlhf.config.load import load_pipeline

    pipeline = load_pipeline(config, overrides or [])
    from rlhf.stages.pipeline import run as run_pipeline

    console = make_console(quiet, as_json)
    print_notes(pipeline.notes, console)
    run_pipeline(pipeline, console)


@app.command("show")
def show_command(
    config: opt.ConfigArg,
    overrides: opt.OverridesArg = None,
    stage: Annotated[str | None, typer.Option(help="which stage's file it is; default: the file's name")] = None,
) -> None:
    """Print every value of a configuration with its origin (default, file:line, command line) and meaning."""
    from rlhf.config.load import load_stage_config
    from rlhf.config.schema import RECIPES
    from rlhf.config.show import config_lines

    name = stage or config.stem
    if name not in RECIPES:
        raise ConfigError(f"no stage called '{name}'", where=str(config), do=f"give --stage: {', '.join(RECIPES)}")
    loaded = load_stage_config(RECIPES[name], config, overrides or [])
    for note in loaded.notes:
        typer.echo(note, err=True)
    for line in config_lines(loaded):
        typer.echo(line)


@app.command("check")
def check_command(
    config: opt.ConfigArg,
    overrides: opt.OverridesArg = None,
    stage: Annotated[str | None, typer.Option(help="a stage, or pipeline; default: by the file's name")] = None,
    launcher: opt.LauncherOpt = None,
    num_processes: opt.ProcessesOpt = None,
    num_machines: opt.MachinesOpt = None,
    gpu_memory: Annotated[str | None, typer.Option(help="of one GPU, e.g. 80G; default: this machine's")] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="ppo: mean length of responses; default: of what the policy learnt to say")
    ] = None,
    quiet: opt.QuietOpt = False,
    as_json: opt.JsonOpt = False,
) -> None:
    """Before a long run: batch, data, template, models that belong together, tokens, and memory of each process.

    Takes a stage's file or a pipeline's. Trains and writes nothing. Exit code 1 if something fails or does not fit.
    """
    from rlhf.preflight.check import run_preflight

    how = (launcher, num_processes, num_machines)
    known: dict[str, Any] = {"gpu_memory": gpu_memory, "response": response_tokens}
    raise typer.Exit(
        run_preflight(config, overrides or [], make_console(quiet, as_json), stage=stage, how=how, **known)
    )


@app.command("bench")
def bench_command(
    config: opt.ConfigArg,
    overrides: opt.OverridesArg = None,
    steps: Annotated[int, typer.Option(min=1, help="steps that are measured, after one to warm up")] = 3,
    quiet: opt.QuietOpt = False,
    as_json: opt.JsonOpt = False,
) -> None:
    """Measure PPO on this machine, phase by phase, beside what the machine could do. Takes a ppo file."""
    from rlhf.config.load import load_stage_config
    from rlhf.config.schema import PPOConfig

    loaded = load_stage_config(PPOConfig, config, overrides or [])
    from rlhf.preflight.benchmark import run_benchmark as run_bench

    console = make_console(quiet, as_json)
    print_notes(loaded.notes, console)
    run_bench(loaded.config, console, steps=steps)


@app.command("inspect")
def inspect_command(
    run: Annotated[Path, typer.Argument(help="run directory of a ppo stage")],
    step: Annotated[int | None, typer.Option(help="which step; default: the last one written")] = None,
    row: Annotated[int | None, typer.Option(help="which response of the step; default: all that were written")] = None,
    paint: Annotated[str, typer.Option(help="logprob, kl, value, advantage or reward")] = "advantage",
    as_json: opt.JsonOpt = False,
) -> None:
    """Paint the tokens of a PPO rollout by one of their numbers, and list all of them."""
    from rlhf.reports.inspect import inspect_rollout as run_inspect

    run_inspect(run, make_console(False, as_json), step=step, row=row, paint=paint)


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="run directories of evaluate stages, or of pipelines")],
    output: Annotated[Path | None, typer.Option(help="HTML page to write, with all runs in one picture")] = None,
    as_json: opt.JsonOpt = False,
) -> None:
    """Several evaluations side by side, such as the seeds of one experiment: each, their mean and the worst."""
    from rlhf.reports.compare import compare_runs as run_compare

    run_compare(runs, make_console(False, as_json), output=output)


@app.command("chat")
def chat_command(
    model: Annotated[str, typer.Argument(help="run directory, model folder or hub id")],
    temperature: opt.TemperatureOpt = 0.7,
    max_new_tokens: opt.NewTokensOpt = 128,
    seed: Annotated[int, typer.Option(help="seed of the replies")] = 1,
) -> None:
    """Talk to a model in the terminal. Empty line or Ctrl-D ends; /new starts over."""
    from rlhf.tools.generate import chat_in_terminal as run_chat

    run_chat(model, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


@app.command("generate")
def generate_command(
    model: Annotated[str, typer.Argument(help="run directory, model folder or hub id")],
    prompts: Annotated[str, typer.Argument(help="file of prompts (any format that PPO reads)")],
    output: Annotated[Path, typer.Argument(help="JSONL file to write; must not exist")],
    temperature: opt.TemperatureOpt = 0.7,
    max_new_tokens: opt.NewTokensOpt = 128,
    seed: Annotated[int, typer.Option(help="seed of the replies")] = 1,
    quiet: opt.QuietOpt = False,
) -> None:
    """Answer a file of prompts."""
    from rlhf.tools.generate import generate_file as run_generate

    run_generate(
        model,
        prompts,
        output,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        console=make_console(quiet, False),
    )


@app.command("merge")
def merge_command(
    adapter: Annotated[str, typer.Argument(help="run directory or model folder of an adapter (peft.method lora, ia3)")],
    output: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    quiet: opt.QuietOpt = False,
) -> None:
    """Fold an adapter into its base: plain float32 weights that transformers loads without peft.

    For serving, or to train all weights from there. Tokenizer, hand-over record, end token and, of a reward model or
    classifier, its head come along. The folder appears only after the written model has been loaded again and has given
    the adapter's logits.

      rlhf merge runs/lora/3-ppo runs/lora/assistant
    """
    from rlhf.tools.merge import merge_adapter as run_merge

    run_merge(adapter, output, make_console(quiet, False))


@app.command("rate")
def rate_command(
    model: Annotated[str, typer.Argument(help="run directory, model folder or hub id")],
    output: Annotated[Path, typer.Argument(help="JSONL file of comparisons to write; must not exist")],
    rows: Annotated[int, typer.Option(min=1, help="prompts to ask, twice each")] = 16000,
    max_new_tokens: opt.NewTokensOpt = 48,
    seed: Annotated[int, typer.Option(help="seed of prompts, replies and labels")] = 1,
    quiet: opt.QuietOpt = False,
) -> None:
    """Have the demo world's simulated rater compare a model's own replies: pairs for the next reward model."""
    from rlhf.labeling.relabel import rate_responses as run_rate

    run_rate(model, output, rows=rows, max_new_tokens=max_new_tokens, seed=seed, console=make_console(quiet, False))


app.add_typer(data)


def main() -> None:
    """Entry point: errors a user can cause become one message and a non-zero exit code."""
    from rlhf.distributed.heartbeat import write_heartbeat

    preemption.handle_sigterm()
    write_heartbeat("running")
    try:
        app(prog_name="rlhf")  # says and exits by itself on a wrong command or option
    except RLHFError as error:
        write_heartbeat("refused", words=f"{type(error).__name__}: {error}")
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        write_heartbeat("interrupted")
        sys.exit(print_ending("interrupted", preemption.INTERRUPTED_EXIT_CODE))
    except SystemExit as end:
        if not end.code or isinstance(end, preemption.RunStopped):
            _leave_together()
        if isinstance(end, preemption.RunStopped):
            write_heartbeat("interrupted")
            print_ending(
                "stopped by SIGTERM" + (f", saved {end.saved}" if end.saved else ""), preemption.STOPPED_EXIT_CODE
            )
        elif end.code == preemption.INTERRUPTED_EXIT_CODE:
            write_heartbeat("interrupted")
            print_ending("interrupted", preemption.INTERRUPTED_EXIT_CODE)
        else:
            write_heartbeat("failed" if end.code else "finished", words=f"exit code {end.code}")
        raise
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        write_heartbeat("failed", words=f"{type(error).__name__}: {error}")
        if error.errno not in preemption.DISK_ERRNOS:
            typer.echo(explain_unforeseen(error), err=True)
            sys.exit(UNFORESEEN)
        typer.echo(f"CheckpointError: {error.filename or 'output_dir'}: the disk does not take more: {error}", err=True)
        sys.exit(2)
    except Exception as error:
        write_heartbeat("failed", words=f"{type(error).__name__}: {error}")
        typer.echo(explain_unforeseen(error), err=True)
        sys.exit(UNFORESEEN)


def explain_unforeseen(error: Exception) -> str:
    """Write the traceback of an error that no check foresaw to a file; returns one line that says where it is.

    The file lies in the run directory if a run has begun, else in the folder for temporary files.
    """
    import tempfile
    import traceback

    from rlhf.runs.run_dir import RunDir

    run, rank = RunDir.unfinished(), os.environ.get("RANK", "0")
    folder = run.path if run is not None and run.path.is_dir() else None
    trace = "".join(traceback.format_exception(error))
    try:
        path = (folder or Path(tempfile.gettempdir())) / f"error-rank{rank}-pid{os.getpid()}.txt"
        path.write_text(trace, encoding="utf-8")
    except OSError as full:
        path = Path(f"nowhere ({full})")
    what = str(error).strip().split("\n")[0][:300] or "no message"
    where = f" in run {folder}" if folder is not None else ""
    return (
        f"InternalError{where}: {type(error).__name__}: {what}; this is a defect of rlhf or of a library, please "
        f"report it with the full trace, which is in {path}"
    )


def _leave_together() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from rlhf.distributed.launch_env import leave_process_groups_at_exit

        leave_process_groups_at_exit()


__all__ = ["__version__", "app", "main"]
