# Two commands do all set-up: `make demo` (the main job) and `make test`.
# PYTHON picks the interpreter, VENV the environment's folder.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
RUN    := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
WORKERS ?= 3
FAULTS  ?= 200
MINUTES ?= 30
SEED    ?= 1
LOCK   := $(VENV)/constraints.txt

.PHONY: help setup demo test check format bench chaos clean

help:
	@echo "make demo    set up and run the main job on this machine and two emulated boards"
	@echo "make test    set up and run the test suite"
	@echo "make check   lint, format, types, import contracts"
	@echo "make chaos   the main job on a virtual lab under 200 random faults, a fleet under them for 30 minutes"
	@echo "make bench   run every benchmark in bench/"
	@echo "make clean   remove the environment and the demo's state"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "stifarm needs Python 3.11 or newer; found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The lock, without torch and numpy where the environment brings its own (a board's vendor build).
$(LOCK): requirements.lock | $(VENV)/bin/python
	@if $(BIN)/python -c 'import torch' 2>/dev/null && [ ! -e $(RUN) ]; \
	  then grep -v -e '^torch==' -e '^numpy==' requirements.lock > $@; else cp requirements.lock $@; fi

$(RUN): pyproject.toml $(LOCK) | $(VENV)/bin/python
	$(PIP) install -q -c $(LOCK) -e .
	@touch $@

$(DEV): $(RUN)
	$(PIP) install -q -c $(LOCK) -e '.[dev,figures,parquet,postgres]'
	@touch $@

setup: $(RUN)

demo: $(RUN)
	@$(BIN)/stifarm demo

test: $(DEV)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

bench: $(DEV)
	@for script in bench/[a-z]*.py; do name=$$(basename $$script .py); \
	  echo "== bench.$$name"; $(BIN)/python -m bench.$$name || exit 1; done

chaos: $(DEV)
	$(BIN)/python -m tests.chaos --faults $(FAULTS) --seed $(SEED)
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) --seed $(SEED)

clean:
	rm -rf $(VENV) .stifarm build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache
