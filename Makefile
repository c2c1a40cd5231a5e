# make quickstart   install into .venv and train GPT and Retro on Python's documentation (10 minutes on 2 cores)
# make test         the tests (under 15 minutes on 2 cores); TESTS=tests/corpus for a part of them
# make test-all     the slow ones too, on this Python and on Python 3.12 where there is one; continues where it stopped
# make test-cuda    the tests that compile for GPUs, on a machine that needs none (installs 4.4 GB into .venv-cuda)
# make test-harness  the adapter to lm-evaluation-harness (installs it into .venv-harness)
# make lint         ruff and mypy
# make goldens      write the golden files anew; read the diff
# make constraints  write constraints.txt from what is installed in .venv and .venv-3.12

PYTHON ?= python3
# The first that is a Python 3.12; pyenv's are not on the path unless they are chosen.
PYTHON312 ?= $(shell for p in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python3.12; do \
    $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$p && break; done)
TESTS ?= tests
# Two processes, a file of tests in one of them; PYTEST_ARGS= for one process.
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile

BIN := .venv/bin
BIN312 := .venv-3.12/bin
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt

.PHONY: quickstart install install-dev test test-all test-cuda test-harness lint goldens constraints

quickstart: install
	$(BIN)/python train.py --config configs/quickstart.gin

test: install-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TESTS)

test-all: install-dev
	$(BIN)/python tests/run_all.py
ifneq ($(PYTHON312),)
	$(MAKE) --no-print-directory .venv-3.12/.dev
	$(BIN312)/python tests/run_all.py
else
	@echo "not run on Python 3.12: there is none on the path; name one with make test-all PYTHON312=/path/to/python3.12"
endif

test-cuda: .venv-cuda/.dev
	.venv-cuda/bin/python -m pytest -m cuda tests/planning

test-harness: .venv-harness/.dev
	.venv-harness/bin/python -m pytest -m harness tests/evaluation

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy kernels train.py eval.py

goldens: install-dev
	$(BIN)/python -m pytest --renew-goldens tests
	git --no-pager diff --stat tests/golden

constraints: .venv/.dev .venv-3.12/.dev
	{ echo "# Versions that the tests pass with. Written by make constraints."; \
	  $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude torch | sed 's/$$/; python_version == "3.11"/'; \
	  $(BIN312)/python -m pip freeze --all --exclude-editable --exclude pip --exclude torch | sed 's/$$/; python_version == "3.12"/'; } > constraints.new
	mv constraints.new constraints.txt

install: .venv/.cpu
install-dev: .venv/.dev

.venv/.cpu: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) --editable '.[cpu]'
	touch $@

.venv/.dev: .venv/.cpu
	$(BIN)/python $(INSTALL) --editable '.[cpu,dev]'
	touch $@

.venv-cuda/.dev: $(SOURCES)
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python $(INSTALL) --editable '.[cpu,dev,cuda]'
	touch $@

# Without constraints, whose versions lm_eval need not take.
.venv-harness/.dev: $(SOURCES)
	$(PYTHON) -m venv .venv-harness
	.venv-harness/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,dev,harness]'
	touch $@

.venv-3.12/.dev: $(SOURCES)
	$(PYTHON312) -m venv .venv-3.12
	$(BIN312)/python $(INSTALL) --editable '.[cpu,dev]'
	touch $@
