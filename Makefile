# `make` alone says what there is. Only `setup` reaches the network.

PYTHON ?= python3
WORKERS ?= 2

# One thread per process: tests and runs start several processes per core.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup quickstart what-next test lint

help:
	@echo 'make setup       make .venv: everything to train and test on CPUs (once; PYTHON=... to choose one)'
	@echo 'make quickstart  train a small model from scratch, then improve it with Dr. GRPO, on this CPU'
	@echo 'make test        lint, then all tests (WORKERS=... test processes)'
	@echo 'make lint        ruff: mistakes and format'

setup:
	@$(PYTHON) tools/setup/make_venv.py

# The base model is made once (--resume: an earlier start may have been interrupted). Every call
# trains it anew, in a run directory of its own, and runs/quickstart leads to the newest; only a run
# that somebody has called just so is left in its place.
NEWEST := quickstart_$(shell date +%m%d_%H%M%S)

quickstart: setup
	@test -f runs/quickstart_base/hf/step_000500/config.json \
		|| .venv/bin/megatron-zero pretrain quickstart_base --nproc 2 --resume
	@.venv/bin/megatron-zero train quickstart --nproc 2 name=$(NEWEST)
	@test -d runs/quickstart && test ! -L runs/quickstart || ln -sfn $(NEWEST) runs/quickstart
	@test -L runs/quickstart || run=$(NEWEST); $(MAKE) -s what-next RUN=runs/$${run:-quickstart}

define WHAT_NEXT

Next: greedy, both models are nearly always right. Drawn at temperature 1, the base model is not:

  .venv/bin/megatron-zero eval runs/quickstart_base $(SAMPLED) --out runs/quickstart_base/sampled
  .venv/bin/megatron-zero eval $(RUN) $(SAMPLED) --out $(RUN)/sampled
  .venv/bin/megatron-zero eval --compare runs/quickstart_base/sampled/arithmetic.json $(RUN)/sampled/arithmetic.json

What weighed in the gradient, and the model for transformers and vLLM:

  .venv/bin/megatron-zero analyze bias $(RUN) --out $(RUN)/analysis
  ls $(RUN)/hf/step_000080
endef
RUN ?= runs/quickstart
SAMPLED := --benchmarks arithmetic_heldout --template arithmetic --n 8 --temperature 1 \
	--max-tokens 96 --nproc 2 model.dtype=fp32
export WHAT_NEXT

what-next:
	@echo "$$WHAT_NEXT"

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

test: lint
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadgroup --durations 10
