# Needs make and a Python of at least 3.11; everything else comes into .venv. Paths are relative,
# so that the directory may have any name.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help env demo test lint format bench soak docs wheel real-parts peers clean distclean FORCE

BIN := .venv/bin
# By its real place, because pip writes it into the commands (see place_venv).
PIP := "$$(cd -P .venv && pwd)/bin/python" -m pip --disable-pip-version-check --no-input
PYTEST_ARGS ?=
BENCH_ARGS ?=
SOAK_ARGS ?=
DEMO_REPORT ?= demo-report.html

# A moved or copied directory takes an environment along that points to the old place.
MOVED := $(shell [ ! -f .venv/.made ] || [ "$$(cat .venv/.made)" = "$$(pwd -P)" ] || echo FORCE)

help:  ## Show this list
	@awk -F' *## ' '/^[a-z-]+:.*##/ { sub(/:.*/, "", $$1); printf "make %-11s %s\n", $$1, $$2 }' Makefile

env: .venv/.made-dev  ## Make the environment (.venv) with all that tests and lint need

demo: .venv/.made  ## Sweep the simulated engine and write an HTML report
	@$(BIN)/loadgen sweep --demo --html "$(DEMO_REPORT)" || [ $$? = 3 ] # 3: measured, on a busy machine
	@echo "The report is $(DEMO_REPORT): open it in a browser."

test: .venv/.made-dev  ## Run every test that can run here, and say which real parts were missing
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.made-dev  ## Check style and types
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: .venv/.made-dev  ## Rewrite the sources as the linter wants them
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

bench: .venv/.made-dev  ## Measure the load generator against a server of known timing, and the agent (BENCH_ARGS=--quick)
	@$(BIN)/python -m tests.bench $(BENCH_ARGS)

soak: .venv/.made-dev  ## Compare what the agent saw on a real vLLM with a sweep of it, a quarter of an hour
	@$(BIN)/python -m tests.soak.passive $(SOAK_ARGS)

docs: .venv/.made-dev  ## Check the documents: their links, and the commands they name
	@$(BIN)/python -m pytest -q tests/test_docs.py

wheel: .venv/.made  ## Build the wheel into dist/
	@rm -rf dist
	@$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

real-parts:  ## Install what the tests use of the real world: vLLM, Phoenix, VictoriaMetrics, Chromium (5 GB)
	@sh tests/real/install.sh

peers:  ## Install the load generators that bench runs beside ours: AIPerf, GuideLLM (2 GB)
	@sh tests/bench/peers.sh

clean:  ## Remove what was built, and caches; the environment stays
	@rm -rf dist build artifacts .mypy_cache .ruff_cache .pytest_cache .hypothesis "$(DEMO_REPORT)"
	@find agent loadgen tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove the environment too
	@[ ! -L .venv ] || rm -rf "$$(readlink .venv)"
	@rm -rf .venv

# The first Python of at least 3.11 that can make an environment.
define find_python
for python in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do \
  "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
    >/dev/null 2>&1 && break; \
  python=; \
done; \
if [ -z "$$python" ]; then \
  echo "make: no Python of at least 3.11 with venv and ensurepip is on the path." >&2; \
  echo "  Install one (Debian, Ubuntu: apt-get install python3 python3-venv)," >&2; \
  echo "  or name it: make PYTHON=/path/to/python3 ..." >&2; \
  exit 1; \
fi
endef

# An environment refuses a path with a colon, and its commands one with a character that means
# something to the shell. Then it lies in the cache directory, and .venv leads to it.
define place_venv
place=.venv; \
case "$$(pwd -P)" in *[':"$$`\']*) \
  place="$${XDG_CACHE_HOME:-$$HOME/.cache}/servefit/env-$$(pwd -P | cksum | tr ' ' -)"; \
  mkdir -p "$$place"; rm -rf .venv; ln -s "$$place" .venv ;; \
esac
endef

# pip 25.1 is the first that knows dependency groups.
.venv/.made: pyproject.toml $(MOVED)
	@set -e; $(find_python); \
	if ! $(BIN)/python -c 'import pip' >/dev/null 2>&1; then \
	  echo "Making the environment with $$python"; \
	  $(place_venv); \
	  "$$python" -m venv --clear "$$place"; \
	fi
	@rm -f .venv/.made .venv/.made-dev
	@$(PIP) install --quiet --upgrade 'pip>=25.1'
	@$(PIP) install --quiet --editable .
	@pwd -P > .venv/.made

.venv/.made-dev: .venv/.made
	@$(PIP) install --quiet --group dev
	@touch .venv/.made-dev
