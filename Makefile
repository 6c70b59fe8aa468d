# Everything is built with the one `release` profile, for the whole workspace, so
# that the demo, the tests and the benchmarks share every compiled dependency.
CARGO   ?= cargo
PROFILE := --release
ARGS    ?=

.PHONY: help deps build demo test check bench

help:
	@echo "make demo    build, then answer questions with a computed and a fetched prefill"
	@echo "make test    build and run every test"
	@echo "make check   formatting, lints, documentation, dependency policy"
	@echo "make bench   run the benchmarks (ARGS='ttft --quick --json' picks one)"
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
