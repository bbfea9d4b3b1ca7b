# `make mount` gives a working mount on a fresh machine, `make test` tests it; `make help` tells the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
MOUNTPOINT ?= $(HOME)/polefs
VOLUME ?=
DESTDIR ?=

venv := $(CURDIR)/.venv
python := $(venv)/bin/python
polefs := $(venv)/bin/polefs
stamp := $(venv)/.installed
sources := pyproject.toml setup.py $(wildcard rawfuse/_*.py rawfuse/_*.cdef rawfuse/_helpers.c rawfuse/_uring.h rawfuse/_fast.c rawfuse/_replies.h)

.PHONY: help
help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

.PHONY: install
install: $(stamp) ## make .venv with polefs in it (editable)

$(stamp): $(sources)
	@PYTHON="$(PYTHON)" .ci/prepare build
	@[ -x "$(python)" ] || "$(PYTHON)" -m venv "$(venv)"
	"$(python)" -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch "$@"

.PHONY: mount
mount: $(stamp) ## mount a volume: MOUNTPOINT=~/polefs, VOLUME= the default one
	@mkdir -p "$(MOUNTPOINT)" 2>/dev/null || true
	@"$(polefs)" mount $(if $(VOLUME),"$(VOLUME)") "$(MOUNTPOINT)"
	@echo "polefs is mounted on $(MOUNTPOINT); unmount it with: make umount MOUNTPOINT=$(MOUNTPOINT)"

.PHONY: umount
umount: $(stamp) ## unmount MOUNTPOINT; returns when everything is saved
	@"$(polefs)" umount "$(MOUNTPOINT)"

.PHONY: test
test: $(stamp) ## unit tests, and tests on real mounts (as root)
	@.ci/prepare test
	"$(python)" -m pytest -q

.PHONY: stress
stress: $(stamp) ## the same tests, longer and bigger
	@.ci/prepare test
	POLEFS_STRESS=1 "$(python)" -m pytest -q

sanitizers := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g
sanitized := build/sanitized

.PHONY: sanitize
sanitize: $(stamp) ## unit tests and fuzzing of rawfuse, its compiled parts built with AddressSanitizer and UBSan
	rm -rf $(sanitized)
	mkdir -p $(sanitized)
	cp -r rawfuse tests pyproject.toml setup.py README.md $(sanitized)
	rm -f $(sanitized)/rawfuse/*.so
	cd $(sanitized) && CFLAGS="$(sanitizers)" LDFLAGS="$(sanitizers)" "$(python)" setup.py --quiet build_ext --inplace
	cd $(sanitized) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 PYTHONMALLOC=malloc \
	    "$(python)" -m pytest -q -p no:cacheprovider tests/unit/test_rawfuse_*.py tests/fuzz -k "not guided_by_coverage"

.PHONY: fuzz
fuzz: $(stamp) ## fuzz rawfuse: FUZZ_ARGS="--seconds 600", see python -m tests.fuzz --help
	"$(python)" -m tests.fuzz $(FUZZ_ARGS)

.PHONY: lint
lint: $(stamp) ## ruff and mypy
	"$(venv)/bin/ruff" check .
	"$(venv)/bin/ruff" format --check .
	"$(venv)/bin/mypy"

.PHONY: docs
docs: $(stamp) ## write docs/rawfuse/reference.md from the docstrings
	"$(python)" docs/make_reference.py > docs/rawfuse/reference.md.new
	@mv docs/rawfuse/reference.md.new docs/rawfuse/reference.md

.PHONY: bench
bench: $(stamp) ## measure polefs against its peers: bench/README.md
	"$(python)" -m bench.compare $(BENCH_ARGS)

.PHONY: bench-s3
bench-s3: $(stamp) ## measure polefs on S3 against its peers, with a chart (as root): bench/README.md
	@mkdir -p bench/results
	"$(python)" -m bench.s3compare --json bench/results/s3.json --chart bench/results/s3.png $(BENCH_ARGS)

.PHONY: bench-rawfuse
bench-rawfuse: $(stamp) ## measure rawfuse against other FUSE libraries, with a chart (as root): bench/README.md
	@mkdir -p bench/results
	"$(python)" -m bench.requests --json bench/results/requests.json --chart bench/results/requests.png $(BENCH_ARGS)

.PHONY: install-helper
install-helper: $(stamp) ## make `mount -t polefs` and fstab lines work: /sbin/mount.polefs (as root)
	@install -d "$(DESTDIR)/sbin"
	@printf '#!/bin/sh\nexec "%s" -P -m polefs.cli.helper "$$@"\n' "$(python)" > "$(DESTDIR)/sbin/mount.polefs"
	@chmod 755 "$(DESTDIR)/sbin/mount.polefs"

.PHONY: clean
clean: ## remove .venv and everything built
	rm -rf "$(venv)" build ./*.egg-info rawfuse/_kernel.c rawfuse/*.o rawfuse/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
