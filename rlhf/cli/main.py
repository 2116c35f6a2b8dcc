"""The commands of `rlhf` and its entry point. Each command imports its work when it runs, so that help is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.cli import options as opt
from rlhf.cli.data import data
from rlhf.cli.memory_errors import explain_out_of_memory
from rlhf.cli.output import explain_unforeseen, make_console, print_ending, print_notes
from rlhf.errors import ConfigError, RLHFError
from rlhf.runs import preemption
from rlhf.version import __version__

app = typer.Typer(
    name="rlhf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a pretrained language model and human preferences into an aligned chat model.\n\n"
    "Stages, in order: pretrain (optional), sft, reward, ppo, evaluate; 'run' runs them all. Each stage takes a YAML "
    "file and key=value overrides, and writes a run directory:\n\n"
    "\b\n"
    "  rlhf run configs/demo/pipeline.yaml              # all stages of the demo\n"
    "  rlhf check configs/demo/ppo.yaml                 # data, batch sizes and memory before a long run\n"
    "  rlhf ppo configs/demo/ppo.yaml kl.target=2.5     # one stage, with an override\n"
    "  rlhf ppo configs/demo/ppo.yaml --launcher zero3  # the same on several GPUs\n"
    "  rlhf show configs/demo/ppo.yaml                  # every setting with its value, origin and meaning",
)

UNFORESEEN = 70
"""Exit code after an error that no check foresaw (EX_SOFTWARE of sysexits.h)."""


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
            "these options need a launcher, which starts the processes",
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
    """Run all stages of a pipeline in order; finished stages are skipped, an interrupted one is resumed.

    Each stage takes the models of the stages before it. Overrides of a stage begin with its name.

    \b
      rlhf run configs/demo/pipeline.yaml
      rlhf run configs/demo/pipeline.yaml seed=2 ppo.kl.target=2.5 sft.launcher=ddp pretrain.enabled=false
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
    stage: Annotated[
        str | None, typer.Option(help="stage that the file configures; default: the name of the file")
    ] = None,
) -> None:
    """Print every value of a configuration with its origin (default, file:line or command line) and its meaning.

    \b
      rlhf show configs/demo/ppo.yaml kl.target=2.5
      rlhf show my-run.yaml --stage ppo
    """
    from rlhf.config.load import load_stage_config
    from rlhf.config.schema import RECIPES
    from rlhf.config.show import config_lines

    name = stage or config.stem
    if name not in RECIPES:
        raise ConfigError(
            f"no stage called '{name}'", where=str(config), do=f"set --stage to one of {', '.join(RECIPES)}"
        )
    loaded = load_stage_config(RECIPES[name], config, overrides or [])
    for note in loaded.notes:
        typer.echo(note, err=True)
    for line in config_lines(loaded):
        typer.echo(line)


@app.command("check")
def check_command(
    config: opt.ConfigArg,
    overrides: opt.OverridesArg = None,
    stage: Annotated[
        str | None, typer.Option(help="stage that the file configures, or pipeline; default: by the name of the file")
    ] = None,
    launcher: opt.LauncherOpt = None,
    num_processes: opt.ProcessesOpt = None,
    num_machines: opt.MachinesOpt = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="memory of one GPU that the run must fit into, e.g. 80G; default: that of this machine"),
    ] = None,
    response_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="ppo: mean length of responses, in tokens; default: that of the replies the policy was trained on",
        ),
    ] = None,
    quiet: opt.QuietOpt = False,
    as_json: opt.JsonOpt = False,
) -> None:
    """Check a stage or pipeline before a long run: batch sizes, data, chat template, models, tokens, and memory.

    Trains nothing and writes nothing. The exit code is 1 if a check fails or the run does not fit into memory.

    \b
      rlhf check configs/demo/pipeline.yaml
      rlhf check configs/demo/ppo.yaml --launcher zero3 --num-processes 8 --gpu-memory 80G
    """
    from rlhf.preflight.check import run_preflight

    raise typer.Exit(
        run_preflight(
            config,
            overrides or [],
            make_console(quiet, as_json),
            stage=stage,
            launch=(launcher, num_processes, num_machines),
            gpu_memory=gpu_memory,
            response_tokens=response_tokens,
        )
    )


@app.command("bench")
def bench_command(
    config: opt.ConfigArg,
    overrides: opt.OverridesArg = None,
    steps: Annotated[int, typer.Option(min=1, help="number of PPO steps to measure, after one warm-up step")] = 3,
    quiet: opt.QuietOpt = False,
    as_json: opt.JsonOpt = False,
) -> None:
    """Measure the speed of PPO on this machine, phase by phase, and compare it with what the hardware can do.

    \b
      rlhf bench configs/demo/ppo.yaml --steps 5
    """
    from rlhf.config.load import load_stage_config
    from rlhf.config.schema import PPOConfig

    loaded = load_stage_config(PPOConfig, config, overrides or [])
    from rlhf.preflight.benchmark import run_benchmark as run_bench

    console = make_console(quiet, as_json)
    print_notes(loaded.notes, console)
    run_bench(loaded.config, console, steps=steps)


