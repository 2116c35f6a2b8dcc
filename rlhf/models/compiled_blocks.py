"""The blocks of a transformer compiled one by one, so that norms, activations and rotations run as few fused kernels.

Compiling a block takes seconds and serves all blocks, because they compute the same on other weights. It is compiled
again for every other shape of its input, so batches must come in few shapes (`PackedBatch.of(row_length=...)`).
"""

from __future__ import annotations

from typing import Any

from rlhf.distributed.library_internals import raise_recompile_limit
from rlhf.models.packed_batch import can_pack
from rlhf.models.parameter_selection import block_modules


def compile_blocks(model: Any) -> None:
    """Compile the blocks of a causal language model or scorer in place; they compile when they run first.

    Whether the model can be packed is found out before, because that runs it on other shapes.
    """
    can_pack(model)
    raise_recompile_limit()
    for block in block_modules(model):
        block.compile(dynamic=False)
