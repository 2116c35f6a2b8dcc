"""Decoding with buffers of fixed shape: each step is the same sequence of kernels, so that a CUDA graph can replay it.

A decode step of a small model is hundreds of tiny kernels, and launching them takes the CPU longer than running them
takes the GPU. Here nothing in a step depends on the host: keys and values, tokens, positions, random numbers and
finished flags are buffers, each slot writes to its own column, and the draw is part of the step. On a GPU the step is
captured once for each number of columns and replayed; elsewhere the same function runs as it is, as it is tested.

    column    0 1 2 3 4 5 6 7
    slot 0    p p p r r r . .      p prompt, r response so far, . masked
    slot 1    p p p p p p r r
    slot 2    p p r . . . . .      a prompt that took a finished one's place

The host looks at the finished flags every `STEPS_BETWEEN_CHECKS` steps. A slot that has finished in between repeats its
last step without effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from rlhf.config.sections import Sampling
from rlhf.data.collate import pad_right
from rlhf.distributed.library_internals import attention_implementation
from rlhf.generation.request import DecodingRequest
from rlhf.generation.response_buffers import ResponseBuffers
from rlhf.generation.sampling import allowed_tokens, draw_token
from rlhf.models.output_layer import next_token_logits
from rlhf.models.packed_batch import TOLERANCE
from rlhf.models.quantization import least_precise_dtype
from rlhf.rollout.types import Rollout

STEPS_BETWEEN_CHECKS = 8
"""Decode steps between two looks of the host at the finished flags."""
COLUMN_STEP = 128
"""Keys and values are read in multiples of so many columns; each multiple has a graph of its own."""
PREFILL_TOKENS = 2**15
"""Prompt tokens, padding included, of one forward pass that admits prompts."""


_can_decode: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_decode_statically(model: Any) -> bool:
    """Return whether a model decodes correctly here: tried once for each model, on two short prompts.

    It must cache plain keys and values in every layer, and take positions and a mask of four dimensions. Models with a
    sliding window, with a state along the row (Mamba) or with position biases made from the mask (BLOOM) do not.
    """
    if model not in _can_decode:
        _can_decode[model] = False  # also while it is tried
        if hasattr(model, "config"):
            layers = DynamicCache(config=model.config).layers
            kernel = attention_implementation(model)
            if layers and all(type(layer) is DynamicLayer for layer in layers) and kernel in ("sdpa", "eager"):
                _can_decode[model] = _decodes_correctly(model)
    return _can_decode[model]


@torch.no_grad()
def _decodes_correctly(model: Any) -> bool:
    """Compare two decode steps with forward passes over the whole sequences."""
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    rows = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [(0, rows[0][:6]), (1, rows[1][:3])]
    settings = Sampling(max_new_tokens=3, temperature=0.0, batch_size=2)
    try:
        request = DecodingRequest(prompts, settings, seed=0, step=0, end_id=-1, pad_id=0, device=device)
        rollout = StaticDecoder(model, request, graphs=False).run()
        logprobs = []
        for row, (_, prompt) in enumerate(prompts):
            ids = torch.tensor([[*prompt, *rollout.response_ids[row].tolist()]], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            logprobs.append(logits.log_softmax(-1).gather(1, rollout.response_ids[row][:, None]).squeeze(1))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever an architecture raises that cannot do it
        return False
    difference = (torch.stack(logprobs) - rollout.sampled_logprobs).abs().max()
    dtype = least_precise_dtype(model, next(model.parameters()).dtype)
    return bool(difference <= 4 * TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]))


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, columns, width], allocated with the first prompts."""

    is_compileable = True

    def __init__(self, owner: StaticCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers with the heads, width and dtype of the first keys and values."""
        shape = (self.owner.slots, key_states.shape[1], self.owner.columns)
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])  # what is masked must still be finite
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns. Prompts attend to themselves; a decode step attends to the columns in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.owner
        if cache.admitted is not None:
            self.keys[cache.admitted, :, : key_states.shape[2]] = key_states
            self.values[cache.admitted, :, : key_states.shape[2]] = value_states
            return key_states, value_states
        column = cache.position.view(-1, 1, 1, 1)
        self.keys.scatter_(2, column.expand_as(key_states), key_states.to(self.keys.dtype))
        self.values.scatter_(2, column.expand_as(value_states), value_states.to(self.values.dtype))
        return self.keys[:, :, : cache.in_use], self.values[:, :, : cache.in_use]

    def get_seq_length(self) -> int:
        """Return 0: positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (columns, the first of them) of a forward pass over prompts, the only one that needs a mask made."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Return the number of columns."""
        return self.owner.columns


class StaticCache(Cache):
    """Keys and values of a fixed number of slots.

    Attributes:
        position: [slots] int64, the column that each slot's next token is written to.
        in_use: number of columns that a decode step reads.
        admitted: slots that the prompts of this forward pass go to; None in a decode step.
    """

    def __init__(self, layers: int, slots: int, columns: int, device: torch.device) -> None:
        super().__init__(layers=[_Layer(self) for _ in range(layers)])
        self.slots, self.columns, self.in_use = slots, columns, columns
        self.position = torch.zeros(slots, dtype=torch.long, device=device)
        self.admitted: Tensor | None = None


class StaticDecoder:
    """Decodes the responses of one rollout in a fixed number of slots."""

    def __init__(self, model: Any, request: DecodingRequest, *, graphs: bool = True) -> None:
        """Allocate the buffers.

        Args:
            model: causal LM on the request's device, for which `can_decode_statically` holds.
            graphs: capture the decode step as CUDA graphs where the device is a GPU.
        """
        prompts, settings, device, pad_id = request.prompts, request.settings, request.device, request.pad_id
        self.model, self.request, self.prompts, self.settings = model, request, prompts, settings
        self.end_id, self.pad_id, self.device, self.stops = request.end_id, pad_id, device, request.stops
        self.pool = torch.cuda.graph_pool_handle() if graphs and device.type == "cuda" else None
        self.slots, self.length_limit = min(settings.batch_size, len(prompts)), settings.max_new_tokens
        longest = max(len(ids) for _, ids in prompts)
        self.columns = -(-(longest + self.length_limit) // COLUMN_STEP) * COLUMN_STEP
        layers = len(DynamicCache(config=model.config).layers)
        self.cache = StaticCache(layers, self.slots, self.columns, device)
        self.uniform = request.uniform_numbers()
        self.responses = ResponseBuffers.empty(len(prompts), settings, model, pad_id, device)
        self.live = ResponseBuffers.empty(self.slots, settings, model, pad_id, device)
        self.live.done.fill_(True)
        self.slot_uniform = torch.zeros(self.slots, self.length_limit, device=device)
        self.row_of_slot = [-1] * self.slots  # prompt that a slot decodes; -1 = none
        self.checked_length = [0] * self.slots  # response tokens in which no stop string was found
        self.graphs: dict[int, Callable[[], None]] = {}

    def run(self) -> Rollout:
        """Decode every prompt."""
        pending = sorted(range(len(self.prompts)), key=lambda row: len(self.prompts[row][1]))
        while True:
            free = [slot for slot, row in enumerate(self.row_of_slot) if row < 0]
            if pending and free:
                taken, pending = pending[: len(free)], pending[len(free) :]
                self._admit(taken, free[: len(taken)])
            elif len(free) == self.slots:
                return self._rollout()
            else:
                self._decode_some_steps()
            self._collect_finished()

    def _admit(self, rows: list[int], slots: list[int]) -> None:
        """Put prompts into free slots, and draw the first token of each."""
        size = max(1, PREFILL_TOKENS // max(len(self.prompts[row][1]) for row in rows))
        for start in range(0, len(rows), size):
            some, places = rows[start : start + size], slots[start : start + size]
            ids, mask = (t.to(self.device) for t in pad_right([self.prompts[row][1] for row in some], self.pad_id))
            lengths, place = mask.sum(dim=1), torch.tensor(places, device=self.device)
            self.cache.admitted = place
            inputs = {
                "input_ids": ids,
                "attention_mask": mask.long(),
                "position_ids": (mask.long().cumsum(dim=1) - 1).clamp_min(0),
                "past_key_values": self.cache,
                "use_cache": True,
            }
            last = torch.arange(len(some), device=self.device) * ids.shape[1] + lengths - 1
            logits = next_token_logits(self.model, inputs, last)
            self.cache.admitted = None
            self.live.clear(place, self.pad_id)
            self.slot_uniform[place] = self.uniform[torch.tensor(some, device=self.device)]
            self.cache.position[place] = lengths - 1  # of the last token that was read
            fresh = torch.zeros_like(self.live.done).index_fill_(0, place, True)
            self._draw(
                torch.zeros(self.slots, logits.shape[1], dtype=logits.dtype, device=self.device).index_copy_(
                    0, place, logits
                ),
                fresh,
            )
            for row, slot in zip(some, places, strict=True):
                self.row_of_slot[slot], self.checked_length[slot] = row, 0

    def _decode_some_steps(self) -> None:
        """Run the decode step a few times, on no more columns than they need."""
        furthest = int(self.cache.position.max()) + 1 + STEPS_BETWEEN_CHECKS
        self.cache.in_use = min(self.columns, -(-furthest // COLUMN_STEP) * COLUMN_STEP)
        step = self._step_function(self.cache.in_use)
        for _ in range(STEPS_BETWEEN_CHECKS):
            step()

    def _step_function(self, in_use: int) -> Callable[[], None]:
        """Return the decode step on so many columns; on a GPU a graph that was captured once."""
        if self.pool is None:
            return self._step
        if in_use not in self.graphs:
            self.graphs[in_use] = _capture(self._step, [*self.live.state(), self.cache.position], self.pool)
        return self.graphs[in_use]

    def _step(self) -> None:
        """Decode one token in every slot. Reads and writes buffers only, and never waits for the device."""
        columns = torch.arange(self.cache.in_use, device=self.device)
        output = self.model(
            input_ids=self.live.last[:, None],
            attention_mask=self._mask(columns <= self.cache.position[:, None]),
            position_ids=self.cache.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._draw(output.logits[:, -1], ~self.live.done)

    def _mask(self, visible: Tensor) -> Tensor:
        """Return the attention mask [slots, 1, 1, columns]: bool for sdpa, added to the scores for eager attention."""
        visible = visible[:, None, None, :]
        if attention_implementation(self.model) == "sdpa":
            return visible
        dtype = next(self.model.parameters()).dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    def _draw(self, logits: Tensor, active: Tensor) -> None:
        """Draw one token in the active slots; logits [slots, V], active [slots] bool."""
        live = self.live
        place = live.length.clamp_max(self.length_limit - 1)
        allowed = allowed_tokens(logits, self.settings, place, self.end_id)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        uniform = self.slot_uniform.gather(1, place[:, None]).squeeze(1)
        token, logprob = draw_token(logits, uniform, self.settings.temperature)
        live.write(place, token, logprob, allowed, active)
        self.cache.position.add_(active.long())
        live.finished.logical_or_(active & (token == self.end_id))
        live.done.copy_(live.finished | (live.length >= self.length_limit) | (live.done & ~active))

    def _collect_finished(self) -> None:
        """Move finished responses out of their slots."""
        self._apply_stop_strings()
        done = self.live.done.tolist()
        slots = [slot for slot, row in enumerate(self.row_of_slot) if row >= 0 and done[slot]]
        if not slots:
            return
        rows = torch.tensor([self.row_of_slot[slot] for slot in slots], device=self.device)
        self.responses.copy_rows(rows, self.live, torch.tensor(slots, device=self.device))
        for slot in slots:
            self.row_of_slot[slot] = -1
        self.live.done[torch.tensor(slots, device=self.device)] = True
        self.cache.position[torch.tensor(slots, device=self.device)] = 0

    def _apply_stop_strings(self) -> None:
        """End the responses that hold a stop string right after it, and drop what was drawn beyond it."""
        if self.stops is None:
            return
        lengths, finished = self.live.length.tolist(), self.live.finished.tolist()
        all_ids = self.live.ids.tolist()
        for slot, row in enumerate(self.row_of_slot):
            if row < 0:
                continue
            # The end token, if the response ended with it, is not searched: it would have come after the stop string.
            ids = all_ids[slot][: lengths[slot] - finished[slot]]
            stop = self.stops.find(ids, self.checked_length[slot])
            self.checked_length[slot] = len(ids)
            if stop is not None and stop < lengths[slot]:
                self.live.cut(slot, stop, self.pad_id)
            if stop is not None:
                self.live.finished[slot] = self.live.done[slot] = True

    def _rollout(self) -> Rollout:
        """Return all responses, cut to the longest."""
        ids, mask = self.request.padded_prompts()
        found, used = self.responses, int(self.responses.length.max())
        response_mask = torch.arange(used, device=self.device) < found.length[:, None]
        support = (
            found.support if found.support is not None else found.ids.new_zeros(*found.ids.shape, 0, dtype=torch.uint8)
        )
        return Rollout(
            ids,
            mask,
            found.ids[:, :used],
            response_mask,
            found.finished,
            self.request.prompt_numbers(),
            found.logprobs[:, :used],
            support[:, :used],
        )


def _capture(step: Callable[[], None], state: list[Tensor], pool: Any) -> Callable[[], None]:
    """Capture a function of buffers as a CUDA graph, and return what replays it.

    Kernels are chosen and workspaces allocated when they run for the first time, which must not happen in a capture: so
    the function runs first, and the state that it has changed is put back. The graphs of a decoder share the memory of
    their intermediate results (`pool`), because only one of them runs at a time.
    """
    kept = [buffer.clone() for buffer in state]
    cache_weights = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # or the graph would read casted weights that are freed after the capture
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    torch.set_autocast_cache_enabled(cache_weights)
    for buffer, before in zip(state, kept, strict=True):
        buffer.copy_(before)
    return graph.replay
