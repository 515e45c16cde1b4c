# make run: train and evaluate on the watch data.  make test: lint and tests.
# Both make the virtual environment on their first call, and again when pyproject.toml has changed.
# PYTHON chooses the interpreter (3.11 or newer), VENV the folder of the environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help run test docs wheel clean

help:
	@echo "make run    install, train on the watch data, evaluate on held-out people, write a report"
	@echo "make test   install, lint and run the tests"
	@echo "make docs   install, build the API reference in build/docs"
	@echo "make wheel  build the wheel and run the quick start from it in a clean environment"
	@echo "make clean  remove the virtual environment $(VENV)"

run: $(VENV)/installed-data
	$(BIN)/cmamba train configs/watch.py

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest

docs: $(VENV)/installed-test
	$(BIN)/python tests/api_reference.py build/docs

wheel: $(BIN)/python
	rm -rf build/wheel && $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	"$(PYTHON)" -m venv --clear build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet build/wheel/cmamba_jax-*.whl
	cd build/wheel && venv/bin/python ../../tests/quick_start.py

clean:
	rm -rf $(VENV)

$(VENV)/installed-data: EXTRAS = data
$(VENV)/installed-test: EXTRAS = test,data
$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	@touch $@

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "error: '$(PYTHON)' not found: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$("$(PYTHON)" --version 2>&1) is too old: 3.11 or newer is needed; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
