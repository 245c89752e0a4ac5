# make demo: plan and serve a mixed cluster on this machine.   make test: every check.
.PHONY: demo test lint unit engine venv clean
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

unit: venv
	$(PY) -m pytest -q -m "not engine"

engine: venv
	$(PY) -m pytest -q -m engine --timeout 900

clean:
	rm -rf .venv build
