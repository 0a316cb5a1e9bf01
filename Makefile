# Every target works on a bare machine with Python 3.11 or later: what it needs is installed into .venv first,
# and again only when pyproject.toml or constraints.txt change.
#   make demo    train a small V4 on real English and continue a prompt     make test    the tests
#   make check   ruff and pyright                                           make setup   only install
#   make faults  crashes, full disks, damaged files, kills and races: what a training run survives (minutes)
#   make bench-count     instructions of the C++ ops beside the committed ones: a slower commit, without a clock (valgrind)
#   make gpu-check   parity and timings on a machine with a GPU; needs torch alone, no set-up, no network
# Options for the program behind a target go into ARGS, as in: make test ARGS="-k muon"

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
ARGS ?=

.PHONY: setup demo test check faults bench-count gpu-check

setup: $(VENV)/.dev

demo: $(VENV)/.core
	$(PY) -m dsv4 demo $(ARGS)

# Two processes of one thread each: sums are then taken in the same order on every machine with the same CPU.
test: $(VENV)/.dev $(VENV)/.browser
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 $(ARGS)

check: $(VENV)/.dev
	$(PY) -m ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright

faults: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) tests/faults.py $(ARGS)

bench-count: $(VENV)/.core
	$(PY) -m dsv4 bench count $(ARGS)

# The .venv if there is one, else python3; PYTHON=... given by the user always wins.
gpu-check:
	$(if $(and $(filter file,$(origin PYTHON)),$(wildcard $(PY))),$(PY),$(PYTHON)) -m dsv4 bench gpu-check $(ARGS)

# The page of `dsv4 cost --html` is tested in a real browser. Where there is none, and none can be installed, that one test
# is skipped and says so (with CI set, it fails).
$(VENV)/.browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name > /dev/null && exit 0; done; \
	test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	  && (apt-get update -q && apt-get install -y -q --no-install-recommends chromium) > $(VENV)/browser.log 2>&1 \
	  || echo "no Chromium here, and it could not be installed: one test of the cost page will be skipped"
	@touch $@

# torch comes first and alone, at its pinned version: any looser request may fetch a newer and far larger build.
$(VENV)/.core: pyproject.toml constraints.txt setup.py dsv4/ops/build.py $(wildcard dsv4/ops/cpu/src/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "dsv4 needs Python 3.11 or later, this is %s: name one by  make PYTHON=python3.12 ..." % sys.version.split()[0])'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $$(grep '^torch==' constraints.txt)
	$(PIP) install -q -c constraints.txt -e .
	touch $@

# xgrammar is optional, and goes without what it asks for: triton, hundreds of megabytes that nothing on a CPU imports.
$(VENV)/.dev: $(VENV)/.core
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps xgrammar apache-tvm-ffi \
	  || echo "xgrammar cannot be installed here: three tests of the chat format will be skipped"
	touch $@
