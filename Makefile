# `make` lists the targets. Expensive results are kept in $(SANDPOD_CACHE), named by the hash of their inputs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.SILENT:
MAKEFLAGS += --no-print-directory

RELEASE := $(CURDIR)/target/x86_64-unknown-linux-gnu/release
TOOLS := $(CURDIR)/target/tools

# Where tests, demo and benchmark find what they run.
export SANDPOD_CACHE ?= /var/cache/sandpod
export SANDPOD_BIN := $(RELEASE)
export SANDPOD_GUEST_OWN := $(CURDIR)/target/guest/own
export SANDPOD_GUEST_DEBIAN := $(CURDIR)/target/guest/debian
export SANDPOD_GUEST_TRACING := $(CURDIR)/target/guest/tracing
export SANDPOD_PEERS := $(TOOLS)/peers
export SANDPOD_VIRTIOFSD := $(TOOLS)/virtiofsd
export SANDPOD_PAYLOAD := $(CURDIR)/target/payload
export SANDPOD_IMAGES := $(CURDIR)/target/images
export SANDPOD_RELEASE := $(CURDIR)/target/release-$(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
export SANDPOD_NODE_IMAGE := $(TOOLS)/node-image
export SANDPOD_TEST_KERNEL := $(SANDPOD_GUEST_OWN)/vmlinux
export SANDPOD_TEST_VIRTIOFSD := $(SANDPOD_VIRTIOFSD)

# What deploy/deps.sh installs for `make demo` and for `make test`.
DEMO_GROUPS := build run peers
TEST_GROUPS := build kernel run release test fresh peers

.PHONY: help demo cluster node test test-all fresh soak bench screenshots lint build guest guest-own guest-tracing
.PHONY: guest-debian payload payload-files images images-files release release-files install clean
.PHONY: programs kernel debian-kernel virtiofsd cyclonedx peers crictl node-image deps-demo deps-test units
.PHONY: suite-e2e suite-crash suite-contract suite-conformance suite-soak suite-cluster suite-node suite-software suite-fresh

help: ## list the targets
	sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: deps-demo ## run a pod in a virtual machine and show that it is one; installs and builds what it needs (cold: under 10 minutes)
	$(MAKE) -j2 programs virtiofsd crictl debian-kernel
	$(MAKE) guest-debian
	$(RELEASE)/demo

cluster: deps-test ## a whole Kubernetes with one node, to try the operator on, until interrupted (a minute; with empty caches some 20)
	$(MAKE) -j2 kernel programs virtiofsd peers debian-kernel
	$(MAKE) guest
	$(MAKE) payload-files
	$(MAKE) images-files
	$(RELEASE)/kubernetes

node: deps-test ## an emulated node with systemd and KVM, to try things in: each line of input runs there
	$(MAKE) -j2 kernel programs virtiofsd peers node-image
	$(MAKE) guest-own
	$(MAKE) payload-files
	$(RELEASE)/emulated-node

test: deps-test ## every test and every lint (some 40 minutes on two cores, over an hour with empty caches)
	$(MAKE) -j2 PARTS='--bins --tests' kernel programs virtiofsd cyclonedx peers node-image debian-kernel lint
	$(MAKE) PARTS='--bins --tests' guest
	$(MAKE) payload-files
	$(MAKE) images-files
	$(MAKE) release-files
	$(MAKE) units
	echo 'tests: the suites with real peers, two at a time, usually 35 minutes; each prints when it is done'
	$(MAKE) -j2 --keep-going --output-sync=target suite-node suite-cluster suite-conformance suite-e2e suite-software suite-crash suite-contract suite-soak suite-fresh

test-all: test ## every test, and what takes long: real software, each with runc too, and a large cluster (an hour more)
	$(MAKE) guest-tracing
	$(MAKE) suite-cluster FLAGS=--ignored
	$(MAKE) suite-software FLAGS=--ignored

TARGET := demo
fresh: ## `make demo`, or TARGET, in a Debian 12 that has next to nothing installed: whether deploy/deps.sh names all that it needs
	deploy/deps.sh fresh
	tests/fresh/run.sh -- make $(TARGET)

bench: deps-test ## measure pod start, memory, exec and file sharing
	$(MAKE) -j2 kernel programs virtiofsd peers debian-kernel
	$(MAKE) guest
	$(RELEASE)/bench

soak: deps-test ## long use: 10,000 execs, 500 pods, restarts under load, a death in the middle of every verb (hours)
	$(MAKE) -j2 PARTS='--bins --tests' kernel programs virtiofsd peers debian-kernel
	$(MAKE) PARTS='--bins --tests' guest
	cargo test --release --workspace --test soak -- --ignored --test-threads=1 full/
	cargo test --release --workspace --test crash -- --include-ignored containerd-2.4/own/

screenshots: deps-test ## docs/images: the page of `kata-ctl monitor`, light and dark, with three pods
	$(MAKE) -j2 PARTS='--bins --tests' kernel programs virtiofsd peers debian-kernel
	$(MAKE) PARTS='--bins --tests' guest
	$(MAKE) suite-e2e FLAGS='--ignored --exact containerd-2.4/own/a_picture_of_the_page'
	install -D -m 644 -t docs/images target/screenshots/monitor-light.png target/screenshots/monitor-dark.png

lint: ## formatting, clippy, documentation and scripts, warnings denied
	echo 'lint: rustfmt, shellcheck, clippy and rustdoc, usually 2 minutes the first time'
	cargo fmt --all --check
	shopt -s globstar
	shellcheck --severity=warning .ci/run deploy/**/*.sh tests/**/*.sh
	cargo clippy --quiet --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --release --workspace --no-deps

build: deps-test ## our programs, virtiofsd and both guest images
	$(MAKE) -j2 kernel programs virtiofsd debian-kernel
	$(MAKE) guest

guest: guest-own guest-debian ## the guest images target/guest/own and target/guest/debian

# TRACING=yes puts the kernel for eBPF agents into it too.
payload: build $(if $(TRACING),guest-tracing) ## target/payload: everything that a node needs, as the installer carries it
	$(MAKE) payload-files

payload-files:
	deploy/deps.sh payload
	deploy/payload.sh $(RELEASE) $(SANDPOD_GUEST_OWN) $(SANDPOD_VIRTIOFSD) $(SANDPOD_PAYLOAD) $(if $(TRACING),$(SANDPOD_GUEST_TRACING))

images: payload ## target/images: the controller's and the installer's container images, as OCI archives
	$(MAKE) images-files

LICENCES := $(CURDIR)/target/licences
images-files:
	deploy/deps.sh images
	deploy/release/licences.sh $(SANDPOD_PAYLOAD) $(SANDPOD_VIRTIOFSD) $(LICENCES)
	deploy/images.sh $(RELEASE) $(SANDPOD_PAYLOAD) $(SANDPOD_IMAGES) $(LICENCES)

release: images ## target/release-<version>: what a publisher publishes (docs/release.md)
	$(MAKE) release-files

release-files: cyclonedx
	deploy/deps.sh release
	deploy/release/release.sh $(RELEASE) $(SANDPOD_PAYLOAD) $(SANDPOD_IMAGES) $(LICENCES) $(SANDPOD_VIRTIOFSD) \
	  $(SANDPOD_RELEASE)

install: payload ## put it on this node, and the handler `kata` into its CRI; INSTALL_FLAGS are those of deploy/install.sh
	deploy/install.sh $(INSTALL_FLAGS)

clean: ## remove what was built here (not $(SANDPOD_CACHE))
	cargo clean --quiet

# The steps. Each says what it does when there is something to do.

deps-demo:
	deploy/deps.sh $(DEMO_GROUPS)

deps-test:
	deploy/deps.sh $(TEST_GROUPS)

# Of the whole workspace always, and in one go with the tests where they are wanted: otherwise dependencies are compiled
# once more with other features.
PARTS := --bins
programs: ## the shim, the agent, kata-ctl and the tests' programs
	echo 'programs: compiling, usually 5 minutes the first time'
	cargo build --quiet --release --workspace $(PARTS)

units: ## every test that needs no peers: units, golden files, properties, the agent's engine in a guest
	echo 'units: usually a minute'
	cargo test --release --quiet --workspace --lib --bins $(patsubst %,--test %,description refusals vm engine_in_guest agent_in_guest)

# Two suites run at once, so each has half of the processors; a story's virtual machine takes one.
# FLAGS are for the test program, `--include-ignored` for what takes long too.
FLAGS :=
suite-e2e suite-crash suite-contract suite-conformance suite-soak suite-software suite-cluster suite-node: suite-%:
	cargo test --release --quiet --workspace --test $* -- --test-threads=$$((($$(nproc) + 1) / 2)) $(FLAGS)

# The quick form of `make fresh`, for both of the quick start's targets.
suite-fresh:
	tests/fresh/check.sh "$(DEMO_GROUPS)" "$(TEST_GROUPS) payload images"

kernel: ## our own guest kernel
	deploy/guest/build-kernel.sh >/dev/null

debian-kernel:
	deploy/guest/fetch-debian-kernel.sh >/dev/null

guest-own: programs
	deploy/guest/build-image.sh own $(RELEASE)/kata-agent $(SANDPOD_GUEST_OWN)

guest-tracing: programs ## target/guest/tracing: a guest for eBPF agents, whose kernel has types and probes (20 minutes)
	deploy/deps.sh kernel tracing
	deploy/guest/build-image.sh tracing $(RELEASE)/kata-agent $(SANDPOD_GUEST_TRACING)

guest-debian: programs
	deploy/guest/build-image.sh debian $(RELEASE)/kata-agent $(SANDPOD_GUEST_DEBIAN)

virtiofsd: ## the file server between node and guests
	mkdir -p $(TOOLS)
	program=$$(deploy/build-virtiofsd.sh)
	ln -sfn "$$program" $(SANDPOD_VIRTIOFSD)

cyclonedx: ## what writes the bill of materials
	deploy/release/build-cyclonedx.sh >/dev/null

peers: ## the real containerd, CRI tools and Kubernetes that the tests run against
	mkdir -p $(TOOLS)
	bin=$$(tests/peers/build.sh)
	ln -sfnT "$$bin" $(SANDPOD_PEERS)

node-image: peers ## the disk of the emulated node: Debian with systemd
	mkdir -p $(TOOLS)
	image=$$(tests/node/image.sh $(SANDPOD_PEERS))
	ln -sfnT "$$image" $(SANDPOD_NODE_IMAGE)

crictl:
	mkdir -p $(TOOLS)
	bin=$$(tests/peers/build.sh cri-tools)
	ln -sfnT "$$bin" $(SANDPOD_PEERS)