@app.command("inspect")
def inspect_command(
    run: Annotated[Path, typer.Argument(help="run directory of a PPO run")],
    step: Annotated[int | None, typer.Option(help="PPO step to show; default: the last one that was written")] = None,
    row: Annotated[
        int | None, typer.Option(help="number of the response in that step; default: all that were written")
    ] = None,
    paint: Annotated[
        str, typer.Option(help="quantity that colours the tokens: logprob, kl, value, advantage or reward")
    ] = "advantage",
    as_json: opt.JsonOpt = False,
) -> None:
    """Show responses of a PPO run token by token: coloured by one quantity, with a table of all of them.

    \b
      rlhf inspect runs/demo/3-ppo --step 50 --paint kl
    """
    from rlhf.reports.inspect import inspect_rollout as run_inspect

    run_inspect(run, make_console(False, as_json), step=step, row=row, paint=paint)


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="run directories of evaluations or of pipelines")],
    output: Annotated[
        Path | None, typer.Option(help="HTML page to write, with all runs in one plot; default: none")
    ] = None,
    as_json: opt.JsonOpt = False,
) -> None:
    """Compare evaluations, such as the seeds of one experiment: each of them, their mean and the worst.

    \b
      rlhf compare runs/seed1 runs/seed2 runs/seed3 --output seeds.html
    """
    from rlhf.reports.compare import compare_runs as run_compare

    run_compare(runs, make_console(False, as_json), output=output)


@app.command("chat")
def chat_command(
    model: Annotated[str, typer.Argument(help="run directory, model folder or hub id")],
    temperature: opt.TemperatureOpt = 0.7,
    max_new_tokens: opt.NewTokensOpt = 128,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 1,
) -> None:
    """Chat with a model in the terminal. An empty line or Ctrl-D ends the chat; /new starts a new conversation.

    \b
      rlhf chat runs/demo/3-ppo
    """
    from rlhf.tools.generate import chat_in_terminal as run_chat

    run_chat(model, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


@app.command("generate")
def generate_command(
    model: Annotated[str, typer.Argument(help="run directory, model folder or hub id")],
    prompts: Annotated[str, typer.Argument(help="file of prompts, in any format that PPO reads")],
    output: Annotated[Path, typer.Argument(help="JSONL file to write; must not exist")],
    temperature: opt.TemperatureOpt = 0.7,
    max_new_tokens: opt.NewTokensOpt = 128,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 1,
    quiet: opt.QuietOpt = False,
) -> None:
    """Generate one reply to each prompt of a file.

    \b
      rlhf generate runs/demo/3-ppo data/demo/prompts.jsonl replies.jsonl --temperature 0
    """
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
    adapter: Annotated[
        str, typer.Argument(help="run directory or model folder of an adapter (peft.method lora or ia3)")
    ],
    output: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    quiet: opt.QuietOpt = False,
) -> None:
    """Merge an adapter into its base model: plain float32 weights that transformers loads without peft.

    The merged model can be served, or fine-tuned further with all weights. Tokenizer, hand-over record, end token and
    the head of a reward model or classifier are copied. The folder appears only after the written model has been loaded
    again and has reproduced the adapter's logits.

    \b
      rlhf merge runs/lora/3-ppo runs/lora/assistant
    """
    from rlhf.tools.merge import merge_adapter as run_merge

    run_merge(adapter, output, make_console(quiet, False))


@app.command("rate")
def rate_command(
    model: Annotated[str, typer.Argument(help="run directory, model folder or hub id")],
    output: Annotated[Path, typer.Argument(help="JSONL file of comparisons to write; must not exist")],
    rows: Annotated[int, typer.Option(min=1, help="number of prompts; the model replies to each twice")] = 16000,
    max_new_tokens: opt.NewTokensOpt = 48,
    seed: Annotated[int, typer.Option(help="seed of prompts, sampling and labels")] = 1,
    quiet: opt.QuietOpt = False,
) -> None:
    """Have the demo's simulated rater compare pairs of a model's own replies, as data for the next reward model.

    \b
      rlhf rate runs/demo/1-sft on-policy.jsonl --rows 4000
    """
    from rlhf.labeling.relabel import rate_responses as run_rate

    run_rate(model, output, rows=rows, max_new_tokens=max_new_tokens, seed=seed, console=make_console(quiet, False))


app.add_typer(data)


def main() -> None:
    """Run the command line; an error becomes one message on stderr and a non-zero exit code."""
    from rlhf.distributed.heartbeat import write_heartbeat

    preemption.handle_sigterm()
    write_heartbeat("running")
    try:
        with explain_out_of_memory():
            app(prog_name="rlhf")  # prints usage and exits by itself on a wrong command or option
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


def _leave_together() -> None:
    """Have the processes of a job leave their process groups together, so that none sees another's connection break."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from rlhf.distributed.launch_env import leave_process_groups_at_exit

        leave_process_groups_at_exit()


__all__ = ["__version__", "app", "main"]
