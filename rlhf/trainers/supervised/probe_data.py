"""Loads what a probe reads, as the stage reads its own records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf.config.schema import FineTuningStage
from rlhf.config.sections import Data, ModelSource
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.render import Renderer
from rlhf.data.sources import load_records
from rlhf.errors import CheckpointError, ConfigError
from rlhf.models.load import is_adapter, resolve_model
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import saved_head
from rlhf.trainers.supervised.forgetting import ProbeData


def load_probe(
    config: FineTuningStage,
    data: Data,
    source: ModelSource,
    renderer: Renderer,
    console: Console,
    *,
    kind: Any,
    evaluate: bool,
    render: Callable[[Sequence[Any]], Sequence[Any]],
    scorer: bool,
) -> ProbeData | None:
    """What is read at each evaluation; None if nothing is.

    Args:
        kind: of record that the stage trains on; `render` makes rows of them.
        scorer: the model has another output layer than its source.
    Raises: ConfigError without held-out records, CheckpointError if the source has no output layer to read with.
    """
    wanted = config.probe
    if not (wanted.text or wanted.ood):
        return None
    if not evaluate:
        raise ConfigError(
            "a probe is read when held-out records are, and there are none",
            where="probe",
            do="set data.validation or data.validation_fraction",
        )
    options: dict[str, Any] = {"seed": config.seed, "on_bad_row": data.on_bad_row, "deduplicate": data.deduplicate}
    text: list[list[int]] = []
    if wanted.text:
        loaded = load_records("document", wanted.text, **options)
        text = [tokenize.tokenize_document(record, renderer).ids[: data.max_length] for record in loaded.records]
        console.note(f"probe: {len(text)} texts of the source domain")
    ood: Sequence[Any] = ()
    if wanted.ood:
        ood = render(load_records(kind, wanted.ood, **options).records)
        console.note(f"probe: {len(ood)} records of another distribution")
    output = output_weight(source) if scorer and text else None
    if scorer and text and output is None:
        if wanted.stop_above is not None:
            raise CheckpointError(
                "the probe's text is read with the source's output layer, and it has none",
                where=source.path,
                do="start from a causal LM, or leave probe.stop_above empty",
            )
        console.note("probe: the source has no output layer to read text with; how far its features move is measured")
    return ProbeData(text, not scorer, output, ood, renderer.pad_id, wanted.stop_above)


def output_weight(source: ModelSource) -> torch.Tensor | None:
    """[V, H]: a copy of a causal LM's output layer; None of a model that has another one."""
    from transformers import AutoConfig

    folder = resolve_model(source)
    if is_adapter(folder):
        if any(saved_head(folder)):
            return None
    elif not any(
        "CausalLM" in name or "LMHead" in name for name in AutoConfig.from_pretrained(folder).architectures or []
    ):
        return None
    weight: torch.Tensor = load_causal(source).get_output_embeddings().weight.detach().clone()
    return weight
