"""`rlhf check`: check configuration, data, models and memory before a run; nothing is trained or written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.config.load import load_pipeline, load_stage_config
from rlhf.config.run_plan import PPOPlan, SupervisedPlan, count_processes
from rlhf.config.schema import STAGES, FineTuningStage, PPOConfig, StageConfig
from rlhf.config.sections import quantized_sources
from rlhf.console import Console
from rlhf.errors import CheckpointError, ConfigError, DataError, RLHFError, ShapeError
from rlhf.models.load import check_context, resolve_model
from rlhf.models.quantization import check_quantization
from rlhf.preflight import memory_formulas
from rlhf.preflight.data_audit import DataAudit, audit_data
from rlhf.preflight.memory_formulas import QUANTIZED_BITS, Sharding, format_bytes
from rlhf.preflight.model_shapes import (
    NO_ADAPTER,
    ModelShape,
    PlannedModel,
    PPOModelShapes,
    base_weights,
    expected_reply_tokens,
    reward_sources,
)
from rlhf.preflight.stage_inputs import data_profile, launch_sharding, model_shapes
from rlhf.preflight.stage_memory import DataProfile, EstimateInput, device_bytes, estimate_memory
from rlhf.preflight.suggestions import memory_suggestions, with_lora
from rlhf.rollout.reward_loading import same_tokenizer
from rlhf.stages import lifecycle

FAILS, WELL = 1, 0  # exit codes


@dataclass
class PreflightReport:
    """Conditions under which one stage is checked, and the problems that were found."""

    console: Console
    sharding: Sharding
    limit: float | None  # bytes of one device; None = unknown
    gpu: bool
    response_tokens: int | None = None  # mean length of PPO's responses, if known
    # The next two are by path of models that earlier stages of the pipeline will create.
    planned: dict[str, PlannedModel] = field(default_factory=dict)
    templates: dict[str, str | None] = field(default_factory=dict)  # chat template files
    problems: list[str] = field(default_factory=list)

    def add_problem(self, problem: str) -> None:
        """Record and print a problem because of which the stage would fail."""
        self.problems.append(problem)
        self.console.text(f"FAILS  {problem}")


def run_preflight(
    path: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    stage: str | None,
    launch: tuple[str | None, int | None, int | None],
    gpu_memory: str | None,
    response_tokens: int | None = None,
) -> int:
    """Check the configuration file of a stage or of a pipeline, and print what was found.

    Args:
        path: the file.
        overrides: `key=value` settings of the command line.
        console: where the results are printed.
        stage: stage that the file configures, or 'pipeline'; None = by the name of the file.
        launch: launcher, processes over all machines, machines.
        gpu_memory: memory of one device, such as 80G; None = that of this machine's GPU.
        response_tokens: mean length of PPO's responses. If None, the table shows the memory for the mean length in the
            policy's handover record, but responses of the maximum length must fit.
    Returns: 0 if no problems were found, else 1.
    Raises: ConfigError for an invalid configuration, launch or amount of memory.
    """
    limit = None
    if gpu_memory is not None:
        limit = memory_formulas.parse_bytes(gpu_memory)
        if limit is None:
            raise ConfigError(
                "expected an amount of memory", found=gpu_memory, where="--gpu-memory", do="give an amount such as 80G"
            )
    gpu = limit is not None or device_bytes() is not None
    jobs, notes = _jobs(path, overrides, stage)
    for note in notes:
        console.note(f"note: {note}")
    problems: list[str] = []
    planned: dict[str, PlannedModel] = {}
    templates: dict[str, str | None] = {}
    for name, config, pipeline_launcher in jobs:
        if name == "evaluate":
            console.note("evaluate: trains nothing, so it is not checked")
            continue
        sharding = launch_sharding(config, launch[0] or pipeline_launcher, *launch[1:])
        report = PreflightReport(console, sharding, limit or device_bytes(), gpu, response_tokens, planned, templates)
        console.title(f"{name} ({config.output_dir})")
        try:
            reply_tokens = _check_stage(report, name, config)
        except (DataError, CheckpointError, ShapeError) as error:
            report.add_problem(f"{type(error).__name__}: {error}")
            reply_tokens = None
        problems += report.problems
        _add_planned_model(planned, templates, name, config, reply_tokens)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    console.text(f"{count} found" if problems else "no problems found")
    return FAILS if problems else WELL


def _jobs(
    path: Path, overrides: Sequence[str], stage: str | None
) -> tuple[list[tuple[str, StageConfig, str | None]], tuple[str, ...]]:
    """Return the stages with their configurations and the launchers that a pipeline names for them, and the notes."""
    name = stage or next((s for s in (*STAGES, "pipeline") if path.stem == s or path.stem.startswith(f"{s}-")), None)
    if name == "pipeline":
        pipeline = load_pipeline(path, overrides)
        return [(s.name, s.loaded.config, s.launcher) for s in pipeline.stages], pipeline.notes
    if name not in STAGES or name == "evaluate":
        known = [s for s in (*STAGES, "pipeline") if s != "evaluate"]
        raise ConfigError(
            f"no stage that trains called '{name or path.stem}'",
            where=str(path),
            do=f"give --stage: {', '.join(known)}",
        )
    loaded = load_stage_config(STAGES[name], path, overrides)
    return [(name, loaded.config, None)], loaded.notes


def _add_planned_model(
    planned: dict[str, PlannedModel],
    templates: dict[str, str | None],
    name: str,
    config: Any,
    reply_tokens: float | None,
) -> None:
    """Record the model that a stage will create, since later stages may start from it."""
    source = getattr(config, "model", None) or getattr(config, "policy", None)
    model = PlannedModel(
        name, source, getattr(config, "architecture", None), getattr(config, "peft", NO_ADAPTER), reply_tokens
    )
    for path in (config.output_dir.rstrip("/"), f"{config.output_dir.rstrip('/')}/model"):
        planned[path] = model
        templates[path] = getattr(config, "chat_template", None) or templates.get(getattr(source, "path", ""))


def _check_stage(report: PreflightReport, name: str, config: Any) -> float | None:
    """Check one stage. Returns: the mean length of the replies in SFT's demonstrations; None for other stages."""
    console = report.console
    source = config.policy if name == "ppo" else getattr(config, "model", None)
    base = base_weights(source, report.planned)[0] if source is not None else None
    audits: tuple[DataAudit, DataAudit | None] | None = None
    renderer = None
    if source is not None and base is not None:
        start = source if Path(source.path).exists() else base
        template = getattr(config, "chat_template", None) or report.templates.get(source.path)
        tokenizer, renderer = lifecycle.open_tokenizer(start, console, template=lifecycle.read_template(template))
        console.note(
            f"tokens: {len(tokenizer)}; a response ends with {tokenizer.convert_ids_to_tokens(renderer.end_id)!r}"
        )
        audits = audit_data(name, config, renderer)
        for audit in audits:
            if audit is not None:
                audit.print(console, loss_and_end=name in ("sft", "reward"))
                for problem in audit.problems:
                    report.add_problem(problem)
    else:
        console.note("data: not checked, because the tokenizer does not exist yet; 'pretrain' will create it")
    shared_tokenizer = _check_tokenizers(report, config, renderer) if isinstance(config, PPOConfig) else True
    _check_quantization(report, config)
    models = model_shapes(name, config, report.planned, shared_tokenizer)
    _check_context_length(config, models)
    data = data_profile(config, audits[0] if audits else None)
    _print_run(config, data, report.sharding.processes, console)
    inputs = EstimateInput(name, config, models, data, report.sharding, report.gpu, report.response_tokens)
    _check_memory(report, inputs, expected_reply_tokens(config, report.planned), shared_tokenizer)
    return audits[0].reply_tokens if audits is not None and name == "sft" else None


def _check_quantization(report: PreflightReport, config: StageConfig) -> None:
    """Report a problem if the stage could not load its quantized models, and say what their memory is based on."""
    if not any(True for _ in quantized_sources(config)):
        return
    s = report.sharding
    try:
        check_quantization(config, None if s.zero < 3 else "DeepSpeed ZeRO-3" if s.deepspeed else "FSDP")
    except ConfigError as error:
        report.add_problem(f"ConfigError: {error}")
    report.console.note(
        f"quantize: {QUANTIZED_BITS:.3f} bits for each weight of the quantized linear layers; this was computed, and "
        "was not validated on a GPU"
    )


def _check_tokenizers(report: PreflightReport, config: PPOConfig, renderer: Any) -> bool:
    """Compare the tokenizers of PPO's reward models with the policy's, and print the results.

    Returns: whether the first reward model has the policy's tokenizer; True if there is none.
    """
    shared_tokenizer = True
    for i, source in enumerate(reward_sources(config)):
        if not Path(source.path).exists() and source.path in report.planned:
            report.console.note(
                f"tokenizers: {source.path} does not exist yet; it will have the tokenizer of the model it starts from"
            )
            continue
        if renderer is None:
            continue
        same = same_tokenizer(source, renderer)
        record = lifecycle.model_metadata.read_handover(resolve_model(source))
        result = "has a different tokenizer: responses will be decoded and tokenized again"
        if same:
            handover = "and a handover record" if record is not None else "but no handover record"
            result = f"has the policy's tokenizer, {handover}"
        report.console.note(f"tokenizers: {source.path} {result}")
        if i == 0:
            shared_tokenizer = same
        needed = config.ppo.normalize_scores == "stored" and source is config.reward_model
        if needed and (record is None or record.score_std is None):
            report.add_problem(
                f"{source.path}: no mean and standard deviation of its scores; train it with 'rlhf reward', or set "
                "ppo.normalize_scores=running or raw"
            )
    return shared_tokenizer


