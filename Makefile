# `make` prints what there is. PYTHON=path/to/python names the interpreter to make .venv with.

VENV := .venv
TE_VENV := .venv-te
PYTHON_IN_VENV := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SOURCES := megatron_dion benchmarks docs examples studies tools tests setup.py pretrain_gpt.py

# One thread per process: the tests and the CPU training start several processes.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all docs convergence test-versions test-te test-gpu lint format clean

help:
	@echo 'make setup   install everything into $(VENV) (once; again only when the requirements change)'
	@echo 'make train   fetch a corpus, make a tokenizer and data, pretrain a small GPT with Dion'
	@echo "             ARGS='--train-iters 50' (more than the 30 of the warm-up) adds or overrides flags of pretrain_gpt.py"
	@echo 'make test    run the tests of what must never break: 10 minutes on two cores'
	@echo 'make test-all  run the others too'
	@echo 'make docs    build the documentation site into build/docs'
	@echo 'make convergence   train all cases in tests/convergence and check their curves'
	@echo 'make test-te   build Transformer Engine into $(TE_VENV) (once, 25 minutes of processor time)'
	@echo '               and run the tests that need it; no GPU is needed'
	@echo "make test-versions  run a short suite on each supported megatron-core; VERSIONS='0.18.2' on one"
	@echo 'make test-gpu  run the tests that need a GPU, in the Python that is active'
	@echo 'make lint    check style and types'
	@echo 'make format  rewrite the code in the project style'
	@echo 'make clean   remove $(VENV) and $(VENV)-*, data/ and caches; runs/ is kept'

setup: $(INSTALLED)

# In a container that brings its own torch, leave the constraints out: `pip install -e ".[data,run]"`.
$(INSTALLED): pyproject.toml constraints.txt setup.py
	@$(PYTHON_IN_VENV) -m pip --version >/dev/null 2>&1 || { \
	  python=$$(PYTHON='$(PYTHON)' tools/find_python.sh) && \
	  echo "making $(VENV) with $$python" && \
	  "$$python" -m venv --clear $(VENV); }
	@echo 'installing into $(VENV): 2 to 5 minutes without a word, and 6 GB'
	@$(PYTHON_IN_VENV) -m pip install --disable-pip-version-check --quiet \
	  -c constraints.txt -e '.[data,run,dev,docs]'
	@touch $@

train: setup
	@$(PYTHON_IN_VENV) tools/quick_start.py $(if $(ARGS),-- $(ARGS))

# Two files at a time: each pytest process has worlds of ranks of its own. In alphabetical order short
# files come last, so that neither process waits long for the other.
PYTEST := $(PYTHON_IN_VENV) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) -m 'not slow'

test-all: test
	$(PYTEST) -m slow

docs: setup
	$(PYTHON_IN_VENV) -m sphinx -W --keep-going -n -q -j auto docs build/docs

convergence: setup
	$(PYTHON_IN_VENV) -m megatron_dion_tools convergence check

# Environments on top of $(VENV), whose packages they see behind a megatron-core of their own.
VERSIONS ?= 0.18.2 0.19.0 0.19.2
ENVIRONMENTS := $(VERSIONS:%=.venv-%/.installed)
BRIDGE := 0.6.2

test-versions: $(ENVIRONMENTS)
	@for version in $(VERSIONS); do echo "megatron-core $$version" && \
	  .venv-$$version/bin/python -m pytest -m versions tests/unit tests/distributed || exit 1; done

.venv-%/.installed: $(INSTALLED)
	$(PYTHON_IN_VENV) -m venv --without-pip --clear .venv-$*
	$(PYTHON_IN_VENV) -m pip --disable-pip-version-check --python .venv-$*/bin/python install \
	  --quiet --no-deps megatron-core==$* megatron-bridge==$(BRIDGE)
	@echo "import site; site.addsitedir('$$($(PYTHON_IN_VENV) -c \
	  'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@touch $@

test-te:
	@tools/build_transformer_engine.sh $(TE_VENV)
	$(TE_VENV)/bin/python -m pytest tests/transformer_engine

# Not in $(VENV). Tests of the algorithm need torch and pytest; others are skipped by name where
# Megatron or Transformer Engine is missing. It fails where there is no GPU.
test-gpu:
	TEST_DEVICE=cuda python -m pytest tests/gpu

lint: setup
	$(PYTHON_IN_VENV) -m ruff check $(SOURCES)
	$(PYTHON_IN_VENV) -m ruff format --check $(SOURCES)
	$(PYTHON_IN_VENV) -m mypy
	@! git grep -nE '^(<{7}|>{7}) '  # what a merge left

format: setup
	$(PYTHON_IN_VENV) -m ruff check --fix $(SOURCES)
	$(PYTHON_IN_VENV) -m ruff format $(SOURCES)

clean:
	rm -rf $(VENV) $(VENV)-* data build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
