.PHONY: install test lint slow gpu notebooks bench ci

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
	pytest tests/test_notebooks.py

gpu:
	pytest -m gpu

bench:
	python bench.py

ci:
	bash .ci/run
