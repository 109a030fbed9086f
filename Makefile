# Everything runs in an environment of its own, made from the versions in configs/constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := keyreduce-out/demo

NEEDS := $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
# Which interpreter an environment was made from.
INTERPRETER := import sys; print(sys.version, sys.base_prefix)

define need_python
@$(PYTHON) -c 'import sys; v = sys.version_info >= tuple(map(int, "$(NEEDS)".split("."))); \
v or sys.exit("keyreduce needs Python $(NEEDS) or newer, and $(PYTHON) is " + sys.version.split()[0] \
+ "; name another one: make PYTHON=python$(NEEDS)")'
endef

.PHONY: setup demo check test test-fast test-versions docs results dist clean

setup: $(VENV)/.ready

# An environment of the same interpreter is kept, and what differs from the pinned versions is installed into it.
# `make clean setup` makes a fresh one.
$(VENV)/.ready: pyproject.toml configs/constraints.txt
	$(need_python)
	@test "$$($(BIN)/python -c 'import pip; $(INTERPRETER)' 2>/dev/null)" = "$$($(PYTHON) -c '$(INTERPRETER)')" \
	|| $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint configs/constraints.txt --editable ".[docs,harness,ray,test,train]"
	touch $@

# The session of the README, and then the rest of the main line: each command finds what the one before it wrote.
demo: export KEYREDUCE_WORK := $(DEMO)
demo: setup
	rm -rf $(DEMO)
	$(BIN)/keyreduce inspect
	$(BIN)/keyreduce prune --state-ratio 0.5 --recover least-squares
	$(BIN)/keyreduce eval
	$(BIN)/keyreduce convert-dcp
	$(BIN)/keyreduce benchmark --mixer

# Style and types; under a minute.
check: setup
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

# Two processes of one thread each: the tests are many and small.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

# What needs no model: under 90 seconds.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal --fast

# The oldest versions that pyproject.toml allows and the pinned ones, each without extras and then with them.
test-versions:
	$(need_python)
	$(PYTHON) tests/versions.py

# docs/results.md and its pictures, from the JSON that is committed in benchmarks/; nothing is measured.
results: setup
	$(BIN)/python benchmarks/results.py

# The site, in build/site; a link that leads nowhere is an error.
docs: setup
	$(BIN)/python docs/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The wheel and the sdist; docs/release.md says what comes before and after.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) .venv-versions keyreduce-out build dist *.egg-info
