# Every target sets up what it needs: .venv, the pinned requirements, the extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
NATIVE := $(wildcard csrc/*.* csrc/*/*.*) setup.py pyproject.toml lambda_kernels/__init__.py

# $(call supported,PYTHON): a Python that this project runs on
supported = $(1) -c 'import sys; v = sys.version_info; (3, 10) <= v[:2] <= (3, 14) or sys.exit( \
    "lambda-kernels needs Python 3.10 to 3.14, %s is %d.%d: name another one, such as make PYTHON=python3.12" % (sys.executable, v[0], v[1]))'

.DEFAULT_GOAL := all
.PHONY: all help demo docs test fuzz soak sanitize sanitize-memory sanitize-threads bench peers timings experiments gpu \
    format lint code audit wheel tried-wheel clean distclean force

all: $(VENV)/.built
	@echo "Ready: source $(BIN)/activate, then lambda-maml demo, or lambda-maml --help. make help lists what else make does."

help:
	@echo "make          $(VENV) with all requirements, and the kernels"
	@echo "make demo     train on an embedded image set, choose a pattern, draw the picture: runs/demo"
	@echo "make test     all tests"
	@echo "make docs     the pages as a site: build/site/index.html"
	@echo "make fuzz     random networks and calls beside plain PyTorch, and operators with arguments that do not fit, for"
	@echo "              SECONDS=600, from SEED=0 on"
	@echo "make soak     the same, and bad files, kills, many writers of one path, round after round, for SECONDS=600"
	@echo "make sanitize the native code under AddressSanitizer and UndefinedBehaviorSanitizer: its tests, and COUNT=4000 calls;"
	@echo "              its tests under ThreadSanitizer (make sanitize-memory, make sanitize-threads: one of the two)"
	@echo "make bench    benchmarks: make peers, which writes docs/performance.md and README's figures, then make timings: bench/results/local.json"
	@echo "make experiments  DATA=FOLDER of image sets: trains, chooses and times all configurations of docs/experiments.md, in"
	@echo "              JOBS=1 processes; goes on where it was ended; ONLY=NAMES some of them, RESULTS= and RUNS= elsewhere"
	@echo "make gpu      build, tests and benchmarks on a GPU machine with $(PYTHON) as it is: bench/results, docs/gpu.md"
	@echo "make lint     ruff and mypy, the forms of ruff format and clang-format (make format writes these), licences, pip-audit"
	@echo "make wheel    wheels in dist/ (CPU; with a CUDA torch also CUDA), each tried in an environment of its own"
	@echo "make clean    remove what was built; make distclean: $(VENV) too"
	@echo "PYTHON=python3.12 names the interpreter of a new $(VENV), CXX=g++-13 the compiler, MAX_JOBS=2 compilers at a time."

demo: $(VENV)/.built
	$(BIN)/lambda-maml demo --out runs/demo

# One process runs all tests of a file, so that fixtures are made once. What the tests start finds bytecode. The slowest
# tests are named at the end, so that a record of CI says where its time went.
test: $(VENV)/.built
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest tests -p no:benchmark --numprocesses 2 --dist loadfile \
	    --no-loadscope-reorder --durations 30 --durations-min 5

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Random networks and calls beside plain PyTorch, each with a seed that shows it again.
SECONDS ?= 600
SEED ?= 0
fuzz: $(VENV)/.built
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(SECONDS) --first $(SEED)

soak: $(VENV)/.built
	$(BIN)/python tests/soak.py $(SECONDS) $(SEED)

# The extension under sanitizers, in folders of its own. Run in tests/, where the checkout's own packages are not found.
# ThreadSanitizer's has threads of its own: it would not see that those of torch's libgomp have been waited for.
COUNT ?= 4000
NATIVE_TESTS := affine_block chain frozen_block head image_block inner_loop inner_loop_rates norms operators outer snapshot winograd
THREAD_TESTS := affine_block frozen_block head image_block inner_loop outer winograd
preloaded = LD_PRELOAD="$$(for name in $(1); do $${CXX:-g++} -print-file-name=$$name.so; done | tr '\n' ' ')"
sanitize: sanitize-memory sanitize-threads

