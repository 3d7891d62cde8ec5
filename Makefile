# Each target sets itself up in .venv: only Python 3.11+ and make are assumed. Nothing is installed twice.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup demo test test-slow check wheel clean

demo: $(VENV)/demo.stamp
	$(BIN)/repvgg demo --out demo

setup: $(VENV)/all.stamp

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/pip.stamp
	$(BIN)/pip wheel -q --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "repvgg needs Python 3.11 or later: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/pip.stamp
	$(BIN)/pip install -q -e '.[demo]'
	@touch $@

$(VENV)/all.stamp: pyproject.toml | $(VENV)/pip.stamp
	$(BIN)/pip install -q -e '.[all]'
	@touch $@ $(VENV)/demo.stamp
