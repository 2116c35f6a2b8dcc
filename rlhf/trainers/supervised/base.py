"""Parts that all stages on a transformers Trainer share: overridden methods, row order, arguments and metrics."""

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
from rlhf.models.quantization import quantized_layers
from rlhf.runs.memory_phase import phase
from rlhf.runs.metrics import METRICS, MetricsWriter, read_jsonl, round_metric
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.phase_schedule import PhaseSchedule

SCHEDULER_FILE = "scheduler.pt"
METRIC_NAMES = {"num_tokens": "tokens", "mean_token_accuracy": "token_accuracy"}


class LengthGroupedSampler(Sampler[int]):
    """Sampler that shuffles rows but puts rows of similar length into one update's batch, for less padding.

    The order depends only on seed and epoch, so it is the same for any number of processes and after a resume; the
    order of transformers' own length grouping is not. The last batch of an epoch is filled up with other rows of that
    epoch, drawn at random: an update of one or two rows would weigh as much as any other update, and an incomplete
    batch could not be divided among processes.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, *, pool: int = 50) -> None:
        """Prepare the sampler.

        Args:
            lengths: length of each row.
            batch_size: rows of one update, over all processes.
            seed: seed of the order.
            pool: number of batches that are sorted by length together; 1 = no grouping by length.
        """
        self.lengths, self.batch_size, self.seed, self.epoch = torch.tensor(lengths), batch_size, seed, 0
        self.pool = pool

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch. Called by `SamplerEpochCallback` and by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches: list[torch.Tensor] = []
        order = torch.randperm(len(self.lengths), generator=generator)
        for pool in order.split(self.pool * self.batch_size):
            batches += pool[self.lengths[pool].argsort(descending=True, stable=True)].split(self.batch_size)
        full = len(order) // self.batch_size
        for i in torch.randperm(full, generator=generator).tolist():
            yield from batches[i].tolist()
        for last in batches[full:]:
            filled = torch.cat([last, order[~torch.isin(order, last)]])
            yield from filled.repeat(-(-self.batch_size // len(order)))[: self.batch_size].tolist()


class SamplerEpochCallback(TrainerCallback):
    """Sets the sampler's epoch when an epoch begins.

    transformers does not reach the sampler when it skips batches of a sharded data loader, so several processes that
    resume inside an epoch would otherwise use the order of the first epoch again.
    """

    def __init__(self, sampler: LengthGroupedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the epoch before its first batch is drawn."""
        self.sampler.set_epoch(math.floor((state.epoch or 0.0) + 1e-6))


