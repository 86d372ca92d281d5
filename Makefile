# make demo      train a small PaLM on this machine's CPU, look at it, sample from it
# make length    the figure of docs/evaluate.md: rotary and ALiBi beyond the trained length
# make test      the suite that shows that everything works here
# make test-all  all tests
# make lint      ruff and pyright
# Each installs what it needs into .venv first.

PYTHON ?= python3
VENV ?= .venv
JAX ?= jax
WORKERS ?= 2
# The oldest jax is tested with the Triton of its time, which pip can't tell: newer jax-tritons ask
# for no newer jax.
TRITON ?= $(if $(filter jax==0.11.2,$(JAX)),jax-triton==0.3.1 triton==3.6.0)

.PHONY: help demo length test test-all lint clean

help:
	@sed -n 's/^# //p' Makefile

# The demo needs the base dependencies alone; tests add theirs to the same environment. What pip says
# is shown if it fails.
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 12) or sys.exit("palm-haiku needs Python 3.12 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 ..." % v[:2])'
	@echo "Installing $(1) into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --editable $(2) '$(JAX)' > $(VENV)/pip.log 2>&1 \
	  || { cat $(VENV)/pip.log; exit 1; }
endef

$(VENV)/installed-base: setup.cfg pyproject.toml
	$(call install,palm-haiku (0.9 GB),.)
	@touch $@

$(VENV)/installed: setup.cfg pyproject.toml
	$(call install,palm-haiku and what its tests need (3 GB),'.[test]' $(TRITON))
	@touch $(VENV)/installed-base $@

test-all: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

demo: $(VENV)/installed-base
	@$(VENV)/bin/python -m palm_haiku.demo

length: $(VENV)/installed-base
	@$(VENV)/bin/python examples/train_short_test_long.py

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
