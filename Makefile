# One command each; `make help` lists them. The first target that needs it
# makes .venv (scripts/setup), so any of them can be run first.

VENV ?= .venv
PY := $(VENV)/bin/python
export VENV PYTHON TORCH_INDEX_URL

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-studies test-versions check format lock clean
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup: ## make .venv, or bring it up to date
	@scripts/setup

demo: setup ## a shaped and an unshaped run with no GPU, a table, an HTML report; ARGS='--servers 2'
	@"$(PY)" -m bench.demo $(ARGS)

test: setup ## every test; ARGS='-k sampler' picks some, ARGS=-n0 runs one at a time
	@"$(PY)" -m pytest --numprocesses 2 --dist loadscope --durations=20 $(ARGS)

test-studies: setup ## the tests of bench/studies, which `make test` leaves out
	@"$(PY)" -m pytest --numprocesses 2 --dist loadscope --durations=20 tests/studies $(ARGS)

test-versions: setup ## the scheduler's suites over other vLLMs; VERSIONS="0.23.0 0.33.0" picks
	@"$(PY)" scripts/test-versions $(VERSIONS) $(ARGS)

check: setup ## format, lint, types and every test; ARGS go to pytest
	@scripts/check $(ARGS)

format: setup ## rewrite the files in the house format
	@"$(PY)" -m ruff format . && "$(PY)" -m ruff check --fix .

lock: setup ## write requirements/emulated.lock anew
	@"$(PY)" scripts/lock

clean: ## remove .venv and what runs have left
	rm -rf "$(VENV)" .setup.lock .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist out
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
