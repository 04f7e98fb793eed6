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
FILE ?= bench/study/scenarios/smoke.toml
STUDY_ARGS ?=
PIP_ARGS ?=
SIM_ARGS ?=
# The v2 plugin where it is installed, else version 1.
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
CHAOS_ARGS ?=
SOAK_ARGS ?=
FUZZ_ARGS ?=
FUZZ_EXAMPLES ?= 2000

# Five processes share the machine in a test or a demo; one thread each beats several that wait for each other.
export OMP_NUM_THREADS ?= 1
# Some four hundred processes start in a test: where the caller's shell forbids bytecode files, each of them would compile every module again.
export PYTHONDONTWRITEBYTECODE :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test check fuzz proto bench study simulate chaos soak e2e-systemd e2e-compose e2e-prometheus e2e-page e2e-proxy e2e-runbooks sbom clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

check: $(STAMP) ## Format, lint, types, imports, generated code, unit tests
	$(BIN)/ruff format --check --output-format concise $(CODE)
	$(BIN)/ruff check --output-format concise $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/generate_wire.py --check
	$(BIN)/python -m pytest tests/unit -q

proto: $(STAMP) ## Generate common/cosilo_common/rpc from proto/
	$(BIN)/python tools/generate_wire.py

simulate: $(STAMP) ## Simulate federations by seed for ten minutes, with faults; SIM_ARGS="--seed N" replays one
	$(BIN)/python -m tests.simulation $(SIM_ARGS)

chaos: $(STAMP) ## Break a real federation at every phase by seed; CHAOS_ARGS="--seed N --only CELL" replays one fault
	$(BIN)/python -m tests.system.chaos $(CHAOS_ARGS)

soak: $(STAMP) ## 300 rounds of real daemons with sites that go and come; nothing may grow. SOAK_ARGS="--rounds 20" is short
	$(BIN)/python -m tests.system.soak $(SOAK_ARGS)

fuzz: $(STAMP) ## Give every decoder and method inputs that are nearly right; FUZZ_EXAMPLES=N each, FUZZ_ARGS="-k manifest"
	COSILO_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/fuzz -q --timeout 3600 $(FUZZ_ARGS)

bench: $(STAMP) ## Speed and memory, each figure beside a yardstick of the same run; BENCH_ARGS="--quick" or "--only transfer masks"
	$(BIN)/python -m bench $(BENCH_ARGS)

study: $(STAMP) ## A scenario of the study over real daemons, scored: FILE=bench/study/scenarios/NAME.toml STUDY_ARGS="--arms fedavg"
	$(BIN)/python tools/convert_efficientnet.py
	$(BIN)/python -m bench.study.run $(FILE) $(STUDY_ARGS)

e2e-prometheus: $(STAMP) ## Rules, alerts and the dashboard's queries on a real Prometheus that scrapes a federation
	tests/e2e/prepare prometheus
	$(BIN)/python -m tests.e2e.prometheus

e2e-page: $(STAMP) ## The status page of a live federation in headless Chromium; photographs in demo-out/page
	tests/e2e/prepare page
	$(BIN)/python -m tests.e2e.page

e2e-proxy: $(STAMP) ## A site behind a real HTTP proxy (tinyproxy), the only way out: enrol, train, proxy killed in mid-transfer (as root)
	tests/e2e/prepare proxy
	$(BIN)/python -m tests.e2e.proxy

e2e-runbooks: $(STAMP) ## The operating pages' own lines, typed into shells beside a real federation, and what they must answer
	$(BIN)/python -m tests.e2e.runbooks

e2e-compose: $(STAMP) ## deploy/compose on a real engine: images, four sites in containers, one killed, one cut off, down and up (as root; Docker)
	tests/e2e/prepare compose
	$(BIN)/python -m tests.e2e.compose --compose "$(COMPOSE)"

e2e-systemd: $(STAMP) ## Both daemons under a real systemd: install, enrol, train, kill, hang, stop, reboot (as root; Docker)
	tests/e2e/prepare systemd
	$(BIN)/python -m tests.e2e.systemd

sbom: $(STAMP) ## Bills of materials (CycloneDX) of both wheelhouses: dist/sbom-site-wheels.json, dist/sbom-coordinator-wheels.json
	@for kind in site coordinator; do \
	  rm -rf dist/$$kind-wheels; \
	  deploy/airgap/wheelhouse --for $$kind --out dist/$$kind-wheels --python $(BIN)/python; \
	  $(BIN)/python tools/sbom.py --name cosilo-$$kind --wheels dist/$$kind-wheels --out dist/sbom-$$kind-wheels.json; \
	done

clean: ## Remove .venv, caches, dist and what the demo and the benches left
	rm -rf $(VENV) demo-out bench-out dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(PACKAGES) tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
