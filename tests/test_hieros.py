"""Tests of hieros.py: who acts when, what flows up and down, what is remembered.

Games are sequences of N steps with several episodes, played by towers of one to three
levels, and once more by `naive`: the specification in plain loops.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from test_subactor import (
    CONFIG,
    PICTURE,
    H,
    K,
    S,
    jit,
    normal,
    random_latent,
    random_subactor,
    replace,
)

from etbs import Replay, in_float16, load_carry, store_carry
from hieros import EnvStep, act, if_acting, init_state, push, remember
from nets import Window, symlog

N, SHORT = 24, 4
TOWERS = [(1, 2), (2, 4), (3, 2)]  # levels, period
towers = pytest.mark.parametrize(("levels", "period"), TOWERS)
keys = st.integers(0, 2**20)
# Lengths of the first episodes; the last one runs on to the end of the game.
lengths = st.lists(st.integers(2, 13), min_size=1, max_size=7)
close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
same = np.testing.assert_array_equal


@cache
def subactors(levels, period):
    config = replace(CONFIG, levels=levels, period=period)
    return tuple(random_subactor(config, level) for level in range(levels))


def env_steps(*fields):
    """An EnvStep whose fields have a time axis."""
    one = EnvStep(*(jnp.asarray(field[0]) for field in fields))
    return jax.tree.unflatten(jax.tree.structure(one), fields)


def game(key, lengths):
    """N steps as the environment would show them, from one integer."""
    rng = np.random.default_rng(key)
    ends = [end for end in np.cumsum(lengths) if end < N]
    first, last = np.zeros((2, N), bool)
    first[[0, *ends]] = True
    last[[end - 1 for end in ends]] = True
    reward = rng.integers(-5, 6, N).astype(np.float32)
    return env_steps(
        rng.integers(256, size=(N, *PICTURE)).astype(np.uint8),
        np.where(first, np.float32(0), reward),
        first,
        last,
        last & rng.integers(2, size=N).astype(bool),
    )


def seeds(key):
    return np.random.default_rng(key).integers(2**30, size=N)


@partial(jit, static_argnames="period")
def played(subactors, steps, seeds, period):
    state = init_state(subactors, period)
    first = jax.tree.map(lambda x: x[0], steps)
    key = jax.random.key(0)
    _, _, acted = jax.eval_shape(
        lambda state: act(subactors, state, first, period=period, key=key), state
    )
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    replays = tuple(
        Replay(N + 1, zeros(a.step), level.carry)
        for a, level in zip(acted, state.levels, strict=True)
    )

    def one(carry, inputs):
        state, replays = carry
        step, seed = inputs
        key = jax.random.key(seed)
        state, action, acted = act(subactors, state, step, period=period, key=key)
        return (state, remember(replays, acted)), (state, action, acted)

    (_, replays), log = jax.lax.scan(one, (state, replays), (steps, seeds))
    return *log, replays


def play(levels, period, steps, seeds):
    """Per step: state after it, action, what levels did; and the replays at the end."""
    return jax.device_get(played(subactors(levels, period), steps, seeds, period))


def row(tree, n):
    return jax.tree.map(lambda x: x[n], tree)


def clocks(steps):
    """Steps since the episode's start."""
    first = np.flatnonzero(steps.is_first)
    return np.array([n - first[first <= n][-1] for n in range(N)])


def acting(steps, stride):
    return (clocks(steps) % stride == 0) | np.asarray(steps.is_last)


def test_shape_hook_is_live():
    byte = jnp.zeros((2, S), jnp.uint8)
    with pytest.raises(TypeCheckError):
        push(Window(byte, jnp.zeros((3, H), jnp.float16)), jnp.array(True), None)
    with pytest.raises(TypeCheckError):
        EnvStep(jnp.zeros((2, 2)), *jnp.zeros(4, bool))


# The specification in plain loops


@jit
def infer_one(subactor, carry, action, is_first, obs, key):
    return subactor.world_model.step(carry, action, is_first, obs, key=key)


@jit
def act_one(subactor, latent, goal, key):
    return subactor.act(latent, goal, key=key)


@cache
def start_carry(levels, period, i):
    return jit(lambda s: s.world_model.init_carry())(subactors(levels, period)[i])


