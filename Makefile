# Everything runs in .venv, made from constraints.txt; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BENCH ?= .venv-bench
BIN = $(VENV)/bin
RUN ?= runs/digits
STEPS ?= 450
EMOJI ?= runs/data/emoji
COLOR ?= runs/emoji
# The larger size for one GPU: make demo-color COLOR_RECIPE=emoji-gpu COLOR=runs/emoji-gpu
COLOR_RECIPE ?= emoji
# Further options of its training, such as --steps 20 for a first try.
COLOR_OPTIONS ?=
# How the demo is sampled for its score, whatever the settings of the recipe, so that scores can be compared.
SAMPLING = --sampler DDIM --grid Trailing --steps 25 --guidance CFG --guidance.scale 1.5
# Test workers: one for each core that is visible, each with one thread.
WORKERS ?= auto
# The byte code of tests is kept, which saves each worker and each command in a process of its own its compilation.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_OPTIONS)

.PHONY: help demo demo-color test test-slow test-thorough coverage lint typecheck format gallery docs bench clean

help:                            ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/installed          ## train on real digits, sample a labelled grid, score it
	$(BIN)/diffcore train digits --steps $(STEPS) --folder $(RUN) --resume auto
	$(BIN)/diffcore sample $(RUN) --labels 0-9 --per-label 8 --seeds 0-79 --out $(RUN)/samples.png
	$(BIN)/diffcore evaluate $(RUN) --features pixels --n 500 --reference '{class_path: Digits, init_args: {split: test}}' $(SAMPLING) $(BOUNDS)

demo-color: $(VENV)/installed    ## train on emoji pictures that npm fetches, sample each category, score it
	test -f $(EMOJI)/content.json || $(BIN)/python scripts/prepare_emoji.py --out $(EMOJI)
	$(BIN)/diffcore train $(COLOR_RECIPE) --data.folder $(EMOJI)/train --validation.data.folder $(EMOJI)/test --folder $(COLOR) --resume auto $(COLOR_OPTIONS)
	$(BIN)/diffcore sample $(COLOR) --labels 0-8 --per-label 10 --seeds 0-89 --out $(COLOR)/samples.png
	$(BIN)/diffcore features train $(EMOJI)/train --out $(COLOR)/features.safetensors
	$(BIN)/diffcore evaluate $(COLOR) --features $(COLOR)/features.safetensors --reference $(EMOJI)/test --n 320

test: $(VENV)/installed          ## run the tests (about 6 minutes on two cores)
	$(PYTEST)

test-slow: $(VENV)/installed     ## run the tests that take minutes each
	$(PYTEST) -m "slow and not thorough"

test-thorough: $(VENV)/installed ## run every combination of the tests of which `make test` runs a sample
	$(PYTEST) -m thorough

coverage: $(VENV)/installed      ## run tests and slow tests, print the branch coverage of the package; fail below 95 %
	$(PYTEST) -m "not thorough" --cov --cov-report=term:skip-covered

bench: $(BENCH)/installed        ## remake all tables and plots of docs/benchmarks.md, beside other libraries
	$(BENCH)/bin/python scripts/benchmark.py all $(BENCH_OPTIONS)

$(BENCH)/installed: pyproject.toml constraints.txt scripts/benchmarks/sides/peers.txt scripts/benchmarks/sides/peers-needs.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" -r scripts/benchmarks/sides/peers-needs.txt
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check --no-deps -r scripts/benchmarks/sides/peers.txt
	touch $@

lint: $(VENV)/installed          ## check style, format and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(VENV)/installed     ## check types
	$(BIN)/mypy

format: $(VENV)/installed        ## repair style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gallery: $(VENV)/installed       ## draw the pictures of docs/, in light and dark; trains the demo if runs/digits is missing
	$(BIN)/diffcore train digits --resume auto
	$(BIN)/python scripts/gallery.py

docs: $(VENV)/installed          ## build the documentation in build/site, and try its search in Chromium if there is one
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python scripts/check_site.py build/site
	$(BIN)/pytest -q -m slow tests/scripts/test_site_search.py

clean:                           ## remove what was built; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
