# Each target sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONPATH := workflow/scripts

.PHONY: help setup run test test-gpu test-slurm lint format bench bench-gpu figures schema clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | column -t -s "$$(printf '\t')"

setup: $(VENV)/.ready ## the environment in .venv

$(VENV)/.ready: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	touch $@

run: setup ## the embedded default, to results/report.html
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores all --resources gpu=1

test: setup ## every test that needs no GPU
	PATH="$(CURDIR)/$(BIN):$$PATH" pytest --numprocesses 2 --dist loadgroup

test-gpu: setup ## the tests that need a CUDA device
	PATH="$(CURDIR)/$(BIN):$$PATH" pytest tests/gpu

lint: setup ## style, types, layers, workflow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/mypy
	$(BIN)/lint-imports
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --lint

format: setup ## rewrite the code in its style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

bench: setup ## the pipeline's own speed
	$(BIN)/python benchmarks/prompts_stage.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/engines.py --manifest results/models/smollm2-135m/manifest.json --engine hf graph \
		--workload 1x512 4x256 --new-tokens 32

bench-gpu: setup ## the decode engines on a GPU of 80 GB
	$(BIN)/python benchmarks/engines.py --workload 64x1024 32x4096 8x16384 --energy
	$(BIN)/python benchmarks/article.py

figures: run ## the README's picture, from a run on this machine
	mkdir -p docs && cp results/plots/bars-long.svg docs/

test-slurm: setup ## the cluster profile on a Slurm of its own; root on Debian
	PATH="$(CURDIR)/$(BIN):$$PATH" KVBENCH_SLURM=1 pytest tests/workflow/test_slurm.py

schema: setup ## config/schema.json, after a change of the config's model
	$(BIN)/python workflow/scripts/schema.py config/schema.json

clean: ## what a run and the tests leave, results included
	rm -rf results .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
