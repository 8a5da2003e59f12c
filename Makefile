# `make help` lists the targets. Nothing here is needed to use rjupyter.py: copy the file as `rjupyter`, and run it.

PREFIX ?= /usr/local
DESTDIR ?=
PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help demo setup check test bench lint install uninstall clean

help: ## print this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: ## a shell in which `demo` is a host to try it with: a private sshd here, with a Jupyter of its own
	@PYTHON=$(PYTHON) sh tests/setup.sh demo
	@.venv/bin/python tests/demo.py $(DEMO_ARGS)

setup: ## install what the tests need
	@PYTHON=$(PYTHON) sh tests/setup.sh test

check: ## the tests that need no sshd, no browser and no cluster: half a minute
	@PYTHON=$(PYTHON) sh tests/setup.sh check
	.venv/bin/python -m pytest tests -m unit -n 3 $(PYTEST_ARGS)

# All processes would compile the tests at the same time, were they not compiled before.
test: setup ## all tests, after make setup
	@.venv/bin/python -m pytest tests -n 0 -q --collect-only >/dev/null || true # what is wrong, the tests themselves say
	.venv/bin/python -m pytest tests $(PYTEST_ARGS)

bench: ## measure it beside what one would use instead: a Markdown table, in less than 10 minutes
	@PYTHON=$(PYTHON) sh tests/setup.sh bench
	@.venv/bin/python tests/bench/bench.py $(BENCH_ARGS)

lint: ## ruff, mypy --strict, shellcheck
	@PYTHON=$(PYTHON) sh tests/setup.sh lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	shellcheck tests/*.sh .ci/run
	@.venv/bin/python tests/size.py

install: ## copy it to $(PREFIX)/bin/rjupyter
	install -d "$(DESTDIR)$(PREFIX)/bin"
	install -m 755 rjupyter.py "$(DESTDIR)$(PREFIX)/bin/rjupyter"

uninstall: ## remove it again
	rm -f "$(DESTDIR)$(PREFIX)/bin/rjupyter"

clean: ## remove what the others made here
	rm -rf .venv .sshd .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis tests/__pycache__ __pycache__
	@du -sh /var/tmp/rjupyter-tests-* 2>/dev/null | while read -r size place; do \
		echo "kept, for other checkouts too: $$place ($$size)"; done
