"""Compare models on the same held-out prompts, and the reward model with its ceiling and baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.config.schema import EvaluateConfig
from rlhf.config.sections import ModelSource
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.records import Comparison, Prompt
from rlhf.data.render import Renderer
from rlhf.data.sources import load_records
from rlhf.distributed.engine import all_gather_objects, make_accelerator
from rlhf.distributed.launch_env import get_rank, is_main_process, use_cpu, world_size
from rlhf.errors import DataError
from rlhf.evaluation.answers import GeneratedResponse, generate_responses, perplexity, score_sequences
from rlhf.evaluation.baselines import longer_wins, tfidf_accuracy
from rlhf.evaluation.judge import Judge, load_judge
from rlhf.evaluation.stats import best_of_n_kl, bootstrap_mean, win_indicators
from rlhf.models.reward_models import load_scorer
from rlhf.models.soft_prompt import load_for_generation
from rlhf.reports.html import write_report
from rlhf.runs.run_dir import write_json
from rlhf.stages.lifecycle import RunResult, begin_run, open_tokenizer, start_run

TableRow = dict[str, Any]


@dataclass(frozen=True)
class EvaluationInputs:
    """What is measured with: prompts of every split, the judge, the reference and the reward model."""

    records: dict[str, Sequence[Prompt]]
    ids: dict[str, list[list[int]]]
    text: list[list[int]]
    judge: Judge | None
    measures: dict[str, Judge]
    reward_model: Any
    renderer: Renderer
    device: torch.device


def run(config: EvaluateConfig, console: Console) -> RunResult:
    """Measure; writes results.json, answers.jsonl and report.html into the run directory."""
    directory, state = begin_run("evaluate", config, console)
    if state == "finished":
        print_results(json.loads((directory.path / "results.json").read_text(encoding="utf-8")), console)
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    bench = _prepare(config, console)
    start_run(directory, "evaluate", config)
    with directory.guard():
        answers = _answers(config, bench, console)
        results: dict[str, Any] = {"reference": config.reference, "models": _table(config, bench, answers)}
        if config.preferences and bench.reward_model is not None:
            results["reward_model"] = _reward_table(config, bench)
        results["side_by_side"] = _side_by_side(config, bench, answers)
        if is_main_process():
            write_json(directory.path / "results.json", results)
            _write_answers(directory.path / "answers.jsonl", bench, answers)
            write_report(directory.path / "report.html", results, _run_folders(config))
    print_results(results, console)
    console.note(f"report: {directory.path / 'report.html'}")
    directory.note(summary={"models": results["models"], "reward_model": results.get("reward_model")})
    directory.finish()
    return RunResult(directory.path, results)


def _prepare(config: EvaluateConfig, console: Console) -> EvaluationInputs:
    if world_size() > 1:
        device = make_accelerator().device  # of several GPUs, this process's own; starts the process group
    else:
        device = torch.device("cpu" if use_cpu() else "cuda")
    _, renderer = open_tokenizer(config.models[config.reference], console)
    records: dict[str, Sequence[Prompt]] = {}
    ids = {}
    for split, source in config.prompts.items():
        loaded = load_records("prompt", [source], seed=config.seed, on_bad_row="error", deduplicate=False)
        records[split] = loaded.records
        ids[split] = tokenize.tokenize_prompts(
            loaded.records, renderer, config.max_prompt_tokens, "error", "error", console
        )
    text: list[list[int]] = []
    if config.text:
        loaded = load_records("text", config.text, seed=config.seed, on_bad_row="error", deduplicate=False)
        text = [renderer.text(r.text).ids[: config.max_prompt_tokens * 4] for r in loaded.records]
    reward_model = load_scorer(config.reward_model).to(device).eval() if config.reward_model else None
    judge = load_judge(config.judge) if config.judge else None
    measures = {name: load_judge(function, where=f"measures.{name}") for name, function in config.measures.items()}
    return EvaluationInputs(records, ids, text, judge, measures, reward_model, renderer, device)


def _load(source: ModelSource, bench: EvaluationInputs) -> Any:
    return load_for_generation(source).to(bench.device).eval()


def _answer_all(
    model: Any,
    ids: Sequence[list[int]],
    config: EvaluateConfig,
    bench: EvaluationInputs,
    *,
    draw: int = 0,
    reference: Any = None,
) -> list[GeneratedResponse]:
    """A response to every prompt, on every process: each process generates its share of them."""
    world = world_size()
    mine = range(get_rank(), len(ids), world)
    answers = generate_responses(
        model,
        [ids[i] for i in mine],
        bench.renderer,
        config.sampling,
        seed=config.seed,
        draw=draw,
        reference=reference,
        reward_model=bench.reward_model,
        numbers=mine,
    )
    if world == 1:
        return answers
    shares = all_gather_objects(answers, world)
    return [shares[i % world][i // world] for i in range(len(ids))]


def _answers(config: EvaluateConfig, bench: EvaluationInputs, console: Console) -> dict[str, dict[str, Any]]:
    """name -> {split: [Answer], 'perplexity': float}; best-of-n of the reference is one more name."""
    reference = _load(config.models[config.reference], bench)
    out: dict[str, dict[str, Any]] = {}
    rounds = len(config.models) + config.best_of
    with console.progress("evaluate", rounds, "round") as bar:
        for done, (name, source) in enumerate(config.models.items()):
            model = reference if name == config.reference else _load(source, bench)
            out[name] = {
                split: _answer_all(model, ids, config, bench, reference=reference) for split, ids in bench.ids.items()
            }
            if bench.text:
                out[name]["perplexity"] = perplexity(model, bench.text, bench.renderer.pad_id)
            bar.update(done + 1, {})
        if config.best_of and bench.reward_model is not None:
            name = f"{config.reference} best-of-{config.best_of}"
            out[name] = {split: [] for split in bench.ids}
            for split, ids in bench.ids.items():
                pool = [_answer_all(reference, ids, config, bench, draw=1 + draw) for draw in range(config.best_of)]
                out[name][split] = [max(drawn, key=lambda a: a.score) for drawn in zip(*pool, strict=True)]
        bar.update(rounds, {})
    return out


def _table(config: EvaluateConfig, bench: EvaluationInputs, answers: dict[str, dict[str, Any]]) -> list[TableRow]:
    rows = []
    for split, records in bench.records.items():
        judged: dict[str, list[float]] = {}
        if bench.judge is not None:
            judged = {
                name: [_judge(bench.judge, r, a) for r, a in zip(records, per_split[split], strict=True)]
                for name, per_split in answers.items()
            }
        for name, per_split in answers.items():
            drawn: list[GeneratedResponse] = per_split[split]
            kls = [a.kl for a in drawn if a.kl is not None]
            row: TableRow = {
                "split": split,
                "model": name,
                "prompts": len(drawn),
                "kl": float(np.mean(kls)) if kls else best_of_n_kl(config.best_of),
                "length": float(np.mean([a.length for a in drawn])),
                "ended": float(np.mean([a.finished for a in drawn])),
                "perplexity": per_split.get("perplexity"),
            }
            if bench.reward_model is not None:
                row["score"] = float(np.mean([a.score for a in drawn]))
            for measure, function in bench.measures.items():
                row.setdefault("measures", {})[measure] = float(
                    np.mean([_judge(function, r, a) for r, a in zip(records, drawn, strict=True)])
                )
            if bench.judge is not None:
                win = bootstrap_mean(
                    win_indicators(judged[name], judged[config.reference]), resamples=config.bootstrap, seed=config.seed
                )
                row |= {"utility": float(np.mean(judged[name])), "win": win.mean, "low": win.low, "high": win.high}
            rows.append(row)
    return rows


def _judge(judge: Judge, record: Prompt, drawn: GeneratedResponse) -> float:
    return judge(record.messages, drawn.text, record.record, drawn.finished)


def _reward_table(config: EvaluateConfig, bench: EvaluationInputs) -> TableRow:
    """Accuracy on held-out decided pairs, beside the ceiling (what the judge itself gets) and cheap baselines."""
    options: dict[str, Any] = {"seed": config.seed, "on_bad_row": "error", "deduplicate": False}
    pairs: Sequence[Comparison] = load_records("comparison", config.preferences, **options).records
    decided = [p for p in pairs if p.preference != 0.5]
    if not decided:
        raise DataError(
            "every pair is a tie: there is no accuracy to measure", found=f"{len(pairs)} pairs", where="preferences"
        )
    prompts = [bench.renderer.prompt(p.prompt) for p in decided]
    scores = [
        score_sequences(
            bench.reward_model,
            [ids + bench.renderer.response(getattr(p, side)) for ids, p in zip(prompts, decided, strict=True)],
            bench.renderer.pad_id,
        )
        for side in ("chosen", "rejected")
    ]
    right = win_indicators(scores[0], scores[1])
    estimate = bootstrap_mean(right, resamples=config.bootstrap, seed=config.seed)
    row: TableRow = {
        "pairs": len(decided),
        "accuracy": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "longer_wins": longer_wins(decided),
    }
    if config.preferences_train:
        train = load_records("comparison", config.preferences_train, **options).records
        row["tfidf"] = tfidf_accuracy(train, decided)
    if bench.judge is not None and all("task" in p.extra for p in decided):
        chosen, rejected = (
            [bench.judge(p.prompt, getattr(p, side), p.extra, True) for p in decided] for side in ("chosen", "rejected")
        )
        row["ceiling"] = float(win_indicators(chosen, rejected).mean())
    return row


def _side_by_side(
    config: EvaluateConfig, bench: EvaluationInputs, answers: dict[str, dict[str, Any]]
) -> list[TableRow]:
    shown: list[TableRow] = []
    for split, records in bench.records.items():
        for i in range(min(config.show, len(records))):
            row = i * len(records) // max(config.show, 1)  # spread over the file
            replies = {name: per_split[split][row].text for name, per_split in answers.items()}
            shown.append({"split": split, "prompt": records[row].messages, "replies": replies})
    return shown


def _write_answers(path: Path, bench: EvaluationInputs, answers: dict[str, dict[str, Any]]) -> None:
    """Every response; its utility only if a judge gave one."""
    with path.open("w", encoding="utf-8") as file:
        for split, records in bench.records.items():
            for i, record in enumerate(records):
                replies: dict[str, TableRow] = {}
                for name, per_split in answers.items():
                    drawn: GeneratedResponse = per_split[split][i]
                    replies[name] = {"text": drawn.text, "finished": drawn.finished}
                    if bench.judge is not None:
                        replies[name]["utility"] = round(_judge(bench.judge, record, drawn), 4)
                line = {"split": split, "prompt": record.messages, "replies": replies}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _run_folders(config: EvaluateConfig) -> dict[str, Path]:
    """Training runs behind the models, for their curves in the report."""
    sources = dict(config.models)
    if config.reward_model:
        sources["reward"] = config.reward_model
    folders = {name: Path(source.path) for name, source in sources.items()}
    folders = {name: p.parent if p.name == "model" else p for name, p in folders.items()}
    return {name: p for name, p in folders.items() if (p / "metrics.jsonl").is_file()}


def print_results(results: dict[str, Any], console: Console) -> None:
    """Print the tables and the side-by-side answers."""
    win = f"win rate vs {results['reference']} [95 %]"
    header = ["split", "model", win, "utility", "KL nats", "tokens", "ended", "perplexity"]
    measures = list(results["models"][0].get("measures", {}))
    rows = []
    for r in results["models"]:
        win = f"{100 * r['win']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]" if "win" in r else "-"
        text = f"{r['perplexity']:.2f}" if r.get("perplexity") else "-"
        rows.append(
            [
                r["split"],
                r["model"],
                win,
                f"{r['utility']:.2f}" if "utility" in r else "-",
                f"{r['kl']:.2f}",
                f"{r['length']:.1f}",
                f"{100 * r['ended']:.0f} %",
                text,
                *(f"{r['measures'][m]:.3f}" for m in measures),
            ]
        )
    console.table("Models", [*header, *measures], rows)
    if "reward_model" in results:
        r = results["reward_model"]
        cells = [["reward model", f"{100 * r['accuracy']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"]]
        names = {"ceiling": "ceiling (the judge itself)", "tfidf": "tf-idf Bradley-Terry", "longer_wins": "longer wins"}
        cells += [[words, f"{100 * r[key]:.1f} %"] for key, words in names.items() if key in r]
        console.table(f"Reward model: accuracy on {r['pairs']} held-out pairs", ["", "accuracy"], cells)
    for item in results["side_by_side"]:
        dialogue = "\n".join(f"  {m['role']}: {m['content']}" for m in item["prompt"])
        replies = "\n".join(f"    {name:>16} > {text}" for name, text in item["replies"].items())
        console.text(f"[{item['split']}]\n{dialogue}\n{replies}")
