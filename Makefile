# Everything lives in .venv; `make demo` and `make test` each set up what they need.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Installed first, so that the range in pyproject.toml does not pull in several GB of CUDA packages where a CPU
# build of this version is on offer. For another build: make demo TORCH='torch==2.11.*'
TORCH  ?= torch==2.13.0
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench bench-secagg bench-ppo clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## run the main job on eight synthetic groups: minutes on two cores
	@$(BIN)/appa-secure run experiment=demo

test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not bench"

lint: $(READY) ## check style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(READY) ## measure speed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m bench

bench-secagg: $(READY) ## measure secure aggregation beside Flower's (options: ARGS='--help')
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.secagg $(ARGS)

bench-ppo: $(READY) ## measure PPO steps beside TRL's last PPOTrainer (options: ARGS='--help')
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.ppo $(ARGS)

clean: ## remove the environment, caches and build products; runs/ and client_state/ stay
	rm -rf $(VENV) build dist *.egg-info .appa_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find appa_secure clients coordinator configs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Made once and again when the dependencies change. The steps skip what is installed already.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	       "Name another one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) and the other packages into $(VENV): some minutes, once"
	@$(PIP) install '$(TORCH)'
	@$(PIP) install -e '.[simulation,embedder,dev]'
	@touch $@
