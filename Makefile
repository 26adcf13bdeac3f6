# demo: makes outputs/demo.mp4 with the bundled model.   test: the CPU test suite.   lint: ruff + mypy.
# bench: the benchmarks (a GPU is used if there is one).  Each target sets up .venv by itself, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/tilewise generate "a red circle moving right on a blue background" --method sta-balanced --compare dense --out outputs/demo.mp4

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) outputs build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
