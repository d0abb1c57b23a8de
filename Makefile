# Two commands do everything: `make run` and `make test`. `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv run test prove soak lint format tools bench bench-quick bench-snapshots bench-scale check-python clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STATE ?= var
# More arguments for the program behind a target: make run ARGS="--nbd 127.0.0.1:0", make test ARGS="-k journal -n 0"
ARGS ?=
APT_LINE := apt-get install -y git make python3-venv
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
# Two workers halve the suite on two cores; a file's tests stay together, so that they can share a guest or a daemon.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

help:
	@echo "make run      make .venv, install, start the daemon on a pool under ./$(STATE), print its URLs"
	@echo "make test     install the tests' tools where allowed, lint, run the whole suite (CI=true: a skip is a failure)"
	@echo "make prove    attack the invariants, for up to 45 minutes: crashes, power cuts, faults, fuzz (as root)"
	@echo "make soak     the same for hours, in parts of an hour; docs/soak-ledger.md says how far it has come"
	@echo "make venv     only make .venv and install"
	@echo "make lint     ruff, mypy --strict, import-linter"
	@echo "make format   let ruff rewrite what it can"
	@echo "make bench    the speed report: beside qemu-nbd and nbdkit on this machine, every target met or not"
	@echo "make bench-quick      its ratios only, in less than 3 minutes"
	@echo "make bench-snapshots  what snapshots cost, beside qcow2's"
	@echo "make bench-scale  how far one daemon goes, beside its targets"
	@echo "make clean    remove .venv and caches (never ./$(STATE): that is data)"

# --- the virtual environment: one stamp for users, one more for what the tests need -----------------------------------

check-python:
	@command -v git >/dev/null || echo "git is missing: $(APT_LINE)" >&2
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing. On Debian: $(APT_LINE)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "blockvirt needs Python 3.11 or newer; $$(command -v $(PYTHON)) is $$($(PYTHON) -V)." >&2; \
	    echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$$(command -v $(PYTHON)) cannot make virtual environments. On Debian: $(APT_LINE)" >&2; exit 1; }

venv: $(VENV)/.installed

# An environment that was only half made, or whose interpreter is gone, is made anew.
$(VENV)/.installed: pyproject.toml | check-python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing blockvirt into $(VENV) ..."
	@$(PIP) install -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV) ..."
	@$(PIP) install -e '.[test]'
	@touch $@

# --- run, test ----------------------------------------------------------------------------------------------------------

# Not by the shell's exec, which makes the path absolute: the greeting repeats it as it was called.
run: venv
	@$(BIN)/blockvirt -s $(STATE) serve $(ARGS)

tools:
	@tools/install-test-tools

test: tools lint
	$(PYTEST) $(ARGS)

prove: tools $(VENV)/.installed-test
	$(BIN)/python -m tests.attacks $(ARGS)

soak: tools $(VENV)/.installed-test
	$(BIN)/python -m tests.attacks.soak $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: tools $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-quick: tools $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.run --quick $(ARGS)

bench-snapshots: tools $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.snapshots $(ARGS)

bench-scale: tools $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.scale $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(STATE)/*' -prune -exec rm -rf {} +
