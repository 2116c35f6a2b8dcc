"""`rlhf check`: everything that can be known about a run before it starts. Trains nothing and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.config.load import load_pipeline, load_stage_config
from rlhf.config.run_plan import PPOPlan, SupervisedPlan, count_processes
from rlhf.config.schema import STAGES, FineTuningStage, PPOConfig, StageConfig
from rlhf.console import Console
from rlhf.errors import CheckpointError, ConfigError, DataError, RLHFError, ShapeError
from rlhf.launch.launcher import LaunchOptions, LaunchPlan, check_batch_shared, resolve_launch
from rlhf.models.load import check_context, resolve_model
from rlhf.preflight import memory_model
from rlhf.preflight.data_audit import DataAudit, audit_data
from rlhf.preflight.memory_estimate import DataProfile, EstimateInput, device_bytes, estimate_memory
from rlhf.preflight.memory_model import Sharding, format_bytes
from rlhf.preflight.model_shapes import (
    NO_ADAPTER,
    ModelShape,
    PlannedModel,
    PPOModelShapes,
    base_weights,
    expected_reply_tokens,
    ppo_model_shapes,
    reward_sources,
    trained_model_shape,
)
from rlhf.preflight.suggestions import memory_suggestions, with_lora
from rlhf.rollout.reward_loading import check_offload, same_tokenizer
from rlhf.stages import lifecycle

FAILS, WELL = 1, 0


@dataclass
class PreflightReport:
    """What is checked against what, and what was found."""

    console: Console
    sharding: Sharding
    limit: float | None  # bytes of one device
    gpu: bool
    response: int | None = None  # mean length of PPO's responses, if known
    planned: dict[str, PlannedModel] = field(
        default_factory=dict
    )  # models that earlier stages of the pipeline will make
    templates: dict[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def fails(self, problem: str) -> None:
        """Note something that would go wrong."""
        self.problems.append(problem)
        self.console.text(f"FAILS  {problem}")


def run_preflight(
    path: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    stage: str | None,
    how: tuple[str | None, int | None, int | None],
    gpu_memory: str | None,
    response: int | None = None,
) -> int:
    """Check a stage's file or a pipeline's. Returns 0 if all is well, else 1.

    Args:
        how: launcher, processes over all machines, machines.
        gpu_memory: of one device, such as 80G.
        response: mean tokens of PPO's responses, if known; else what the policy's hand-over record says is shown, and
            as long as they may be is what must fit.

    Raises: ConfigError for a configuration, a launch or an amount of memory that means nothing.
    """
    limit = None
    if gpu_memory is not None:
        limit = memory_model.parse_bytes(gpu_memory)
        if limit is None:
            raise ConfigError("expected an amount of memory", found=gpu_memory, where="--gpu-memory", do="e.g. 80G")
    gpu = limit is not None or device_bytes() is not None
    jobs = _jobs(path, overrides, stage)
    problems: list[str] = []
    planned: dict[str, PlannedModel] = {}
    templates: dict[str, str | None] = {}
    for name, config, own in jobs:
        if name == "evaluate":
            console.note("evaluate: trains nothing, so it is not checked")
            continue
        sharding = _sharding(name, config, how[0] or own, *how[1:])
        checkup = PreflightReport(console, sharding, limit or device_bytes(), gpu, response, planned, templates)
        console.title(f"{name} ({config.output_dir})")
        try:
            replies = _stage(checkup, name, config)
        except (DataError, CheckpointError, ShapeError) as error:
            checkup.fails(f"{type(error).__name__}: {error}")
            replies = None
        problems += checkup.problems
        _plan(planned, templates, name, config, replies)
    console.text("all is well" if not problems else f"{len(problems)} problem{'s' if len(problems) > 1 else ''}")
    return FAILS if problems else WELL


def _jobs(path: Path, overrides: Sequence[str], stage: str | None) -> list[tuple[str, StageConfig, str | None]]:
    """Stages, their configurations and the launchers that a pipeline names for them."""
    name = stage or next((s for s in (*STAGES, "pipeline") if path.stem == s or path.stem.startswith(f"{s}-")), None)
    if name == "pipeline":
        return [(s.name, s.loaded.config, s.launcher) for s in load_pipeline(path, overrides).stages]
    if name not in STAGES or name == "evaluate":
        known = [s for s in (*STAGES, "pipeline") if s != "evaluate"]
        raise ConfigError(
            f"no stage that trains called '{name or path.stem}'",
            where=str(path),
            do=f"give --stage: {', '.join(known)}",
        )
    return [(name, load_stage_config(STAGES[name], path, overrides).config, None)]


def _sharding(
    name: str, config: StageConfig, launcher: str | None, processes: int | None, machines: int | None
) -> Sharding:
    if launcher is None:
        number = processes or 1
        plan = LaunchPlan(Path(), {"distributed_type": "MULTI_GPU"}, number, 1, 0, None, None)
    else:
        address = "machine-0" if machines is None or machines > 1 else None  # any will do: nothing is started
        plan = resolve_launch(LaunchOptions(launcher, processes, machines, 0, address), {})
    check_batch_shared(config, plan.processes)
    return Sharding.of(plan.settings, plan.processes)


def _plan(
    planned: dict[str, PlannedModel], templates: dict[str, str | None], name: str, config: Any, replies: float | None
) -> None:
    """Remember the model that a stage makes: later stages may start from it."""
    source = getattr(config, "model", None) or getattr(config, "policy", None)
    made = PlannedModel(
        name, source, getattr(config, "architecture", None), getattr(config, "peft", NO_ADAPTER), replies
    )
    for path in (config.output_dir.rstrip("/"), f"{config.output_dir.rstrip('/')}/model"):
        planned[path] = made
        templates[path] = getattr(config, "chat_template", None) or templates.get(getattr(source, "path", ""))


def _stage(checkup: PreflightReport, name: str, config: Any) -> float | None:
    """Check one. Returns: mean tokens of what it teaches to say, if it is known."""
    console = checkup.console
    source = config.policy if name == "ppo" else getattr(config, "model", None)
    base = base_weights(source, checkup.planned)[0] if source is not None else None
    found: tuple[DataAudit, DataAudit | None] | None = None
    renderer = None
    if source is not None and base is not None:
        start = source if Path(source.path).exists() else base
        template = getattr(config, "chat_template", None) or checkup.templates.get(source.path)
        tokenizer, renderer = lifecycle.open_tokenizer(start, console, template=lifecycle.read_template(template))
        console.note(
            f"tokens: {len(tokenizer)}; a response ends with {tokenizer.convert_ids_to_tokens(renderer.end_id)!r}"
        )
        found = audit_data(name, config, renderer)
        for one in found:
            if one is not None:
                one.show(console, end_matters=name in ("sft", "reward"))
                for problem in one.problems:
                    checkup.fails(problem)
    else:
        console.note("data: not audited, since the tokenizer is yet to be made by 'pretrain'")
    fits = _pairing(checkup, config, renderer) if isinstance(config, PPOConfig) else True
    models = _models(checkup, name, config, fits)
    _lengths(config, models)
    load = _load(config, found[0] if found else None)
    _run(config, load, checkup.sharding.processes, console)
    case = EstimateInput(name, config, models, load, checkup.sharding, checkup.gpu, checkup.response)
    _memory(checkup, case, expected_reply_tokens(config, checkup.planned), fits)
    return found[0].reply_tokens if found is not None and name == "sft" else None


def _pairing(checkup: PreflightReport, config: PPOConfig, renderer: Any) -> bool:
    """Whether the models of PPO read the same tokens; says so by their hand-over records. Returns: whether the reward
    model, if any, has the policy's tokenizer."""
    fits = True
    for i, source in enumerate(reward_sources(config)):
        if not Path(source.path).exists() and source.path in checkup.planned:
            checkup.console.note(
                f"pairing: {source.path} is yet to be made; it will have the tokenizer of what it starts from"
            )
            continue
        if renderer is None:
            continue
        same = same_tokenizer(source, renderer)
        record = lifecycle.model_metadata.read_handover(resolve_model(source))
        said = "agrees with the policy's hand-over record" if record is not None else "has no hand-over record"
        other = "has another tokenizer: responses will be decoded and tokenised again"
        checkup.console.note(f"pairing: {source.path} {said if same else other}")
        if i == 0:
            fits = same
        needed = config.ppo.normalize_scores == "stored" and source is config.reward_model
        if needed and (record is None or record.score_std is None):
            checkup.fails(
                f"{source.path}: no mean and deviation of its scores; train it with 'rlhf reward', or set "
                "ppo.normalize_scores=running or raw"
            )
    return fits


