# make demo   set up, then data -> SFT -> reward model -> PPO -> evaluation on the embedded world (runs/demo)
# make test   set up, then lint, types, documentation and tests
# make docs   build the documentation into build/site; a broken link is an error
# make soak   kill a tiny pipeline 100 times (KILLS=100, SEED=1), resume it each time, compare with an uninterrupted one
# make bench  measure what optimisations are worth on this machine (give it the machine alone)
# make test-gpu   the tests that need one GPU (tests/gpu); 'make test' uses the CPU on any machine and skips them
# make bench-gpu  measure PPO steps of a 0.6B and an 8B shape on one GPU, in at most 9 minutes; downloads nothing
# make lock   rewrite constraints.txt from the environment that was tested
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test setup lint types docs pytest test-gpu soak bench bench-gpu lock clean

demo: setup
	$(BIN)/rlhf run configs/demo/pipeline.yaml

test: lint types docs pytest

setup: $(VENV)/.installed

# Torch first and by itself, so that no other build of it is pulled in later. pip takes what its index offers; where that
# is the CUDA build and there is no GPU, name an index of CPU builds: make setup TORCH_INDEX=https://...
# DeepSpeed after torch, without building its operators: none is needed for ZeRO.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("rlhf needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev,deepspeed,docs]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Not with --quiet, which would hide warnings from --strict.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pytest: setup
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

test-gpu: setup
	$(BIN)/python -m pytest tests/gpu -rs

KILLS ?= 100
SEED  ?= 1
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.kills $$(mktemp -d) --kills $(KILLS) --seed $(SEED)

bench: setup
	$(BIN)/python -m tests.bench.startup
	$(BIN)/python -m tests.bench.packing
	$(BIN)/python -m tests.bench.growth
	$(BIN)/python -m tests.bench.freezing
	$(BIN)/python -m tests.bench.against_trl

bench-gpu: setup
	$(BIN)/python -m tests.bench.gpu

lock: setup
	$(BIN)/python -m pip freeze --exclude-editable --exclude pip | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
