# One folder, .venv, holds everything. `make` alone lists the verbs.
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
STAMP := .venv/.installed

# Options for pip when it fetches torch alone, for instance an --index-url with the build of your choice.
TORCH_PIP_ARGS ?=
# More arguments for pytest: make test ARGS="-k wheel"
ARGS ?=
# How long `make fuzz` spends on each reader and each kind of file. ARGS="zero config.json" picks some of them.
SECONDS ?= 20

.DEFAULT_GOAL := help
.PHONY: help install demo test manifest docs dist lint format bench bench-8b peers test-peers test-lowest test-python faults fuzz clean

help:  ## list these verbs
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv with every package pinned, and this project in it

demo: $(STAMP)  ## train a small LLaVA, convert it to every layout, ask each about pictures (five minutes)
	@$(PY) -m fixtures.demo

test: $(STAMP)  ## run the tests, a process a core
	$(PY) -m pytest -n auto --dist worksteal $(ARGS)

manifest: $(STAMP)  ## say which files of every golden conversion changed; ARGS=--write takes them as right
	$(PY) -m tests.golden.manifest $(ARGS)

docs: $(STAMP)  ## make the pages of docs that are made of tables and commands, then the site, under site/
	$(PY) -m tests.docs.api_page
	$(PY) -m tests.docs.cli_page
	$(PY) -m tests.docs.facts_page
	$(PY) -m tests.docs.families_page
	$(PY) -m tests.docs.json_page
	$(PY) -m tests.docs.readme_table
	$(PY) -m tests.docs.forty
	$(PY) -m tests.docs.tour
	$(PY) -m tests.docs.picture
	$(PY) -m mkdocs build

dist: $(STAMP)  ## build what goes to PyPI, under dist/, and check it as PyPI does
	rm -rf dist
	$(PY) -m hatchling build
	@$(PY) -c 'import twine' 2>/dev/null || $(PIP) twine
	$(PY) -m twine check --strict dist/*

lint: $(STAMP)  ## ruff (rules and format), the rooms' contracts and mypy, as .ci/run does
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports
	$(PY) -m mypy

format: $(STAMP)  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)  ## time against cp; against the peers, ARGS="--jobs xtuner gguf --sizes 1 2.3"
	$(PY) -m benchmarks $(ARGS)

bench-8b: $(STAMP)  ## convert a LLaVA-Llama-3-8B of its real size, beside cp (up to 55 GB of disk)
	$(PY) -m benchmarks.eight $(ARGS)

peers: $(STAMP)  ## build the real converters, older transformers and llama.cpp (5 minutes), under .venvs
	$(PY) tests/peers/build.py all

test-peers: peers  ## run the tests that need them, on checkpoints that the real xtuner and DeepSpeed make here
	.venvs/xtuner/bin/python tests/peers/xtuner_cases.py --missing
	test -d .venvs/cases-zero || .venvs/xtuner/bin/python tests/peers/zero_cases.py
	$(PY) -m pytest -m peers $(ARGS)

test-lowest: $(STAMP)  ## convert with the lowest versions that pyproject.toml allows: the same bytes
	$(PY) tests/lowest.py

test-python: $(STAMP)  ## convert under another Python: make test-python PYTHON=python3.13
	$(PY) tests/lowest.py --python $(PYTHON)

faults: $(STAMP)  ## fail every system call of a job, kill it at 500 moments, change its source while it reads (an hour)
	$(PY) -m pytest -m sweep $(ARGS)

# atheris has wheels for Linux alone, so it is none of the dev dependencies.
fuzz: $(STAMP)  ## fuzz each reader and whole conversions for SECONDS=20 each, with atheris, which this installs
	@$(PY) -c 'import atheris' 2>/dev/null || $(PIP) atheris==3.0.0
	$(PY) -m tests.fuzz --seconds $(SECONDS) $(ARGS)

clean:  ## remove everything that make made, .venv and .venvs included
	rm -rf .venv .venvs .bench build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A shim may be on the PATH and not run, so each candidate is asked. A venv that is made half is removed again.
$(PY):
	@for python in python3.11 python3.12 python3.13 python3 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "creating .venv with $$($$python --version)"; \
	        $$python -m venv .venv && exit 0; \
	        rm -rf .venv; \
	        echo "$$python cannot create a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; \
	        exit 1; \
	    fi; \
	done; \
	echo "llava-convert needs Python 3.11 or later; none of python3.11, 3.12, 3.13, python3, python is one" >&2; \
	exit 1

# torch goes first and alone: asked together with its dependants, pip may weigh other builds of it, gigabytes each.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PIP) $(TORCH_PIP_ARGS) torch
	$(PIP) hatchling
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