def naive(levels, period, steps, seeds):
    """Per step: the action and, of levels that act, transition and latent."""
    log = []
    for n in range(N):
        step = row(steps, n)
        if step.is_first:
            clock = 0
            carry = [start_carry(levels, period, i) for i in range(levels)]
            own = [
                np.zeros(s.action_shape[0], np.uint8) for s in subactors(levels, period)
            ]
            history = [[] for _ in range(levels)]
            total = [0.0] * levels
        key = jax.random.split(jax.random.key(seeds[n]), (levels, 2))
        done, obs, latent = {}, {0: step.obs}, {}
        for i, subactor in enumerate(subactors(levels, period)):
            total[i] += float(step.reward) / period**i
            if clock % period**i != 0 and not step.is_last:
                continue
            latent[i] = infer_one(
                subactor, carry[i], own[i], step.is_first, obs[i], key[i, 0]
            )
            carry[i] = latent[i].carry
            z = np.asarray(latent[i].z).argmax(-1).astype(np.uint8)
            history[i].append((z, np.asarray(symlog(latent[i].h), np.float16)))
            recent = history[i][-period:]
            recent = [recent[0]] * (period - len(recent)) + recent
            obs[i + 1] = Window(
                *(jnp.asarray(np.stack(x)) for x in zip(*recent, strict=True))
            )
        for i in reversed(latent):
            goal = own[i + 1] if i + 1 < levels else None
            done[i] = (
                {
                    "obs": obs[i],
                    "action": own[i],
                    "reward": total[i],
                    "is_first": step.is_first,
                    "is_terminal": step.is_terminal,
                    "goal": goal,
                },
                latent[i],
            )
            own[i] = np.asarray(
                act_one(subactors(levels, period)[i], latent[i], goal, key[i, 1])
            )
            total[i] = 0.0
        log.append((own[0][0], done))
        clock += 1
    return log


@towers
@given(key=keys, lengths=lengths)
def test_tower_is_the_specification_in_plain_loops(levels, period, key, lengths):
    """Who acts, what is seen, inferred, drawn and remembered; the replays, too."""
    steps = game(key, lengths)
    _, action, acted, replays = play(levels, period, steps, seeds(key))
    written = [0] * levels
    for n, (expected_action, done) in enumerate(
        naive(levels, period, steps, seeds(key))
    ):
        assert action[n] == expected_action
        assert [bool(level.acts[n]) for level in acted] == [
            i in done for i in range(levels)
        ]
        for i, (transition, latent) in done.items():
            step = row(acted[i].step, n)
            for name, expected in transition.items():
                if name == "obs" and i > 0:
                    same(step.obs.z, expected.z)
                    close(step.obs.h, expected.h, atol=2e-3)
                elif expected is None:
                    assert getattr(step, name) is None
                else:
                    same(getattr(step, name), expected, err_msg=name)
            for name in ("x", "z", "h", "prior"):
                got = getattr(row(acted[i].latent, n), name)
                close(got, getattr(latent, name), err_msg=name)
            jax.tree.map(same, row(replays[i].steps, written[i]), step)
            carry = row(replays[i].carries, written[i])
            close(load_carry(carry, K).x, latent.x, rtol=2**-10)
            same(carry.z, np.asarray(latent.z).argmax(-1))
            written[i] += 1
    assert [int(replay.size) for replay in replays] == written


# One law at a time


@towers
@given(key=keys, lengths=lengths)
def test_level_acts_every_stride_and_at_the_end(levels, period, key, lengths):
    steps = game(key, lengths)
    state, _, acted, replays = play(levels, period, steps, seeds(key))
    same(state.clock, clocks(steps) + 1)
    for i, level in enumerate(acted):
        same(level.acts, acting(steps, period**i))
        assert replays[i].size == level.acts.sum()


