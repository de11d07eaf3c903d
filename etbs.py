"""Replay, and efficient time-balanced sampling (ETBS): one draw in O(1).

    F(x) = [x (ln x - ln n - 1) - 2 (ln 2 - ln n - 1)]
           / (2 ln n - n - 2 ln 2 + 2),   x = 2 + u m,  n = m + 2   (ETBS 1)
    index = ⌊τ F(x) m + (1 - τ) u m⌋,   u ~ U(0, 1)                 (ETBS 2)
    density over relative age v, large m: 1 / ((1 - τ) - τ ln u(v))   (ETBS 3)

Uniform draws from a growing buffer give entry i about ln(n/i) draws: old data is
over-used. (ETBS 2) remaps one uniform variate so that new data is drawn more often; m
is the number of windows that the ring holds now. Old data stays ahead: draws per tenth
of the entries, oldest to newest, go from 3.31 to 0.05 by uniform draws, from 2.64 to
0.07 with τ = 0.3, from 1.80 to 0.29 with τ = 1. (ETBS 2) interpolates *indices*, not
densities. The formula p_ETBS of the paper's slides is not a distribution, and inverting
their CDF worsens the imbalance.

Mattes, Schlosser, Herbrich, "Hieros", ICML 2024; Robine et al., "Transformer-
based World Models", 2023 (count-balanced). Official: embodied/replay/selectors.py.
Differs from the official code in: Δ20 m is the current size, Δ21 carries are stored.

Axes: B batch, T time, C capacity; N, P, S as in s5wm.py. Position is age: 0 is the
oldest entry.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from s5wm import Carry, Transition

BALANCE_TEMPERATURE = 20.0


def etbs_cdf(u: Float[Array, "*B"], m: Int[Array, ""]) -> Float[Array, "*B"]:
    """F at quantile u of m windows: 0 at u = 0, 1 at u = 1. (ETBS 1)

    Numerator and denominator are divided by n, which float32 needs at m = 10⁷.
    """
    n = m + 2.0
    x = (2 + u * m) / n
    two = 2 / n
    above = x * (jnp.log(x) - 1) - two * (jnp.log(two) - 1)
    return above / (two * (1 - jnp.log(two)) - 1)  # (ETBS 1)


def etbs_index(
    u: Float[Array, "*B"], m: Int[Array, ""], tau: float
) -> Int[Array, "*B"]:
    """Age order index in [0, m) of a uniform variate; τ = 0 is uniform. (ETBS 2)"""
    position = tau * etbs_cdf(u, m) * m + (1 - tau) * u * m  # (ETBS 2)
    return jnp.clip(jnp.floor(position).astype(jnp.int32), 0, m - 1)


class StoredCarry(eqx.Module):
    """A carry with z as class indices, x as real and, if it has one, imaginary part."""

    x: tuple[Float[Array, "*B N P"], ...]
    z: UInt8[Array, "*B S"]


class Replay(eqx.Module):
    """A level's experience on the device: a ring of C entries, oldest overwritten.

    `carries[t]` is the state after entry t, x rounded to float16. Acting goes on from
    the float32 state: rounded at every step, slow modes would lose their increments.
    `draws` counts the windows that began at an entry. Arrays have one row more than the
    capacity: it swallows the writes of a level that does not act.
    """

    steps: Transition
    carries: StoredCarry
    draws: Float[Array, " C+1"]
    head: Int[Array, ""]
    size: Int[Array, ""]
    capacity: int = eqx.field(static=True)

    def __init__(self, capacity: int, step: Transition, carry: StoredCarry):
        """An empty ring for entries shaped like `step` and `carry`."""
        rows = lambda x: jnp.zeros((capacity + 1, *x.shape), x.dtype)
        self.steps = jax.tree.map(rows, step)
        self.carries = jax.tree.map(rows, in_float16(carry))
        self.draws = jnp.zeros(capacity + 1)
        self.head, self.size = jnp.array(0, jnp.int32), jnp.array(0, jnp.int32)
        self.capacity = capacity

    def add(
        self, step: Transition, carry: StoredCarry, acts: Bool[Array, ""]
    ) -> "Replay":
        """The ring after one more entry, or unchanged where `acts` is false."""
        row = jnp.where(acts, self.head, self.capacity)
        write = lambda ring, x: ring.at[row].set(x)
        new = (
            jax.tree.map(write, self.steps, step),
            jax.tree.map(write, self.carries, in_float16(carry)),
            self.draws.at[row].set(0),
            jnp.where(acts, (self.head + 1) % self.capacity, self.head),
            jnp.where(acts, jnp.minimum(self.size + 1, self.capacity), self.size),
        )
        where = lambda r: (r.steps, r.carries, r.draws, r.head, r.size)
        return eqx.tree_at(where, self, new)

    def rows(self, age: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """Rows of entries by age order; no window of them crosses the write head."""
        oldest = self.head - self.size
        return (oldest + age) % self.capacity

    def sample(
        self, batch: int, length: int, sampler: str, tau: float, *, key: PRNGKeyArray
    ) -> tuple["Replay", Int[Array, "B T"]]:
        """Rows of `batch` windows of `length` steps; needs `length` entries.

        The replay is returned with its draws counted, which the balanced sampler reads.
        """
        m = self.size - length + 1
        if sampler == "balanced":
            ages = jnp.arange(self.capacity)
            logits = -self.draws[self.rows(ages)] / BALANCE_TEMPERATURE
            logits = jnp.where(ages < m, logits, -jnp.inf)
            start = jax.random.categorical(key, logits, shape=(batch,))
        else:
            u = jax.random.uniform(key, (batch,))
            start = etbs_index(u, m, tau if sampler == "etbs" else 0.0)
        rows = self.rows(start[:, None] + jnp.arange(length))
        draws = self.draws.at[rows[:, 0]].add(1)
        return eqx.tree_at(lambda r: r.draws, self, draws), rows

    def windows(
        self, rows: Int[Array, "B T"], carry_in: str
    ) -> tuple[Transition, StoredCarry]:
        """Steps (B, T), and the carries (B) of the entries before them.

        A window without a known past starts like an episode: all of them if
        `carry_in` is zero, only the one at the ring's oldest entry if it is stored.
        """
        first = rows[:, 0]
        fresh = first == self.rows(jnp.array(0))
        if carry_in == "zero":
            fresh = jnp.ones_like(fresh)
        steps = jax.tree.map(lambda ring: ring[rows], self.steps)
        is_first = steps.is_first.at[:, 0].set(steps.is_first[:, 0] | fresh)
        steps = eqx.tree_at(lambda s: s.is_first, steps, is_first)
        before = (first - 1) % self.capacity
        return steps, jax.tree.map(lambda ring: ring[before], self.carries)

    def refresh(self, rows: Int[Array, "B T"], carries: StoredCarry) -> "Replay":
        """Recomputed carries (B, T) written back, one window after the other.

        The order is fixed because windows overlap and a scatter picks any winner.
        """

        def write(ring, row_carry):
            row, carry = row_carry
            return jax.tree.map(lambda r, c: r.at[row].set(c), ring, carry), None

        carries, _ = jax.lax.scan(write, self.carries, (rows, in_float16(carries)))
        return eqx.tree_at(lambda r: r.carries, self, carries)


def store_carry(carry: Carry) -> StoredCarry:
    """z as class indices, exactly invertible because z is one-hot."""
    x = (carry.x.real, carry.x.imag) if jnp.iscomplexobj(carry.x) else (carry.x,)
    return StoredCarry(x, jnp.argmax(carry.z, -1).astype(jnp.uint8))


def in_float16(carry: StoredCarry) -> StoredCarry:
    """x in float16: states of order 1 with three digits, half the memory and disk."""
    return StoredCarry(tuple(x.astype(jnp.float16) for x in carry.x), carry.z)


def load_carry(carry: StoredCarry, classes: int) -> Carry:
    """Inverse of `store_carry`; of `in_float16`, up to the rounding."""
    x = [x.astype(jnp.float32) for x in carry.x]
    x = jax.lax.complex(*x) if len(x) == 2 else x[0]
    return Carry(x, jax.nn.one_hot(carry.z, classes))
