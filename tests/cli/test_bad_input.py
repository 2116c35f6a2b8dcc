"""Every mistake a user can make ends with one message that says where and what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Run

Prepare = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A command, what is broken before it, and words its message must hold: the place and the way out."""

    name: str
    command: str
    says: tuple[str, ...]
    prepare: Prepare | None = None


def put(name: str, content: str | bytes) -> Prepare:
    """Write a file."""

    def write(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def rows(name: str, *values: object) -> Prepare:
    """Write a JSONL file."""
    return put(name, "".join(json.dumps(v) + "\n" for v in values))


def change(name: str, **values: object) -> Prepare:
    """Change a JSON file."""

    def edit(place: Path) -> None:
        path = place / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return edit


def remove(*names: str) -> Prepare:
    """Delete files."""
    return lambda place: [(place / name).unlink() for name in names]


def other_run(place: Path) -> None:
    """A finished run of another seed in the output folder."""
    from rlhf.config.load import load_stage_config
    from rlhf.config.schema import SFTConfig
    from rlhf.runs.run_dir import RunDir

    config = load_stage_config(SFTConfig, place / "sft.yaml", ["seed=99"]).config
    run = RunDir(place / "out")
    run.start("sft", config, seed=99, processes=1, versions={}, inputs={})
    run.finish()


TALK = {"role": "user", "content": "hi"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
LONG = "a very long question " * 40
SPAM, HAM = ({"text": f"some {name}", "label": name} for name in ("spam", "ham"))

DATA = [
    Case(
        "missing",
        "sft sft.yaml data.train.0.path=demo.jsonl",
        ("demo.jsonl: no such file", "did you mean 'demos.jsonl"),
    ),
    Case("empty", "sft sft.yaml", ("demos.jsonl: the file is empty", "name another file"), put("demos.jsonl", "")),
    Case(
        "corrupt",
        "sft sft.yaml",
        ("demos.jsonl row 2: corrupt JSON at column 15", "repair or remove the line"),
        put("demos.jsonl", '{"messages": []}\n{"messages": [}\n'),
    ),
    Case(
        "columns",
        "sft sft.yaml",
        ("pairs.jsonl", "chosen"),
        put(
            "sft.yaml", "output_dir: out\nmodel: {path: tiny}\ndata: {train: [{path: pairs.jsonl, format: messages}]}\n"
        ),
    ),
    Case("no format", "sft sft.yaml", ("demos.jsonl", "column"), rows("demos.jsonl", {"question": "a", "reply": "b"})),
    Case(
        "not UTF-8",
        "sft sft.yaml",
        ("demos.jsonl row 2: invalid UTF-8 at byte", "save the file as UTF-8"),
        put("demos.jsonl", b'{"messages": []}\n{"messages": "caf\xe9"}\n'),
    ),
    Case(
        "empty response",
        "sft sft.yaml",
        ("demos.jsonl row 1: turn 2 (assistant) is empty", "on_bad_row=drop"),
        rows("demos.jsonl", {"messages": [TALK, {"role": "assistant", "content": " "}]}),
    ),
    Case(
        "empty chosen",
        "reward reward.yaml",
        ("pairs.jsonl row 2: chosen is empty", "fix or remove the row"),
        rows("pairs.jsonl", PAIR, PAIR | {"chosen": ""}),
    ),
    Case(
        "identical sides",
        "reward reward.yaml",
        ("pairs.jsonl row 1: 'chosen' and 'rejected' are identical", "preference 0.5"),
        rows("pairs.jsonl", PAIR | {"rejected": "b"}),
    ),
    Case(
        "two bad rows",
        "reward reward.yaml",
        ("3 problems", "row 1: ", "row 2: ", "fix or remove them"),
        rows("pairs.jsonl", PAIR | {"rejected": "b"}, PAIR | {"preference": 2}),
    ),
    Case("all too long", "sft sft.yaml data.max_length=8", ("record is left", "raise data.max_length")),
    Case(
        "prompt too long (ppo)",
        "ppo ppo.yaml",
        ("prompts.jsonl row 1: the prompt is longer than 64 tokens", "shorten it"),
        rows("prompts.jsonl", {"prompt": LONG}),
    ),
    Case(
        "prompt too long (generate)",
        "generate sft prompts.jsonl out.jsonl --max-new-tokens 8",
        ("prompts.jsonl row 1: the prompt is longer than 120 tokens", "shorten it"),
        rows("prompts.jsonl", {"prompt": LONG}),
    ),
    Case(
        "a label without a training record",
        "classify classify.yaml labels=[short,kind,rude]",
        ("data.train: no training record has the label 'rude'", "add some, or drop the label"),
    ),
    Case(
        "a label that never holds",
        "classify classify.yaml labels=[ham,spam,kind] data.validation_fraction=0",
        ("data.train: no training record has the label 'kind'", "add some, or drop the label"),
        rows("labels.jsonl", SPAM, HAM | {"label": {"ham": 1, "kind": 0}}),
    ),
    Case(
        "a label that is not the classifier's",
        "classify classify.yaml labels=[short,rude]",
        (
            "labels.jsonl row ",
            ": label 'kind' is not one of the classifier's (found: labels short, rude)",
            "name it in labels, or correct the row",
        ),
    ),
    Case(
        "a label that is not the classifier's, held out",
        "classify classify.yaml data.validation=[{'path':'other.jsonl'}]",
        ("other.jsonl row 1: label 'rude' is not one of the classifier's (found: labels kind, short)", "name it in"),
        rows("other.jsonl", {"text": "a", "label": "rude"}),
    ),
    Case(
        "a broken label",
        "classify classify.yaml",
        ("labels.jsonl row 2: 'label' must be a label (text or a whole number)", "(found: True)", "on_bad_row=drop"),
        rows("labels.jsonl", SPAM, HAM | {"label": True}),
    ),
    Case(
        "a label that always holds, balanced",
        "classify classify.yaml multi_label=true class_weights=balanced labels=[ham] data.validation_fraction=0",
        ("data.train: every training record has the label 'ham'", "class_weights=equal"),
        rows("labels.jsonl", HAM, HAM | {"text": "other"}),
    ),
    Case(
        "two labels where one may hold",
        "classify classify.yaml data.validation_fraction=0",
        ("DataError: labels.jsonl row 2: a record must have exactly one label", "set multi_label=true"),
        rows("labels.jsonl", SPAM, HAM | {"label": ["ham", "spam"]}),
    ),
    Case(
        "no label column",
        "classify classify.yaml data.train.0.path=demos.jsonl",
        ("demos.jsonl: no format of the kind 'labelled' fits (found: columns messages)", "text (text, label)"),
    ),
    Case(
        "no votes column",
        "data weak weak.yaml sources=[{'votes':'vote'}] gold=tru",
        ("2 problems", "votes.jsonl: there is no column 'tru' (found: columns", "column 'vote'", "name one of"),
    ),
    Case(
        "a vote that is none",
        "data weak weak.yaml",
        (
            "votes.jsonl row 2: the vote of 'ann' on a pair is 'chosen', 'rejected' or 'tie'",
            "(found: 'a')",
            "data.on_bad_row=drop",
        ),
        rows("votes.jsonl", PAIR | {"votes": {}}, PAIR | {"votes": {"ann": "a"}}),
    ),
    Case(
        "votes that are no mapping",
        "data weak weak.yaml",
        ("votes.jsonl row 1: 'votes' must be a mapping annotator -> vote", "(found: ['chosen'])", "fix or remove"),
        rows("votes.jsonl", PAIR | {"votes": ["chosen"]}),
    ),
    Case(
        "a bad pair (weak)",
        "data weak weak.yaml",
        ("votes.jsonl row 1: chosen is empty", "fix or remove the row"),
        rows("votes.jsonl", PAIR | {"chosen": "", "votes": {"ann": 1}}),
    ),
    Case(
        "nobody votes",
        "data weak weak.yaml",
        ("votes.jsonl: no source votes on any record (found: sources ann)", "check the columns"),
        rows("votes.jsonl", PAIR | {"votes": {"ann": "tie"}}),
    ),
    Case(
        "too few sources for accuracies",
        "data weak weak.yaml",
        ("votes.jsonl: accuracies can be estimated only if at least 3 sources vote", "set label_model.kind=majority"),
        rows("votes.jsonl", PAIR | {"votes": {"ann": 1, "bob": 1}}),
    ),
    Case(
        "a labelling function that fails",
        "data weak weak.yaml sources=[{'function':'json:loads'}]",
        ("votes.jsonl row 1: the labelling function 'json:loads' failed (found: TypeError", "or None to abstain"),
    ),
    Case("no prompts", "generate sft nope.jsonl out.jsonl", ("nope.jsonl: no such file", "did you mean '")),
]
CONFIG = [
    Case(
        "unknown key",
        "sft sft.yaml optim.epoch=1",
        ("command line: unknown key 'optim.epoch'; did you mean 'optim.epochs",),
    ),
    Case(
        "unknown key in YAML",
        "sft sft.yaml",
        (
            "sft.yaml:1: unknown key 'ouput_dir'; did you mean 'output_dir'",
            "sft.yaml: missing required key 'output_dir'",
        ),
        put("sft.yaml", "ouput_dir: out\nmodel: {path: tiny}\ndata: {train: [{path: demos.jsonl}]}\n"),
    ),
    Case(
        "wrong type", "ppo ppo.yaml ppo.gamma=one", ("command line: 'ppo.gamma': expected a valid number", "got 'one'")
    ),
    Case(
        "a label that is named twice",
        "classify classify.yaml labels=[kind,short,kind]",
        ("labels: 'kind' is given twice",),
    ),
    Case(
        "negative",
        "ppo ppo.yaml kl.coef=-1",
        ("command line: 'kl.coef': expected greater than or equal to 0", "got -1"),
    ),
    Case("override syntax", "sft sft.yaml epochs", ("command line: expected section.key=value, got 'epochs'",)),
    Case(
        "no such configuration",
        "sft stf.yaml",
        ("stf.yaml: no such configuration file", "configuration files in that folder: ", "sft.yaml"),
    ),
    Case(
        "batch", "sft sft.yaml optim.batch_size=6", ("optim.microbatch_size: 6 sequences", "choose one of 1, 2, 3, 6")
    ),
    Case(
        "rollout",
        "ppo ppo.yaml ppo.rollout_size=5 ppo.minibatches=2",
        ("ppo.rollout_size: a rollout of 5", "choose a multiple of 2"),
    ),
    Case("greedy rollouts", "ppo ppo.yaml sampling.temperature=0", ("sampling.temperature: PPO needs more than 0",)),
    Case("no reward", "ppo ppo.yaml reward_model=null", ("there is no reward: set reward_model",)),
    Case("k3 as a reward", "ppo ppo.yaml kl.reward=k3", ("gradient that vanishes near the reference",)),
    Case(
        "reward function",
        "ppo ppo.yaml rewards=[{'function':'no.module:f'}]",
        ("rewards: the reward function does not import", "give module:function"),
    ),
    Case("context (sft)", "sft sft.yaml data.max_length=129", ("data.max_length: sequences of 129", "at most 128")),
    Case(
        "context (ppo)",
        "ppo ppo.yaml sampling.max_new_tokens=65",
        ("data.max_prompt_tokens + sampling.max_new_tokens: sequences of 129", "at most 128"),
    ),
    Case(
        "context (generate)",
        "generate sft prompts.jsonl out.jsonl --max-new-tokens 128",
        ("--max-new-tokens: sequences of 129 tokens", "at most 128"),
    ),
    Case(
        "launcher", "sft sft.yaml --launcher zero9", ("--launcher: no such launcher (found: zero9)", "one of ", "zero3")
    ),
    Case("launcher of a later stage", "run pipeline.yaml reward.launcher=zero9", ("found: zero9", "one of ", "zero3")),
    Case(
        "launcher that is no YAML",
        "sft sft.yaml --launcher bad.yaml",
        ("bad.yaml:1: not valid YAML",),
        put("bad.yaml", "a: ["),
    ),
    Case(
        "launcher that is no mapping",
        "sft sft.yaml --launcher bad.yaml",
        ("bad.yaml: expected 'key: value'",),
        put("bad.yaml", "a\n"),
    ),
    Case("pipeline stage", "run pipeline.yaml sftt.seed=1", ("unknown key 'sftt'; did you mean 'sft'?",)),
    Case(
        "later pipeline stage", "run pipeline.yaml reward.optim.epochs=x", ("command line: 'optim.epochs': expected",)
    ),
    Case(
        "judge",
        "evaluate evaluate.yaml judge=no.module:f",
        ("judge: the judge does not import", "give module:function"),
    ),
    Case("reference", "evaluate evaluate.yaml reference=ppo", ("reference 'ppo' is not one of models: sft",)),
    Case(
        "one label",
        "classify classify.yaml",
        ("labels: a classifier needs 2 labels at least (found: spam)", "set multi_label=true for one label"),
        rows("labels.jsonl", SPAM, SPAM | {"text": "more"}),
    ),
    Case(
        "one label named",
        "classify classify.yaml labels=[kind]",
        ("labels: a classifier needs 2 labels at least (found: kind)", "check the column 'label'"),
    ),
    Case(
        "no label at all",
        "classify classify.yaml multi_label=true",
        ("labels: a classifier needs 1 labels at least (found: none)", "check the column 'label'"),
        rows("labels.jsonl", SPAM | {"label": []}, HAM | {"label": {}}),
    ),
    Case(
        "a class weight too few",
        "classify classify.yaml class_weights={'kind':2.0}",
        (
            "class_weights: class_weights must name every label once (found: 'short' is in one of the two only)",
            "labels: kind, short",
        ),
    ),
    Case(
        "a class weight too many",
        "classify classify.yaml class_weights={'kind':2.0,'short':1,'rude':1}",
        ("class_weights must name every label once (found: 'rude' is in", "labels: kind, short"),
    ),
    Case(
        "a class weight of 0",
        "classify classify.yaml class_weights={'kind':0,'short':1}",
        ("command line: 'class_weights", "expected greater than 0"),
    ),
    Case(
        "context (classify)",
        "classify classify.yaml data.max_length=129",
        ("data.max_length: sequences of 129", "at most 128"),
    ),
    Case(
        "a source that is two",
        "data weak weak.yaml sources=[{'votes':'v','column':'c'}]",
        ("command line: 'sources.0': set exactly one of votes, column,", "got votes, column"),
    ),
    Case("a rule without a name", "data weak weak.yaml sources=[{'regex':'x'}]", ("a rule needs a name",)),
    Case(
        "unknown key (weak)",
        "data weak weak.yaml label_model.kin=majority",
        ("unknown key 'label_model.kin'; did you mean 'label_model.kind'",),
    ),
    Case(
        "a labelling function that does not import",
        "data weak weak.yaml sources=[{'function':'no.module:f'}]",
        ("sources: the labelling function does not import (found: no.module:f (", "give module:function"),
    ),
    Case(
        "two sources of one name",
        "data weak weak.yaml sources=[{'column':'prompt'},{'name':'prompt','regex':'x'}]",
        ("sources: two sources are called 'prompt'", "give one of them another name"),
    ),
    Case(
        "one class",
        "data weak weak.yaml kind=labelled sources=[{'column':'label'}]",
        ("labels: at least two classes are needed (found: spam)", "name the classes under labels"),
        rows("votes.jsonl", SPAM),
    ),
]
MODELS = [
    Case("absent", "sft sft.yaml model.path=tny", ("tny: no such model", "train the stage that makes it first")),
    Case(
        "absent, with a finished run near",
        "sft sft.yaml model.path=runs/b/model output_dir=new",
        ("runs/b/model: no such model", "finished runs here: runs/a"),
        put("runs/a/run.json", '{"status": "finished"}'),
    ),
    Case(
        "hub id without a revision",
        "sft sft.yaml model.path=some/model",
        ("some/model", "set 'revision' to a commit hash"),
    ),
    Case(
        "without weights",
        "sft sft.yaml",
        ("tiny: no weights (.safetensors) here", "config.json"),
        remove("tiny/model.safetensors"),
    ),
    Case("no model at all", "sft sft.yaml", ("tiny: no config.json", "found: "), remove("tiny/config.json")),
    Case("a file", "sft sft.yaml model.path=demos.jsonl", ("demos.jsonl: no config.json", "a file, not a folder")),
    Case(
        "corrupt weights",
        "sft sft.yaml",
        ("tiny: the model does not load", "found: "),
        put("tiny/model.safetensors", b"\x00" * 100),
    ),
    Case(
        "cut weights",
        "ppo ppo.yaml",
        ("sft: the model does not load", "found: "),
        lambda p: (p / "sft/model.safetensors").write_bytes((p / "sft/model.safetensors").read_bytes()[:-1000]),
    ),
    Case(
        "no tokenizer",
        "sft sft.yaml",
        ("tiny: no readable tokenizer",),
        remove("tiny/tokenizer.json", "tiny/tokenizer_config.json"),
    ),
    Case(
        "damaged hand-over", "reward reward.yaml", ("sft/handover.json: damaged JSON",), put("sft/handover.json", "{")
    ),
    Case(
        "other end token",
        "ppo ppo.yaml",
        ("reward: the reward model was trained", "the end token (end_id 7 there"),
        change("reward/handover.json", end_id=7),
    ),
    Case(
        "other vocabulary without a tokenizer",
        "ppo ppo.yaml reward_model.path=foreign ppo.normalize_scores=raw",
        ("foreign: no readable tokenizer",),
        remove("foreign/tokenizer.json", "foreign/tokenizer_config.json"),
    ),
    Case(
        "no mean and deviation",
        "ppo ppo.yaml",
        ("reward: the reward model carries no mean and deviation", "set ppo.normalize_scores=running or raw"),
        remove("reward/handover.json"),
    ),
    Case("SFT model as reward model", "ppo ppo.yaml reward_model.path=sft", ("sft: ", "train it with 'rlhf reward'")),
    Case(
        "SFT model as reward model, raw scores",
        "ppo ppo.yaml reward_model.path=sft ppo.normalize_scores=raw",
        ("sft: not a reward model: its score head would be random", "train it with 'rlhf reward'"),
    ),
    Case(
        "causal model with one label",
        "ppo ppo.yaml reward_model.path=sft ppo.normalize_scores=raw",
        ("sft: not a reward model: its score head would be random", "train it with"),
        change("sft/config.json", num_labels=1),
    ),
    Case("absent (generate)", "generate nope prompts.jsonl out.jsonl", ("nope: no such model",)),
]
OUTPUT = [
    Case(
        "foreign files",
        "sft sft.yaml",
        (
            "output_dir out: the output folder holds files that are no run (found: mine.txt)",
            "choose another output_dir",
        ),
        put("out/mine.txt", "x"),
    ),
    Case(
        "another run",
        "sft sft.yaml",
        (
            "output_dir out: the output folder already holds another run (found: sft, finished)",
            "choose another output_dir, or delete",
        ),
        other_run,
    ),
    Case("another stage", "ppo ppo.yaml", ("output_dir out: the output folder already holds another run",), other_run),
    Case("a file", "sft sft.yaml", ("output_dir out: the output folder is a file", "choose another"), put("out", "x")),
    Case(
        "an existing answer file",
        "generate sft prompts.jsonl out.jsonl",
        ("out.jsonl: the output file exists", "choose"),
        put("out.jsonl", "x"),
    ),
    Case(
        "an existing file of labels",
        "data weak weak.yaml",
        ("out.jsonl: the output file exists", "choose"),
        put("out.jsonl", "x"),
    ),
    Case(
        "a file of labels in no folder",
        "data weak weak.yaml output=no/out.jsonl",
        ("no: no such folder", "create it first"),
    ),
    Case(
        "an answer file in no folder",
        "generate sft prompts.jsonl no/out.jsonl",
        ("no: no such folder", "create it first"),
    ),
]
KINDS = {"DataError": DATA, "ConfigError": [*CONFIG, *OUTPUT], "CheckpointError": MODELS}


def cases() -> Iterable[object]:
    """All of them, with the kind of error that each must be."""
    for kind, some in KINDS.items():
        for case in some:
            yield pytest.param(case, kind, id=f"{kind[:-5]}: {case.name}")


@pytest.mark.parametrize(("case", "kind"), cases())
def test_one_message_and_nothing_left_behind(
    case: Case, kind: str, place: Path, contents: Callable[[Path], dict[str, bytes]], call_cli: Run
) -> None:
    if case.prepare:
        case.prepare(place)
    before = contents(place)
    code, out, err = call_cli(case.command.split(), cwd=place)
    assert code == 2, out + err
    assert re.findall(r"^(\w+): ", err, re.MULTILINE)[0] == kind
    assert len(re.findall(r"^\w*(?:Error|Warning): ", err, re.MULTILINE)) == 1, err
    for words in case.says:
        assert words in err
    assert "Traceback" not in out + err
    assert contents(place) == before


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("sfft sft.yaml", "No such command 'sfft'"),
        ("sft sft.yaml --quite", "No such option: --quite"),
        ("sft", "Missing argument"),
        ("data dmeo", "No such command 'dmeo'"),
        ("data weak", "Missing argument"),
        ("generate sft prompts.jsonl out.jsonl --max-new-tokens -1", "--max-new-tokens"),
        ("generate sft prompts.jsonl out.jsonl --temperature -0.5", "--temperature"),
        ("chat sft --max-new-tokens many", "--max-new-tokens"),
    ],
)
def test_wrong_usage_shows_the_usage(
    command: str, says: str, place: Path, contents: Callable[[Path], dict[str, bytes]], call_cli: Run
) -> None:
    before = contents(place)
    code, out, err = call_cli(command.split(), cwd=place)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ")
    assert f"Error: {says}" in err or f"Error: Invalid value for '{says}'" in err
    assert "-h' for help" in err
    assert contents(place) == before


