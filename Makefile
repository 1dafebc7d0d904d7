# Everything runs in .venv, made from constraints.txt; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN ?= runs/digits
STEPS ?= 450

.PHONY: demo test test-slow lint typecheck format clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/installed          ## train on real digits, sample a labelled grid, say how good it is
	$(BIN)/diffcore train digits --steps $(STEPS) --folder $(RUN) --resume $(if $(wildcard $(RUN)/config.yaml),true,false)
	$(BIN)/diffcore sample $(RUN) --labels 0-9 --per-label 8 --seeds 0-79 --out $(RUN)/samples.png
	$(BIN)/python scripts/evaluate.py $(RUN) $(BOUNDS)

test: $(VENV)/installed          ## prove the numbers
	$(BIN)/pytest -q

test-slow: $(VENV)/installed     ## what takes minutes
	$(BIN)/pytest -q -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(VENV)/installed
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
