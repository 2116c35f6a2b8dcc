"""Compare models on the same held-out prompts, and measure the reward model beside its ceiling and baselines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config.schema import EvaluateConfig
from rlhf.config.sections import ModelSource
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.records import Prompt
from rlhf.data.sources import load_records
from rlhf.distributed.engine import inference_device
from rlhf.distributed.launch_env import is_main_process
from rlhf.evaluation.judge import load_judge
from rlhf.evaluation.model_comparison import (
    EvaluationInputs,
    ModelAnswers,
    TableRow,
    answer_with_every_model,
    comparison_table,
    judge_responses,
    side_by_side,
)
from rlhf.evaluation.reward_accuracy import reward_accuracy
from rlhf.models.reward_models import load_scorer
from rlhf.models.soft_prompt import load_for_generation
from rlhf.reports.html import write_report
from rlhf.runs.memory_phase import phase
from rlhf.runs.run_dir import write_json
from rlhf.stages.lifecycle import RunResult, begin_run, open_tokenizer, start_run


def run(config: EvaluateConfig, console: Console) -> RunResult:
    """Measure the models, and write results.json, answers.jsonl and report.html into the run directory."""
    directory, state = begin_run("evaluate", config, console)
    if state == "finished":
        print_results(json.loads((directory.path / "results.json").read_text(encoding="utf-8")), console)
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    inputs = _load_inputs(config, console)

    @phase("loading")
    def load(source: ModelSource) -> Any:
        return load_for_generation(source).eval()

    start_run(directory, "evaluate", config)
    with directory.guard(), phase("evaluating"):
        answers = answer_with_every_model(config, inputs, load, console)
        results: dict[str, Any] = {
            "reference": config.reference,
            "models": comparison_table(config, inputs, answers),
        }
        if config.preferences and inputs.reward_model is not None:
            results["reward_model"] = reward_accuracy(config, inputs)
        results["side_by_side"] = side_by_side(config, inputs, answers)
        if is_main_process():
            write_json(directory.path / "results.json", results)
            _write_answers(directory.path / "answers.jsonl", inputs, answers)
            write_report(directory.path / "report.html", results, _run_folders(config))
    print_results(results, console)
    console.note(f"report: {directory.path / 'report.html'}")
    directory.note(summary={"models": results["models"], "reward_model": results.get("reward_model")})
    directory.finish()
    return RunResult(directory.path, results)


@phase("loading")
def _load_inputs(config: EvaluateConfig, console: Console) -> EvaluationInputs:
    """Load and tokenize the prompts and the held-out text; load the judge, the measures and the reward model."""
    device = inference_device()
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
    reward_model = load_scorer(config.reward_model).eval() if config.reward_model else None
    judge = load_judge(config.judge) if config.judge else None
    measures = {name: load_judge(function, where=f"measures.{name}") for name, function in config.measures.items()}
    return EvaluationInputs(records, ids, text, judge, measures, reward_model, renderer, device)


def _write_answers(path: Path, inputs: EvaluationInputs, answers: Mapping[str, ModelAnswers]) -> None:
    """Write every response, with its utility if there is a judge."""
    with path.open("w", encoding="utf-8") as file:
        for split, records in inputs.records.items():
            utilities = {}
            if inputs.judge is not None:
                utilities = {
                    name: judge_responses(inputs.judge, records, m.responses[split]) for name, m in answers.items()
                }
            for i, record in enumerate(records):
                replies: dict[str, TableRow] = {}
                for name, model in answers.items():
                    response = model.responses[split][i]
                    replies[name] = {"text": response.text, "finished": response.finished}
                    if inputs.judge is not None:
                        replies[name]["utility"] = round(utilities[name][i], 4)
                line = {"split": split, "prompt": record.messages, "replies": replies}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _run_folders(config: EvaluateConfig) -> dict[str, Path]:
    """Return the training runs that made the models; the report shows their curves."""
    sources = dict(config.models)
    if config.reward_model:
        sources["reward"] = config.reward_model
    folders = {name: Path(source.path) for name, source in sources.items()}
    folders = {name: p.parent if p.name == "model" else p for name, p in folders.items()}
    return {name: p for name, p in folders.items() if (p / "metrics.jsonl").is_file()}


def print_results(results: dict[str, Any], console: Console) -> None:
    """Print the tables and the side-by-side responses."""
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
