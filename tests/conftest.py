"""What all tests share: no network, no GPU, one thread, a tiny model, the command line in and out of this process.

The tests compute on the CPU on every machine, because many of them state what happens there: float32 by default, bit
for bit the same results, memory of the process. A machine with a GPU would otherwise run them in bfloat16 on the GPU.
The variable CUDA_VISIBLE_DEVICES is therefore emptied here, before anything imports torch; subprocesses inherit it.
CUDA reads it once in a process, so no test can undo it later. Only a session that runs nothing but tests/gpu, such as
`pytest tests/gpu`, leaves the GPUs visible; in every other session the tests in tests/gpu are skipped.
"""

from __future__ import annotations

import os

# Before anything imports the hub client, and inherited by subprocesses.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

GPU_TESTS = Path(__file__).resolve().parent / "gpu"
ON_CPU = "--on-cpu"  # option of tests/gpu/conftest.py
GPUS_VISIBLE = "RLHF_TESTS_GPUS_VISIBLE"  # "1" or "0"; inherited by pytest-xdist's workers, which have other arguments


def only_gpu_tests(arguments: Sequence[str], folder: Path) -> bool:
    """Return whether pytest's arguments ask for tests on a GPU and for no others.

    Args:
        arguments: the words of the command line after the program.
        folder: the working directory, from which pytest collects if no path is given.
    """
    found = [folder / word.partition("::")[0] for word in arguments if not word.startswith("-")]
    paths = [path.resolve() for path in found if path.exists()] or [folder.resolve()]
    return ON_CPU not in arguments and all(GPU_TESTS in (path, *path.parents) for path in paths)


if os.environ.setdefault(GPUS_VISIBLE, str(int(only_gpu_tests(sys.argv[1:], Path.cwd())))) != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

pytest_plugins = ["tests.models.fixtures", "tests.stages.fixtures"]

SENTENCES = [
    "the cat sat on the mat and the dog ran after it",
    "hello there, how are you today? i am well, thank you",
    "what does a cow say? a cow says moo",
    "name a red fruit. an apple is red, and so is a cherry",
    "user assistant system",
]
LOOPBACK = ("localhost", "::1")


class Result(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


Run = Callable[..., Result]


class NetworkForbidden(RuntimeError):
    """A test tried to reach another machine. No OSError, so that no library retries or falls back."""


def _is_local(family: int, address: Any) -> bool:
    if family == getattr(socket, "AF_UNIX", None):
        return True
    host = str(address[0]) if isinstance(address, tuple) else ""
    return host in LOOPBACK or host.startswith("127.")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Connections leave this machine for no test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        yield


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    def connect(self: socket.socket, address: Any) -> Any:
        if not _is_local(self.family, address):
            raise NetworkForbidden(f"a test tried to connect to {address}")
        return original(self, address)

    return connect


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are slower on several threads, and sums then depend on their number."""
    import torch

    torch.set_num_threads(1)


def new_tiny_tokenizer() -> Any:
    """Byte-level BPE with ChatML, as `rlhf pretrain` makes it."""
    from rlhf.stages.pretrain import new_tokenizer

    return new_tokenizer(iter(SENTENCES), 320)


def save_tiny_model(folder: Path) -> Path:
    """A causal LM of about 30 000 random weights, with tokenizer: 2 layers, width 32, context 128."""
    import torch

    from rlhf.config.schema import Architecture
    from rlhf.data.render import Renderer
    from rlhf.stages.pretrain import new_model

    tokenizer = new_tiny_tokenizer()
    shape = Architecture(vocab_size=320, hidden_size=32, layers=2, heads=2, intermediate_size=64, context=128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(shape, Renderer(tokenizer), len(tokenizer))
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """`new_tiny_tokenizer`. Do not change it in place."""
    return new_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`save_tiny_model`; read only."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[Any]], Path]:
    """write_jsonl(path, rows) -> path."""

    def write(path: Path, rows: Iterable[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Result]:
    """run_cli(args, cwd=, timeout=) -> (code, stdout, stderr) of `python -m rlhf` in a subprocess."""

    def run(args: Sequence[str], cwd: Path | None = None, timeout: float = 120) -> Result:
        command = [sys.executable, "-m", "rlhf", *map(str, args)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def call_cli() -> Callable[..., Result]:
    """call_cli(args, cwd=) -> (code, stdout, stderr) of `main` in this process: fast; an error that no check
    foresaw comes out as a failure of the test."""

    def call(args: Sequence[str], cwd: Path | None = None) -> Result:
        from rlhf.cli.main import UNFORESEEN, main

        out, err = io.StringIO(), io.StringIO()
        code: Any = 0
        with _put_back(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sys.argv = ["rlhf", *map(str, args)]
            if cwd is not None:
                os.chdir(cwd)
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
        assert code != UNFORESEEN, err.getvalue()
        return Result(int(code), out.getvalue(), err.getvalue())

    return call


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    """What a command changes in its process and would keep until it ends."""
    import torch

    argv, folder, environment = sys.argv, Path.cwd(), dict(os.environ)
    terminate = signal.getsignal(signal.SIGTERM)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        sys.argv = argv
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGTERM, terminate)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
