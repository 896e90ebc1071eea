# Everything a fresh machine with Python and make needs. PYTHON chooses the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types unit test-shuffled fuzz faults limits versions slow bench test-transformers test-peft clean

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

# In another order, with a home folder that is not there and cannot be made, in the C locale, in another time zone and
# without network. SEED=… repeats an order.
SEED ?= $(shell date +%s)
test-shuffled: $(VENV)/.ready
	HOME=/proc/none LC_ALL=C TZ=Pacific/Chatham \
		$(BIN)/python -m pytest -q -n 2 --dist loadscope --shuffle $(SEED) --offline

# Every reader on a million mutated and grown inputs; docs/reliability.md has the figures.
fuzz: $(VENV)/.ready
	$(BIN)/python tests/fuzzing/run.py

# Every command killed, interrupted and refused by the disk at its system calls. Needs a C compiler.
faults: $(VENV)/.ready
	$(BIN)/python tests/faults/run.py

# Full-size golden cases: minutes and gigabytes.
slow: $(VENV)/.ready
	$(BIN)/python -m pytest -q --slow

# Every benchmark, one after the other; writes benchmarks/RESULTS.md. Half an hour on 2 idle cores, 12 GB of disk.
bench: $(VENV)/.ready
	$(BIN)/python benchmarks/bench.py

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
