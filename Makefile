# `make demo` and `make test` need nothing but Python 3.11+ and make: they make their own
# virtual environment in .venv. Everything that the pages say to run works in it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP ?= $(RUN) -m pip
PYTEST := $(RUN) -m pytest -n auto

.PHONY: demo smollm2 reviews product_reviews editorials test thorough quick check docs clean

demo: $(VENV)/.installed
	$(RUN) -m experiments.compare --flagfile=experiments/flagfiles/demo.flags

# Real weights and real texts, into the user's cache folder.
smollm2: $(VENV)/.installed
	$(RUN) -m experiments.fetch $@

reviews: $(VENV)/.installed
	$(RUN) -m experiments.fetch $@

product_reviews: $(VENV)/.installed
	$(RUN) -m experiments.fetch $@

editorials: $(VENV)/.installed
	$(RUN) -m experiments.fetch $@

# The tests, and nothing but tests: what a user runs. All of the library, and of what is true for many
# cases some; tests/thorough.txt lists the others.
test: $(VENV)/.test-installed
	$(PYTEST) -m 'not thorough'

# Every test.
thorough: $(VENV)/.test-installed
	$(PYTEST)

# Some tests of every module, the inner loop of a change.
quick: $(VENV)/.test-installed
	$(PYTEST) $$(grep -v '^#' tests/quick.txt)

# Lint and types, for who changes the code: both tools at the versions of setup.cfg.
check: $(VENV)/.check-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, into site/: index.html opens from there, offline. Warnings are errors.
docs: $(VENV)/.docs-installed
	PATH=$(VENV)/bin:$$PATH NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "zofl_jax needs Python 3.11 or newer, %s is %d.%d: try make PYTHON=python3.12 ..." % (sys.executable, *v[:2]))'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	@touch $@

$(VENV)/.installed: $(VENV)/.python setup.cfg pyproject.toml
	$(PIP) install --quiet --editable '.[language,privacy]'
	@touch $@

$(VENV)/.test-installed: $(VENV)/.python setup.cfg pyproject.toml
	$(PIP) install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.check-installed: $(VENV)/.python setup.cfg pyproject.toml
	$(PIP) install --quiet --editable '.[check,language,privacy]'
	@touch $@

$(VENV)/.docs-installed: $(VENV)/.python setup.cfg pyproject.toml
	$(PIP) install --quiet --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .mypy_cache .ruff_cache .pytest_cache
