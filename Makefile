# Everything runs in the virtual environment .venv, made on first use; it need not be activated.
# The stamp files in it record which extras are installed; a changed pyproject.toml, setup.py or
# constraints.txt installs them again.

PYTHON ?= python3
VENV ?= .venv
# Extra package index, for CPU wheels of PyTorch where pip would find only CUDA builds:
#   make test TORCH_INDEX=URL
TORCH_INDEX ?=
# What to pass on: make train ARGS="seed=1", make test ARGS="-k imports"
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")

.DEFAULT_GOAL := help
.PHONY: help train test check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

train: $(VENV)/.with-viz ## train the default 9x9 Sudoku model (ARGS="key=value ..." changes it)
	$(BIN)/python -m trm_fast.train $(ARGS)

test: $(VENV)/.with-test ## run the whole test suite (ARGS="..." goes to pytest)
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.with-dev ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.with-test ## run the benchmarks (ARGS="--official PATH" compares)
	$(BIN)/python -m pytest bench/ --benchmark-only $(ARGS)

clean: ## remove .venv, build products and caches (data/ and checkpoints/ stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.with-%: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP) install --quiet --editable ".[$*]" --constraint constraints.txt $(INDEX)
	@touch $@
