.PHONY: install test lint slow notebooks gpu ci

install:
	pip install -e '.[test,dev]'

test:
	pytest

lint:
	ruff check .
	ruff format --check .

slow:
	pytest -m slow

notebooks:
	pytest -m slow tests/test_notebooks.py -k scratch

gpu:
	pytest -m gpu

ci:
	bash .ci/run
