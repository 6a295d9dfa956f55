# Two commands do all set-up on a fresh machine:  make demo   and   make test
PYTHON ?= python3
# Pinned, because an unpinned torch brings gigabytes of CUDA on some machines. Another build: make demo TORCH="torch ..."
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
LEAN   := .venv-lean/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find artifacts prep runtime -name "*.py" -o -name "*.cpp" -o -name "*.h")

.PHONY: demo test lint check lean unbuildable wheel oldest sanitize threads aarch64 wheel-aarch64 docs clean

## Build the example model into demo.smoe and generate from it in less memory than all its experts take.
demo: .venv/installed
	test -d demo.smoe || $(BIN)/smoe-prep build examples/reference -o demo.smoe --calibration examples/calibration.jsonl --encoding f32
	$(BIN)/smoe run demo.smoe "def main(" --memory 128MiB --context 512 --max-new-tokens 96 --temperature 0.7 --seed 2

## Lint, import contracts, types, all tests, and a build that cannot be. CI runs more: .ci/run
test: lint check unbuildable

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy --strict --no-warn-return-any -p smoe.artifacts -p smoe.runtime
	$(BIN)/mypy -p smoe.prep

# One process a core, a file of tests in one of them (they share what they build), and one thread each for torch. Files go
# in their order: those of prep, which take longest, are not what the others wait for.
check: .venv/tested
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist loadfile --no-loadscope-reorder

## The runtime's tests in an environment that `pip install smoe` makes: no torch, no transformers. CI does so with the oldest versions (`oldest`).
lean: .venv-lean/installed
	! $(LEAN)/python -c "import torch" 2>/dev/null
	$(LEAN)/pytest -q -n auto --dist loadfile tests/artifacts tests/runtime

## A build that fails must end the install and say what to do; slow kernels are never what one gets instead.
unbuildable: .venv-lean/installed
	CXX=false $(LEAN)/pip install --no-deps --target build/none dist/*.tar.gz 2>&1 | grep "smoe was not installed because"
	test ! -e build/none

## The wheel as users get it, tested where there is no compiler; and with the oldest versions of what it needs.
wheel:
	.ci/wheel
oldest:
	.ci/wheel oldest

## The tests of kernels and packer with every read and every operation checked, in C++ and in nanobind. Python's own leaks are not ours.
sanitize: .venv-lean/installed
	rm -rf build/sanitize
	CXX=g++ CXXFLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=all" \
		$(LEAN)/pip install -q --no-deps -C cmake.build-type=Debug --target build/sanitize .
	PYTHONPATH=build/sanitize PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(LEAN)/pytest -q -n auto --dist loadfile --capture=sys tests/runtime/test_kernels*.py tests/runtime/test_products.py \
		tests/runtime/test_attention.py tests/runtime/test_recurrent.py tests/runtime/test_head_products.py tests/test_packing.py

## The native pool and kernels under the thread sanitizer, called from several threads at once.
threads:
	.ci/threads

## A wheel for aarch64, cross-compiled and tested in an emulator (Debian, as root the first time); the wheel alone.
aarch64:
	.ci/aarch64
wheel-aarch64:
	.ci/aarch64 wheel

.venv/made:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/pip install -q "$(TORCH)"
	touch $@

.venv/installed: .venv/made $(SOURCES)
	$(BIN)/pip install -q '.[prep]'
	touch $@

.venv/tested: .venv/installed
	$(BIN)/pip install -q --group test --group lint --group bench
	touch $@

# From the source distribution, with a compiler on the PATH and nothing else: no cmake, no ninja, no git.
.venv-lean/installed: $(SOURCES)
	$(PYTHON) -m venv .venv-lean
	$(LEAN)/python -m pip install -q --upgrade pip build
	rm -rf dist/*.tar.gz
	$(LEAN)/python -m build --sdist >/dev/null
	mkdir -p .venv-lean/bare
	ln -sf $$(which c++ as ld ar ranlib) .venv-lean/bare/
	CXX=c++ PATH=$(CURDIR)/.venv-lean/bare $(LEAN)/pip install -q dist/*.tar.gz
	$(LEAN)/pip install -q --group test
	touch $@

## docs/commands.md from what the commands print.
docs: .venv/installed
	$(BIN)/python docs/make_commands.py

clean:
	rm -rf .venv .venv-lean .aarch64 build dist demo.smoe demo.smoe.partial
