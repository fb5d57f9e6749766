# The commands of this repository. Each builds its own .venv from the pinned lock when that is missing or out of date.

PYTHON ?= python3
BUILT := .venv/.built

.PHONY: help demo test test-all test-browser ray test-cluster check docs bench bench-serving bench-harvest bench-scaling agreement
.DELETE_ON_ERROR:

help:
	@echo "make demo    a small Gemma Scope of the bundled model, in runs/tiny"
	@echo "make test    the tests of each commit, two at a time; make test WORKERS=8 on a larger machine"
	@echo "make test-all       these and the thorough ones: every kill moment"
	@echo "make check   style, types, floors and house rules"
	@echo "make docs    the documentation site, in build/site; warnings are errors"
	@echo "make test-cluster   tests on a Ray cluster of this host; installs Ray"
	@echo "make bench   training beside other trainers, which are installed the first time; options in BENCH='...'"

demo: $(BUILT)
	.venv/bin/everyscope run tiny --out runs/tiny

# Files stay whole, for their tests share what is costly to build, and start in the order of their names: the slow ones early.
WORKERS ?= 2
PYTEST := .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

test: $(BUILT)
	$(PYTEST)

test-all: $(BUILT)
	$(PYTEST) -m "not cluster"

test-browser: $(BUILT)
	.venv/bin/python -m pytest tests/browser

# Ray is large and only these tests need it, so it is not in the lock.
RAY := ray==2.60.0

ray: $(BUILT)
	.venv/bin/python -m pip install -q "$(RAY)"

test-cluster: ray
	.venv/bin/python -m pytest -m cluster --durations=10 tests/pipeline/test_ray.py

check: $(BUILT)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/lint-imports
	.venv/bin/python -m pytest tests/unit/test_house.py

# The site is built from the sources as text, in an environment without torch.
DOCS_ENV := .test-envs/docs

docs: $(DOCS_ENV)/.built
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build --strict
	@echo "build/site/index.html; with its search: python3 -m http.server --bind 127.0.0.1 --directory build/site"

$(DOCS_ENV)/.built: requirements-docs.lock
	$(PYTHON) -m venv $(DOCS_ENV)
	$(DOCS_ENV)/bin/pip install --require-hashes --no-deps -r requirements-docs.lock
	@touch $@

bench: $(BUILT)
	.venv/bin/python benchmarks/training.py $(BENCH)

bench-serving: $(BUILT)
	.venv/bin/python benchmarks/serving.py $(BENCH)

bench-harvest: $(BUILT)
	.venv/bin/python benchmarks/harvest.py $(BENCH)

bench-scaling: $(BUILT)
	.venv/bin/python benchmarks/scaling.py $(BENCH)

agreement: $(BUILT)
	.venv/bin/python benchmarks/agreement.py runs/tiny

# torch comes first and alone: a torch that is in .venv already, as one built for another CUDA version, is kept if it has
# this version. The last line builds with the setuptools of the lock, so that nothing unpinned is fetched.
$(BUILT): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "everyscope needs Python 3.11 or newer; $(PYTHON) is\
	 $$($(PYTHON) --version 2>&1). Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install torch==2.13.0
	.venv/bin/pip install --require-hashes --no-deps -r requirements.lock
	.venv/bin/pip install --no-deps --no-build-isolation -e .
	@touch $@
