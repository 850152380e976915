# `make demo` and `make test` need nothing but Python 3.11+ and make: they make their own
# virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo smollm2 reviews test clean

demo: $(VENV)/.demo-installed
	$(RUN) -m experiments.compare --flagfile=experiments/flagfiles/demo.flags

# Real weights and real text, into the user's cache folder.
smollm2: $(VENV)/.language-installed
	$(RUN) -m experiments.fetch smollm2

reviews: $(VENV)/.language-installed
	$(RUN) -m experiments.fetch reviews

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

$(VENV)/.language-installed: $(VENV)/.python setup.cfg pyproject.toml
	$(RUN) -m pip install --quiet --editable '.[language]'
	@touch $@

$(VENV)/.test-installed: $(VENV)/.python setup.cfg pyproject.toml
	$(RUN) -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
