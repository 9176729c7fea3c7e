# `make demo` and `make test` set up everything they need; a second run takes seconds.
#   PYTHON=python3.12 make test    another interpreter (>= 3.10)
#   UNIQUE_ATTN_CUDA=auto|0|1      CUDA kernels: when nvcc is found, never, always
VENV ?= .venv
# The first interpreter of these that is new enough.
PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11 python3.10,$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $(python))))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TEST_JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?= all
PY_SOURCES := .
CXX_SOURCES = $(shell find csrc -name "*.h" -o -name "*.cuh" -o -name "*.cpp" -o -name "*.cu")

# Which transformers `test-transformers` runs on; "locked" is the one of $(VENV).
TRANSFORMERS ?= oldest locked newest

# Which vLLM `test-vllm` runs on.
VLLM ?= locked

.PHONY: help setup build demo test test-transformers test-vllm bench report info sanitize lint format lock cuda-compile cuda-hazards docs \
	sdist wheel wheels wheel-hazards wheel-smoke clean distclean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo               sparse generation of a real model over a real document"
	@echo "make test               the tests"
	@echo "make test-transformers  the Hugging Face tests on the oldest, the locked and the newest transformers"
	@echo "make build | info       build in place | what was built and where it runs"
	@echo "make test-vllm          the tests of the backend for vLLM, on the CPU (VLLM='oldest locked' for both versions)"
	@echo "make bench              the tables of benchmarks/results (BENCH_ARGS='decode ...' for a single benchmark)"
	@echo "make report             tables and pictures of the README and docs/, from benchmarks/results"
	@echo "make sanitize           CUDA kernels under compute-sanitizer (needs a GPU)"
	@echo "make lint | format      linters | formatters"
	@echo "make lock               requirements/lock.txt anew, with the newest versions"
	@echo "make cuda-compile       compile every CUDA source"
	@echo "make docs               the documentation in build/docs/index.html"
	@echo "make sdist | wheel      in dist/: the source archive | a wheel made from it, for this machine"
	@echo "make wheels             in dist/: manylinux wheels with CUDA for every CPython (needs docker or podman)"
	@echo "make wheel-smoke        the wheel of dist/ in an environment with nothing but torch"
	@echo "make clean | distclean  remove what was built | the environments too"

# ---- Set-up ----

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.10 was found: install one or run make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Torch first and alone: its build depends on the machine, so it is not in the lock. Everything else is, so nothing but
# the lock is installed afterwards and nothing can bring another torch. `check` says if the lock left something out.
$(VENV)/.requirements: requirements/torch.txt requirements/lock.txt | $(BIN)/python
	$(PIP) install -c requirements/lock.txt -r requirements/torch.txt
	$(PIP) install -q --no-deps -r requirements/lock.txt
	$(PIP) check
	@touch $@

# The editable install only points at this folder: `build` compiles, the first time and after every change.
$(VENV)/.installed: $(VENV)/.requirements pyproject.toml setup.py
	$(BIN)/python -m build_tools
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

setup: $(VENV)/.requirements

build: $(VENV)/.installed
	@$(BIN)/python -m build_tools

# ---- The two commands of the README ----

demo: build
	$(BIN)/python -m examples.demo $(DEMO_ARGS)

test: build
	$(BIN)/python -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS)

# ---- The rest ----

info: build
	@$(BIN)/python -m unique_attn info

bench: build
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

report: build
	$(BIN)/python -m benchmarks report

# An environment with its own transformers on top of $(VENV), whose torch, built package and pip it uses.
.venv-tf-%/.requirements: requirements/transformers-%.txt requirements/torch.txt $(VENV)/.requirements
	$(BIN)/python -m venv --clear --without-pip .venv-tf-$*
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$(.venv-tf-$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	.venv-tf-$*/bin/python -m pip --disable-pip-version-check install -q -U -c requirements/torch.txt -r $<
	@touch $@

# What is newest changes without a change here.
.venv-tf-newest/.requirements: FORCE

test-transformers: build $(patsubst %,.venv-tf-%/.requirements,$(filter-out locked,$(TRANSFORMERS)))
	@status=0; done=; for name in $(TRANSFORMERS); do \
		python=.venv-tf-$$name/bin/python; [ $$name != locked ] || python=$(BIN)/python; \
		version=$$($$python -c "import importlib.metadata as m; print(m.version('transformers'))") || exit 1; \
		case "$$done " in *" $$version "*) echo "== transformers $$version, $$name: tested already"; continue;; esac; \
		done="$$done $$version"; echo "== transformers $$version, $$name"; \
		$$python -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS) tests/test_hf_*.py || status=1; \
	done; exit $$status

