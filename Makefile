# Everything works on a fresh machine: each target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
DOCS := $(VENV)/.docs
# Set them to other requirements for other versions, for example TORCH=torch TRITON=triton.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
# Processes that run tests side by side.
JOBS ?= 2
CLANG_FORMAT := $(BIN)/clang-format
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/*.cpp csrc/cuda/hopper/*.cuh)
EMULATION := $(wildcard tests/cuda/*.h tests/cuda/*.cpp tests/cuda/device/*.h tests/cuda/device/*.cpp tests/cuda/device/hopper/*.cuh)

.PHONY: help setup demo test lint bench docs clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(TOOLS)  ## make .venv, build the extension into it, and add what tests and linters need

$(READY): pyproject.toml setup.py $(CPP)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the build tools (once) ..."
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "setuptools>=77" wheel pybind11 ninja numpy
	@echo "Building gradstats (some minutes the first time) ..."
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[demo]"
	@$(BIN)/python -m pip install -q --no-deps "$(TRITON)" || echo "no triton here: going on without"
	@touch $(READY)

# What was built stays where it is: GRADSTATS_BUILD=none only adds the packages.
$(TOOLS): $(READY)
	@echo "Installing what the tests and linters need, Lightning, transformers and others among it ..."
	GRADSTATS_BUILD=none $(BIN)/python -m pip install -q --no-build-isolation -e ".[test,lint]"
	@touch $(TOOLS)

demo: $(READY)  ## train a small network, measure its noise scale, recommend a batch size
	$(BIN)/python -m gradstats demo $(ARGS)

test: $(TOOLS)  ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(TOOLS)  ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CPP) $(EMULATION)

bench: $(TOOLS)  ## time the operations and whole training steps
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only --benchmark-group-by=group
	$(BIN)/python bench/step_overhead.py
	$(BIN)/python bench/peak_memory.py

docs: $(DOCS)  ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open build/site/index.html"

$(DOCS): $(READY)
	GRADSTATS_BUILD=none $(BIN)/python -m pip install -q --no-build-isolation -e ".[docs]"
	@touch $(DOCS)

clean:  ## remove what was built
	rm -rf $(VENV) build dist *.egg-info gradstats/*.so
