# Everything runs in .venv. torch comes first and pinned, with the Triton that belongs to it: left to itself pip would
# take other builds.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types wheel-check corners clean

demo: $(INSTALLED)
	$(BIN)/reroute-fx demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

.PHONY: install format docs docs-serve

install: $(INSTALLED)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site of docs/ in build/site; a warning is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The checkout maps passes/ and kernels/ into the package, which type checkers can't follow: check what is installed.
types: $(INSTALLED)
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy -p reroute_fx
	MYPYPATH=build/typecheck $(BIN)/mypy tests/typed_use.py

# The oldest and the newest torch and transformers that are declared; recorded with its date. Takes gigabytes and hours.
corners: $(INSTALLED)
	$(BIN)/python benchmarks/version_corners.py

# What users install, in an environment of its own.
wheel-check: $(INSTALLED)
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" .ci/check_wheel

$(INSTALLED): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" "$(TRITON)"
	$(BIN)/pip install --quiet -e ".[dev,bench,onnx]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
