# `make demo` and `make test` are all a newcomer needs; each makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-slow soak format lock clean

demo: $(VENV)/.installed
	$(RUN) demo/demo.py

test: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 -m "not slow" \
		--cov=models --cov=util --cov=engine_tokenbridge --cov=evaluation --cov-report=term --cov-fail-under=90

# What takes minutes: the demo, full-size models, long trainings.
test-slow: $(VENV)/.installed
	$(RUN) -m pytest -m slow

# Runs killed twenty times, and files damaged three hundred times.
soak: $(VENV)/.installed
	$(RUN) -m pytest tests/soak

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Pins the newest versions that pyproject.toml allows; run the tests before committing what it writes.
lock: $(VENV)/.installed
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile --universal --python-version 3.11 --all-extras --no-annotate --no-header --upgrade \
		pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) output

$(VENV)/.installed: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@
