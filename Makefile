# `make` lists the targets. The environment is made on first use; nothing is installed elsewhere.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What a sweep is given besides its experiment, for instance ARGS="model=local model.path=FOLDER".
ARGS ?=
WORKERS ?= 2

.PHONY: help install demo test check tiny-model bench clean
help: ## List the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

install: $(VENV)/installed ## Make .venv with everything the project needs
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,dashboards]'
	touch $@

demo: table-demo ## Compress the embedded model by every method and print the table (minutes, no network)

# The dense baseline has one ratio, so it is a run beside the sweep. A sweep with failures still
# renders its table, and fails afterwards.
table-%: install ## Run an experiment (conf/experiment) and render its table: make table-demo
	@status=0; \
	$(BIN)/python experiments/compress.py -m experiment=$* $(ARGS) method=dense ratio=1 || status=$$?; \
	test $$status -eq 2 || $(BIN)/python experiments/compress.py -m experiment=$* $(ARGS) || status=$$?; \
	test $$status -eq 2 || $(BIN)/python experiments/render.py experiment=$* $(ARGS) || status=$$?; \
	exit $$status

test: install ## Run the tests that need no GPU and no network
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile -m 'not gpu and not network'

check: install ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install ## Seconds and peak memory of the stages, against a training step in the same run
	OMP_NUM_THREADS=1 $(BIN)/python experiments/benchmark.py

tiny-model: install ## Train the embedded model anew (half an hour of one core)
	$(BIN)/python experiments/train_tiny.py

clean: ## Remove the environment and all runs
	rm -rf $(VENV) results/runs results/hydra results/cache