def _check_context_length(config: Any, models: ModelShape | PPOModelShapes) -> None:
    model = models.policy if isinstance(models, PPOModelShapes) else models
    context = getattr(model.config, "max_position_embeddings", None)
    if isinstance(config, PPOConfig):
        longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
        check_context(longest, context, "data.max_prompt_tokens + sampling.max_new_tokens")
    else:
        check_context(config.data.max_length, context, "data.max_length")


def _print_run(config: Any, data: DataProfile, processes: int, console: Console) -> None:
    """Print how batches are divided, and the numbers of steps, updates and tokens of the run."""
    if isinstance(config, PPOConfig):
        plan = PPOPlan(config.ppo, processes)
        console.text(f"{plan.describe()}, backward passes of {config.optim.microbatch_size} episodes")
        console.text(
            f"run: {config.ppo.steps} steps = {plan.episodes:,} episodes, {plan.updates:,} updates; at most "
            f"{plan.episodes * config.sampling.max_new_tokens:,} sampled tokens ({data.records:,} prompts, each "
            f"{plan.episodes / max(data.records, 1):.1f} times)"
        )
        return
    supervised = SupervisedPlan(config.optim, processes, data.rows_per_epoch(config) if data.records else 0)
    console.text(supervised.describe())
    if not data.records:
        return
    rows, per_epoch = supervised.rows, supervised.updates_per_epoch
    phases = config.unfreeze if isinstance(config, FineTuningStage) else ()
    if any(phase.train == "top-down" for phase in phases):
        console.text(f"run: {per_epoch:,} updates per epoch; a top-down phase repeats its length for each block")
        return
    updates, repeated = supervised.updates(phases), supervised.filled_rows
    tokens = data.tokens * updates / per_epoch
    packed = f" packed into {rows:,} sequences" if rows < data.records else ""
    filled = f", the last batch filled up with {repeated:,} of them" if repeated else ""
    console.text(
        f"run: {updates:,} updates ({updates / per_epoch:.2g} epochs of {data.records:,} records{packed}{filled}), "
        f"about {tokens:,.0f} tokens"
    )


