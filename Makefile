# Every target makes .venv from constraints.txt when it is missing or out of date.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT ?= audit

.PHONY: audit test test-all lint bench package peers clean help
.DEFAULT_GOAL := help

help:
	@echo "make audit     training, aggregation, inference: protect, attack, print the table ($(OUT)/report.html)"
	@echo "make test      all tests but the slowest"
	@echo "make test-all  all tests"
	@echo "make lint      format, style, types, layers"
	@echo "make bench     every benchmark, into benchmarks/results"
	@echo "make package   wheel and sdist, tried in an empty environment"
	@echo "make peers     environments of the projects that benchmarks compare with, in .peers"
	@echo "make clean     remove environments and caches"

# CrypTen's metadata asks for a package that no longer exists, hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[hf,dev]' omegaconf
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps crypten
	touch $@

audit: $(INSTALLED)
	$(BIN)/privlm audit --out $(OUT)

test: $(INSTALLED)
	$(BIN)/pytest -m 'not slow'

test-all: $(INSTALLED)
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

# The wheel and the sdist, and the wheel in an empty environment without any extra.
package: $(INSTALLED)
	rm -rf dist && $(BIN)/python -m build
	$(PYTHON) -m venv dist/empty
	dist/empty/bin/pip install --quiet --constraint constraints.txt torch
	dist/empty/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && empty/bin/python -c 'import attacks.suite, privlm.runs, protocols.transport' \
		&& empty/bin/privlm --version

# Projects whose requirements exclude ours; each in an environment of its own.
PEERS := flwr spu
PEER_flwr := flwr[simulation]==1.41.0
PEER_spu := spu==0.9.5

peers: $(PEERS:%=.peers/%/.installed)

.peers/%/.installed:
	$(PYTHON) -m venv .peers/$*
	.peers/$*/bin/pip install --quiet --upgrade pip
	.peers/$*/bin/pip install --quiet '$(PEER_$*)'
	touch $@

clean:
	rm -rf $(VENV) .peers build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
