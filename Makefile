# Two commands do everything, each making its own virtual environment from pinned versions:
#   make demo    a tiny base model becomes an assistant, in about five minutes
#   make test    lint, types and tests
#
# PYTHON names the interpreter for the environment (3.11 or newer).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo demo-all test lint types tests soak test-gpu bench house docs clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.run  ## build a tiny world, pretrain, fine-tune, measure: the whole path in 5 minutes
	@$(BIN)/whet demo

demo-all: $(VENV)/.run  ## the same and what comes after: reward model, DPO, GRPO, compared: 8 minutes
	@$(BIN)/whet demo --all

test: lint types tests  ## lint, types and tests: at most 10 minutes on 2 cores

lint: $(VENV)/.dev  ## ruff: style and common mistakes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy
	@$(BIN)/mypy

# One thread a worker: the tests' matrices are small, and threads of several workers fight for cores.
# Where precision matters, once more as on the other kind of CPU: with bf16 products, or without.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -q
tests: $(VENV)/.dev  ## the tests alone
	@$(PYTEST) -n 2
	@$(PYTEST) -n 2 --bf16 other tests/numerics tests/stages tests/train tests/model/lora

soak: $(VENV)/.dev  ## the long forms: kills, fuzzing, every template with every tokenizer
	@$(PYTEST) -m slow

test-gpu: $(VENV)/.dev  ## what needs a CUDA device
	@$(BIN)/pytest -q -m gpu

house: $(VENV)/.run  ## lines, files by room, circles of imports, what one step of `whet sft` calls
	@$(BIN)/python -m scripts.house

docs: requirements-docs.txt  ## the documentation as a site, into site/; in an environment of its own
	@test -x $(VENV)-docs/bin/mkdocs || $(PYTHON) -m venv $(VENV)-docs
	@$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@$(VENV)-docs/bin/mkdocs build --strict --quiet
	@echo site/index.html

bench: $(VENV)/.dev  ## side-by-side benchmarks on this machine's CPU
	@$(BIN)/python -m benchmarks.run

clean:  ## remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info

$(VENV)/.run: requirements.txt pyproject.toml
	@echo "Installing pinned versions into $(VENV): a few minutes, once."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Whet needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Say another one: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@