@towers
@given(key=keys, lengths=lengths)
def test_goals_are_the_actions_above_and_held_between(levels, period, key, lengths):
    steps = game(key, lengths)
    state, action, acted, _ = play(levels, period, steps, seeds(key))
    same(state.levels[0].action[:, 0], action)
    assert acted[-1].step.goal is None
    for i in range(levels - 1):
        goal, above = acted[i].step.goal, acted[i + 1].acts
        same(goal, state.levels[i + 1].action)
        changes = (goal[1:] != goal[:-1]).any(-1)
        assert not (changes & ~above[1:]).any()
        # Of 25 codes, a new one is mostly another one.
        assert changes.sum() >= above[1:].sum() / 3
        own, before = acted[i].step.action, state.levels[i].action
        same(own[0], 0)
        same(own[1:], np.where(steps.is_first[1:, None], 0, before[:-1]))


@towers
@given(key=keys, lengths=lengths)
def test_windows_hold_the_last_latents_of_the_level_below(levels, period, key, lengths):
    """Oldest first; at an episode's start the oldest there is comes several times."""
    steps = game(key, lengths)
    _, _, acted, _ = play(levels, period, steps, seeds(key))
    start = np.maximum.accumulate(np.where(steps.is_first, np.arange(N), 0))
    for i in range(1, levels):
        below, window = acted[i - 1], acted[i].step.obs
        for n in np.flatnonzero(acted[i].acts):
            seen = [m for m in range(start[n], n + 1) if below.acts[m]][-period:]
            seen = [seen[0]] * (period - len(seen)) + seen
            assert seen[-1] == n
            same(window.z[n], below.latent.z[seen].argmax(-1))
            close(window.h[n], symlog(jnp.asarray(below.latent.h[seen])), rtol=2e-3)


def test_reward_of_a_window_by_hand():
    """5, 6, 7, 8 at steps 1 to 4 are 6.5 for a level of period 4, due at step 4."""
    steps = game(0, [N])
    rewards = np.zeros(N, np.float32)
    rewards[1:5], rewards[5:9] = (5, 6, 7, 8), (1, 2, 3, 6)
    steps = env_steps(steps.obs, rewards, *jax.tree.leaves(steps)[2:])
    _, _, acted, _ = play(2, 4, steps, seeds(0))
    same(acted[1].step.reward[[0, 4, 8, 12]], [0, 6.5, 3, 0])
    same(acted[0].step.reward, rewards)


@towers
@given(key=keys, lengths=lengths)
def test_no_reward_is_lost_or_counted_twice(levels, period, key, lengths):
    """Every ended episode: stored rewards times K_i sum to the return, Δ2."""
    steps = game(key, lengths)
    _, _, acted, _ = play(levels, period, steps, seeds(key))
    rewards, starts = np.asarray(steps.reward), np.flatnonzero(steps.is_first)
    for end in np.flatnonzero(steps.is_last):
        episode = slice(starts[starts < end][-1], end + 1)
        for i, level in enumerate(acted):
            stored = (level.step.reward * level.acts)[episode]
            assert period**i * stored.sum() == rewards[episode].sum()
            since = np.flatnonzero(level.acts[episode])[-2] + 1
            assert period**i * stored[-1] == rewards[episode][since:].sum()


@towers
@given(key=keys, lengths=lengths)
def test_every_level_remembers_the_ending_and_its_kind(levels, period, key, lengths):
    """A time-out is an ending, but not terminal: flags of the replay, in order."""
    steps = game(key, lengths)
    _, _, acted, replays = play(levels, period, steps, seeds(key))
    for level, replay in zip(acted, replays, strict=True):
        assert level.acts[np.asarray(steps.is_last)].all()
        stored = replay.steps
        same(
            stored.is_terminal[: replay.size], np.asarray(steps.is_terminal)[level.acts]
        )
        assert stored.is_terminal.sum() == np.sum(steps.is_terminal)
        same(stored.is_first[: replay.size], np.asarray(steps.is_first)[level.acts])
        assert stored.is_first.sum() == np.sum(steps.is_first)


def ending_at(end, lengths):
    """The first of these episodes, then one that ends at step `end`."""
    kept = [
        x
        for x, total in zip(lengths, np.cumsum(lengths), strict=True)
        if total < end - 1
    ]
    return [*kept, end - sum(kept)]