sanitize-memory: $(VENV)/.required
	LAMBDA_KERNELS_SANITIZE=address,undefined LAMBDA_KERNELS_CUDA=0 $(BIN)/python setup.py --quiet build --build-lib build/sanitized
	cd tests && export OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/build/sanitized:. \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(call preloaded,libasan libubsan libstdc++) && \
	    ../$(BIN)/python -m pytest $(NATIVE_TESTS:%=test_%.py) -p no:benchmark -p no:cacheprovider -q && \
	    ../$(BIN)/python -m fuzz --kind operator --count $(COUNT) --first $(SEED)

sanitize-threads: $(VENV)/.required
	LAMBDA_KERNELS_SANITIZE=thread LAMBDA_KERNELS_CUDA=0 $(BIN)/python setup.py --quiet build --build-lib build/threads
	cd tests && export OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/build/threads:. OMP_THREAD_LIMIT=1 \
	    TSAN_OPTIONS=exitcode=66:suppressions=threads_seen/suppressions.txt \
	    $(call preloaded,libtsan libstdc++) && \
	    setarch -R ../$(BIN)/python -m pytest $(THREAD_TESTS:%=test_%.py) -p no:benchmark -p no:cacheprovider -q --capture=sys \
	    -k 'not large and not giant'  # these take minutes each

bench:
	@$(MAKE) --no-print-directory peers
	@$(MAKE) --no-print-directory timings

# Against stock PyTorch and other packages; PEERS_ARGS=--help and TRAINING_ARGS=--help list options. No figures where a
# result is wrong.
peers: $(VENV)/.built $(VENV)/.peers
	mkdir -p bench/results
	$(BIN)/python bench/bench_training.py --json bench/results/training.json.tmp $(TRAINING_ARGS)
	mv bench/results/training.json.tmp bench/results/training.json
	$(BIN)/python bench/bench_peers.py --json bench/results/peers.json.tmp $(PEERS_ARGS)
	mv bench/results/peers.json.tmp bench/results/peers.json
	$(BIN)/python bench/peers_report.py --markdown bench/results/peers.md --plot bench/results/peers.svg
	$(BIN)/python bench/front_page.py

# What `select --timings` reads; the operations by themselves: python -m pytest bench/bench_ops.py --benchmark-only
timings: $(VENV)/.built
	mkdir -p bench/results
	$(BIN)/python -m pytest bench/bench_adapt.py --benchmark-only --benchmark-json=bench/results/local.json.tmp
	mv bench/results/local.json.tmp bench/results/local.json

# Goes on where it was ended. Its page is docs/experiments.md, of results elsewhere experiments.md beside them.
JOBS ?= 1
RESULTS ?= results
RUNS ?= runs/experiments
experiments: $(VENV)/.built $(VENV)/.peers
	$(BIN)/python bench/experiments.py $(if $(DATA),--data '$(DATA)') --jobs $(JOBS) --results '$(RESULTS)' --runs '$(RUNS)' \
	    $(if $(ONLY),--only $(foreach name,$(ONLY),'$(name)'))
	$(BIN)/python bench/experiments.py --results '$(RESULTS)' --page \
	    $(if $(filter results,$(RESULTS)),docs/experiments.md,'$(RESULTS)/experiments.md')

# No environment of its own and no downloads: torch, triton and pytest are those of $(PYTHON). GPU_ARGS=--help lists options.
gpu:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) found: name the interpreter that has torch," \
	    "such as make gpu PYTHON=python3.12" >&2; exit 1; }
	@$(call supported,$(PYTHON))
	@$(PYTHON) bench/gpu.py $(GPU_ARGS)

