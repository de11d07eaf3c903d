.PHONY: install test lint slow gpu ci

install:
	pip install -e '.[test,dev]'

test:
	pytest

lint:
	ruff check .
	ruff format --check .

slow:
	pytest -m slow

gpu:
	pytest -m gpu

ci:
	bash .ci/run
