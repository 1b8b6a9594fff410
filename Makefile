PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help run test test-anywhere mutations mutants gpu lab docs export lint artifacts clean
.DELETE_ON_ERROR:

help:  ## show this list
	@echo "make <target> [PYTHON=python3.12] [ARGS='...']   (the first use installs into .venv, a few minutes and 6 GB)"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

run: $(STAMP)  ## run the book from the first notebook to the last; ARGS='07_ddpm' for one
	$(BIN)/diffusion-nb run $(ARGS)

test: $(STAMP)  ## check every notebook against its stored outputs, and the library; ARGS=quick for the library's short tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(patsubst quick,--quick tests,$(ARGS))

test-anywhere: $(STAMP)  ## the notebooks as other processors run them (hours): which cell differs, which claim is weak; ARGS='--python OTHER/bin/python'
	$(BIN)/python tools/anywhere.py $(ARGS)

mutations: $(STAMP)  ## put bugs into a copy of the library, one at a time, and see that the tests notice; ARGS='posterior -j 4'
	$(BIN)/python tests/mutations/run.py $(ARGS)

mutants: $(STAMP)  ## change the library at random, 300 times, and see how often the tests notice; ARGS='samplers -n 100 --seed 1'
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/mutations/auto.py $(ARGS)

gpu:  ## check a GPU and time it, 10 minutes; with the PyTorch that PYTHON has, no .venv; results in OUT, else benchmarks/results/gpu
	$(PYTHON) tools/gpu.py $(ARGS)

lab: $(STAMP)  ## open the book in JupyterLab
	OMP_NUM_THREADS=1 $(BIN)/jupyter lab $(ARGS) nbs/index.ipynb

docs: $(STAMP)  ## write the book, its ledger and the library as web pages under _site/
	$(BIN)/python tools/pages.py $(ARGS)

export: $(STAMP)  ## write diffusion_nb/ and README.md from the notebooks
	$(BIN)/python tools/first_cell.py
	$(BIN)/nbdev-export
	$(BIN)/python tools/stub.py
	$(BIN)/python tools/readme.py

lint: $(STAMP)  ## ruff, on notebooks too, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

artifacts: $(STAMP)  ## train every small network again and compare with the cards
	$(BIN)/diffusion-nb artifacts $(ARGS)

clean:  ## remove what was made here, except .venv and data
	rm -rf runs _book _site build dist .ruff_cache .mypy_cache .pytest_cache .hypothesis
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	  { echo "$(PYTHON) is missing or not Python 3.11 to 3.13: name one that is, as in 'make $(or $(MAKECMDGOALS),run) PYTHON=python3.12'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv: install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
