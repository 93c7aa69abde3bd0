# Every target makes .venv and installs what it needs when that is missing or pyproject.toml has changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
CHECKED := diffalign reward_models training tests benchmarks demos

.PHONY: help quickstart test lint types slow study-dpo study-offline study-ablations study-lists study-prefgrpo study-npo study-generate pretrain-shapes clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

quickstart: $(RUN)  ## generate, rank, train DPO, evaluate and report, on a CPU, in minutes (ARGS="--seed 1")
	$(BIN)/diffalign quickstart $(ARGS)

test: $(DEV)  ## all tests that are quick (WORKERS=2)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(DEV)  ## ruff check and ruff format --check
	$(BIN)/ruff check $(wildcard $(CHECKED))
	$(BIN)/ruff format --check $(wildcard $(CHECKED))

types: $(DEV)  ## mypy on the two packages
	$(BIN)/mypy diffalign reward_models

slow: $(DEV)  ## one-seed proofs, tests of the shipped weights and, where there is a GPU, tests that need it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow or weights or gpu" $(ARGS)

study-dpo: $(RUN)  ## three seeds of DPO and its controls on the shapes world; about an hour on 2 cores
	$(BIN)/python benchmarks/study_methods.py --arms dpo sft shuffled --name study-dpo $(ARGS)

study-offline: $(RUN)  ## every offline method and its controls, three seeds; some hours on 2 cores
	$(BIN)/python benchmarks/study_methods.py --name study-offline --arms dpo mapo smpo rankdpo sft shuffled $(ARGS)

study-ablations: $(RUN)  ## SmPO's two halves apart, RankDPO without its weights; after study-offline it reuses its runs
	$(BIN)/python benchmarks/study_methods.py --name study-ablations --arms dpo smpo smpo-inverted smpo-inverted-hard \
		rankdpo rankdpo-plain $(ARGS)

study-lists: $(RUN)  ## RankDPO against DPO on lists of 4, 6 and 8; after study-offline it reuses its runs
	$(BIN)/python benchmarks/study_methods.py --name study-lists --arms dpo-4 rankdpo-4 dpo rankdpo dpo-8 rankdpo-8 $(ARGS)

study-prefgrpo: $(RUN)  ## Pref-GRPO with the checker and with the learned judge, GRPO on scores, a random reward
	$(BIN)/python benchmarks/study_methods.py --name study-prefgrpo --arms prefgrpo grpo prefgrpo-judge grpo-random $(ARGS)

study-npo: $(RUN)  ## negative guidance against plain guidance over scales, three seeds; hours on 2 cores
	$(BIN)/python benchmarks/study_npo.py $(ARGS)

study-generate: $(RUN)  ## 1000 prompts x 4 pictures from two checkpoints x three scorers, then DPO and RankDPO on them
	$(BIN)/python benchmarks/study_generate.py $(ARGS)

pretrain-shapes: $(RUN)  ## train the embedded micro SDXL from scratch; about 45 minutes on 2 cores
	$(BIN)/python training/pretrain_shapes.py --output-dir out/shapes-sdxl $(ARGS)

clean:  ## remove the environment, caches and out/
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# uv does not look into pip's find-links folders, where some machines keep a CPU-only torch that breaks torchvision.
# Without uv, plain pip does it; the last line then says so in one line should torch and torchvision not match.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; then \
		VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet -e '$(1)'; \
	else \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '$(1)'; \
	fi
	$(BIN)/python -m diffalign.environment
	touch $@
endef

$(RUN): pyproject.toml
	$(call install,.)

$(DEV): pyproject.toml
	$(call install,.[dev])
	touch $(RUN)
