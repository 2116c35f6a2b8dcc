"""The command line. Thin: a stage is imported inside its command, so help and configuration errors are instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf import __version__
from rlhf.cli_data import data
from rlhf.cli_options import ConfigArg, JsonOpt, LauncherOpt, OverridesArg, QuietOpt, console
from rlhf.errors import ConfigError, RLHFError
from rlhf.runs import stop

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="rlhf", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a pretrained language model and human preferences to an aligned chat model.\n\n"
    "The stages in order: pretrain (optional), sft, reward, ppo, evaluate; 'run' chains them, 'classify' stands "
    "beside. Each takes a YAML file "
    "and key=value overrides:\n\n"
    "  rlhf run configs/demo/pipeline.yaml\n\n"
    "  rlhf ppo configs/demo/ppo.yaml kl.target=2.5 seed=2\n\n"
    "\b\n  accelerate launch --config_file configs/accelerate/ddp.yaml -m rlhf sft configs/demo/sft.yaml",
)  # fmt: skip

TemperatureOpt = Annotated[float, typer.Option(min=0.0, help="0 = always the likeliest token")]
NewTokensOpt = Annotated[int, typer.Option(min=1, help="longest reply, in tokens")]
INTERRUPTED = 130  # exit code after Ctrl-C, which typer uses too


def _stage(
    name: str, config: Path, overrides: list[str] | None, launcher: str | None, quiet: bool, as_json: bool
) -> None:
    from importlib import import_module

    from rlhf.config.load import load
    from rlhf.config.schema import STAGES

    loaded = load(STAGES[name], config, overrides or [])
    if launcher is not None:
        from rlhf.stages.launch import launch

        flags = [*(["--quiet"] if quiet else []), *(["--json"] if as_json else [])]
        raise typer.Exit(launch(launcher, [name, str(config), *(overrides or []), *flags]))
    import_module(f"rlhf.stages.{name}").run(loaded.config, console(quiet, as_json))


@app.command()
def pretrain(
    config: ConfigArg, overrides: OverridesArg = None, launcher: LauncherOpt = None, quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:  # fmt: skip
    """Make a small source model: tokenizer and next-token training on text."""
    _stage("pretrain", config, overrides, launcher, quiet, as_json)


@app.command()
def sft(
    config: ConfigArg, overrides: OverridesArg = None, launcher: LauncherOpt = None, quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:  # fmt: skip
    """Stage 1: supervised fine-tuning on demonstrations."""
    _stage("sft", config, overrides, launcher, quiet, as_json)


@app.command()
def reward(
    config: ConfigArg, overrides: OverridesArg = None, launcher: LauncherOpt = None, quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:  # fmt: skip
    """Stage 2: a reward model on preference pairs, started from the SFT model."""
    _stage("reward", config, overrides, launcher, quiet, as_json)


@app.command()
def classify(
    config: ConfigArg, overrides: OverridesArg = None, launcher: LauncherOpt = None, quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:  # fmt: skip
    """A classifier with any labels, on any causal LM; a label's probability can be a reward of PPO."""
    _stage("classify", config, overrides, launcher, quiet, as_json)


