# Everything runs from a virtual environment in .venv, made on first use.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	&& { echo "$$p"; break; }; done)
BIN := .venv/bin
STAMP := .venv/.installed
MOEPROF := $(BIN)/python -m moeprof

.DEFAULT_GOAL := help
.PHONY: help setup demo test analysis check format bench wheel clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; set PYTHON=" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable '.[all]'
	@touch $@

setup: $(STAMP)  ## Make .venv with the pinned dependencies

# One thread: the models are small, and threads that wait for each other cost more than they bring.
demo: export OMP_NUM_THREADS = 1
demo: $(STAMP)  ## Record both built-in models, check the traces, write demo/report.html
	@mkdir -p demo
	$(MOEPROF) record zoo:lm -o demo/lm.moeprof --force
	$(MOEPROF) record zoo:mt -o demo/mt.moeprof --force
	$(MOEPROF) check demo/lm.moeprof demo/mt.moeprof
	$(MOEPROF) report demo/lm.moeprof demo/mt.moeprof -o demo/report.html \
		-f html -f md -f json --force
	@echo
	@echo "Traces:  demo/lm.moeprof demo/mt.moeprof"
	@echo "Report:  demo/report.html (the same numbers in demo/report.md and demo/report.json)"

test: $(STAMP)  ## Run the tests
	$(BIN)/python -m pytest -n 2

analysis: $(STAMP)  ## Replays and GPU results as pages, demo/analysis/
	$(BIN)/python -m analysis.gating -o demo/analysis/gating
	$(BIN)/python -m analysis.buffering -o demo/analysis/buffering
	$(BIN)/python -m analysis.balancing -o demo/analysis/balancing
	$(BIN)/python -m analysis.live_results -o demo/analysis/live

check: $(STAMP)  ## Lint, format check, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)  ## Format the code and fix what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)  ## Measure the speed of the replays, and of their first call
	$(BIN)/python -m analysis.bench.buffering
	$(BIN)/python -m analysis.bench.first_call

wheel: $(STAMP)  ## Build dist/*.whl
	@rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

clean:  ## Remove what the targets made, except .venv
	rm -rf build dist demo .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
