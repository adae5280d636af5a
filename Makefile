# Each verb does all its own set-up in .venv. Choose another interpreter with PYTHON=python3.12 (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := torch==2.13.0+cpu
# PyTorch's own index of CPU builds, asked only when the configured index does not have this one.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
# One thread per process: several processes share the cores, and results stay bit-equal from run to run. A crash tells
# where it was, also after pytest, which does so itself while it runs: native threads outlive the last test.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -X faulthandler -m pytest

.PHONY: install quickstart test test-slow check clean

install: $(STAMP)

$(STAMP): requirements/cpu.txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Keel needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --no-deps '$(TORCH)' || $(PIP) --no-deps --index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	$(PIP) --no-deps --editable .
	@touch $@

# Trains a tiny Mixture-of-Experts model with every fix on, on any laptop, in a few minutes.
quickstart: $(STAMP)
	$(BIN)/keel train examples/quickstart/train.toml --fresh
	$(BIN)/keel report runs/quickstart

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache
