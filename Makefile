# Each target sets up what it needs: `make repro` works in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Two processes, each with whole files: what a file sets up once stays in one of them.
PYTEST := pytest -n 2 --dist loadfile

PHASE ?= chat
PORT ?= 8000
# Every model is a folder here; without a cache folder the server fails on the list of models.
SERVE = HF_HUB_OFFLINE=1 HF_HUB_CACHE=.work/hub transformers serve models/$(PHASE)/merged --host 127.0.0.1 --port $(PORT)

.PHONY: repro test test-all check bench setup recipe chat serve serving

repro: setup  ## run every stage that is out of date
	@test -s .dvc/tmp/rwlock || rm -f .dvc/tmp/rwlock  # left empty by a killed DVC, which no other DVC can read
	python stages/check_params.py
	python stages/check_runs.py
	dvc repro
	@dvc data status --json | python -c 'import json, sys; lost = json.load(sys.stdin).get("not_in_cache"); \
		sys.exit(lost and "not in the DVC cache: " + ", ".join(lost) + "; was the disk full? free space, then run dvc commit")'
	python stages/check_runs.py

test: setup  ## the fast tests, under 10 minutes
	$(PYTEST) -m "not slow"

test-all: setup  ## every test
	$(PYTEST)

check: setup  ## style, types and the pipeline's contract, under a minute
	ruff check .
	ruff format --check .
	mypy
	pytest tests/test_pipeline_contract.py

bench: setup  ## measure the budgets
	for bench in clean_to_blocks scale train_tokenizer near_duplicates loader loss_head train_speed merge look_ups pipeline; do \
		echo "--- $$bench"; python bench/$$bench.py || missed=1; done; test -z "$$missed"

recipe: setup  ## make recipe NAME=...: install recipes/NAME.yaml as params.yaml
	@test -f recipes/$(NAME).yaml || { echo "make recipe NAME=...: one of $(basename $(notdir $(wildcard recipes/*.yaml)))"; exit 1; }
	@for one in recipes/*.yaml; do cmp -s $$one params.yaml && exit 0; done; git diff --quiet HEAD -- params.yaml || { \
		echo "params.yaml has changes that Git does not hold and that would be lost; commit it first"; exit 1; }
	cp recipes/$(NAME).yaml params.yaml

chat: serving  ## make chat PHASE=...: talk to a merged model in the terminal; !help lists commands, !exit ends
	@test -f models/$(PHASE)/merged/chat_template.jinja || { echo "models/$(PHASE)/merged has no chat template, so it \
continues text but does not chat: make serve PHASE=$(PHASE), then POST /v1/completions"; exit 1; }
	@! python -c 'import socket; socket.create_connection(("127.0.0.1", $(PORT)), 1)' 2>/dev/null || { \
		echo "something answers on port $(PORT) already, perhaps with another model; make chat PORT=$$(($(PORT) + 1))"; exit 1; }
	@$(SERVE) --log-level error >.work/serve.log 2>&1 & server=$$!; trap "exit 130" INT TERM HUP; \
		trap "kill $$server 2>/dev/null; { wait $$server; } 2>/dev/null" EXIT; \
		until python -c 'import urllib.request as r; r.urlopen("http://127.0.0.1:$(PORT)/health")' 2>/dev/null; do \
		kill -0 $$server 2>/dev/null || { tail -n 3 .work/serve.log; exit 1; }; sleep 1; done; \
		transformers chat models/$(PHASE)/merged http://127.0.0.1:$(PORT)/v1

serve: serving  ## make serve PHASE=... PORT=...: an OpenAI-compatible server of a merged model
	$(SERVE)

serving: setup
	@test -f models/$(PHASE)/merged/config.json || { \
		echo "there is no models/$(PHASE)/merged; run make repro, or name another phase: $(patsubst models/%/merged,%,$(wildcard models/*/merged))"; exit 1; }
	@mkdir -p .work/hub
	@python -c 'import fastapi, uvicorn' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check '.[serve]'

setup: $(BIN)/.installed

$(BIN)/.installed: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Terroir needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@