def _models(checkup: PreflightReport, name: str, config: Any, fits: bool) -> ModelShape | PPOModelShapes:
    if not isinstance(config, PPOConfig):
        return trained_model_shape(name, config, checkup.planned)
    found = ppo_model_shapes(config, checkup.planned, shared=_shared(config, checkup.planned), fits=fits)
    check_offload(config, 0 if found.shared else len(found.scorers))
    return found


def _shared(config: PPOConfig, planned: Mapping[str, PlannedModel]) -> bool:
    """Whether the roles will share a base; of models that are yet to be made, by the adapters that they will be."""
    if not config.peft.enabled or config.roles == "separate":
        return False
    scorer = config.reward_model
    if scorer is not None and not Path(scorer.path).exists() and scorer.path in planned:
        return planned[scorer.path].peft.method == config.peft.method
    from rlhf.stages.ppo import decide_shared_base

    return decide_shared_base(config, Console(quiet=True))


def _lengths(config: Any, models: ModelShape | PPOModelShapes) -> None:
    model = models.policy if isinstance(models, PPOModelShapes) else models
    context = getattr(model.config, "max_position_embeddings", None)
    if isinstance(config, PPOConfig):
        longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
        check_context(longest, context, "data.max_prompt_tokens + sampling.max_new_tokens")
    else:
        check_context(config.data.max_length, context, "data.max_length")


