"""What an update costs: its matrix products, counted in the program that JAX traces.

    FLOPs of dot(x, y) = 2 · batch · rows · contracted · columns    (COST 1)

Scans count as often as they run, of a branch the dearer side. Element-wise work is
left out: on the published configuration it is a few per cent.
"""

import math
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from agent import init_agents, make_trainer, matmul_precision, update
from config import Config


def dot_flops(eqn) -> float:
    """FLOPs of one dot_general equation. (COST 1)"""
    (contract, _), (batch, _) = eqn.params["dimension_numbers"]
    left, right = (v.aval.shape for v in eqn.invars)
    contracted = math.prod(left[i] for i in contract)
    shared = math.prod(left[i] for i in batch)
    total = math.prod(left) * math.prod(right)
    return 2 * total / (contracted * shared)  # (COST 1)


def flops(jaxpr: Jaxpr, loops_once: bool = False) -> float:
    """Matrix-product FLOPs of a traced program; `loops_once` as XLA counts them."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += dot_flops(eqn)
            continue
        inner = [flops(j, loops_once) for j in subprograms(eqn.params)]
        if eqn.primitive.name == "cond":
            total += max(inner)
        elif eqn.primitive.name == "scan":
            times = 1 if loops_once else eqn.params["length"]
            total += times * sum(inner)
        else:
            total += sum(inner)
    return total


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


def update_flops(config: Config, obs_shape: tuple, actions: int) -> list[float]:
    """FLOPs of one update per level, traced without computing or allocating."""
    agent = jax.eval_shape(partial(init_agents, config, obs_shape, actions))
    totals = []
    for level, (learner, replay) in enumerate(
        zip(agent.learners, agent.replays, strict=True)
    ):
        call = partial(update, level=level, **update_arguments(config))
        traced = jax.make_jaxpr(call)(learner, replay, agent.key)
        totals.append(flops(traced.jaxpr))
    return totals


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
