"""What an update costs: its matrix products, counted in the program that JAX traces.

    FLOPs of dot(x, y) = 2 · batch · rows · contracted · columns    (COST 1)

Scans count as often as they run, of a branch the dearer side. Element-wise work is
left out: on the published configuration it is a few per cent.
"""

import math
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from agent import init_agents, make_trainer, matmul_precision, update
from config import Config


class Work(NamedTuple):
    """Of matrix products: FLOPs, bytes that enter and leave them, how many they are."""

    flops: float = 0.0
    bytes: float = 0.0
    products: float = 0.0

    def times(self, n: float | int) -> "Work":
        return Work(*(n * x for x in self))

    def plus(self, other: "Work") -> "Work":
        return Work(*(x + y for x, y in zip(self, other, strict=True)))


def dot_work(eqn) -> Work:
    """Of one dot_general equation. (COST 1)"""
    (contract, _), (batch, _) = eqn.params["dimension_numbers"]
    left, right = (v.aval.shape for v in eqn.invars)
    contracted = math.prod(left[i] for i in contract)
    shared = math.prod(left[i] for i in batch)
    total = math.prod(left) * math.prod(right)
    arrays = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    return Work(2 * total / (contracted * shared), moved, 1)  # (COST 1)


def work(jaxpr: Jaxpr, loops_once: bool = False) -> Work:
    """Of a traced program; `loops_once` as XLA counts them."""
    total = Work()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total = total.plus(dot_work(eqn))
            continue
        inner = [work(j, loops_once) for j in subprograms(eqn.params)]
        if eqn.primitive.name == "cond":
            total = total.plus(max(inner))
            continue
        scanned = eqn.primitive.name == "scan" and not loops_once
        for one in inner:
            total = total.plus(one.times(eqn.params["length"] if scanned else 1))
    return total


def flops(jaxpr: Jaxpr, loops_once: bool = False) -> float:
    """Matrix-product FLOPs of a traced program."""
    return work(jaxpr, loops_once).flops


def subprograms(params: dict) -> list[Jaxpr]:
    """Programs that an equation runs: bodies of loops, branches, calls."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found


def update_arguments(config: Config) -> dict:
    """Everything that `update` is told besides learner, replay, key and level."""
    return {
        "trainer": make_trainer(config),
        "batch": config.batch,
        "length": config.length,
        "sampler": config.sampler,
        "tau": config.tau,
        "carry": config.carry,
        "precision": config.precision,
        "seeds": config.seeds,
    }


def update_work(config: Config, obs_shape: tuple, actions: int) -> list[Work]:
    """Of one update per level, traced without computing or allocating."""
    agent = jax.eval_shape(partial(init_agents, config, obs_shape, actions))
    totals = []
    for level, (learner, replay) in enumerate(
        zip(agent.learners, agent.replays, strict=True)
    ):
        call = partial(update, level=level, **update_arguments(config))
        traced = jax.make_jaxpr(call)(learner, replay, agent.key)
        totals.append(work(traced.jaxpr))
    return totals


def update_flops(config: Config, obs_shape: tuple, actions: int) -> list[float]:
    """FLOPs of one update per level."""
    return [one.flops for one in update_work(config, obs_shape, actions)]


def matmul_peak(
    size: int = 2048, repeats: int = 5, precision: str = "float32"
) -> float:
    """FLOP/s of one large matrix product here and now, median."""
    x = jnp.ones((size, size))
    with matmul_precision(precision):
        product = jax.jit(lambda x: x @ x)
        product(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(seconds))
