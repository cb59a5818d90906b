# `make demo` and `make test` are all a newcomer needs; each makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Empty unless $(VENV) was installed whole and its Python, which may be the system's, is still there.
SOUND := $(shell test -e $(VENV)/.installed && $(RUN) -c 'print("sound")' 2> /dev/null)
NEEDED = $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
FOUND = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)
NEWER = $(lastword $(shell printf '%s\n' $(NEEDED) $(FOUND) | sort -V))
TOO_OLD = Python $(NEEDED) or newer is needed, $(PYTHON) is $(or $(FOUND),not there): try make PYTHON=python$(NEEDED)

QUICK = OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 -m "not slow"

.PHONY: demo web shell test coverage test-slow gpu soak format lock clean $(if $(SOUND),,$(VENV)/.installed)

demo: $(VENV)/.installed
	$(RUN) demo/demo.py

# A page that makes and edits digits, for a browser on this machine.
web: $(VENV)/.installed
	@test -e output/demo/checkpoint-last.pth || { echo "error: no model of digits yet: make demo trains it" >&2; exit 2; }
	$(RUN) demo/web.py --resume output/demo

# A shell in which the environment is active, for the commands of README and docs.
shell: $(VENV)/.installed
	@. $(VENV)/bin/activate && exec $${SHELL:-/bin/sh}

test: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(QUICK)

# The quick tests again, a quarter slower, with the lines that they reach.
coverage: $(VENV)/.installed
	$(QUICK) --cov=models --cov=util --cov=engine_tokenbridge --cov=evaluation --cov-report=term --cov-fail-under=90

# What takes minutes: the demo, full-size models, long trainings. The tests of a file share what takes long to make, so
# one process runs them all; files run in their order, since the demo's is the longest.
test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

# The CUDA tests and benchmarks, on a machine with a GPU, in nine minutes. Installs nothing: PYTHON=
# names an interpreter that has PyTorch and the project's packages.
gpu:
	$(PYTHON) -m benchmarks.gpu

# Runs killed twenty times, and files damaged three hundred times.
soak: $(VENV)/.installed
	KILLS=20 $(RUN) -m pytest tests/soak

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Pins the newest versions that pyproject.toml allows; run the tests before committing what it writes. pip takes no
# hashes for an editable checkout: constraints.txt has the same versions without them.
lock: $(VENV)/.installed
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile --universal --python-version 3.11 --all-extras --generate-hashes --no-strip-extras \
		--no-annotate --no-header --upgrade pyproject.toml --output-file requirements.lock
	sed -n 's/ \\$$//; s/\[[^]]*\]//; /^[a-z].*==/p' requirements.lock > constraints.txt

# Not output/, which may hold results.
clean:
	rm -rf $(VENV) *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.installed: requirements.lock
	$(if $(SOUND)$(filter $(FOUND),$(NEWER)),,$(error $(TOO_OLD)))
	$(if $(SOUND),,$(PYTHON) -m venv --clear $(VENV))
	rm -f $@
	@echo "installing the packages of requirements.lock into $(VENV), which takes minutes"
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
