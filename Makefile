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
# A version of Triton, or `latest`, to compile the kernels with instead of the pinned one.
TRITON ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
OTHER := $(VENV)-triton-$(TRITON)
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))

.DEFAULT_GOAL := help
.PHONY: help train test check sanitize aot bench clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

train: $(VENV)/.with-viz ## train the default 9x9 Sudoku model (ARGS="key=value ..." changes it)
	$(BIN)/python -m trm_fast.train $(ARGS)

test: $(VENV)/.with-test ## run the whole test suite, on two cores (ARGS="..." goes to one pytest)
	$(BIN)/python $(if $(ARGS),-m pytest $(ARGS),tests/halves.py)

check: $(VENV)/.with-dev ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: $(VENV)/.with-test ## test the compiled CPU kernels under AddressSanitizer and UBSan
	$(BIN)/python tests/sanitize.py $(ARGS)

aot: $(if $(TRITON),$(OTHER)/.installed,$(VENV)/.with-test) ## compile every Triton kernel (TRITON=VERSION or latest: with that)
	$(if $(TRITON),$(OTHER)/bin,$(BIN))/python -m trm_fast.kernels.report --check $(ARGS)

bench: $(VENV)/.with-test ## run the benchmarks (ARGS="--official PATH" compares)
	$(BIN)/python -m pytest bench/ --benchmark-only $(ARGS)

clean: ## remove .venv, build products and caches (data/ and checkpoints/ stay)
	rm -rf $(VENV) $(VENV)-triton-* build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.with-%: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP) install --quiet --editable ".[$*]" --constraint constraints.txt $(INDEX)
	@touch $@

# Triton alone is installed there. All else comes from $(VENV) through a path file, which Python
# reads after the environment's own folder: so PyTorch, which asks for one Triton, stays as it is.
$(OTHER)/.installed: $(VENV)/.with-test $(if $(filter latest,$(TRITON)),FORCE)
	$(BIN)/python -m venv --clear $(OTHER)
	$(OTHER)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
	    $(if $(filter latest,$(TRITON)),triton,triton==$(TRITON))
	$(BIN)/python -c '$(PURELIB)' >"$$($(OTHER)/bin/python -c '$(PURELIB)')/dependencies.pth"
	@touch $@

FORCE:
