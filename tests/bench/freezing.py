"""What freezing the lower half of the blocks saves of an SFT step: time, and bytes that autograd keeps.

    python -m tests.bench.freezing

Both sides in turn, in one process, on one batch: forward, backward, clip, AdamW step. `embeddings` names what else is
frozen: with the embeddings trained, the lower blocks keep their activations and most of the saving is gone.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from rlhf.config.schema import Architecture
from rlhf.config.tuning import Selection
from rlhf.models.parameter_selection import map_parameters, select_parameters
from rlhf.stages.pretrain import new_model
from tests.models import tiny

ROUNDS, ROWS, LENGTH = 7, 8, 256
SIDES = {
    "all weights": None,
    "lower half frozen": Selection(first="50%", parts=("embeddings",)),
    "lower half frozen, embeddings trained": Selection(first="50%"),
    "three quarters frozen": Selection(first="75%", parts=("embeddings",)),
}


def build(frozen: Selection | None) -> tuple[Any, Any]:
    """A model of 8 blocks, and its optimizer over what is trained."""
    torch.manual_seed(0)
    shape = Architecture(vocab_size=4096, hidden_size=384, layers=8, heads=6, intermediate_size=1024, context=LENGTH)
    model = new_model(shape, tiny.renderer(), 4096)
    if frozen is not None:
        of = map_parameters(model)
        for name in select_parameters(frozen, of, "freeze"):
            model.get_parameter(name).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4, fused=True)


def step(model: Any, optimizer: Any, ids: torch.Tensor) -> None:
    """One update."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def kept(model: Any, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    del loss
    return sum(found.values())


def main() -> None:
    """Print the table."""
    ids = torch.randint(10, 4000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    sides = {name: build(frozen) for name, frozen in SIDES.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, (model, optimizer) in sides.items():
            begun = time.perf_counter()
            step(model, optimizer, ids)
            if turn:
                times[name].append(time.perf_counter() - begun)
    first = next(iter(sides))
    print(f"{torch.get_num_threads()} threads; {ROWS} rows of {LENGTH} tokens; median of {ROUNDS} steps, in turn")
    print("| weights | s a step | faster | kept for backward, MiB | smaller |\n|---|---:|---:|---:|---:|")
    everything = kept(sides[first][0], ids)
    for name, (model, _) in sides.items():
        ratios = [a / b for a, b in zip(times[first], times[name], strict=True)]
        bytes_kept = kept(model, ids)
        print(
            f"| {name} | {statistics.median(times[name]):.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {bytes_kept / 2**20:.0f} | {everything / bytes_kept:.2f} |"
        )


if __name__ == "__main__":
    main()
