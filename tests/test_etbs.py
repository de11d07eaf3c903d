"""Tests of etbs.py: the law of the sampler, the ring, the carries of its windows.

In a ring of the tests, entry number n stores n wherever it can: reward, z, x, draws.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from etbs import (
    BALANCE_TEMPERATURE,
    Replay,
    StoredCarry,
    etbs_cdf,
    etbs_index,
    in_float16,
    load_carry,
    store_carry,
)
from s5wm import Carry, Transition

CAPACITY, LENGTH, BATCH, MOST = 7, 3, 5, 20
LARGEST = np.float32(1 - 2**-24)  # of all that jax.random.uniform returns
SIZES = (1, 2, 3, 10, 1000, 10**5, 10**7)
cdf = jax.jit(etbs_cdf)
index = jax.jit(etbs_index, static_argnames="tau")
keys = st.integers(0, 2**20)
fills = st.integers(LENGTH, MOST)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
same = np.testing.assert_array_equal


def count(m):
    return jnp.array(m, jnp.int32)


def f32(*x):
    return jnp.array(x, jnp.float32)


def test_shape_hook_is_live():
    with pytest.raises(TypeCheckError):
        etbs_cdf(f32(0.5), jnp.zeros(2, jnp.int32))


# The law


def test_cdf_at_the_quantiles_of_the_specification():
    q = f32(0.01, 0.1, 0.25, 0.5, 0.75, 0.9)
    expected = {
        1000: [0.051303, 0.324651, 0.592779, 0.845032, 0.965407, 0.994770],
        10: [0.027541, 0.245518, 0.519009, 0.808770, 0.956260, 0.993318],
    }
    for m, values in expected.items():
        close(cdf(q, count(m)), values, rtol=0, atol=4e-6)


def test_indices_of_the_specification():
    q = f32(0.01, 0.1, 0.5, 0.9, 0.999)
    same(index(q, count(1000), 0.3), [22, 167, 603, 928, 999])
    same(index(q[:4], count(1000), 1.0), [51, 324, 845, 994])


def naive_cdf(u, m):
    """(ETBS 1) as it is written, in float64."""
    n = m + 2.0
    x = 2 + u * m
    above = x * (np.log(x) - np.log(n) - 1) - 2 * (np.log(2) - np.log(n) - 1)
    return above / (2 * np.log(n) - n - 2 * np.log(2) + 2)


@given(keys, st.sampled_from(SIZES))
def test_cdf_is_the_equation_as_written(key, m):
    u = np.sort(np.random.default_rng(key).random(2000, np.float32))
    F = np.asarray(cdf(u, count(m)))
    close(F, naive_cdf(np.float64(u), m), rtol=0, atol=4e-6)
    close(cdf(f32(0, 1), count(m)), [0, 1], rtol=0, atol=1e-6)
    if m == SIZES[-1]:
        close(F, u * (1 - np.log(u)), atol=1e-4)


@given(keys, st.sampled_from(SIZES), st.sampled_from([0.0, 0.3, 1.0]))
def test_index_is_monotone_and_in_range(key, m, tau):
    """Up to the ends of [0, 1), in float32 and for ten million entries."""
    u = np.random.default_rng(key).random(2000, np.float32)
    u = np.sort(np.concatenate([u, [0, 1e-30, 2**-24, LARGEST]], dtype=np.float32))
    i = np.asarray(index(u, count(m), tau))
    assert i[0] == 0 and i[-1] == m - 1
    # Rounding of F moves a position by a few units of the last place of m.
    assert np.diff(i).min() >= -4e-7 * m
    exact = m * (tau * naive_cdf(np.float64(u), m) + (1 - tau) * u)
    assert np.abs(i - exact).max() <= 1 + 2e-6 * m


@given(keys, st.sampled_from([1, 10, 1000, 10**5]))
def test_tau_zero_is_uniform(key, m):
    """Every index gets the same share of the unit interval."""
    u = np.random.default_rng(key).random(2000, np.float32)
    same(index(u, count(m), 0.0), np.floor(u * np.float32(m)))
    if m <= 1000:
        middle = (np.arange(20 * m) + 0.5) / (20 * m)
        same(np.bincount(index(np.float32(middle), count(m), 0.0)), 20)


def test_density_of_the_specification():
    """q(v) over the relative age v, from a histogram of four million draws."""
    n, m = 4 * 10**6, 10**6
    u = np.float32((np.arange(n) + 0.5) / n)
    v = (np.asarray(index(u, count(m), 0.3)) + 0.5) / m
    density = {0.01: 0.421, 0.1: 0.633, 0.5: 1.018, 0.9: 1.343, 0.998: 1.429}
    for at, expected in density.items():
        near = (abs(v - at) < 0.002).sum() / n / 0.004
        assert near == pytest.approx(expected, rel=0.005), at


@partial(jax.jit, static_argnames="tau")
def draws_per_entry(tau, key):
    """Draws of each of 20,000 entries, one draw per insertion."""
    insertions = jnp.arange(1, 20_001)
    u = jax.random.uniform(key, insertions.shape)
    drawn = jax.vmap(etbs_index, in_axes=(0, 0, None))(u, insertions, tau)
    return jnp.bincount(drawn, length=len(insertions))


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (0.0, [3.31, 1.91, 1.40, 1.05, 0.80, 0.60, 0.44, 0.29, 0.16, 0.05]),
        (0.3, [2.64, 1.84, 1.45, 1.17, 0.94, 0.73, 0.55, 0.38, 0.22, 0.07]),
        (1.0, [1.80, 1.47, 1.31, 1.16, 1.05, 0.92, 0.80, 0.67, 0.52, 0.29]),
    ],
)
def test_draws_per_age_decile_of_the_specification(tau, expected):
    """Mean over ten buffers; the table is one draw of the same, in two decimals."""
    runs = [draws_per_entry(tau, jax.random.key(seed)) for seed in range(10)]
    deciles = np.mean(runs, 0).reshape(10, -1).mean(1)
    # Poisson error of the table's 2,000 entries per decile and of ours.
    error = np.sqrt(deciles / 2000 * (1 + 1 / 10)) + 0.005
    assert (abs(deciles - expected) < 3.5 * error).all(), deciles
    assert deciles.sum() == pytest.approx(10)


# The ring


@jax.jit
def entry(n):
    """Step and carry number n."""
    byte = jnp.asarray(n, jnp.uint8)
    step = Transition(
        obs=jnp.full((1, 1, 1), byte),
        action=byte[None],
        reward=jnp.asarray(n, jnp.float32),
        is_first=jnp.asarray(n % 4 == 0),
        is_terminal=jnp.asarray(n % 4 == 3),
        goal=None,
    )
    x = (jnp.full((1, 2), n, jnp.float16), jnp.full((1, 2), -n, jnp.float16))
    return step, StoredCarry(x, jnp.full(3, byte))


def empty():
    step, carry = entry(jnp.array(0))
    return Replay(CAPACITY, step, carry)


@jax.jit
def filled(acts):
    """The ring after MOST calls, of which some write; written entries count from 0."""

    def add(replay_n, acts):
        replay, n = replay_n
        # What is not to be written is a wrong entry.
        step, carry = entry(jnp.where(acts, n, 99))
        return (replay.add(step, carry, acts), n + acts), None

    return jax.lax.scan(add, (empty(), jnp.array(0)), acts)[0][0]


def fill(n):
    return filled(jnp.arange(MOST) < n)


@partial(jax.jit, static_argnames=("length", "sampler", "carry_in", "batch", "tau"))
def sampled(
    replay, key, length=LENGTH, sampler="etbs", carry_in="stored", batch=BATCH, tau=0.3
):
    replay, rows = replay.sample(batch, length, sampler, tau, key=jax.random.key(key))
    return replay, rows, *replay.windows(rows, carry_in)


@given(st.lists(st.booleans(), min_size=MOST, max_size=MOST))
def test_ring_is_a_list_that_forgets_its_head(acts):
    """The newest `capacity` entries by age; a level that does not act adds none."""
    replay = filled(jnp.array(acts))
    kept = np.arange(sum(acts))[-CAPACITY:]
    assert (replay.size, replay.head) == (len(kept), sum(acts) % CAPACITY)
    rows = replay.rows(jnp.arange(len(kept)))
    expected = [jax.device_get(entry(n)) for n in kept]
    stored = jax.tree.map(lambda ring: ring[rows], (replay.steps, replay.carries))
    for i, one in enumerate(expected):
        jax.tree.map(lambda ring, x, i=i: same(ring[i], x), stored, one)
    assert all(x.shape[0] == CAPACITY + 1 for x in jax.tree.leaves(replay.steps))


def test_idle_level_changes_nothing_that_can_be_seen():
    for n in (0, 3, MOST):
        before = fill(n)
        after = before.add(*entry(jnp.array(77)), jnp.array(False))
        assert (before.size, before.head) == (after.size, after.head)
        visible = lambda r: jax.tree.map(
            lambda x: x[:CAPACITY], (r.steps, r.carries, r.draws)
        )
        jax.tree.map(same, visible(before), visible(after))


@pytest.mark.parametrize("sampler", ["etbs", "uniform", "balanced"])
@given(fill_to=fills, key=keys, length=st.sampled_from([2, LENGTH]))
def test_no_window_crosses_the_write_head(sampler, fill_to, key, length):
    """Entries of a window are consecutive, whatever the fill and the wrap."""
    _, rows, steps, _ = sampled(fill(fill_to), key, length, sampler)
    numbers = np.asarray(steps.reward)
    same(np.diff(numbers, axis=1), 1)
    same(steps.action[..., 0], numbers)
    assert numbers.min() >= max(0, fill_to - CAPACITY) and numbers.max() < fill_to
    assert rows.shape == (BATCH, length) and (np.asarray(rows) < CAPACITY).all()


@pytest.mark.parametrize("sampler", ["etbs", "uniform", "balanced"])
def test_every_window_can_be_drawn(sampler):
    for n in (LENGTH, 5, CAPACITY, MOST):
        _, _, steps, _ = sampled(fill(n), 0, sampler=sampler, batch=500)
        oldest = max(0, n - CAPACITY)
        starts = np.asarray(steps.reward)[:, 0]
        same(np.unique(starts), np.arange(oldest, n - LENGTH + 1))


def test_sampler_draws_by_the_law_of_the_current_size():
    """Δ20: m is the number of windows there are, not the capacity."""
    big = Replay(1000, *entry(jnp.array(0)))
    size = 100 + LENGTH - 1
    big = eqx.tree_at(lambda r: (r.size, r.head), big, (count(size), count(size)))
    for sampler, tau in (("etbs", 0.3), ("etbs", 1.0), ("uniform", 1.0)):
        _, rows, _, _ = sampled(big, 0, sampler=sampler, batch=20_000, tau=tau)
        counts = np.bincount(rows[:, 0], minlength=100) / 20_000
        u = np.float32((np.arange(10**5) + 0.5) / 10**5)
        drawn = index(u, count(100), tau if sampler == "etbs" else 0.0)
        law = np.bincount(drawn, minlength=100) / 10**5
        assert (abs(counts - law) < 5 * np.sqrt(law / 20_000) + 1e-4).all()


@given(fills, keys, st.sampled_from(["stored", "zero"]))
def test_windows_start_with_the_carry_of_the_entry_before(fill_to, key, carry_in):
    """Δ21; without a known past, an episode seems to start. Other flags stay."""
    _, _, steps, before = sampled(fill(fill_to), key, carry_in=carry_in)
    numbers = np.asarray(steps.reward)
    known = numbers[:, 0] > max(0, fill_to - CAPACITY)
    same(
        np.asarray(before.x[0] + 1j * before.x[1])[known],
        numbers[known, :1, None] * (1 - 1j) - [[1 - 1j] * 2],
    )
    same(np.asarray(before.z)[known], numbers[known, :1] - np.ones(3))
    fresh = ~known | (carry_in == "zero")
    same(steps.is_first[:, 0], fresh | (numbers[:, 0] % 4 == 0))
    same(steps.is_first[:, 1:], numbers[:, 1:] % 4 == 0)
    same(steps.is_terminal, numbers % 4 == 3)


@given(keys, fills)
def test_refreshed_carries_are_those_of_the_last_window(key, fill_to):
    """One window after the other, as in a loop; nothing else moves."""
    replay = fill(fill_to)
    _, rows, _, _ = sampled(replay, key)
    new = 100 + np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
    carries = StoredCarry(
        tuple(jnp.asarray(s * new[..., None, None] * np.ones((1, 2))) for s in (1, -1)),
        jnp.asarray(new[..., None] * np.ones(3), jnp.uint8),
    )
    after = jax.jit(Replay.refresh)(replay, rows, carries)
    re, im = map(np.array, replay.carries.x)
    z = np.array(replay.carries.z)
    for b, t in np.ndindex(BATCH, LENGTH):
        re[rows[b, t]], im[rows[b, t]] = new[b, t], -new[b, t]
        z[rows[b, t]] = new[b, t]
    jax.tree.map(same, after.carries.x, (re, im))
    same(after.carries.z, z)
    rest = lambda r: (r.steps, r.draws, r.head, r.size)
    jax.tree.map(same, rest(replay), rest(after))


@given(
    keys, st.sampled_from([(), (2,), (2, 3)]), st.sampled_from(["complex64", "float32"])
)
def test_stored_carries_load_as_they_were(key, batch, dtype):
    rng = np.random.default_rng(key)
    x = rng.normal(size=(*batch, 2, 10)).astype(np.float32)
    x = jnp.asarray(x.view(np.complex64) if dtype == "complex64" else x)
    z = jnp.asarray(np.eye(7)[rng.integers(7, size=(*batch, 4))], jnp.float32)
    stored = store_carry(Carry(x, z))
    assert stored.z.dtype == jnp.uint8 and stored.z.shape == (*batch, 4)
    loaded = load_carry(stored, 7)
    same(loaded.x, x)
    same(loaded.z, z)
    jax.tree.map(same, store_carry(loaded), stored)
    kept = in_float16(stored)
    assert {part.dtype for part in kept.x} == {jnp.dtype("float16")}
    rounded = load_carry(kept, 7)
    assert rounded.x.dtype == x.dtype
    np.testing.assert_allclose(rounded.x, x, rtol=2**-10, atol=1e-7)
    jax.tree.map(same, in_float16(store_carry(rounded)), kept)


# Balanced by counts


def with_draws(replay, draws):
    rows = replay.rows(jnp.arange(len(draws)))
    return eqx.tree_at(
        lambda r: r.draws, replay, replay.draws.at[rows].set(jnp.asarray(draws, float))
    )


def test_balanced_sampler_prefers_what_was_drawn_less():
    """p ∝ exp(-draws / β) over the starts of windows, by age."""
    drawn = np.array([60.0, 0.0, 20.0, 5.0, 40.0, 0.0, 0.0])
    replay = with_draws(fill(MOST), drawn)
    _, _, steps, _ = sampled(replay, 0, sampler="balanced", batch=20_000)
    starts = np.asarray(steps.reward)[:, 0].astype(int) - (MOST - CAPACITY)
    p = np.exp(-drawn[: CAPACITY - LENGTH + 1] / BALANCE_TEMPERATURE)
    p /= p.sum()
    counts = np.bincount(starts, minlength=len(p)) / 20_000
    assert (abs(counts - p) < 4.5 * np.sqrt(p / 20_000)).all()


def test_draws_are_counted_at_starts_and_forgotten_with_the_entry():
    replay, rows, _, _ = sampled(fill(MOST), 3, sampler="balanced")
    replay, more, _, _ = sampled(replay, 4, sampler="balanced")
    starts = np.concatenate([rows[:, 0], more[:, 0]])
    same(replay.draws, np.bincount(starts, minlength=CAPACITY + 1))
    assert replay.draws.sum() == 2 * BATCH
    oldest = replay.rows(jnp.array(0))
    crowded = eqx.tree_at(lambda r: r.draws, replay, replay.draws + 5)
    after = crowded.add(*entry(jnp.array(1)), jnp.array(True))
    same(after.draws, crowded.draws.at[oldest].set(0))


def test_balanced_sampler_evens_out():
    """After many batches without new data all windows were drawn about equally."""

    @jax.jit
    def many(replay):
        def step(replay, key):
            return replay.sample(BATCH, LENGTH, "balanced", 0.3, key=key)[0], None

        return jax.lax.scan(step, replay, jax.random.split(jax.random.key(0), 300))[0]

    replay = many(with_draws(fill(MOST), [200.0, 0, 0, 0, 0, 0, 0]))
    draws = np.asarray(replay.draws[replay.rows(jnp.arange(CAPACITY - LENGTH + 1))])
    assert draws.sum() == 200 + 300 * BATCH and np.ptp(draws) < 150
