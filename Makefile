# make quickstart   environment, install, a small tokenizer trained on real
#                   photographs, figures and pictures in runs/quickstart
# make test         environment with the test extra, the whole fast suite
# make test-slow    the tests that take minutes each, older CPUs, Python 3.12
# make test-extras  of those, the page of demo in a browser, and Ray
# make test-codebooks  of those, whether 4,096 codes stay in use
# make bench        environment with the test extra; speed beside PyTorch, into
#                   docs/performance.md (40 minutes on two idle cores); with
#                   DATA=a folder, a glob, … that of reading it too
# make test-wheel   of make test-slow, sdist and wheel, installed alone on each
#                   Python that is here
# make wheel        what is published: dist/*.tar.gz and, from it, dist/*.whl
# make docs         environment with the docs extra; the site, strict, into
#                   docs/_build/html, and every code block of it and README.md
# make linkcheck    the site's links to other places, which needs a network
# make lint         environment with the test extra; ruff, format and rules
# make clean        removes all environments and what builds leave, no run
PYTHON ?= python3
VENV ?= .venv
STEPS ?=
BIN = $(VENV)/bin
# Python compiles what it imports; all the rest would be 40 CPU-seconds. Where
# it may not write that, each process would compile it again: 4 CPU-seconds.
export PIP_COMPILE = 0
unexport PYTHONDONTWRITEBYTECODE
WORKERS ?= 2
# By a path, not by an import hook: beside the clone, Python would take the
# folder of that name for an empty package.
EDITABLE = --config-settings editable_mode=compat -e
# For LPIPS's file of linear heads and for Inception, which tests compare with.
# Without what they ask for: torchvision breaks transformers beside the CPU
# torch.
PEERS = $(BIN)/python -m pip install -qq --no-deps -c constraints.txt lpips \
  torch-fidelity

.PHONY: quickstart test test-unit test-slow test-extras test-codebooks \
  test-newest bench lint clean

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vqrae_jax needs Python 3.11 or newer; try make PYTHON=python3.11 …"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.docs: $(VENV)/.%: $(VENV)/.made \
  pyproject.toml setup.py constraints.txt
	@echo "installing vqrae_jax[cpu,$*] into $(VENV)"
	@$(BIN)/python -m pip install -qq -c constraints.txt $(EDITABLE) '.[cpu,$*]'
	@$(if $(filter test,$*),$(PEERS) || echo "no lpips or no torch-fidelity: a test skips")
	@touch $@

quickstart: $(VENV)/.demo
	JAX_PLATFORMS=cpu $(BIN)/python -m vqrae_jax.train \
	  --config=configs/quickstart.py$(if $(STEPS),:steps=$(STEPS)) \
	  --workdir=runs/quickstart

PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(VENV)/.test
	$(PYTEST) -m 'not slow'

test-unit: $(VENV)/.test
	$(PYTEST) -m 'not slow and not integration'

test-slow: $(VENV)/.test
	$(PYTEST) -m slow
	$(MAKE) test-extras
	for isa in AVX2 SSE4_2; do \
	  XLA_FLAGS=--xla_cpu_max_isa=$$isa $(PYTEST) -m 'not slow' || exit 1; done
	for newer in python3.12 ~/.pyenv/versions/3.12*/bin/python; do \
	  "$$newer" -c '' 2>/dev/null || continue; \
	  $(MAKE) test-newest PYTHON="$$newer" || exit 1; break; done

# The page of `demo` in a browser (chromium, if there is one), two actors of Ray.
# Apart, since Ray is large and Gradio 6 wants Pillow 12, whose resize is up to
# two levels off that of Pillow 13, which the tests compare with. Nothing is
# pinned.
test-extras:
	@$(PYTHON) -m venv --clear $(VENV)-extras
	@$(VENV)-extras/bin/python -m pip install -qq --upgrade pip
	@$(VENV)-extras/bin/python -m pip install -qq $(EDITABLE) \
	  '.[cpu,unit,gradio,ray]' playwright
	$(VENV)-extras/bin/python -m pytest -m slow -rs tests/test_demo.py \
	  tests/test_ray.py

test-codebooks: $(VENV)/.test
	$(PYTEST) -m slow -k 4096 tests/quantizers/test_codebooks.py

# Nothing is pinned and nothing kept: what pip finds today.
test-newest:
	@$(PYTHON) -m venv --clear $(VENV)-newest
	@$(VENV)-newest/bin/python -m pip install -qq --upgrade pip
	@$(VENV)-newest/bin/python -m pip install -qq $(EDITABLE) '.[cpu,unit]'
	$(VENV)-newest/bin/python -m pytest -n $(WORKERS) --dist worksteal \
	  -m 'not slow and not integration'

# Memory that a step frees is kept and its pages are huge (docs/performance.md).
bench: export GLIBC_TUNABLES = glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=34359738368:glibc.malloc.trim_threshold=68719476736
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.bench --json=benchmarks/results/cpu.json \
	  $(if $(DATA),--data=$(DATA))
	$(BIN)/python -m benchmarks.bench --report

.PHONY: wheel test-wheel
test-wheel: $(VENV)/.test
	$(BIN)/python -m pytest -m slow -rs tests/test_packaging.py

wheel: $(VENV)/.made
	@$(BIN)/python -m pip install -qq -c constraints.txt build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

PROSE = README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs/*.md

.PHONY: docs linkcheck
docs: $(VENV)/.docs
	$(BIN)/codespell
	$(BIN)/python -m sphinx -E -W --keep-going -q docs docs/_build/html
	$(BIN)/proselint check $(PROSE)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	  -rs -p docs.blocks README.md docs

linkcheck: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-extras build dist docs/_build docs/config.md \
	  docs/commands.md docs/recipes.md *.egg-info .pytest_cache .ruff_cache
