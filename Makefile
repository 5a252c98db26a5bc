# `make` alone says what there is. Only `setup` reaches the network.

PYTHON ?= python3
WORKERS ?= 2

# One thread per process: tests and runs start several processes per core.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup quickstart test lint

help:
	@echo 'make setup       make .venv: everything to train and test on CPUs (once; PYTHON=... to choose one)'
	@echo 'make quickstart  train a small model from scratch, then improve it with Dr. GRPO, on this CPU'
	@echo 'make test        lint, then all tests (WORKERS=... test processes)'
	@echo 'make lint        ruff: mistakes and format'

setup:
	@$(PYTHON) tools/setup/make_venv.py

# The base model is made once; every call trains it anew, in a run directory of its own.
quickstart: setup
	@test -d runs/quickstart_base/hf || .venv/bin/megatron-zero pretrain quickstart_base --nproc 2
	@.venv/bin/megatron-zero train quickstart --nproc 2 name=quickstart_$$(date +%m%d_%H%M%S)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

test: lint
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadgroup --durations 10
