# The commands of the project. A newcomer needs two: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# With AGAIN=yes what failed has a second try: on a machine that is busy some time-outs in the tests come true.
AGAIN ?=
pytest = $(BIN)/python -m pytest $(1) || { test -n "$(AGAIN)" && $(BIN)/python -m pytest $(1) --lf --lfnf=none; }
# What `make test` tries in the lab of boxes, and all that can be tried there.
TRIED ?= default firewall
SCENARIOS ?= default firewall pull update
# Virtual machines side by side in `make test-image`: each with a processor (two with KVM) and 2 GB of memory.
MACHINES ?= 2
# `make test` looks at a stick if it takes a few minutes to build one; without this it builds all, in some twenty.
STICK ?= --cached
UNIT := tests/agent tests/deidentify tests/kspace tests/disk tests/repo tests/image/test_inputs.py
# The tests start the agent some hundred times; without its compiled modules each costs half a second more.
unexport PYTHONDONTWRITEBYTECODE

help: ## Show the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/demo ## See a study leave a scanner, travel over HTTPS and be proved to have arrived
	@$(BIN)/python -m tests.demo

check: $(VENV)/test ## Lint, types, rules of the roles and unit tests: some two minutes
	@$(MAKE) --no-print-directory --output-sync -j 2 lint unit

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/mypy relay_agent
	@$(MAKE) -s $(VENV)/linted
	$(BIN)/yamllint .

# It starts Ansible for each playbook and role, and remembers nothing: half a minute, also where nothing has changed.
# Folders are looked at too, for a file that is gone must be missed.
$(VENV)/linted: $(VENV)/test $(shell find ansible.cfg .config .gitignore .yamllint inventory molecule playbooks roles)
	PATH=$(CURDIR)/$(BIN):$$PATH ansible-lint -q
	@touch $@

unit: $(VENV)/test
	$(call pytest,$(UNIT) -m "not slow" -n auto)

test: $(VENV)/test peers check ## All that proves the product, with real peers: under thirty minutes
	$(call pytest,$(UNIT) -m slow -n auto)
	$(call pytest,tests $(UNIT:%=--ignore=%) --ignore=tests/image -n 5 --dist loadgroup)
	@sh image/install test || echo "Not tried: sticks, for the reason above"
	$(call pytest,tests/image -m "not full" --ignore=tests/image/test_inputs.py $(STICK))
	@AGAIN=$(AGAIN) sh molecule/lab/try $(TRIED) || { test $$? -eq 3 && echo "Not tried: boxes, for the reason above"; }

test-box: $(VENV)/test ## Set up boxes in a lab on this machine, look at them, update and retire them: as root
	@AGAIN=$(AGAIN) sh molecule/lab/try $(SCENARIOS)

image: ## Build a stick for tests (docs/image.md tells how to build one that is shipped): as root of the machine or of a user namespace
	@sh image/install
	@image/build

test-image: $(VENV)/test ## All tests of the stick, in machines of QEMU: as root
	@sh image/install test
	$(BIN)/python -m pytest tests/image -n $(MACHINES) --dist loadgroup

docs: $(VENV)/test ## Write docs/variables.md anew from the roles' argument specs
	$(BIN)/python -m tests.repo.variables > docs/variables.md

bench: $(VENV)/test peers ## Figures and ratios against Orthanc and DCMTK, measured in the same run
	$(BIN)/python -m tests.bench

peers: ## Install the DICOM peers that the tests talk to (Debian, as root)
	@sh tests/install-peers

release: build/relay-agent.tar build/relay-disk build/VERSION ## The agent and all it needs in one file, for boxes with Debian 13 and without network

# From the same sources the same file, so that a box can tell by its digest whether it has it.
build/relay-agent.tar: pyproject.toml $(wildcard relay_agent/*.py relay_agent/*/*.py) | $(VENV)/ready
	@rm -rf build/wheels build/lib build/bdist.*
	@SOURCE_DATE_EPOCH=946684800 $(BIN)/python -m pip wheel -q --no-deps --wheel-dir build/wheels .
	@$(BIN)/python -m pip download -q --dest build/wheels --only-binary :all: --python-version 3.13 \
	--implementation cp --abi cp313 --abi abi3 --abi none --platform manylinux_2_28_x86_64 \
	--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any build/wheels/relay_agent-*.whl
	@tar --sort=name --mtime=@946684800 --owner=0 --group=0 --numeric-owner -cf $@ -C build/wheels .

# One file, so that a power cut leaves the old command or the new one.
build/relay-disk: $(wildcard roles/storage/files/relay_disk/*.py) | $(VENV)/ready
	@rm -rf build/disk && mkdir -p build/disk
	@install -m 644 -D -t build/disk/relay_disk $^ && cp build/disk/relay_disk/__main__.py build/disk
	@find build/disk -exec touch --date=@946684800 {} +
	@TZ=UTC $(BIN)/python -m zipapp build/disk --python="/usr/bin/python3 -IB" --output=$@

# The agent's version and the moment of the commit, so that a box can tell which of two releases is the later one.
build/VERSION: FORCE
	@mkdir -p build
	@TZ=UTC git log -1 --date=format-local:%Y%m%d%H%M%S \
	--format="$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' relay_agent/__init__.py).%cd-%h" > $@

# With settings it is a release of now, whatever day its roles are of.
bundle: release ## A release signed for boxes that fetch it: make bundle KEY=~/.ssh/release [SITES=/path/to/fleet.yml]
	@test -n "$(KEY)" || { echo "Name the signing key: make bundle KEY=~/.ssh/release"; exit 2; }
	@rm -rf build/settings && mkdir build/settings
	@test -z "$(SITES)" || { $(BIN)/ansible-playbook $(SITES:%=--inventory=%) playbooks/settings.yml \
	&& sed -i -E "s/[0-9]{14}-/$$(date -u +%Y%m%d%H%M%S)-/" build/VERSION; }
	@tar --sort=name --mtime="@$$(git log -1 --format=%ct)" --owner=0 --group=0 --numeric-owner --mode=go-w \
	--exclude=__pycache__ -cf build/relay.tar ansible.cfg playbooks roles \
	build/relay-agent.tar build/relay-disk build/settings build/VERSION
	@rm -f build/relay.tar.sig # ssh-keygen would ask, and keep the old one where nobody answers
	@ssh-keygen -q -Y sign -f "$(KEY)" -n relay-release build/relay.tar
	@echo "build/relay.tar and build/relay.tar.sig: release $$(cat build/VERSION), sha256 $$(sha256sum < build/relay.tar | cut -c -64)"

clean: ## Remove what the commands above made
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "The venv module is needed; on Debian: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/demo: pyproject.toml | $(VENV)/ready
	@echo "setting up $(VENV) (once)"
	@$(BIN)/python -m pip install -qq --editable '.[demo]'
	@touch $@

$(VENV)/test: pyproject.toml | $(VENV)/ready
	$(BIN)/python -m pip install -qq --editable '.[demo,test,box]'
	@touch $@

FORCE:

.PHONY: help demo check lint unit test test-box image test-image docs bench peers release bundle clean FORCE
