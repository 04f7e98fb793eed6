# `make` lists the targets. Everything runs in .venv, which the first target that needs it makes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PACKAGES := common server client
CODE := $(PACKAGES) tests tools $(wildcard bench)

# Arguments passed on: make demo DEMO_ARGS="--rounds 3", make test TEST_ARGS="-k masks", make setup PIP_ARGS="--no-index".
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
PIP_ARGS ?=
SIM_ARGS ?=

# Five processes share the machine in a test or a demo; one thread each beats several that wait for each other.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test check proto bench simulate e2e-systemd e2e-prometheus e2e-page clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with everything that the other targets need

$(STAMP): constraints.txt requirements-dev.txt $(PACKAGES:%=%/pyproject.toml)
	@python=; for candidate in python3.11 python3.12 python3.13 python3; do \
	  if command -v $$candidate >/dev/null && $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "error: setup: Python 3.11 or newer not found; install python3.11 with its venv module" >&2; exit 1; fi; \
	if [ ! -x $(BIN)/python ]; then \
	  $$python -m venv $(VENV) || { rm -rf $(VENV); echo "error: setup: $$python cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }; \
	fi
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -r requirements-dev.txt -e ./common -e ./server -e './client[digits]'
	@touch $@

demo: $(STAMP) ## Train over four sites on real images; leaves a grid of drawn digits in demo-out/
	$(BIN)/python -m tests.federation.demo $(DEMO_ARGS)

test: $(STAMP) ## Run every test: unit, protocol, integration, system
	$(BIN)/python -m pytest tests $(TEST_ARGS)

check: $(STAMP) ## Format, lint, types, imports, generated code, unit tests
	$(BIN)/ruff format --check --output-format concise $(CODE)
	$(BIN)/ruff check --output-format concise $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/generate_wire.py --check
	$(BIN)/python -m pytest tests/unit -q

proto: $(STAMP) ## Generate common/cosilo_common/rpc from proto/
	$(BIN)/python tools/generate_wire.py

bench: $(STAMP) ## Measure masking and opening: seconds and peak memory
	$(BIN)/python bench/secagg.py $(BENCH_ARGS)

simulate: $(STAMP) ## Simulate federations by seed for ten minutes, with faults; SIM_ARGS="--seed N" replays one
	$(BIN)/python -m tests.simulation $(SIM_ARGS)

e2e-systemd: $(STAMP) ## Both daemons under a real systemd: install, enrol, train, kill, hang, stop, reboot (as root; Docker)
	tests/e2e/prepare systemd
	$(BIN)/python -m tests.e2e.systemd

e2e-prometheus: $(STAMP) ## Rules, alerts and the dashboard's queries on a real Prometheus that scrapes a federation
	tests/e2e/prepare prometheus
	$(BIN)/python -m tests.e2e.prometheus

e2e-page: $(STAMP) ## The status page of a live federation in headless Chromium; photographs in demo-out/page
	tests/e2e/prepare page
	$(BIN)/python -m tests.e2e.page

clean: ## Remove .venv, caches and what the demo and the benches left
	rm -rf $(VENV) demo-out bench-out dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(PACKAGES) tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
