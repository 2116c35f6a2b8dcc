"""`rlhf data ...`: makes the embedded world's data, and labels out of votes. Thin, as `rlhf.cli.main`."""

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
    help="Make data: the embedded world's, and labels out of the votes of rules, functions and annotators.\n\n"
    "  rlhf data annotators\n\n"
    "  rlhf data weak configs/demo/experiments/weak.yaml output=labelled.jsonl",
)
FolderOpt = Annotated[
    Path | None, typer.Option(help="folder to write, data/NAME by default; files of the same names are replaced")
]
DataSeedOpt = Annotated[int, typer.Option(help="0 gives the shipped files byte for byte")]


def _embedded(name: str, make: Callable[..., dict[str, int]], output: Path | None, seed: int) -> None:
    folder = output or Path("data") / name
    for file, count in make(folder, seed=seed).items():
        typer.echo(f"{folder / file}: {count} records")


@data.command("demo")
def data_demo(output: FolderOpt = None, seed: DataSeedOpt = 0) -> None:
    """Regenerate the embedded world: corpus, demonstrations, comparisons, prompts, evaluation."""
    from rlhf.demo.generate import generate as make

    _embedded("demo", make, output, seed)


@data.command("rules")
def data_rules(output: FolderOpt = None, seed: DataSeedOpt = 0) -> None:
    """Comparisons by answer alone, and replies with the rules that they break."""
    from rlhf.demo.rules import generate_rules as make

    _embedded("rules", make, output, seed)


@data.command("features")
def data_features(output: FolderOpt = None, seed: DataSeedOpt = 0) -> None:
    """Replies with their traits, and a small, narrow task whose test set is not: what a new head is tried on."""
    from rlhf.demo.features import generate_features as make

    _embedded("features", make, output, seed)


@data.command("annotators")
def data_annotators(output: FolderOpt = None, seed: DataSeedOpt = 0) -> None:
    """Pairs with the votes of six simulated annotators of different skill, and the truth in files beside them."""
    from rlhf.demo.annotators import generate_annotators as make

    _embedded("annotators", make, output, seed)


@data.command("weak")
def data_weak(
    config: ConfigArg, overrides: OverridesArg = None, quiet: QuietOpt = False, as_json: JsonOpt = False
) -> None:
    """Label pairs or classes by votes: labelling functions, rules and noisy annotators, weighed by how right each is.

    Writes a file that 'rlhf reward' (pairs) or 'rlhf classify' (classes) reads, and prints a table of the sources.
    """
    from rlhf.config.load import load_stage_config
    from rlhf.config.schema import WeakLabelConfig

    loaded = load_stage_config(WeakLabelConfig, config, overrides or [])
    from rlhf.labeling.weak_labels import make_weak_labels as run_weak

    console = make_console(quiet, as_json)
    print_notes(loaded.notes, console)
    run_weak(loaded.config, console)
