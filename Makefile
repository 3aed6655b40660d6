# make build   set everything up: packages (as root), .venv, dependencies, C modules, guests
# make demo-linux  a Debian kernel, fetched by apt, moves by postcopy while it compresses a file
# make demo    watch a guest move between two processes, by precopy and back by postcopy
# make test    build, then check
# make check   the whole gate without the set-up: format, lint, types, C warnings, tests
# make bench   migrations, page faults, guest speed and the monitor beside stock QEMU's, interleaved
# make clean   remove what was built (not .venv)

SHELL := /bin/bash
# The system's Python before one from PATH: the packages that the set-up installs are made for it, and
# unprivileged tests can run it wherever the home of the one in PATH may be.
SYSTEM_PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
PYTHON := .venv/bin/python
export PYTHONPATH := $(CURDIR)

NATIVE_SOURCES := $(shell find uffd vmm -name '*.[ch]' -o -name _build.py) tools/native.py
GUEST_SOURCES := $(wildcard tools/guests/*) tools/guest_builder.py

.PHONY: build demo demo-linux test check format lint types c-warnings pytest bench clean

build: .venv/.packages-stamp build/.native-stamp build/.guests-stamp

.venv/.packages-stamp: tools/requirements.txt pyproject.toml tools/setup_check.sh
	@tools/setup_check.sh $(SYSTEM_PYTHON)
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || $(SYSTEM_PYTHON) -m venv --clear .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r tools/requirements.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

build/.native-stamp: .venv/.packages-stamp $(NATIVE_SOURCES)
	@$(PYTHON) -m tools.native
	@mkdir -p build && touch $@

build/.guests-stamp: .venv/.packages-stamp $(GUEST_SOURCES)
	@$(PYTHON) -m tools.guest_builder
	@mkdir -p build && touch $@

demo: build
	@$(PYTHON) -m tools.demo

demo-linux: build
	@$(PYTHON) -m tools.demo_linux

test: build
	@$(MAKE) --no-print-directory check

check: format lint types c-warnings pytest

format:
	$(PYTHON) -m ruff format --check
lint:
	$(PYTHON) -m ruff check
types:
	$(PYTHON) -m mypy
# The C is compiled with -Wall -Wextra -Werror: a module that is up to date had no warning.
c-warnings:
	$(PYTHON) -m tools.native
pytest:
	$(PYTHON) -m pytest -q -p tests.support.times

bench: build
	@$(PYTHON) -m tools.bench
	@$(PYTHON) -m tools.bench_qmp
	@$(PYTHON) -m tools.bench_linux

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
	find qmp uffd vmm -name '*.so' -delete
