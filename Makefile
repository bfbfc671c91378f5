# The two commands of the README, and what they stand on. Needs Python >= 3.11 and a package index; no GPU, no model hub.
SHELL := /bin/bash
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := $(UV) run --no-sync

.PHONY: demo test setup lint types format site help

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: setup ## dock, align, instruct, evaluate, ask: minutes on two cores
	$(RUN) opticnerve demo $(ARGS)

test: setup lint types ## lint, types, every test
	$(RUN) pytest $(ARGS)

setup: $(if $(filter .uv/bin/uv,$(UV)),.uv/bin/uv) ## install everything into .venv
	$(UV) sync --locked --quiet

# uv itself comes from the package index where it is missing.
.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet uv

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) lint-imports

types: setup
	$(RUN) mypy

format: setup ## let ruff put the code in order
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

site: setup ## the documents as a web site, in site/
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict
