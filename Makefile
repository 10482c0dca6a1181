# Every target makes .venv itself when it is missing and installs what it needs.
PYTHON ?= python3.11
BIN := .venv/bin
RUN := JAX_PLATFORMS=cpu $(BIN)/python

.PHONY: venv demo test test-parity lint bench clean

# One stamp a set of extras: a change of setup.py installs again.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: setup.py | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[data,serve,eval]"
	touch $@

.venv/test.stamp: setup.py | .venv/demo.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[tpu,data,serve,eval,test,dev]"
	touch $@

.venv/parity.stamp: setup.py | .venv/test.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[convert]"
	touch $@

venv: .venv/test.stamp

demo: .venv/demo.stamp
	$(RUN) -m experiments.quickstart $(ARGS)

test: .venv/test.stamp
	$(RUN) -m pytest -n 2 --dist loadfile -m "not parity" $(ARGS)

test-parity: .venv/parity.stamp
	$(RUN) -m pytest -m parity $(ARGS)

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/parity.stamp
	$(RUN) -m tests.bench $(ARGS)

clean:
	rm -rf .venv build *.egg-info
