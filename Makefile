# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)
# torch by its pin first: resolved together with others it can bring gigabytes of CUDA.
INSTALL = test -x $(BIN)/python || $(PYTHON) -m venv .venv; $(PIP) "$$(grep ^torch== constraints.txt)"; $(PIP) -e

NATIVE := setup.py $(wildcard src/steelyard/kernels/native/*)

.PHONY: setup demo test slow check format bench clean

setup: .venv/.dev

.venv/.demo: pyproject.toml constraints.txt $(NATIVE)
	@echo "installing what the demo needs into .venv (a minute or two)"
	@set -e; $(INSTALL) '.[demo]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt $(NATIVE)
	@echo "installing everything for development into .venv (a minute or two)"
	@set -e; $(INSTALL) '.[dev]'
	@touch $@ .venv/.demo

demo: .venv/.demo
	$(BIN)/steelyard demo --json demo/result.json

# A process a core, with a thread each (`tests/conftest.py`).
test: .venv/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

check: .venv/.dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

bench: .venv/.dev
	$(BIN)/python benchmarks/sms.py --seeds 0,1,2 --labels 400 --json bench/sms-400.json

clean:
	rm -rf .venv demo bench build src/*.egg-info src/steelyard/kernels/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