# What make lint asks for: Python by ruff, C++ and CUDA by clang-format.
format: $(VENV)/.required
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.* csrc/*/*.*)

lint: code audit

code: $(VENV)/.required
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(BIN)/mypy bench

audit: $(VENV)/.required
	$(BIN)/python tests/dependencies.py build/audit

# A CPU wheel, and beside a CUDA torch one with the CUDA kernels for TORCH_CUDA_ARCH_LIST. WHEELS="cpu cu130" names them, as
# where nvcc is there without a CUDA torch.
WHEELS = cpu $(shell $(BIN)/python -c 'import torch; c = torch.version.cuda; print("cu" + c.replace(".", "") if c else "")')
wheel: $(VENV)/.required
	@for local in $(WHEELS); do $(MAKE) --no-print-directory tried-wheel LOCAL=$$local || exit 1; done
	@ls dist/*.whl

# auditwheel names the oldest glibc that the wheel runs on; the libraries that it does not hold are torch's and the driver's.
tried-wheel: TRY := build/try
tried-wheel: OF_OTHERS := liblambda_kernels.so libtorch* libc10* libcuda.so.1
tried-wheel:
	rm -rf build/lib* build/bdist* $(TRY)
	LAMBDA_KERNELS_LOCAL_VERSION=$(LOCAL) LAMBDA_KERNELS_CUDA=$(if $(filter cpu,$(LOCAL)),0,1) \
	    $(PIP) wheel --no-build-isolation --no-deps --wheel-dir $(TRY)/built .
	$(BIN)/auditwheel repair --patcher none $(OF_OTHERS:%=--exclude '%') --wheel-dir $(TRY) $(TRY)/built/*.whl
	tests/try_wheel.sh $(BIN)/python $(TRY)/*.whl
	mkdir -p dist
	mv $(TRY)/*.whl dist/
	rm -rf $(TRY)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(VENV)/.built
	rm -f lambda_kernels/_C*.so lambda_kernels/liblambda_kernels.so lambda_kernels/_cuda*.so lambda_kernels/_build_info.json
	for folder in lambda_kernels python tests bench; do \
	    test ! -d $$folder || find $$folder -name __pycache__ -type d -prune -exec rm -rf {} +; done

distclean: clean
	rm -rf $(VENV)

# The compiler and the interpreter are looked for before anything is downloaded; setup.py looks again.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) found: install Python 3.10 to 3.14 (Debian: apt install" \
	    "python3 python3-venv) or name one, such as make PYTHON=python3.12" >&2; exit 1; }
	@$(call supported,$(PYTHON))
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make environments:" \
	    "install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	@for compiler in $${CXX:-g++ c++ clang++}; do command -v $$compiler >/dev/null && exit 0; done; \
	    echo "make: no C++ compiler ($${CXX:-g++, c++, clang++}): install one (Debian, Ubuntu: apt install g++;" \
	    "Fedora: dnf install gcc-c++; conda: conda install gxx_linux-64) or set CXX to the compiler" >&2; exit 1
	$(PYTHON) -m venv $(VENV)

$(VENV)/.required: requirements.txt | $(BIN)/python
	@$(call supported,$(BIN)/python)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(PIP) install --quiet 'pip>=22.3'
	$(PIP) install --requirement requirements.txt
	@touch $@

$(VENV)/.docs: docs/requirements.txt | $(BIN)/python
	$(PIP) install --quiet --requirement $<
	@touch $@

# Nothing of this project needs them, and their torch is ours: without them the benchmark says so and goes on.
$(VENV)/.peers: bench/requirements-peers.txt $(VENV)/.required
	@$(PIP) install --quiet --no-deps --retries 1 --timeout 15 --requirement $< && touch $@ || \
	    echo "make: not all of $< can be installed; the benchmark goes on without"

$(VENV)/.built: $(VENV)/.required $(NATIVE) $(if $(wildcard lambda_kernels/_C.*.so),,force)
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
