# `make demo` and `make test` need nothing but Python 3.11+ and make: they make their own
# virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/.demo-installed
	$(RUN) -m experiments.train --flagfile=experiments/flagfiles/digits.flags

test: $(VENV)/.test-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest -n auto --dist loadfile

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "zofl_jax needs Python 3.11 or newer, %s is %d.%d: try make PYTHON=python3.12 ..." % (sys.executable, *v[:2]))'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.demo-installed: $(VENV)/.python setup.cfg pyproject.toml
	$(RUN) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test-installed: $(VENV)/.python setup.cfg pyproject.toml
	$(RUN) -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