# vLLM pins a torch, so its environment has one of its own. The package in it is this checkout; what was compiled serves
# both, and so does the metadata that `build` made, by which vLLM finds the backend. vLLM drags in three packages that it
# does not need here.
SITE = -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.venv-vllm-%/.requirements: requirements/vllm-%.txt requirements/vllm.txt | $(BIN)/python
	$(BIN)/python -m venv --clear .venv-vllm-$*
	.venv-vllm-$*/bin/python -m pip --disable-pip-version-check install -q -r $< -r requirements/vllm.txt
	.venv-vllm-$*/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	echo $(CURDIR) > $$(.venv-vllm-$*/bin/python $(SITE))/checkout.pth
	@touch $@

test-vllm: build $(patsubst %,.venv-vllm-%/.requirements,$(VLLM))
	@status=0; for name in $(VLLM); do echo "== vLLM, $$name"; site=$$(.venv-vllm-$$name/bin/python $(SITE)); \
		rm -rf $$site/unique_attn-*.dist-info; cp -r $$($(BIN)/python $(SITE))/unique_attn-*.dist-info $$site/ || exit 1; \
		.venv-vllm-$$name/bin/python -m pytest --show-capture=no $(PYTEST_ARGS) tests_vllm || status=1; \
	done; exit $$status

# On a machine with a GPU. Leaves a library for the sanitizer behind; `make build` brings the usual one back.
sanitize:
	UNIQUE_ATTN_NVCC_FLAGS=-DUNIQUE_ATTN_RACECHECK $(MAKE) build
	for tool in memcheck racecheck; do PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python tests/sanitizer_workload.py || exit 1; done

lint: $(VENV)/.requirements
	$(BIN)/ruff check $(PY_SOURCES)
	$(BIN)/ruff format --check $(PY_SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix $(PY_SOURCES)
	$(BIN)/ruff format $(PY_SOURCES)
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Exact versions of everything but torch, the newest that requirements/dev.in allows, for every supported Python.
# Torch takes part so that its Python dependencies are there too; its CUDA ones come with a CUDA build, not to every machine.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip --disable-pip-version-check install -q uv
	.venv-lock/bin/uv pip compile -q --universal --python-version 3.10 --no-python-downloads --annotation-style line \
		--custom-compile-command "make lock" -o .venv-lock/lock.txt requirements/dev.in requirements/torch.txt
	grep -vE '^(torch|triton)==|^(nvidia|cuda)-' .venv-lock/lock.txt > requirements/lock.txt

cuda-compile: $(VENV)/.requirements
	@UNIQUE_ATTN_CUDA=1 $(BIN)/python -m build_tools cuda

$(VENV)/.cuda-tools: requirements/cuda-tools.txt $(VENV)/.requirements
	$(PIP) install -q --no-deps -r $<
	@touch $@

# Whether the compiler overwrites operands of products in flight.
cuda-hazards: $(VENV)/.cuda-tools
	@UNIQUE_ATTN_CUDA=1 $(BIN)/python -m build_tools.wgmma_hazards

# ---- Documentation and releases ----

docs: build
	$(BIN)/python -m sphinx -W --keep-going -q -j auto -d build/docs-cache docs build/docs

.venv-release/.requirements: requirements/release.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.10 was found: install one or run make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/python -m pip --disable-pip-version-check install -q -r $<
	@touch $@

sdist: .venv-release/.requirements
	rm -f dist/*.tar.gz
	.venv-release/bin/python -m build --sdist

wheel: sdist $(VENV)/.requirements
	$(PIP) wheel --no-build-isolation --no-deps -w dist dist/*.tar.gz

# What they are made of and how is in pyproject.toml, [tool.cibuildwheel].
wheels: sdist
	.venv-release/bin/cibuildwheel --platform linux --output-dir dist dist/*.tar.gz

# What `cuda-hazards` does, for the code that is released.
wheel-hazards: .venv-release/.requirements
	.venv-release/bin/python -m pip --disable-pip-version-check install -q --no-deps -r requirements/cuda-tools.txt
	for wheel in dist/*.whl; do \
		rm -rf build/wheel && .venv-release/bin/python -m zipfile -e $$wheel build/wheel && \
		.venv-release/bin/python -m build_tools.wgmma_hazards build/wheel/unique_attn/lib/libunique_attn.so || exit 1; \
	done

# SMOKE_ARGS='torch==2.10.0 --cuda': on another torch; the wheel must hold CUDA kernels.
wheel-smoke:
	PYTHON=$(PYTHON) .ci/wheel-smoke dist $(SMOKE_ARGS)

clean:
	rm -rf build dist *.egg-info unique_attn/lib unique_attn/_runtime*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.installed

distclean: clean
	rm -rf $(VENV) .venv-tf-* .venv-vllm-* .venv-lock .venv-release