class OverridingTrainer:
    """Mixin with all methods in which this package overrides the Trainers of transformers and TRL.

    It must come before the Trainer among the base classes. A test compares the overridden methods with the installed
    releases. Each method behaves like the library's own until `order_rows`, `attach_phases`,
    `CheckpointCallback.attach` or `save_by_parameter_name` has set the attribute that it reads.
    """

    row_order: LengthGroupedSampler | None = None  # order of the training rows
    phase_callback: Any = None  # `PhaseCallback`: makes the optimizer's groups and their learning rates
    checkpoints: Any = None  # `CheckpointCallback`: wraps the writing of a checkpoint
    saved_names: frozenset[str] | None = None  # parameters that are saved by name, with their Adam state
    columns: tuple[str, ...] | None = None  # columns of the data set that the collator needs

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the dtype of the trained weights on a quantized base; TRL would cast them to bfloat16.

        bfloat16 weights lose small AdamW updates, and a score head must compute in float32.
        """
        quantized = any(True for _ in quantized_layers(model))
        trained = [(p, p.data) for p in model.parameters() if quantized and p.requires_grad]
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        for parameter, data in trained:
            parameter.data = data.to(parameter.device)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Return `row_order` as the sampler of training rows."""
        if self.row_order is None:
            return super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        return self.row_order

    def _set_signature_columns_if_needed(self) -> None:
        """Make the Trainer keep the columns that the collator needs."""
        if self.columns is None:
            super()._set_signature_columns_if_needed()  # type: ignore[misc]
        else:
            self._signature_columns = list(self.columns)

    def create_optimizer(self: Any, model: Any = None) -> Any:
        """Create the optimizer with the parameter groups of `phase_callback`."""
        if self.phase_callback is None:
            return super().create_optimizer(model)  # type: ignore[misc]
        if self.optimizer is None:
            target = model if model is not None else self.model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            decays = frozenset(self.get_decay_parameter_names(target))
            groups = self.phase_callback.optimizer_groups(target, decays, self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **options | {"lr": 1.0})
        return self.optimizer

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the learning-rate scheduler, which follows `phase_callback`."""
        if self.phase_callback is None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if self.lr_scheduler is None:
            self.lr_scheduler = self.phase_callback.scheduler(optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; if memory runs out, the message names this phase."""
        with phase("evaluating"):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)  # type: ignore[misc]
        return metrics

    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint inside `CheckpointCallback.writing`, which checks disk space and removes partial files."""
        with nullcontext() if self.checkpoints is None else self.checkpoints.writing(self.state.global_step):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        """Write trained parameters and Adam state by parameter name, readable by any engine, and the scheduler."""
        if self.saved_names is None:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        main = self.accelerator.is_main_process
        save_parameters_and_adam(Path(output_dir) if main else None, self.saved_parameters(), self.optimizer)
        if main:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        """Restore the files that `_save_optimizer_and_scheduler` wrote."""
        if self.saved_names is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        elif checkpoint is not None:
            if not self.is_deepspeed_enabled:  # DeepSpeed has already restored them, with the engine's weights
                self.load_saved_parameters(checkpoint)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))

    def saved_parameters(self: Any) -> dict[str, Any]:
        """Return the parameters that are saved by name."""
        return {name: p for name, p in self.model.named_parameters() if name in self.saved_names}

    def load_saved_parameters(self: Any, folder: str) -> None:
        """Restore trained parameters and Adam state from a checkpoint's folder."""
        load_parameters_and_adam(Path(folder), self.saved_parameters(), self.optimizer)

    def inputs_on_device(self: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch on the device of this process."""
        moved: dict[str, Any] = self._prepare_inputs(inputs)
        return moved


def order_rows(trainer: Any, lengths: Sequence[int], *, pool: int = 50) -> None:
    """Make a Trainer draw its training rows in the order of a `LengthGroupedSampler`.

    Args:
        lengths: length of each training row.
        pool: number of batches that are sorted by length together; 1 = no grouping by length.
    """
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
    schedule: PhaseSchedule,
    evaluate: bool,
    evaluations: int = 5,
) -> dict[str, Any]:
    """Return keyword arguments for a subclass of TrainingArguments.

    Learning rates during training come from the phase schedule (`phase_callback`). Evaluations and checkpoints happen
    at the same updates, `evaluations` times in the run. With patience, the best checkpoint of the last phase is
    restored at the end.
    """
    plan, updates = SupervisedPlan(optim, processes, 0), schedule.updates
    every = max(1, math.ceil(updates / evaluations))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return (best if any(phase.patience for phase in schedule.phases) else {}) | {
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
        "save_total_limit": None,  # checkpoint_callback removes old ones, after the new one is complete
        # Parameters outside their phase receive no gradient; DDP must be told.
        **({"ddp_find_unused_parameters": True} if len(schedule.phases) > 1 else {}),
        **trainer_arguments(optim.precision),
    }


class MetricsCallback(TrainerCallback):
    """Writes a Trainer's log lines to metrics.jsonl and the progress bar."""

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
            writer: writes metrics.jsonl.
            bar: the progress bar.
            shown: names of the metrics on the bar.
            tokens: tokens trained on before the checkpoint that this run continues from; the Trainer counts from 0.
            losses: training losses between the last evaluation before that checkpoint and the checkpoint.
        """
        self.writer, self.bar, self.shown, self.tokens = writer, bar, shown, tokens
        self._numbers: dict[str, float] = {}
        self._losses = list(losses)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Write those numbers of a log line that `runs.metrics` declares."""
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
        """Advance the bar. The update of a checkpoint is always logged, so that a resumed run continues its metrics."""
        control.should_log = control.should_log or control.should_save
        self.bar.update(state.global_step, self._numbers)
        report_progress(state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report progress to the supervisor during evaluations too."""
        report_progress()


def tokens_until(path: Path, step: int) -> float:
    """Return the number of tokens trained on up to an update, from metrics.jsonl."""
    lines = read_jsonl(path) if path.is_file() else iter(())
    return max((line.get("tokens", 0.0) for line in lines if line.get("step", 0) <= step), default=0.0)


def losses_since(path: Path, lines: int) -> list[float]:
    """Return the training losses after the last evaluation within the first `lines` lines of metrics.jsonl."""
    losses: list[float] = []
    for line in list(read_jsonl(path) if path.is_file() else ())[:lines]:
        losses = [] if "eval_loss" in line else [*losses, line["loss"]] if "loss" in line else losses
    return losses


def remove_printer(trainer: Any) -> None:
    """Remove the callback that prints log lines as dictionaries; the progress bar replaces it."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


class StopOnBadLoss(TrainerCallback):
    """Ends a run whose loss or gradient norm is not finite, before it replaces good checkpoints."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Check a log line. Raises: TrainingError for a loss or gradient norm that is not finite."""
        from rlhf.errors import TrainingError

        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if isinstance(value, int | float) and not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value}",
                    where=f"update {state.global_step}",
                    do="lower optim.learning_rate, or check the data",
                )