def test_the_place_itself_is_good(place: Path, call_cli: Run) -> None:
    """Without a planted fault the same commands work, so that each case fails for its own reason."""
    stages = [f"{name} {name}.yaml output_dir=out-{name}" for name in ("sft", "reward", "classify", "ppo", "evaluate")]
    for command in (
        *stages,
        "data weak weak.yaml output=weak.jsonl",
        "generate sft prompts.jsonl out.jsonl --max-new-tokens 8",
    ):
        code, _, err = call_cli([*command.split(), "--quiet"], cwd=place)
        assert (code, err) == (0, ""), command
    assert len((place / "weak.jsonl").read_text(encoding="utf-8").splitlines()) == 10
    assert (place / "out-ppo" / "model" / "config.json").is_file()
    assert len((place / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 10


@pytest.mark.slow
def test_the_same_in_a_process_of_its_own(
    place: Path, contents: Callable[[Path], dict[str, bytes]], run_cli: Run
) -> None:
    """What the libraries print or leave behind does not show inside this process."""
    before = contents(place)
    code, _, err = run_cli(["ppo", "ppo.yaml", "reward_model.path=sft", "ppo.normalize_scores=raw"], cwd=place)
    assert code == 2
    assert err.startswith("CheckpointError: sft: not a reward model")
    assert len(err.splitlines()) == 1
    assert contents(place) == before
