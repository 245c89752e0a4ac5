# make demo: plan and serve a mixed cluster on this machine.   make test: every check.
# make slow: what takes minutes more (all layouts on real engines, 200 clusters against the exhaustive solver).
.PHONY: demo test lint unit engine layouts slow docs venv clean
PY := .venv/bin/python

demo: venv
	.venv/bin/hexgen2 demo

test: lint unit engine

venv:
	@tools/setup_venv.sh cpu,dev

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The tests on a Ray cluster share one, so they stay in one process.
# NIXL crashes beside OR-Tools in one process, so the KV connector's tests run by themselves.
unit: venv
	$(PY) -m pytest -q -n 2 -m "not engine and not slow and not ray" --ignore tests/vllm_plugin/kv_connector
	$(PY) -m pytest -q -m "not engine and not slow" tests/vllm_plugin/kv_connector
	$(PY) -m pytest -q -m "ray and not engine and not slow"

engine: venv
	HEXGEN2_ENGINE_REQUIRED=1 $(PY) -m pytest -q -m "engine and not slow" --timeout 900

# The groups and pairs of groups of three ranks and more, which `engine` leaves out: CI runs them once.
layouts: venv
	HEXGEN2_ENGINE_REQUIRED=1 $(PY) -m pytest -q -m slow --timeout 900 \
	  tests/engine/test_asymmetric.py tests/engine/test_kv_connector_layouts.py

slow: venv
	HEXGEN2_ENGINE_REQUIRED=1 $(PY) -m pytest -q -m slow --timeout 1800

# The rooms' public faces, from their docstrings. The plugin stays out: only vLLM's processes import it.
docs: venv
	$(PY) -m pdoc --docformat markdown -o build/docs hexgen2 '!hexgen2.vllm_plugin' '!hexgen2.cli'
	@echo open build/docs/index.html

clean:
	rm -rf .venv build