@towers
@given(key=keys, start=st.integers(2, 16), one=lengths, two=lengths, ends=st.booleans())
def test_nothing_leaks_into_the_next_episode(
    levels, period, key, start, one, two, ends
):
    """Two pasts that end or break off at any step: other pictures, rewards, keys."""
    future = game(key, [12])

    def after(past_key, lengths):
        past = game(past_key, ending_at(start, lengths))
        past.is_last[start - 1] = ends
        join = lambda p, f: np.concatenate([p[:start], f[: N - start]])
        steps = jax.tree.map(join, past, future)
        mixed = join(seeds(past_key), seeds(key))
        state, action, acted, replays = play(levels, period, steps, mixed)
        stored = [
            row(
                (replay.steps, replay.carries),
                slice(level.acts[:start].sum(), replay.size),
            )
            for level, replay in zip(acted, replays, strict=True)
        ]
        return row((state, action, acted), slice(start, None)), stored

    jax.tree.map(same, after(key + 1, one), after(key + 2, two))


stored_form = jit(jax.vmap(lambda latent: in_float16(store_carry(latent.carry))))


@jit
def replayed(subactor, replay, before, start):
    """Latents of SHORT entries that follow `before`, with stored z; their carry-in."""
    rows = replay.rows(start + jnp.arange(SHORT))
    steps, carry_in = row(replay.windows(rows[None], "stored"), 0)
    z = jax.nn.one_hot(replay.carries.z[rows], K)
    latent = subactor.world_model.predict_all(
        z, before.carry, steps.action, steps.is_first
    )
    return latent, carry_in


@towers
@given(key=keys, lengths=lengths)
def test_replay_continues_as_acting_did(levels, period, key, lengths):
    """Stored is acting's carry, rounded; a window starts from it, and from the same
    carry before rounding every window comes out again. How far the rounding of the
    start carries depends on the network alone."""
    steps = game(key, lengths)
    _, _, acted, replays = play(levels, period, steps, seeds(key))
    for i, subactor in enumerate(subactors(levels, period)):
        level, replay = row(acted[i].latent, acted[i].acts), replays[i]
        stored = row(replay.carries, slice(replay.size))
        jax.tree.map(same, stored, row(stored_form(acted[i].latent), acted[i].acts))
        for start in range(replay.size - SHORT + 1):
            before = row(level, start - 1)
            latent, carry_in = replayed(subactor, replay, before, start)
            if start > 0:
                jax.tree.map(same, carry_in, row(stored, start - 1))
            window = row(level, slice(start, start + SHORT))
            for name in ("x", "h", "prior"):
                close(getattr(latent, name), getattr(window, name))


# The small functions


@given(keys)
def test_push_shifts_or_fills(key):
    rng = np.random.default_rng(key)
    z = rng.integers(K, size=(3, S)).astype(np.uint8)
    h = normal(key, 3, H).astype(np.float16)
    window = Window(jnp.asarray(z), jnp.asarray(h))
    latent = random_latent(key)
    new_z, new_h = latent.z.argmax(-1), symlog(latent.h).astype(jnp.float16)
    shifted, filled = (jit(push)(window, jnp.array(x), latent) for x in (False, True))
    same(shifted.z, [*z[1:], new_z])
    close(shifted.h, [*h[1:], new_h], rtol=2e-3)
    same(filled.z, [new_z] * 3)
    close(filled.h, [new_h] * 3, rtol=2e-3)
    assert (shifted.z.dtype, shifted.h.dtype) == (jnp.uint8, jnp.float16)


def test_idle_levels_compute_nothing():
    """Neither branch of a cond that is not taken runs, and zeros come out of it."""
    ran = []

    @jit
    def maybe(due):
        def compute():
            jax.debug.callback(lambda: ran.append(1))
            return jnp.ones(3), jnp.array(7, jnp.uint8)

        return if_acting(due, compute)

    for due, times in ((False, 0), (True, 1)):
        ones, seven = jax.block_until_ready(maybe(jnp.array(due)))
        jax.effects_barrier()
        assert len(ran) == times
        same(ones, np.full(3, due))
        assert seven == 7 * due and seven.dtype == jnp.uint8


def test_tower_before_its_first_episode():
    state = init_state(subactors(3, 2), 2)
    assert not any(np.any(x) for x in jax.tree.leaves(state))
    assert [level.window is None for level in state.levels] == [True, False, False]
    assert state.levels[2].window.z.shape == (2, S)
    carry = store_carry(random_latent(0).carry)
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(
        jnp.shape, state.levels[0].carry
    )
