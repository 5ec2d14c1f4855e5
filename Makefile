# Everything runs from .venv, made from pyproject.toml under the exact versions in constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
# Bytecode is written now: uv leaves that to the first import, and where PYTHONDONTWRITEBYTECODE is set, to every one.
INSTALL = $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt

export OMP_NUM_THREADS ?= $(shell nproc)
export DO_NOT_TRACK = 1

.PHONY: demo test test-quick test-cluster docs reference lint format constraints clean

demo: $(VENV)/.installed
	$(BIN)/fovea run flows/pipelines/demo.yaml

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The inner loop: what starts no further processes.
test-quick: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'not (slow or multiprocess or cluster or browser or gpu or e2e)'

test-cluster: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m e2e --log-cli-level INFO --log-cli-format '%(asctime)s %(message)s'

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The pages of docs/reference, made from the models.
reference: $(VENV)/.installed-dev
	$(BIN)/python -m flows.cli.reference docs/reference

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The lock: exact versions for every supported Python, no addresses.
constraints: $(UV)
	$(UV) pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header --all-extras pyproject.toml -o constraints.txt

$(UV):
	$(PYTHON) -c 'import sys; sys.exit("Fovea needs Python 3.11 or newer: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.installed: pyproject.toml constraints.txt | $(UV)
	@echo "Installing Fovea into $(VENV) (several GB on a new machine) ..."
	$(INSTALL) --editable .
	$(BIN)/python -m compileall -q curation distill eval flows infra pretrain
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
