"""What the stages on a transformers Trainer share: arguments, progress and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

from rlhf.checkpointing.parameters_and_adam import load_parameters_and_adam, save_parameters_and_adam
from rlhf.config.run_plan import SupervisedPlan
from rlhf.config.sections import Optim
from rlhf.console import Bar
from rlhf.distributed.engine import trainer_arguments
from rlhf.distributed.heartbeat import report_progress
from rlhf.runs.metrics import METRICS, MetricsWriter, read_jsonl, round_metric
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.phase_schedule import PhaseSchedule

SCHEDULER_FILE = "scheduler.pt"
METRIC_NAMES = {"num_tokens": "tokens", "mean_token_accuracy": "token_accuracy"}


class LengthGroupedSampler(Sampler[int]):
    """Shuffled rows, but an update's batch holds rows of like length: less padding.

    The order follows from seed and epoch alone: it is the same for any number of processes and after a resume, which
    the library's own grouping is not. The last batch of an epoch is filled up with other rows of that epoch, drawn at
    random: an update of one or two rows would count as much as any other, and a part of a batch could not be shared
    out among processes.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, *, pool: int = 50) -> None:
        """`pool` batches are sorted together; with 1, a batch holds any rows."""
        self.lengths, self.batch_size, self.seed, self.epoch = torch.tensor(lengths), batch_size, seed, 0
        self.pool = pool

    def set_epoch(self, epoch: int) -> None:
        """Another order; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches: list[torch.Tensor] = []
        order = torch.randperm(len(self.lengths), generator=generator)
        for pool in order.split(self.pool * self.batch_size):
            batches += pool[self.lengths[pool].argsort(descending=True, stable=True)].split(self.batch_size)
        whole = len(order) // self.batch_size
        for i in torch.randperm(whole, generator=generator).tolist():
            yield from batches[i].tolist()
        for last in batches[whole:]:
            filled = torch.cat([last, order[~torch.isin(order, last)]])
            yield from filled.repeat(-(-self.batch_size // len(order)))[: self.batch_size].tolist()


class SamplerEpochCallback(TrainerCallback):
    """Tells the sampler which epoch begins. The library's own way there is blocked where it skips batches of a shard:
    several processes that resume inside an epoch would draw the first one again."""

    def __init__(self, sampler: LengthGroupedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before its first batch is drawn."""
        self.sampler.set_epoch(math.floor((state.epoch or 0.0) + 1e-6))


