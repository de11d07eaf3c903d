"""Tests of cost.py: programs counted by hand, and the published configuration."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from test_subactor import CONFIG

import agent
import cost
import train
from config import PRESETS

x, y = jnp.ones((3, 4)), jnp.ones((4, 5))
PRODUCT = 2 * 3 * 4 * 5


def flops(function, *inputs):
    return cost.flops(jax.make_jaxpr(function)(*inputs).jaxpr)


def test_hook_is_live():
    with pytest.raises(TypeCheckError):
        cost.flops(lambda x: x)
    with pytest.raises(TypeCheckError):
        cost.matmul_peak(2.5)


def looped(x, y):
    """Seven products, and seven times two in a loop of its own."""

    def twice(total, _):
        return total + (x @ y).sum(), None

    def body(total, _):
        return jax.lax.scan(twice, total + (x @ y).sum(), None, length=2)[0], None

    return jax.lax.scan(body, 0.0, None, length=7)[0]


def branched(x, y):
    """A branch of two products, one of one, one of none."""
    two = lambda: (x @ y).sum() + (x @ y).max()
    one = lambda: 0 - (x @ y).sum()
    return jax.lax.switch(x[0, 0].astype(int), [two, one, lambda: 0.0])


@jax.checkpoint
def checkpointed(x, y):
    return jnp.sin(x @ y).sum()


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x, y: x @ y, 1),
        (lambda x, y: x[0] @ y, 1 / 3),
        (lambda x, y: y.T @ x[1] + x[0] @ y, 2 / 3),
        (lambda x, y: x + 1, 0),
        (lambda x, y: jax.vmap(lambda row: row @ y)(x), 1),
        (
            lambda x, y: jnp.einsum(
                "bij,bjk->bik", x.reshape(2, 3, 2), y.reshape(2, 2, 5)
            ),
            1,
        ),
        (lambda x, y: jnp.tensordot(x.reshape(3, 2, 2), y.reshape(2, 2, 5)), 1),
        (looped, 7 + 7 * 2),
        (branched, 2),
        (jax.jit(lambda x, y: jax.jit(jnp.matmul)(x, y) @ y.T), 2),
        (jax.grad(lambda x, y: jnp.sin(x @ y).sum()), 2),
        (jax.grad(lambda x, y: jnp.sin(x @ y).sum(), argnums=(0, 1)), 3),
        (jax.grad(checkpointed), 3),
        (lambda x, y: jax.lax.fori_loop(0, 6, lambda i, t: t + (x @ y).sum(), 0.0), 6),
    ],
)
def test_products_by_hand(function, products):
    """In units of one (3, 4) × (4, 5) product, which is 120 FLOPs."""
    assert flops(function, x, y) == pytest.approx(products * PRODUCT)


def test_bytes_and_number_of_products():
    """Two inputs and an output of four bytes each, as often as a loop runs."""
    once = cost.work(jax.make_jaxpr(jnp.matmul)(x, y).jaxpr)
    assert once[1:] == (4 * (12 + 20 + 15), 1)
    many = cost.work(jax.make_jaxpr(looped)(x, y).jaxpr)
    assert many == once.times(7 + 7 * 2)
    entered = cost.work(jax.make_jaxpr(looped)(x, y).jaxpr, loops_once=True)
    assert entered == once.times(2)


def test_update_is_told_everything():
    told = set(cost.update_arguments(CONFIG))
    parameters = inspect.signature(agent.update).parameters
    assert told | {"learner", "replay", "key", "level"} == set(parameters)


def test_published_configuration_costs_what_train_says():
    """0.54, 0.38, 0.33 TFLOP per update; a level updates once per own step."""
    config = PRESETS["atari100k"]
    totals = cost.update_work(config, (64, 64, 3), 18)
    per_step = sum(x.flops / config.period**i for i, x in enumerate(totals))
    assert per_step == pytest.approx(train.FULL_FLOPS, rel=0.05), totals
    # The README's roofline table.
    assert [x.products for x in totals] == [1123, 1111, 1097]
    assert [round(x.bytes / 1e9, 1) for x in totals] == [11.2, 5.3, 4.8]


def test_peak_is_a_speed():
    assert 1e6 < cost.matmul_peak(64, repeats=3) < 1e16


def test_peak_is_the_median_of_its_repeats(monkeypatch):
    """Products that take 1, 2 and 9 seconds, of 2 · 64³ FLOPs."""
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    assert cost.matmul_peak(64, repeats=3) == 64**3
