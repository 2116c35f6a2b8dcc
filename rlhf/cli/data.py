"""`rlhf data ...`: commands that generate the demo's data sets, and labels from votes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlhf.cli.options import ConfigArg, JsonOpt, OverridesArg, QuietOpt
from rlhf.cli.output import make_console, print_notes

data = typer.Typer(
    name="data",
    no_args_is_help=True,
    help="Generate the demo's data sets, or labels from the votes of rules, functions and annotators.\n\n"
    "\b\n  rlhf data demo\n  rlhf data weak configs/demo/experiments/weak.yaml output=labelled.jsonl",
)
FolderOpt = Annotated[
    Path | None,
    typer.Option(help="folder to write into; default: data/NAME; existing files of the same names are replaced"),
]
DataSeedOpt = Annotated[int, typer.Option(help="seed of the generator; 0 gives exactly the files that come with rlhf")]


def _generate(name: str, make: Callable[..., dict[str, int]], output: Path | None, seed: int) -> None:
    folder = output or Path("data") / name
    for file, count in make(folder, seed=seed).items():
        typer.echo(f"{folder / file}: {count} records")


@data.command("demo")
def data_demo(output: FolderOpt = None, seed: DataSeedOpt = 0) -> None:
    """Generate the data of the demo task: pretraining corpus, demonstrations, comparisons, prompts, evaluation.

    \b
      rlhf data demo --output my-demo --seed 1
    """
    from rlhf.demo.generate import generate as make

    _generate("demo", make, output, seed)


@data.command("rules")
def data_rules(output: FolderOpt = None, seed: DataSeedOpt = 0) -> None:
    """Generate comparisons judged by the answer alone, and replies labelled with the rules that they break.

    The second is training data for 'rlhf classify'.

    \b
      rlhf data rules
    """
    from rlhf.demo.rules import generate_rules as make

    _generate("rules", make, output, seed)


@data.command("features")
def data_features(output: FolderOpt = None, seed: DataSeedOpt = 0) -> None:
    """Generate two classification tasks: traits of replies, and a small task with an out-of-distribution test set.

    They are used to compare ways of fine-tuning with a new output layer.

    \b
      rlhf data features
    """
    from rlhf.demo.features import generate_features as make

    _generate("features", make, output, seed)


@data.command("annotators")
def data_annotators(output: FolderOpt = None, seed: DataSeedOpt = 0) -> None:
    """Generate pairs with the votes of six simulated annotators, and the true labels in separate files.

    \b
      rlhf data annotators
    """
    from rlhf.demo.annotators import generate_annotators as make

    _generate("annotators", make, output, seed)


@data.command("weak")
def data_weak(
    config: ConfigArg, overrides: OverridesArg = None, quiet: QuietOpt = False, as_json: JsonOpt = False
) -> None:
    """Label pairs or classes by the votes of functions, rules and annotators, weighed by their estimated accuracy.

    Writes a file for 'rlhf reward' (pairs) or 'rlhf classify' (classes), and prints a table of the sources.

    \b
      rlhf data weak configs/demo/experiments/weak.yaml output=labelled.jsonl
    """
    from rlhf.config.load import load_stage_config
    from rlhf.config.schema import WeakLabelConfig

    loaded = load_stage_config(WeakLabelConfig, config, overrides or [])
    from rlhf.labeling.weak_labels import make_weak_labels as run_weak

    console = make_console(quiet, as_json)
    print_notes(loaded.notes, console)
    run_weak(loaded.config, console)
