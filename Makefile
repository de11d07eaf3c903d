.PHONY: install test lint slow gpu bench ci

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

bench:
	python bench.py

ci:
	bash .ci/run
