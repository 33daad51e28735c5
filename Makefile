# Everything runs in .venv. torch comes pinned, with the Triton that belongs to it: left to itself the installer would
# take other builds.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RAY := $(VENV)/.ray
WHEEL := build/wheel/.built
# What is downloaded and unpacked lies beside the checkout's other builds; environments link to it.
export UV_CACHE_DIR ?= $(CURDIR)/build/cache/uv
export PIP_CACHE_DIR ?= $(CURDIR)/build/cache/pip

# A new interpreter would compile all of torch and transformers again, which takes ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test full full-list lint types wheel wheel-check corners gate-times clean

demo: $(INSTALLED)
	$(BIN)/reroute-fx demo

# What every change has to pass.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# All tests, recorded with the commit, after the installed wheel's demo on compiled code. The gate asks for it when 40
# commits came after the last record.
full: $(INSTALLED) $(RAY) $(WHEEL)
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" BACKEND=inductor .ci/check_wheel
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --tier full --record-full

# What the gate leaves out, from the marks in the tests.
full-list: $(INSTALLED)
	$(BIN)/python -m pytest --collect-only --quiet --write-full-list > /dev/null

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
types: $(INSTALLED) $(WHEEL)
	rm -rf build/typecheck
	$(BIN)/python .ci/install.py $(VENV) --no-deps --target build/typecheck build/wheel/*.whl
	MYPYPATH=build/typecheck $(BIN)/mypy -p reroute_fx
	MYPYPATH=build/typecheck $(BIN)/mypy tests/typed_use.py

# The oldest and the newest torch and transformers that are declared; recorded with its date. Takes gigabytes and hours.
corners: $(INSTALLED)
	$(BIN)/python benchmarks/version_corners.py

# What users install, in an environment of its own.
wheel-check: $(INSTALLED) $(WHEEL)
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" .ci/check_wheel

wheel: $(WHEEL)

$(WHEEL): $(INSTALLED) $(shell find reroute_fx passes kernels -type f -not -name '*.pyc') README.md LICENSE MANIFEST.in
	.ci/build_wheel

# Seconds of the gate by phase on a fresh clone of this commit.
gate-times: $(INSTALLED)
	$(BIN)/python benchmarks/gate_times.py after

$(INSTALLED): pyproject.toml setup.py .ci/install.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python .ci/install.py $(VENV) "$(TORCH)" "$(TRITON)" -e ".[dev,bench,onnx]"
	touch $@

# What only all tests need: 330 MB that the gate does without.
$(RAY): $(INSTALLED)
	$(BIN)/python .ci/install.py $(VENV) "$(TORCH)" "$(TRITON)" -e ".[dev,bench,onnx,ray]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
