# Everything is built with the one `release` profile, for the whole workspace, so
# that the demo, the tests and the benchmarks share every compiled dependency.
CARGO   ?= cargo
PROFILE := --release
ARGS    ?=

# What `make train` and `make quality` work on.
MODEL   ?= models/reader-9m
RUN     ?= target/reader
VENV    ?= .venv

.PHONY: help deps build demo test check bench quality venv train

help:
	@echo "make demo    build, then answer questions with a computed and a fetched prefill"
	@echo "make test    build and run every test"
	@echo "make check   formatting, lints, documentation, dependency policy"
	@echo "make bench   run the benchmarks (ARGS='ttft --quick --json' picks one)"
	@echo "make quality ask the shipped model, write docs/quality.md (an hour; ARGS=--quick: minutes)"
	@echo "make train   train the shipped model again, or go on training it (hours on a CPU)"
	@echo "make deps    install missing system packages (Debian, apt)"

# RocksDB is compiled from source: a C++ compiler, and libclang for its bindings.
# The tests hold the corpus against the Python that training uses.
DEPS := g++ clang libclang-dev python3

deps:
	@missing=""; for package in $(DEPS); do \
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

# cargo-deny is installed on first use: it is a tool, not a dependency.
check: deps
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(PROFILE) --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(PROFILE) --locked --workspace --no-deps
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny@0.20.2
	$(CARGO) deny --all-features check bans licenses sources

bench: deps
	$(CARGO) run $(PROFILE) --locked -p kvasir-bench -- $(if $(ARGS),$(ARGS),all)

# The page is generated from the two reports and from nothing else.
quality: build
	mkdir -p target/quality
	$(CARGO) run $(PROFILE) --locked -q -p kvasir-bench -- quality --model $(MODEL) --json $(ARGS) > target/quality/quality.json
	$(CARGO) run $(PROFILE) --locked -q -p kvasir-bench -- kvstats --model $(MODEL) --json > target/quality/kvstats.json
	$(CARGO) run $(PROFILE) --locked -q -p kvasir-bench -- page --quality target/quality/quality.json \
	  --kvstats target/quality/kvstats.json --out docs

# Python is needed for training and for comparing with transformers, for nothing else.
venv:
	@test -x $(VENV)/bin/python || { python3 -m venv $(VENV) && \
	  $(VENV)/bin/pip install -q -r bench/quality/requirements.txt; }

train: venv
	$(VENV)/bin/python bench/quality/train.py --out $(RUN) $(ARGS)
