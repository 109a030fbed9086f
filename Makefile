# Everything runs in an environment of its own, made from the versions in configs/constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := keyreduce-out/demo

.PHONY: setup demo check test test-fast test-versions clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml configs/constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint configs/constraints.txt --editable ".[test,train,harness,ray]"
	touch $@

# The main line: each command finds what the one before it wrote.
demo: export KEYREDUCE_WORK := $(DEMO)
demo: setup
	rm -rf $(DEMO)
	$(BIN)/keyreduce calibrate
	$(BIN)/keyreduce prune --method wanda --ratio 0.25
	$(BIN)/keyreduce recover --num-batches 8
	$(BIN)/keyreduce convert-dcp
	$(BIN)/keyreduce benchmark --mixer
	$(BIN)/keyreduce eval

# Style and types; under a minute.
check: setup
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

# Two processes of one thread each: the tests are many and small.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

# What needs no model: under 90 seconds.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --fast

# The oldest versions that pyproject.toml allows and the pinned ones, each without extras and then with them.
test-versions:
	$(PYTHON) tests/versions.py

clean:
	rm -rf $(VENV) .venv-versions keyreduce-out build *.egg-info
