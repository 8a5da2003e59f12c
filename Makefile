# `make help` lists the targets. Nothing here is needed to use rjupyter.py: copy the file and run it.

PREFIX ?= /usr/local
DESTDIR ?=
PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

# -I and -S: no module of the user's or the site's is imported, which takes time and may be a queue.py of somebody's.
define LAUNCHER
#!/bin/sh
exec python3 -IS -c '
import _signal, os, sys
if _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # until main: a Ctrl-C among the imports leaves no traceback
del sys.argv[0]
top = os.path.dirname(os.path.dirname(os.path.realpath(sys.argv[0])))
sys.path.insert(0, os.path.join(top, "lib", "rjupyter"))
import rjupyter
rjupyter.command()
' "$$0" "$$@"
endef
export LAUNCHER

.PHONY: help demo setup check test bench lint install uninstall clean

help: ## print this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: ## the main job without a remote host: a private sshd here, its Jupyter in your browser
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

install: ## put it into $(PREFIX)/lib/rjupyter with its bytecode, so that it starts sooner, and a launcher on PATH
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/lib/rjupyter"
	install -m 644 rjupyter.py "$(DESTDIR)$(PREFIX)/lib/rjupyter/rjupyter.py"
	$(PYTHON) -m compileall -q -f -d "$(PREFIX)/lib/rjupyter" "$(DESTDIR)$(PREFIX)/lib/rjupyter"
	printf '%s\n' "$$LAUNCHER" >"$(DESTDIR)$(PREFIX)/bin/rjupyter"
	chmod 755 "$(DESTDIR)$(PREFIX)/bin/rjupyter"

uninstall: ## remove it again
	rm -rf "$(DESTDIR)$(PREFIX)/bin/rjupyter" "$(DESTDIR)$(PREFIX)/lib/rjupyter"

clean: ## remove what the others made here
	rm -rf .venv .sshd .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis tests/__pycache__ __pycache__
	@du -sh /var/tmp/rjupyter-tests-* 2>/dev/null | while read -r size place; do \
		echo "kept, for other checkouts too: $$place ($$size)"; done
