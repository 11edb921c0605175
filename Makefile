# make serve and make test are all a newcomer needs. Both begin with make setup, which does nothing the second time.
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# The first of these that runs and is new enough; overrule it with make setup PYTHON=...
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell $(name) $(NEW_ENOUGH) && echo $(name))))
PIP = PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-deps
# Tests that start real engines, their workers or Ray clusters. They run in one process, after the others: the threads of an
# engine wait for each other after each matrix product, and a second process on the same cores makes it many times slower.
ALONE = tests/end_to_end tests/server/distributed tests/training/rl/test_on_ray.py \
	tests/server/generation/test_worker_watchdog.py tests/server/generation/test_free_memory.py
TWO_AT_A_TIME = $(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile $(ALONE:%=--ignore=%)
TORCH = $(shell grep '^torch==' requirements/cpu.txt)

.PHONY: help setup models serve test test-fast check docs site bench lock clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(READY) models  ## make .venv, install the pinned packages, prepare the embedded models

# torch comes first, as the build for CPUs: from what pip is configured with, or else from PyTorch's own index.
# Everything else is pinned and needs no resolving: requirements/lock.py tells why.
$(READY): requirements/cpu.txt pyproject.toml
	@$(or $(PYTHON),false) $(NEW_ENOUGH) || { echo "nbest needs Python 3.11 or newer: install one, or name it with make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing $(TORCH) for CPUs (1 of 3)"
	@$(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) "$(TORCH)" --index-url https://download.pytorch.org/whl/cpu
	@echo "Installing the $$(grep -c == requirements/cpu.txt) packages of requirements/cpu.txt, the first time for a few minutes (2 of 3)"
	@$(PIP) -r requirements/cpu.txt
	@echo "Installing nbest itself from this folder (3 of 3)"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

models: $(READY)
	@$(BIN)/nbest prepare >/dev/null

serve: setup  ## serve on 127.0.0.1:8000 until Ctrl-C
	@$(BIN)/nbest serve

test: setup  ## run every test: first two files at a time, then what needs the machine for itself
	@$(TWO_AT_A_TIME)
	@$(BIN)/python -m pytest --quiet $(ALONE)

test-fast: setup  ## run the pure and component tests: no engines, Ray clusters or browsers, and not the slowest of the others
	@$(TWO_AT_A_TIME) -m "not browser and not slow"

check: $(READY)  ## style, types, import fences, words, generated pages, links of the documentation
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest --quiet tests/test_layering.py
	@$(BIN)/python -m scripts.words
	@$(BIN)/python -m scripts.docs --check
	@$(BIN)/python -m scripts.site --check

docs: $(READY)  ## write the pages of docs/ that are made from code
	@$(BIN)/python -m scripts.docs

site: $(READY)  ## build docs/ as a web site in build/site/html
	@$(BIN)/python -m scripts.site

bench: setup  ## measure the short benchmarks anew, and redraw the figures and tables
	@for name in scoring_overhead router_overhead scoring blockwise latency plot; do $(BIN)/python -m benchmarks.$$name || exit; done
	@$(BIN)/python -m scripts.docs

lock: $(READY)  ## resolve requirements/cpu.in into cpu.txt
	@$(BIN)/python requirements/lock.py

clean:  ## remove .venv and everything built
	@rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
