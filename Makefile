# Every target works alone on a fresh clone: Python 3.11 or 3.12, make and a package index are enough.

PYTHON ?= $(shell for each in python3.11 python3.12 python3; do \
	$$each -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
	2>/dev/null && echo $$each && break; done)
OPEN_WEBUI ?= 0.12.4
BIN := .venv/bin
READY := .venv/ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
ARGS ?=

.PHONY: help venv demo test test-fast check format bench
.DELETE_ON_ERROR:

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(READY) ## build .venv (the other targets do so themselves)

demo: $(READY) ## run Open WebUI with the pipe in it, at http://127.0.0.1:8080
	$(BIN)/python -m tests.demo $(ARGS)

test: $(READY) ## run every test, those with a real Open WebUI and a browser too
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(READY) ## run the tests that need no server
	$(BIN)/python -m pytest -m "not e2e" $(ARGS)

check: $(READY) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## measure the pipe under load
	$(BIN)/python -m tests.bench $(ARGS)

# Open WebUI comes without its dependencies: the slim list that it ships starts the real server in a tenth of the space.
$(READY): pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed; say where: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --no-deps open-webui==$(OPEN_WEBUI)
	$(INSTALL) -r .venv/lib/python3.*/site-packages/requirements-slim.txt
	$(INSTALL) --editable '.[dev]'
	@touch $@