def _load(config: Any, found: DataAudit | None) -> DataProfile:
    limit = config.data.max_prompt_tokens if isinstance(config, PPOConfig) else config.data.max_length
    if found is None or not found.kept:
        return DataProfile(0, 0, limit, 1.0)
    micro = config.optim.microbatch_size
    longest, loss = found.longest(micro)
    tokens = sum(n for n, _ in sorted(found.kept, reverse=True)[:micro])
    lengths = tuple(sorted(n for n, _ in found.kept))
    return DataProfile(len(found.kept), found.tokens, longest, loss / max(tokens, 1), lengths)


def _run(config: Any, load: DataProfile, processes: int, console: Console) -> None:
    """Batch arithmetic, steps and tokens in words."""
    if isinstance(config, PPOConfig):
        plan = PPOPlan(config.ppo, processes)
        console.text(f"{plan.describe()}, backward of {config.optim.microbatch_size} episodes at a time")
        console.text(
            f"run: {config.ppo.steps} steps = {plan.episodes:,} episodes, {plan.updates:,} updates; at most "
            f"{plan.episodes * config.sampling.max_new_tokens:,} sampled tokens ({load.records:,} prompts, each "
            f"{plan.episodes / max(load.records, 1):.1f} times)"
        )
        return
    supervised = SupervisedPlan(config.optim, processes, load.rows(config) if load.records else 0)
    console.text(supervised.describe())
    if not load.records:
        return
    rows, per_epoch = supervised.rows, supervised.updates_per_epoch
    phases = config.unfreeze if isinstance(config, FineTuningStage) else ()
    if any(phase.train == "top-down" for phase in phases):
        console.text(
            f"run: {per_epoch:,} updates an epoch; a phase from the top down repeats its length for each block"
        )
        return
    updates, short = supervised.updates(phases), supervised.filled_rows
    tokens = load.tokens * updates / per_epoch
    packed = f" packed into {rows:,} sequences" if rows < load.records else ""
    filled = f", the last batch filled up with {short:,} of them" if short else ""
    console.text(
        f"run: {updates:,} updates ({updates / per_epoch:.2g} epochs of {load.records:,} records{packed}{filled}), "
        f"about {tokens:,.0f} tokens"
    )


def _memory(checkup: PreflightReport, case: EstimateInput, replies: int | None, fits: bool) -> None:
    """The table of the worst phase, and what would help if it does not fit.

    Args:
        replies: tokens of a response as PPO starts. They are what the table shows, if nobody says better; but responses
            may grow, so that the longest must fit.
    """
    limit, longest = checkup.limit, estimate_memory(case)
    expected = replies is not None and case.response is None
    found = estimate_memory(replace(case, response=replies)) if expected else longest
    where = "GPU" if checkup.gpu else "process, above what imports take"
    rows = [
        [part.name, format_bytes(part.bytes), "host" if part.host and checkup.gpu else ""]
        for part in found.phases[found.largest]
    ]
    rows.append([f"peak (while: {found.largest})", format_bytes(found.peak), ""])
    if len(found.phases) > 1:
        rows += [[f"  {phase}", format_bytes(found.needed(phase)), ""] for phase in found.phases]
    if expected:
        rows.append(["peak if all responses grow to their limit", format_bytes(longest.peak), ""])
    s = case.sharding
    spread = f"ZeRO-{s.zero}" if s.deepspeed else "FSDP" if s.zero else "whole models"
    passes = f"{'bfloat16' if case.bfloat16 else 'float32'} passes"
    checkup.console.table(
        f"Memory of each {where} ({count_processes(s.processes)}, {spread}, {passes})",
        ["part", "bytes", ""],
        rows,
    )
    if expected:
        checkup.console.note(
            f"responses count as {replies} tokens, the mean of what the policy learnt to say; at most "
            f"{case.config.sampling.max_new_tokens} (--response-tokens sets another mean)"
        )
    if limit is None:
        return
    if longest.peak <= limit:
        checkup.console.text(f"fits: {format_bytes(longest.peak)} of {format_bytes(limit)}")
        return
    begins = f" (as it begins {format_bytes(found.peak)})" if expected else ""
    checkup.fails(
        f"{case.stage} needs {format_bytes(longest.peak)} of {format_bytes(limit)}{begins}: "
        f"{_way_out(checkup, case, limit, fits)}"
    )


def _way_out(checkup: PreflightReport, case: EstimateInput, limit: float, fits: bool) -> str:
    least, words = math.inf, ""
    for change, other in memory_suggestions(case):
        try:
            needed = estimate_memory(other).peak
        except RLHFError:  # a batch that so many processes cannot share
            continue
        if needed <= limit:
            return f"the cheapest change that fits is {change} ({format_bytes(needed)})"
        if needed < least:
            least, words = needed, change
    config = with_lora(case.config)
    if config is not None:
        models = _models(checkup, case.stage, config, fits)
        needed = estimate_memory(replace(case, config=config, models=models)).peak
        if needed <= limit:
            return f"only adapters fit, which train other weights: peft.method=lora ({format_bytes(needed)})"
    if not words:
        return "nothing smaller was found"
    return f"nothing fits; the least is {format_bytes(least)} with {words}"