class OverridingTrainer:
    """What this package does otherwise than the Trainers of transformers and TRL; put it before one of them.

    All overriding of their internals is here, as methods that a test holds against the installed releases. A method
    does what the library does until `order_rows`, `attach_phases`, `CheckpointCallback.attach` or `by_name` has set the
    attribute that it reads.
    """

    row_order: LengthGroupedSampler | None = None  # of the training rows
    phases: Any = None  # `PhaseCallback`: makes the optimizer's groups and their learning rates
    checkpoints: Any = None  # `CheckpointCallback`: guards the writing of a checkpoint
    saved_names: frozenset[str] | None = None  # parameters that are saved by name, with their Adam state
    columns: tuple[str, ...] | None = None  # of the data set, as the collator needs them

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Draw training rows in `row_order`."""
        if self.row_order is None:
            return super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        return self.row_order

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the collator needs."""
        if self.columns is None:
            super()._set_signature_columns_if_needed()  # type: ignore[misc]
        else:
            self._signature_columns = list(self.columns)

    def create_optimizer(self: Any, model: Any = None) -> Any:
        """Make the optimizer, with the groups of `phases`."""
        if self.phases is None:
            return super().create_optimizer(model)  # type: ignore[misc]
        if self.optimizer is None:
            of = model if model is not None else self.model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, of)
            decays = frozenset(self.get_decay_parameter_names(of))
            groups = self.phases.optimizer_groups(of, decays, self.args.weight_decay)
            self.optimizer = kind(groups, **options | {"lr": 1.0})
        return self.optimizer

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning-rate schedule, which follows `phases`."""
        if self.phases is None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if self.lr_scheduler is None:
            self.lr_scheduler = self.phases.scheduler(optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint; none is left half-written, and a full disk is reported before it is full."""
        with nullcontext() if self.checkpoints is None else self.checkpoints.writing(self.state.global_step):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        """Write what is trained and its Adam state by parameter name, in files that any engine reads."""
        if self.saved_names is None:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        main = self.accelerator.is_main_process
        save_parameters_and_adam(Path(output_dir) if main else None, self.saved_parameters(), self.optimizer)
        if main:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        """Restore what `_save_optimizer_and_scheduler` wrote."""
        if self.saved_names is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        elif checkpoint is not None:
            if not self.is_deepspeed_enabled:  # else it has been done, with the engine's weights
                self.load_saved_parameters(checkpoint)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))

    def saved_parameters(self: Any) -> dict[str, Any]:
        """Return the parameters that are saved by name."""
        return {name: p for name, p in self.model.named_parameters() if name in self.saved_names}

    def load_saved_parameters(self: Any, folder: str) -> None:
        """Restore parameters and Adam state from a checkpoint's folder."""
        load_parameters_and_adam(Path(folder), self.saved_parameters(), self.optimizer)

    def inputs_on_device(self: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch on the device of this process."""
        moved: dict[str, Any] = self._prepare_inputs(inputs)
        return moved


def order_rows(trainer: Any, lengths: Sequence[int], *, pool: int = 50) -> None:
    """Make a Trainer draw its training rows, whose lengths are given, in the order of `LengthGroupedSampler`."""
    args = trainer.args
    size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trainer.row_order = LengthGroupedSampler(lengths, size, args.seed, pool=pool)
    trainer.add_callback(SamplerEpochCallback(trainer.row_order))


def training_arguments(
    optim: Optim,
    run: RunDir,
    *,
    seed: int,
    processes: int,
    program: PhaseSchedule,
    evaluate: bool,
    evaluations: int = 5,
) -> dict[str, Any]:
    """Keyword arguments of a TrainingArguments subclass; learning rates are the program's (`phase_callback`).

    Evaluations and checkpoints fall together, `evaluations` times over the run. With patience the best weights among
    the last phase's evaluations are restored at the end.
    """
    plan, updates = SupervisedPlan(optim, processes, 0), program.updates
    every = max(1, math.ceil(updates / evaluations))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return (best if any(stretch.patience for stretch in program.stretches) else {}) | {
        "output_dir": str(run.checkpoints),
        "seed": seed,
        "data_seed": seed,
        "learning_rate": optim.learning_rate,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.adam_beta1,
        "adam_beta2": optim.adam_beta2,
        "adam_epsilon": optim.adam_eps,
        "max_grad_norm": optim.max_grad_norm,
        "max_steps": updates,
        "per_device_train_batch_size": plan.microbatch,
        "per_device_eval_batch_size": plan.microbatch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_checkpointing": optim.activation_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": max(1, updates // 100),
        "logging_first_step": True,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": None,  # checkpoint_callback removes the old ones, and only when the new one is whole
        # Weights that wait for their phase take no gradient, which every process has to know.
        **({"ddp_find_unused_parameters": True} if len(program.stretches) > 1 else {}),
        **trainer_arguments(optim.precision),
    }


class MetricsCallback(TrainerCallback):
    """Carries a Trainer's log lines to metrics.jsonl and the progress bar."""

    def __init__(
        self,
        writer: MetricsWriter,
        bar: Bar,
        shown: tuple[str, ...],
        *,
        tokens: float = 0.0,
        losses: Sequence[float] = (),
    ) -> None:
        """Report to `writer` and `bar`.

        Args:
            shown: names shown on the bar.
            tokens: trained on before the checkpoint that this run continues from; the library counts from there.
            losses: written since the last evaluation before that checkpoint.
        """
        self.writer, self.bar, self.shown, self.tokens = writer, bar, shown, tokens
        self._numbers: dict[str, float] = {}
        self._losses = list(losses)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Write the declared numbers of a log line."""
        renamed = {METRIC_NAMES.get(k, k): v for k, v in (logs or {}).items()}
        values = {k: float(v) for k, v in renamed.items() if k in METRICS and isinstance(v, int | float)}
        if "tokens" in values:
            values["tokens"] += self.tokens
        self._losses += [round_metric(values["loss"])] if "loss" in values else []
        if "eval_loss" in values and self._losses:
            values["gap"] = values["eval_loss"] - sum(self._losses) / len(self._losses)
            self._losses = []
        if values:
            self.writer.write(state.global_step, values)
            self._numbers.update({k: v for k, v in values.items() if k in self.shown})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar; a checkpoint's update is always logged, so that its numbers can be continued from."""
        control.should_log = control.should_log or control.should_save
        self.bar.update(state.global_step, self._numbers)
        report_progress(state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A held-out batch is work too."""
        report_progress()


def tokens_until(path: Path, step: int) -> float:
    """Tokens trained on up to an update, from metrics.jsonl."""
    lines = read_jsonl(path) if path.is_file() else iter(())
    return max((line.get("tokens", 0.0) for line in lines if line.get("step", 0) <= step), default=0.0)


def losses_since(path: Path, lines: int) -> list[float]:
    """Training losses after the last evaluation in the first lines of metrics.jsonl."""
    found: list[float] = []
    for line in list(read_jsonl(path) if path.is_file() else ())[:lines]:
        found = [] if "eval_loss" in line else [*found, line["loss"]] if "loss" in line else found
    return found


def remove_printer(trainer: Any) -> None:
    """Take off the callback that prints log lines as dictionaries: the bar shows what matters."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


class StopOnBadLoss(TrainerCallback):
    """Ends a run whose loss is not a number, before it overwrites good checkpoints."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Raise on a non-finite loss or gradient norm."""
        from rlhf.errors import TrainingError

        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if isinstance(value, int | float) and not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value}",
                    where=f"update {state.global_step}",
                    do="lower optim.learning_rate, or check the data",
                )
