"""Loading of the data of a forgetting probe, with the same settings as the stage's own records."""

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
    """Return the data of the configured probe, or None if none is configured.

    Args:
        config: configuration of the stage, with its `probe` section.
        data: data settings of the stage.
        source: the model that training starts from.
        renderer: renders and tokenizes records.
        console: where notes are printed.
        kind: kind of record that the stage trains on.
        evaluate: whether there are held-out records.
        render: function from records to rows of the trainer.
        scorer: whether the trained model has another output layer than its source.
    Raises: ConfigError without held-out records; CheckpointError if `stop_above` is set and the source has no output
        layer to compute the text's loss with.
    """
    wanted = config.probe
    if not (wanted.text or wanted.ood):
        return None
    if not evaluate:
        raise ConfigError(
            "a probe is measured at each evaluation, and there are no held-out records to evaluate",
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
                "the loss of the probe's text needs the source model's output layer, and it has none",
                where=source.path,
                do="start from a causal LM, or leave probe.stop_above empty",
            )
        console.note(
            "probe: the source model has no output layer to compute the text's loss with; only the change of hidden "
            "states is measured"
        )
    return ProbeData(text, not scorer, output, ood, renderer.pad_id, wanted.stop_above)


def output_weight(source: ModelSource) -> torch.Tensor | None:
    """Return a copy of a causal LM's output layer, [V, H]; None for a model that is no causal LM."""
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
