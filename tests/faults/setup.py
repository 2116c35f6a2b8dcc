"""What the fault tests compare: everything that a run leaves behind and that time does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.stages.setup import metrics

MODELS = ("model", "value_model")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a saved model, by file and name."""
    return {f"{f.name}:{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def differences(run: Path, other: Path) -> list[str]:
    """Where two run directories differ: weights bit for bit, metrics and samples line for line."""
    found = []
    for name in MODELS:
        ours, theirs = weights(run / name), weights(other / name)
        if ours.keys() != theirs.keys():
            found.append(f"{name}: other tensors")
        found += [f"{name}/{key}" for key in ours.keys() & theirs.keys() if not torch.equal(ours[key], theirs[key])]
    for name in ("samples.jsonl", "results.json", "answers.jsonl"):
        texts = [(folder / name).read_bytes() if (folder / name).is_file() else None for folder in (run, other)]
        if texts[0] != texts[1]:
            found.append(name)
    if (other / "metrics.jsonl").is_file():
        ours, theirs = metrics(run), metrics(other)
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
            found.append(f"metrics.jsonl: {len(ours)} and {len(theirs)} lines, first other one {at}")
    facts: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    if facts["status"] != "finished":
        found.append(f"status {facts['status']}")
    return found


def checkpoints(run: Path) -> list[str]:
    """Names of the folders in checkpoints/."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
