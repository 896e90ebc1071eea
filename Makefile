# Everything a fresh machine with Python and make needs. PYTHON chooses the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types unit slow test-transformers test-peft limits versions clean

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

test: lint types unit

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.ready
	$(BIN)/mypy

unit: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 2 --dist loadscope

# Full-size golden cases: minutes and gigabytes.
slow: $(VENV)/.ready
	$(BIN)/python -m pytest -q --slow

# transformers' own common model, processor and tokenizer tests, fetched from its source distribution.
test-transformers: $(VENV)/.ready
	$(BIN)/python tests/transformers_suite/run.py

# peft's own custom models, fetched from its source distribution, through our merge.
test-peft: $(VENV)/.ready
	$(BIN)/python tests/peft_suite/run.py

# The largest inputs, sparse, in processes of 2 GB.
limits: $(VENV)/.ready
	$(BIN)/python -m pytest -q -s --slow tests/limits

# The ends of the stated ranges, each in an environment of its own; writes docs/versions.md.
versions: $(VENV)/.ready
	$(BIN)/python tests/versions/run.py

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .cache demo build *.egg-info
