# gradtools: everything that a developer runs. `make` alone lists the targets.
#
# Python 3.11 or newer and pip are all that is needed: the first target that wants an
# environment makes it. Another torch: `make test TORCH=2.15.0`.

TORCH  ?= 2.13.0
PYTHON ?= python3
VENV   := $(if $(filter 2.13.0,$(TORCH)),.venv,.venv-$(TORCH))
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
WORKERS ?= 2
# What `make package` runs of the tests.
INSTALLED ?= tests/rules tests/runtime/test_distribution.py tests/runtime/test_house.py \
    tests/runtime/test_public.py tests/runtime/test_spelling.py tests/neighbours

export OMP_NUM_THREADS ?= 1

.PHONY: help demo test lint types unit package docs sweep bench lifted format clean

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: $(READY) ## Train a classifier with custom rules; print figures, draw one
	for script in digits inside_a_network compiled_step; do \
	    $(BIN)/python examples/$$script.py || exit 1; done

test: lint types unit ## Lint, types and tests

lint: $(READY) ## Style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Static types of the package, and what users' checkers see of it
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/mypy --cache-dir $(VENV)/mypy

unit: $(READY) ## Tests alone
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

package: $(READY) ## Build wheel and sdist; test what they install
	rm -rf dist
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/python -m build --no-isolation
	WORKERS=$(WORKERS) .ci/installed $(BIN)/python $(INSTALLED)

docs: $(READY) ## Build the documentation: docs/_build/html/index.html
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python -m sphinx -q -W --keep-going -b linkcheck docs docs/_build/linkcheck
	$(BIN)/python -m tests.docs.links docs/_build/html

sweep: $(READY) ## Put the check to the test: mutants, torch's operators, cost
	$(BIN)/python -m tests.benchmarks.mutants --jobs $(WORKERS)
	$(BIN)/python -m tests.benchmarks.false_alarms --jobs $(WORKERS)
	$(BIN)/python -m tests.benchmarks.cost

bench: $(READY) ## Measure time and memory beside rules by hand; write docs/performance.md
	$(BIN)/python -m pip install -q -c constraints.txt --group bench
	$(BIN)/python -m tests.benchmarks.performance $(BENCH)

lifted: $(READY) ## Lift classes of other libraries; write docs/guides/functions.md
	$(BIN)/python -m pip install -q -c constraints.txt --group lifted
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps liger_kernel # has triton
	$(BIN)/python -m tests.benchmarks.lifted $(LIFTED)

format: $(READY) ## Mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove environments and everything that was made
	rm -rf .venv .venv-* build dist docs/_build .pytest_cache .ruff_cache .hypothesis

# torch first, by its exact version: a range would choose another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q -c constraints.txt \
	    --build-constraint constraints.txt -e '.[demo]' --group dev
	touch $@
