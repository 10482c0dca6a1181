# Every target makes the virtual environment itself when it is missing and installs what it needs.
# The newest Python that can make one: a name on the PATH may not run (pyenv's), or lack ensurepip (Debian's).
# PYTHON= takes another, VENV= another folder.
RUNS = $(shell $(1) -c "import ensurepip, venv" >/dev/null 2>&1 && echo $(1))
PYTHON := $(or $(PYTHON),$(firstword $(foreach p,python3.13 python3.12 python3.11,$(call RUNS,$(p)))),python3.11)
VENV ?= .venv
# One more than the smallest machine has cores: processes of one job often wait for each other.
WORKERS ?= 3
# The PyTorch peers are pinned on Python 3.11, and have an environment of their own where PYTHON is another.
PEERS := $(if $(filter python3.11,$(notdir $(PYTHON))),$(VENV),$(VENV)-peers)

BIN = $(VENV)/bin
RUN = JAX_PLATFORMS=cpu $(BIN)/python
PIP = $(BIN)/pip install --quiet --disable-pip-version-check
MADE = $(VENV)/$(notdir $(PYTHON))
SHORT = tests/models tests/kernels tests/test_golden.py tests/parallel/test_two_processes.py
# Every stage of the demo, but hardly trained: the numbers it prints mean nothing.
SHORT_DEMO = --root=runs/short --set=collect.clips=128 --set=codec.steps=20 --set=world.steps=20 --set=action.steps=10 \
  --set=causal.steps=10 --set=distill.steps=6 --set=collect_long.held_out=8 --set=compare.clips=2 --set=compare.plays=1 \
  --set=compare.shown=1 --set=compare.found=6

.PHONY: venv play demo demo-short test test-short test-parity test-browser lint bench lock clean

# One stamp per Python and set of extras: another Python or a change of setup.py installs again.
$(MADE).stamp:
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(MADE).play.stamp: setup.py | $(MADE).stamp
	$(PIP) -e ".[serve]"
	touch $@

$(MADE).browser.stamp: setup.py | $(MADE).play.stamp
	$(PIP) -e ".[serve,test,browser]"
	touch $@

$(MADE).demo.stamp: setup.py | $(MADE).stamp
	$(PIP) -e ".[data,serve,eval]"
	touch $@

$(MADE).test.stamp: setup.py | $(MADE).demo.stamp
	$(PIP) -e ".[tpu,data,serve,eval,test,dev]"
	touch $@

$(MADE).peers.stamp: setup.py | $(MADE).test.stamp
	$(PIP) torch==2.13.0
	$(PIP) -e ".[convert,browser]"
	touch $@

venv: $(MADE).test.stamp

# The world of this repository in a page; any other: make play ARGS="--run=runs/demo/distill --picture=door.png".
play: $(MADE).play.stamp
	$(RUN) -m experiments.serve $(ARGS)

demo: $(MADE).demo.stamp
	$(RUN) -m experiments.quickstart $(ARGS)

demo-short: $(MADE).demo.stamp
	rm -rf runs/short
	$(RUN) -m experiments.quickstart $(SHORT_DEMO)

test: $(MADE).test.stamp
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not parity and not browser" $(ARGS)

# Networks, kernels, goldens and one job of two processes: for the other end of the Pythons and JAX versions.
test-short: $(MADE).test.stamp
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not parity and not browser" $(SHORT) $(ARGS)

# In Debian's Chromium (or another one on the PATH); nginx reads its example. Screenshots: runs/browser.
test-browser: $(MADE).browser.stamp
	@{ { command -v chromium || command -v chromium-browser || command -v google-chrome; } \
	    && PATH="$$PATH:/usr/sbin" command -v nginx; } >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && apt-get -qq update \
	    && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium nginx-light >/dev/null; } \
	  || { echo "test-browser needs Chromium and nginx: apt-get install chromium nginx-light" >&2; exit 1; }
	$(RUN) -m pytest -m browser tests/browser $(ARGS)

lint: $(MADE).test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

ifeq ($(PEERS),$(VENV))
test-parity: $(MADE).peers.stamp
	$(RUN) -m pytest -m parity $(ARGS)

bench: $(MADE).peers.stamp
	$(RUN) -m tests.bench $(ARGS)
else
test-parity bench:
	$(MAKE) $@ PYTHON=python3.11 VENV=$(PEERS) ARGS="$(ARGS)"
endif

# What the Dockerfile installs, with hashes, for every Python; pins that still fit stay, with ARGS=--upgrade none.
LOCKED = tpu data eval gcs wandb
lock: $(MADE).stamp
	$(PIP) -e ".[lock]"
	for python in 3.11 3.12 3.13; do \
	  $(BIN)/uv pip compile setup.py $(addprefix --extra=,$(LOCKED)) --python-version=$$python \
	    --python-platform=x86_64-manylinux_2_31 --generate-hashes --no-annotate --quiet \
	    --custom-compile-command="make lock" --output-file=requirements/pod-$$python.txt $(ARGS) || exit 1; \
	done

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info
