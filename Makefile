# Each target sets up what it needs on a fresh Debian 12 with a Rust toolchain; the
# tests and the demo run as root, for namespaces, mounts and cgroups.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.PHONY: build demo test check install bench clean deps deps-test

CARGO ?= cargo
PREFIX ?= /usr/local
BIN := $(CURDIR)/out/bin
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
# The shim runs once per pod, the monitor once per container, and the pod's init inside
# its root file system: small and static (docs/decisions says how the flags were chosen).
SMALL := --profile small
STATIC := -C target-feature=+crt-static

build: deps
	$(CARGO) build --release -p longshore
	$(CARGO) rustc -p containerd-shim-longshore-v2 $(SMALL) --bin containerd-shim-longshore-v2 -- $(STATIC)
	$(CARGO) rustc -p longshore-conmon $(SMALL) --bin longshore-conmon -- $(STATIC)
	$(CARGO) rustc -p longshore-pod-init $(SMALL) --bin longshore-pod-init -- $(STATIC)
	mkdir -p $(BIN)
	install -m 0755 $(TARGET)/release/longshore $(TARGET)/small/containerd-shim-longshore-v2 \
	  $(TARGET)/small/longshore-conmon $(TARGET)/small/longshore-pod-init $(BIN)

demo: build
	scripts/demo.sh $(BIN)

# Once more with Go's shim: all that is of pods and their containers.
FOREIGN := --test lifecycle --test exec_sync --test recovery --test crash --test reconcile --test damage \
  --test errors --test security --test cli --test volumes --test doctor
# Once more with a monitor per container: Debian's conmon, and ours.
MONITORED := --test lifecycle --test exec_sync --test recovery

test: deps-test build
	LONGSHORE_BIN_DIR=$(BIN) $(CARGO) test --workspace
	LONGSHORE_BIN_DIR=$(BIN) LONGSHORE_TEST_HANDLER=go-shim $(CARGO) test -p longshore-tests $(FOREIGN)
	LONGSHORE_BIN_DIR=$(BIN) LONGSHORE_TEST_HANDLER=conmon $(CARGO) test -p longshore-tests $(MONITORED)
	LONGSHORE_BIN_DIR=$(BIN) LONGSHORE_TEST_HANDLER=longshore-conmon $(CARGO) test -p longshore-tests $(MONITORED)
	LONGSHORE_TEST_CONMON=$(BIN)/longshore-conmon $(CARGO) test -p longshore-runtime --test conmon --test conmon_exec

check: deps
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny --log-level error check bans licenses sources
	$(CARGO) test -p longshore-tests --test crate_rules

bench: deps-test build
	LONGSHORE_BIN_DIR=$(BIN) $(CARGO) bench -p longshore-tests

install: $(BIN)/longshore
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system
	install -m 0755 $(BIN)/longshore $(BIN)/containerd-shim-longshore-v2 $(BIN)/longshore-conmon \
	  $(BIN)/longshore-pod-init $(DESTDIR)$(PREFIX)/bin
	sed 's|@BINDIR@|$(PREFIX)/bin|' contrib/longshore.service \
	  | install -m 0644 /dev/stdin $(DESTDIR)$(PREFIX)/lib/systemd/system/longshore.service

$(BIN)/longshore:
	$(MAKE) build

deps:
	scripts/deps.sh demo

deps-test:
	scripts/deps.sh test

clean:
	$(CARGO) clean
	rm -rf out
