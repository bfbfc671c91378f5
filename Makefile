# The two commands of the README, and what they stand on. Needs Python >= 3.11 and a package index; no GPU, no model hub.
SHELL := /bin/bash
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := $(UV) run --no-sync
SPACE := $() $()
# Tests whose types are not in order yet.
UNTYPED := tests/(data/test_scale|fuzz/(fuzz_data|long)|models/test_(saving|fusion_classifier)|serve/test_(chat|crowd|refusals|stopping)).py

.PHONY: demo test test-plain coverage setup lint types format site help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: setup ## dock, align, instruct, evaluate, ask: minutes on two cores
	$(RUN) opticnerve demo $(ARGS)

test: setup lint types ## lint, types, every test
	$(RUN) pytest -n 2 $(ARGS)

test-plain: setup ## every test, with all switched off that exists for speed alone
	OPTICNERVE_PLAIN=1 $(RUN) pytest -n 2 $(ARGS)

coverage: setup ## every test, and how much of the package ran: not less than pyproject.toml says
	$(RUN) pytest --cov $(ARGS)

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

# Of the tests, strictly but for what follows. They import their neighbours by bare name, as pytest lets them, so that a second
# conftest would be a second module of that name. They hand in stand-ins (arg-type, dict-item), reach into modules
# (attributes that are a Tensor or a Module to torch's types), and replace what a module imports.
types: setup
	$(RUN) mypy
	MYPYPATH=src:benchmarks:tests:examples/third_party/src:$(subst $(SPACE),:,$(filter-out %.py,$(wildcard tests/*))) \
		$(RUN) mypy --cache-dir .mypy_cache/tests --explicit-package-bases --follow-imports silent \
		--exclude '^tests/[a-z]+/conftest.py' --exclude '$(UNTYPED)' --implicit-reexport --allow-untyped-calls \
		--no-strict-equality --no-warn-return-any --no-warn-unused-ignores \
		$(addprefix --disable-error-code ,arg-type dict-item func-returns-value import-untyped operator union-attr) tests

format: setup ## let ruff put the code in order
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

site: setup ## the documents as a web site, in site/
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict
