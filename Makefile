# make demo   train a small PaLM on this machine's CPU, look at it, sample from it
# make test      the suite that shows that everything works here
# make test-all  all tests
# Both make their own virtual environment first.

PYTHON ?= python3
VENV ?= .venv
JAX ?= jax
WORKERS ?= 2
# The oldest jax is tested with the Triton of its time, which pip can't tell: newer jax-tritons ask
# for no newer jax.
TRITON ?= $(if $(filter jax==0.11.2,$(JAX)),jax-triton==0.3.1 triton==3.6.0)

.PHONY: help demo test test-all clean

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 12) or sys.exit("palm-haiku needs Python 3.12 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]' '$(JAX)' $(TRITON)
	@touch $@

test-all: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) $(ARGS)

demo: $(VENV)/installed
	$(VENV)/bin/python -m palm_haiku.demo

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .hypothesis
