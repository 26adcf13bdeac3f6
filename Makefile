# demo: makes outputs/demo.mp4 with the bundled model.   lint: ruff + mypy.
# test: the CPU test suite.   quick: its fast tests of kernels and plugins (model families included), in under a minute.
# bench: the benchmarks (a GPU is used if there is one).  Each target sets up .venv by itself, once.
#
# PIP_ARGS is passed to pip. On a machine without a GPU, naming PyTorch's own index of CPU builds there saves gigabytes:
#   make demo PIP_ARGS='--extra-index-url URL'
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick lint bench clean
.DELETE_ON_ERROR:

# A venv that Debian's python3 makes without the package python3-venv has no pip: it is made anew, not taken for a good one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tilewise needs Python 3.11 or later: make PYTHON=python3.12 …")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
	  || { echo 'python3 -m venv failed: on Debian and Ubuntu, install python3-venv' >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS) --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/tilewise generate "a red circle moving right on a blue background" --method sta-balanced --compare dense --out outputs/demo.mp4 --force

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not (slow or compile or cli or web or gpu)' tests/kernels tests/plugins tests/test_structure.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) outputs build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
