# Each target does all it needs on a fresh machine: virtual environment, installation, run.
#   make quickstart        train a small protein BERT on real Pfam domains, over four processes
#   make test              all tests
#   make test-faults       a run killed at twenty moments against one that was left alone
#   make lint              ruff and mypy
#   make bench             the benchmarks, one after another
# On a machine with GPUs: make CONSTRAINTS= test (the constraints pin a torch without CUDA).

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt

SHELL := bash
BIN := $(abspath $(VENV))/bin
PIP_INSTALL := $(BIN)/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
ROOMS := common pretrain finetune tools launch

.PHONY: quickstart test test-faults lint bench clean

quickstart: $(VENV)/.installed
	PATH="$(BIN):$$PATH" bash examples/quickstart.sh

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q

test-faults: $(VENV)/.installed-dev
	MEGAPROT_NUM_FAULTS=20 $(BIN)/python -m pytest -q tests/distributed/test_faults.py -k random

# mypy knows no mapping of folders to packages: build/types/megaprot/ROOM links to ROOM.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	rm -rf build/types && mkdir -p build/types/megaprot
	for room in $(ROOMS); do ln -s ../../../$$room build/types/megaprot/$$room; done
	MYPYPATH=build/types $(BIN)/mypy -p megaprot

bench: $(VENV)/.installed-dev
	for script in benchmarks/bench_*.py; do \
		echo "== $$script"; SECONDS=0; $(BIN)/python $$script || exit 1; echo "== $$script: $$SECONDS s"; done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis quickstart

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created setup.py $(CONSTRAINTS)
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e ".[data,dev]"
	touch $@
