"""A working folder for each test: valid data and configurations, and copies of models that are made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.sections import ModelSource, Peft
from rlhf.data.render import Renderer
from rlhf.models.model_metadata import save_tokenizer_and_handover
from rlhf.models.reward_models import new_reward_model

WORDS = "cat dog cow hen fox owl pig bee ant elk".split()  # noqa: SIM905 - readable
DEMOS = [
    {"messages": [{"role": "user", "content": f"name {w}"}, {"role": "assistant", "content": f"a {w}"}]} for w in WORDS
]
PAIRS = [{"prompt": f"name {w}", "chosen": f"a {w}", "rejected": "no"} for w in WORDS]
LABELS = [
    {"prompt": f"name {w}", "completion": f"a {w}" if i % 2 else "no", "label": "kind" if i % 2 else "short"}
    for i, w in enumerate(WORDS)
]
VOTES = [pair | {"votes": {"ann": "chosen", "bob": int(i % 3 > 0), "cat": "chosen"}} for i, pair in enumerate(PAIRS)]
PROMPTS = [{"prompt": f"name {w}"} for w in WORDS]
DATA = "data: {{train: [{{path: {}.jsonl}}], validation_fraction: 0.2, max_length: 64}}\n"
OPTIM = "optim: {batch_size: 4, microbatch_size: 4, max_updates: 2}\n"
CONFIGS = {
    "sft.yaml": "output_dir: out\nmodel: {path: tiny}\n" + DATA.format("demos") + OPTIM,
    "reward.yaml": "output_dir: out\nmodel: {path: sft}\n" + DATA.format("pairs") + OPTIM,
    "classify.yaml": "output_dir: out\nmodel: {path: sft}\n" + DATA.format("labels") + OPTIM,
    "ppo.yaml": "output_dir: out\npolicy: {path: sft}\nreward_model: {path: reward}\n"
    "data: {prompts: [{path: prompts.jsonl}], max_prompt_tokens: 64}\nsampling: {max_new_tokens: 8}\n"
    "ppo: {steps: 1, rollout_size: 4, epochs: 1}\noptim: {microbatch_size: 4}\n",
    "evaluate.yaml": "output_dir: out\nmodels: {sft: {path: sft}}\nprompts: {all: {path: prompts.jsonl}}\n"
    "best_of: 0\nbootstrap: 20\nmax_prompt_tokens: 64\nsampling: {max_new_tokens: 8}\n",
    "weak.yaml": "output: out.jsonl\ndata: {path: votes.jsonl}\nsources: [{votes: votes}]\n",
    "pipeline.yaml": "output_dir: out\nsft: {config: sft.yaml}\nreward: {config: reward.yaml}\n",
}


@pytest.fixture(scope="session")
def models(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models. tiny: plain. sft, reward: as the stages leave them. foreign, foreign-sealed: reward models of
    another, larger tokenizer, without and with a hand-over record."""
    root = tmp_path_factory.mktemp("models")
    renderer = Renderer(tiny_tokenizer)
    shutil.copytree(tiny_model_dir, root / "tiny")
    shutil.copytree(tiny_model_dir, root / "sft")
    save_tokenizer_and_handover(root / "sft", "sft", renderer, tiny_tokenizer)
    other = _other_tokenizer()
    _reward(root / "tiny", root / "reward", tiny_tokenizer)
    _reward(root / "tiny", root / "foreign-sealed", other)
    _reward(root / "tiny", root / "foreign", other)
    (root / "foreign" / "handover.json").unlink()
    return root


def _other_tokenizer() -> Any:
    from rlhf.stages.pretrain import new_tokenizer

    text = (
        "other sentences whose words stand nowhere else give other tokens, and enough text makes certainly more of them"
    )
    return new_tokenizer(iter([text, *WORDS]), 360)


def _reward(start: Path, folder: Path, tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    source = ModelSource(path=str(start), dtype="float32")
    model = new_reward_model(source, Peft(), pad_id=renderer.pad_id, vocab_size=len(tokenizer), seed=1)
    model.save_pretrained(str(folder))
    save_tokenizer_and_handover(
        folder, "reward", renderer, tokenizer, head_dtype="float32", score_mean=0.0, score_std=1.0
    )


@pytest.fixture
def place(tmp_path: Path, models: Path, write_jsonl: Callable[..., Path]) -> Path:
    """The current folder of a command: configurations, data, and copies of the models."""
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, rows in (("demos", DEMOS), ("pairs", PAIRS), ("labels", LABELS), ("votes", VOTES), ("prompts", PROMPTS)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """contents(folder) -> every file and folder below it, with what is in it."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}

    return read
