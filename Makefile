# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt

.PHONY: demo test install install-dev lint types imports pytest wheel clean benchmarks

demo: install
	$(BIN)/rlgen-stats demo --folder runs/demo

test: install-dev lint types imports pytest

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@ $(VENV)/.installed

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and import-linter cannot follow an editable install, so they read the packages through links.
.namespace/rlgen_stats:
	mkdir -p $@
	for package in schemas stores toolkit cli; do ln -sfn ../../$$package $@/$$package; done

types: .namespace/rlgen_stats
	MYPYPATH=.namespace $(BIN)/mypy -p rlgen_stats.schemas -p rlgen_stats.stores -p rlgen_stats.toolkit -p rlgen_stats.cli

imports: .namespace/rlgen_stats
	cd .namespace && PYTHONPATH=. ../$(BIN)/lint-imports --config ../pyproject.toml

pytest:
	$(BIN)/python -P -m pytest -n 2

wheel: install-dev
	rm -rf build dist
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) .namespace build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