def _check_memory(
    report: PreflightReport, inputs: EstimateInput, reply_tokens: int | None, shared_tokenizer: bool
) -> None:
    """Print the memory of the largest phase, and report a problem with a suggestion if the stage does not fit.

    Args:
        report: conditions of the check.
        inputs: the stage.
        reply_tokens: length of PPO's responses at the start, if known. The table shows the memory for it, unless the
            user gave a length; but responses may become longer, so the maximum length must fit.
        shared_tokenizer: whether the reward model has the policy's tokenizer.
    """
    limit, longest = report.limit, estimate_memory(inputs)
    from_record = reply_tokens is not None and inputs.response_tokens is None
    shown = estimate_memory(replace(inputs, response_tokens=reply_tokens)) if from_record else longest
    device = "GPU" if report.gpu else "process, in addition to imported libraries"
    rows = [
        [part.name, format_bytes(part.bytes), "host" if part.host and report.gpu else ""]
        for part in shown.phases[shown.largest_phase]
    ]
    rows.append([f"peak ({shown.largest_phase})", format_bytes(shown.peak), ""])
    if len(shown.phases) > 1:
        rows += [[f"  {phase}", format_bytes(shown.phase_bytes(phase)), ""] for phase in shown.phases]
    if from_record:
        rows.append(["peak if all responses reach the maximum length", format_bytes(longest.peak), ""])
    s = inputs.sharding
    sharding = f"ZeRO-{s.zero}" if s.deepspeed else "FSDP" if s.zero else "no sharding"
    passes = f"{'bfloat16' if inputs.bfloat16 else 'float32'} passes"
    report.console.table(
        f"Memory of each {device} ({count_processes(s.processes)}, {sharding}, {passes})",
        ["part", "bytes", ""],
        rows,
    )
    if from_record:
        report.console.note(
            f"the table assumes responses of {reply_tokens} tokens, the mean length recorded for the policy; the "
            f"maximum is {inputs.config.sampling.max_new_tokens} (--response-tokens sets another mean)"
        )
    if limit is None:
        return
    if longest.peak <= limit:
        report.console.text(f"fits: {format_bytes(longest.peak)} of {format_bytes(limit)}")
        return
    at_start = f" ({format_bytes(shown.peak)} at the start)" if from_record else ""
    report.add_problem(
        f"{inputs.stage} needs {format_bytes(longest.peak)}{at_start}, but the limit is {format_bytes(limit)}: "
        f"{_suggest_change(report, inputs, limit, shared_tokenizer)}"
    )


def _suggest_change(report: PreflightReport, inputs: EstimateInput, limit: float, shared_tokenizer: bool) -> str:
    """Return a text about the cheapest change with which the stage fits, or about the one that needs least memory."""
    smallest, smallest_change = math.inf, ""
    for change, changed in memory_suggestions(inputs):
        try:
            needed = estimate_memory(changed).peak
        except RLHFError:  # this number of processes cannot share the batch
            continue
        if needed <= limit:
            return f"the cheapest change that fits is {change} ({format_bytes(needed)})"
        if needed < smallest:
            smallest, smallest_change = needed, change
    config = with_lora(inputs.config)
    if config is not None:
        models = model_shapes(inputs.stage, config, report.planned, shared_tokenizer)
        needed = estimate_memory(replace(inputs, config=config, models=models)).peak
        if needed <= limit:
            return f"only adapters fit, which train other weights: peft.method=lora ({format_bytes(needed)})"
    if not smallest_change:
        return "no change that needs less memory was found"
    return f"no change fits; the smallest need is {format_bytes(smallest)} with {smallest_change}"