@app.command()
def ppo(
    config: ConfigArg, overrides: OverridesArg = None, launcher: LauncherOpt = None, quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:  # fmt: skip
    """Stage 3: PPO against the reward model, kept near the SFT model."""
    _stage("ppo", config, overrides, launcher, quiet, as_json)


@app.command()
def evaluate(
    config: ConfigArg, overrides: OverridesArg = None, launcher: LauncherOpt = None, quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:  # fmt: skip
    """Compare models on held-out prompts: win rate with its interval, KL, length, perplexity; writes report.html."""
    _stage("evaluate", config, overrides, launcher, quiet, as_json)


@app.command()
def run(config: ConfigArg, overrides: OverridesArg = None, quiet: QuietOpt = False, as_json: JsonOpt = False) -> None:
    """All stages in order. Finished stages are skipped, an interrupted one continues.

    Overrides start with the stage: ppo.kl.target=2.5, pretrain.enabled=true, sft.launcher=ddp, seed=2.
    """
    from rlhf.config.load import load_pipeline

    pipeline = load_pipeline(config, overrides or [])
    from rlhf.stages.pipeline import run as run_pipeline

    run_pipeline(pipeline, console(quiet, as_json))


@app.command()
def show(
    config: ConfigArg, overrides: OverridesArg = None,
    stage: Annotated[str | None, typer.Option(help="which stage's file it is; default: the file's name")] = None,
) -> None:  # fmt: skip
    """Print every value of a configuration with its origin (default, file:line, command line) and meaning."""
    from rlhf.config.load import load
    from rlhf.config.schema import RECIPES
    from rlhf.config.show import lines

    name = stage or config.stem
    if name not in RECIPES:
        raise ConfigError(f"no stage called '{name}'", where=str(config), do=f"give --stage: {', '.join(RECIPES)}")
    for line in lines(load(RECIPES[name], config, overrides or [])):
        typer.echo(line)


@app.command()
def bench(
    config: ConfigArg, overrides: OverridesArg = None,
    steps: Annotated[int, typer.Option(min=1, help="steps that are measured, after one to warm up")] = 3,
    quiet: QuietOpt = False, as_json: JsonOpt = False,
) -> None:  # fmt: skip
    """Measure PPO on this machine, phase by phase, beside what the machine could do. Takes a ppo file."""
    from rlhf.config.load import load
    from rlhf.config.schema import PPOConfig

    loaded = load(PPOConfig, config, overrides or [])
    from rlhf.stages.bench import bench as run_bench

    run_bench(loaded.config, console(quiet, as_json), steps=steps)


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="run directory of a ppo stage")],
    step: Annotated[int | None, typer.Option(help="which step; default: the last one written")] = None,
    row: Annotated[int | None, typer.Option(help="which response of the step; default: all that were written")] = None,
    paint: Annotated[str, typer.Option(help="logprob, kl, value, advantage or reward")] = "advantage",
    as_json: JsonOpt = False,
) -> None:
    """Paint the tokens of a PPO rollout by one of their numbers, and list all of them."""
    from rlhf.runs.inspect import inspect as run_inspect

    run_inspect(run, console(False, as_json), step=step, row=row, paint=paint)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run directories of evaluate stages, or of pipelines")],
    output: Annotated[Path | None, typer.Option(help="HTML page to write, with all runs in one picture")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Several evaluations side by side, such as the seeds of one experiment: each, their mean and the worst."""
    from rlhf.runs.compare import compare as run_compare

    run_compare(runs, console(False, as_json), output=output)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="run directory, model folder or hub id")],
    temperature: TemperatureOpt = 0.7,
    max_new_tokens: NewTokensOpt = 128,
    seed: Annotated[int, typer.Option(help="seed of the replies")] = 1,
) -> None:
    """Talk to a model in the terminal. Empty line or Ctrl-D ends; /new starts over."""
    from rlhf.stages.generate import chat as run_chat

    run_chat(model, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="run directory, model folder or hub id")],
    prompts: Annotated[str, typer.Argument(help="file of prompts (any format that PPO reads)")],
    output: Annotated[Path, typer.Argument(help="JSONL file to write; must not exist")],
    temperature: TemperatureOpt = 0.7,
    max_new_tokens: NewTokensOpt = 128,
    seed: Annotated[int, typer.Option(help="seed of the replies")] = 1,
    quiet: QuietOpt = False,
) -> None:
    """Answer a file of prompts."""
    from rlhf.stages.generate import generate as run_generate

    run_generate(
        model, prompts, output, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed,
        console=console(quiet, False),
    )  # fmt: skip


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="run directory or model folder of an adapter (peft.method lora, ia3)")],
    output: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    quiet: QuietOpt = False,
) -> None:
    """Fold an adapter into its base: plain float32 weights that transformers loads without peft.

    For serving, or to train all weights from there. Tokenizer, hand-over record, end token and, of a reward model or
    classifier, its head come along. The folder appears only after the written model has been loaded again and has given
    the adapter's logits.

      rlhf merge runs/lora/3-ppo runs/lora/assistant
    """
    from rlhf.stages.merge import merge as run_merge

    run_merge(adapter, output, console(quiet, False))


@app.command()
def rate(
    model: Annotated[str, typer.Argument(help="run directory, model folder or hub id")],
    output: Annotated[Path, typer.Argument(help="JSONL file of comparisons to write; must not exist")],
    rows: Annotated[int, typer.Option(min=1, help="prompts to ask, twice each")] = 16000,
    max_new_tokens: NewTokensOpt = 48,
    seed: Annotated[int, typer.Option(help="seed of prompts, replies and labels")] = 1,
    quiet: QuietOpt = False,
) -> None:
    """Have the demo world's simulated rater compare a model's own replies: pairs for the next reward model."""
    from rlhf.stages.rate import rate as run_rate

    run_rate(model, output, rows=rows, max_new_tokens=max_new_tokens, seed=seed, console=console(quiet, False))


app.add_typer(data)


def main() -> None:
    """Entry point: errors a user can cause become one message and a non-zero exit code."""
    stop.listen()
    try:
        app(prog_name="rlhf")  # says and exits by itself on a wrong command or option
    except RLHFError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(stop.say_end("interrupted", INTERRUPTED))
    except SystemExit as end:
        if isinstance(end, stop.Stopped):
            stop.say_end("stopped by SIGTERM" + (f", saved {end.saved}" if end.saved else ""), stop.STOPPED)
        elif end.code == INTERRUPTED:
            stop.say_end("interrupted", INTERRUPTED)
        raise
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if error.errno not in stop.DISK:
            raise
        typer.echo(f"CheckpointError: {error.filename or 'output_dir'}: the disk does not take more: {error}", err=True)
        sys.exit(2)


__all__ = ["__version__", "app", "main"]
