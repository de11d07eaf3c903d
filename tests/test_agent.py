"""Tests of agent.py: one update and one step of a whole agent, their keys and buffers.

Agents are `tiny` with smaller networks; `used` ones have played twenty steps.
"""

from dataclasses import asdict
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lax import lax as lax_internal
from jaxtyping import TypeCheckError
from test_hieros import N, game, row
from test_subactor import ACTIONS, CONFIG, PICTURE, jit, parts_equal, replace

import agent
from config import PRESETS
from cost import update_arguments
from etbs import load_carry, store_carry
from learner import Trainer
from s5wm import Carry

TWO = replace(CONFIG, levels=2)
FLAT = replace(CONFIG, levels=1)
TWIN = replace(FLAT, world_model="rssm")
STEPS = 20
TRUE = jnp.array(True)
copy = partial(jax.tree.map, jnp.copy)
same = np.testing.assert_array_equal


@cache
def fresh(config):
    return jit(partial(agent.init_agent, config, PICTURE, ACTIONS, config.seed))()


@cache
def act_compiled(config):
    a = fresh(config)
    step = row(jax.tree.map(jnp.asarray, game(0, [N])), 0)
    inputs = (a.subactors, a.tower, a.replays, step, TRUE, a.key, a.calls)
    settings = {"period": config.period, "precision": config.precision}
    return agent.act_and_store.lower(*inputs, **settings).compile()


def play(config, a, steps):
    """The agent after some steps of a game, and the actions."""
    actions, subactors, a = [], a.subactors, copy(a)
    for n in range(len(steps.reward)):
        step = jax.tree.map(jnp.asarray, row(steps, n))
        action, tower, replays, calls = act_compiled(config)(
            subactors, a.tower, a.replays, step, TRUE, a.key, a.calls
        )
        a = agent.Agent(a.learners, replays, tower, calls, a.key)
        actions.append(int(action))
    return a, actions


@cache
def used(config):
    if config == TWIN:
        a, played = fresh(TWIN), used(FLAT).replays[0]
        where = lambda replay: (replay.steps, replay.head, replay.size)
        replay = eqx.tree_at(where, a.replays[0], where(played))
        return eqx.tree_at(lambda a: a.replays, a, (replay,))
    return play(config, fresh(config), row(game(0, [9, 7]), slice(STEPS)))[0]


@cache
def update_compiled(config, level):
    a = used(config)
    arguments = update_arguments(config)
    lowered = agent.update.lower(
        a.learners[level], a.replays[level], a.key, level=level, **arguments
    )
    return lowered.compile()


def update(config, level=0, times=1, updates=0):
    """Learner, replay and metrics after some updates; `updates` came before."""
    a = used(config)
    learner, replay = copy((a.learners[level], a.replays[level]))
    learner = eqx.tree_at(lambda x: x.updates, learner, jnp.array(updates, jnp.int32))
    for _ in range(times):
        learner, replay, metrics, _ = update_compiled(config, level)(
            learner, replay, a.key
        )
    return learner, replay, metrics


def test_shape_hook_is_live():
    a = fresh(FLAT)
    step = row(game(0, [N]), 0)
    with pytest.raises(TypeCheckError):
        calls = jnp.zeros(2, int)
        settings = {"period": 2, "precision": "float32"}
        agent.act_only(a.subactors, a.tower, step, a.key, calls, **settings)
    with pytest.raises(TypeCheckError):
        agent.make_trainer(None)


# One update


@pytest.mark.parametrize("level", [0, 1])
def test_update_trains_all_parts(level):
    """The first one moves neither the world model, whose rate warms up from 0, nor

    the slow critics, which start as the fast ones.
    """
    before = used(TWO).learners[level]
    learner, replay, metrics = update(TWO, level)
    same_parts = {name for name, equal in parts_equal(before, learner).items() if equal}
    assert same_parts == {"world_model", "slow_critics"}
    learner, replay, metrics = update(TWO, level, times=3)
    assert not any(parts_equal(before, learner).values())
    leaves = jax.tree.leaves((learner, metrics))
    assert all(np.isfinite(x).all() for x in leaves)
    assert learner.updates == 3 and replay.draws.sum() == 3 * TWO.batch
    for name in ("world_model", "actor", "critics", "autoencoder"):
        assert metrics[f"grad_norm_{name}"] > 0


def test_novelty_is_logged_at_level_zero_and_rewarded_above():
    _, _, below = update(TWO, 0)
    _, _, above = update(TWO, 1)
    for metrics in (below, above):
        assert {"imagined_novelty", "real_novelty"} <= metrics.keys()
    named = lambda metrics: {n[7:] for n in metrics if n.startswith("return_")}
    assert {n for n in named(below) if "scale" not in n} == {"extrinsic", "subgoal"}
    assert {n for n in named(above) if "scale" not in n} == {"extrinsic", "novelty"}


def test_update_follows_from_key_and_count():
    one, two = update(TWO), update(TWO)
    jax.tree.map(same, one, two)
    other = update(TWO, updates=5)
    assert other[2]["loss_world_model"] != one[2]["loss_world_model"]
    twice = update(TWO, times=2)
    learner, replay, _ = copy(one)
    resumed = update_compiled(TWO, 0)(learner, replay, used(TWO).key)[:3]
    jax.tree.map(same, twice, resumed)


def test_update_writes_back_the_carries_it_has_seen():
    before, (_, after, _) = used(TWO).replays[0], update(TWO)
    changed = np.any(np.asarray(before.carries.x[0] != after.carries.x[0]), (1, 2))
    drawn = np.flatnonzero(after.draws)
    covered = {int(start) + t for start in drawn for t in range(TWO.length)}
    assert set(np.flatnonzero(changed)) <= covered and changed.sum() >= TWO.length - 1
    jax.tree.map(same, before.steps, after.steps)


REPLAY_SETTINGS = [
    ("etbs", 0.0, "stored"),
    ("etbs", 1.0, "zero"),
    ("balanced", 1.0, "zero"),
]


@pytest.mark.parametrize(("sampler", "tau", "carry"), REPLAY_SETTINGS)
def test_the_trainer_is_given_windows_and_its_carries_are_kept(sampler, tau, carry):
    """Sampler, τ and carry as they are set; a trainer that only looks."""
    seen, B, T = [], 16, FLAT.length

    class Looking(Trainer):
        def update(self, learner, batch, carry, *, key):
            number = jnp.arange(B * T, dtype=float).reshape(B, T)
            x = number[..., None, None] + jnp.zeros_like(carry.x)[:, None]
            carries = Carry(x, jnp.repeat(carry.z[:, None], T, 1))
            seen.extend([(batch, carry), carries])
            return learner, carries, {}

    a = used(FLAT)
    learner, replay = a.learners[0], a.replays[0]
    given = {"sampler": sampler, "tau": tau, "carry": carry, "batch": B}
    given["trainer"] = Looking(**asdict(FLAT.trainer))
    settings = update_arguments(FLAT) | given
    _, after, _, rows = agent.update.__wrapped__(
        learner, replay, a.key, level=0, **settings
    )
    key = jax.random.fold_in(jax.random.fold_in(a.key, 1), learner.updates)
    key = jax.random.split(key)[0]
    same(rows, replay.sample(B, T, sampler, tau, key=key)[1])
    steps, before = replay.windows(rows, carry)
    inputs, carries = seen
    jax.tree.map(same, inputs, (steps, load_carry(before, inputs[1].z.shape[-1])))
    kept = replay.refresh(rows, store_carry(carries)).carries
    jax.tree.map(same, after.carries, kept)


def test_update_donates_learner_and_replay():
    a = used(FLAT)
    learner, replay = copy((a.learners[0], a.replays[0]))
    update_compiled(FLAT, 0)(learner, replay, a.key)
    assert replay.steps.obs.is_deleted() and replay.carries.x[0].is_deleted()
    assert learner.subactor.actor.last.weight.is_deleted()
    assert learner.world_model_adam[1][0].mu.W_in.weight.is_deleted()
    assert not a.key.is_deleted()


def test_flat_agent_knows_no_goals():
    a = used(FLAT)
    learner, replay, metrics = update(FLAT, times=2)
    assert replay.steps.goal is None and a.replays[0].steps.goal is None
    assert learner.subactor.goal_shape is None
    assert learner.subactor.autoencoder is None and learner.autoencoder_adam is None
    words = " ".join(metrics)
    assert not any(word in words for word in ("goal", "novelty", "code", "auto"))
    before = a.learners[0]
    changed = {
        name for name, equal in parts_equal(before, learner).items() if not equal
    }
    assert changed >= {"world_model", "actor", "critics", "return_scale"}


def test_recurrent_twin_learns_the_same_way():
    learner, replay, metrics = update(TWIN, times=3)
    equal = parts_equal(used(TWIN).learners[0], learner)
    assert not any(equal[part] for part in ("world_model", "actor", "critics"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((learner, metrics)))
    assert metrics.keys() == update(FLAT)[2].keys()
    assert len(replay.carries.x) == 1


def test_two_learners_at_once_are_two_learners():
    """Metrics and weights of a vmapped update, as far as float32 goes.

    Where a gradient is next to nothing its sign is chance, and so is Adam's first step.
    """
    a, arguments = used(FLAT), update_arguments(FLAT)
    call = partial(agent.update.__wrapped__, level=0, **arguments)
    learner, replay = a.learners[0], a.replays[0]
    nudge = lambda x: x + 0.01 * jnp.ones_like(x) if x.ndim == 2 else x
    nudged = eqx.tree_at(
        lambda x: x.subactor, learner, jax.tree.map(nudge, learner.subactor)
    )
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    run_keys = jax.random.split(a.key)
    both = jit(jax.vmap(call))(stack(learner, nudged), stack(replay, replay), run_keys)
    rate = FLAT.trainer.actor_critic_lr
    for i, one in enumerate((learner, nudged)):
        single = update_compiled(FLAT, 0)(*copy((one, replay)), run_keys[i])
        assert both[2].keys() == single[2].keys()
        for name, value in single[2].items():
            assert both[2][name][i] == pytest.approx(
                float(value), rel=2e-3, abs=1e-4
            ), name
        weights = lambda result: jax.tree.leaves(result[0].subactor)
        far = total = 0
        for x, y in zip(weights(both), weights(single), strict=True):
            distance = np.abs(x[i] - y)
            assert distance.max() < 2.1 * rate
            far, total = far + (distance > 1e-5).sum(), total + y.size
        assert far < 0.02 * total
        same(both[1].draws[i], single[1].draws)


# One step


def test_acting_resumes_its_stream_of_keys():
    """Tower, replays and number of calls through the host, in the middle."""
    steps = game(1, [9, 7])
    straight, actions = play(TWO, fresh(TWO), steps)
    half, first = play(TWO, fresh(TWO), row(steps, slice(11)))
    state = jax.device_get((half.replays, half.tower, half.calls))
    start = fresh(TWO)
    resumed = agent.Agent(start.learners, *jax.tree.map(jnp.asarray, state), start.key)
    resumed, second = play(TWO, resumed, row(steps, slice(11, N)))
    assert first + second == actions and straight.calls == N
    ours, theirs = ((a.tower, a.replays) for a in (straight, resumed))
    jax.tree.map(same, ours, theirs)
    restarted = eqx.tree_at(lambda a: a.calls, half, jnp.array(0, jnp.int32))
    assert play(TWO, restarted, row(steps, slice(11, N)))[1] != second


def test_acting_donates_tower_and_replays():
    a = copy(fresh(TWO))
    step = row(jax.tree.map(jnp.asarray, game(0, [N])), 0)
    act_compiled(TWO)(
        fresh(TWO).subactors, a.tower, a.replays, step, TRUE, a.key, a.calls
    )
    assert a.replays[1].steps.obs.h.is_deleted() and a.replays[0].draws.is_deleted()
    assert a.tower.levels[1].reward.is_deleted()
    assert not a.learners[0].subactor.actor.last.weight.is_deleted()


def test_evaluation_acts_alike_and_remembers_nothing():
    """`act_only` with the key that `act_and_store` derives gives the same action."""
    a = used(FLAT)
    step = row(jax.tree.map(jnp.asarray, game(2, [N])), 3)
    _, actions = play(FLAT, a, jax.tree.map(lambda x: x[None], step))
    inputs = (a.subactors, a.tower, step, jax.random.fold_in(a.key, 0), a.calls)
    settings = {"period": 2, "precision": "float32"}
    act_only = agent.act_only.lower(*inputs, **settings).compile()
    action, tower = act_only(*inputs)
    assert [int(action)] == actions and tower.clock == a.tower.clock + 1
    assert not a.tower.clock.is_deleted()


def test_who_is_not_active_stays_as_it_was():
    """Nothing changes but the swallowing row of each ring."""
    a = used(TWO)
    step = row(jax.tree.map(jnp.asarray, game(2, [N])), 3)
    tower, replays = copy((a.tower, a.replays))
    _, tower, replays, calls = act_compiled(TWO)(
        a.subactors, tower, replays, step, ~TRUE, a.key, a.calls
    )
    jax.tree.map(same, (a.tower, a.calls), (tower, calls))
    for before, after in zip(a.replays, replays, strict=True):
        kept = partial(jax.tree.map, lambda x, n=before.capacity: x[:n])
        jax.tree.map(same, kept(before.steps), kept(after.steps))
        same(before.size, after.size)


def test_bfloat16_is_asked_of_every_product():
    a, arguments = used(FLAT), update_arguments(FLAT)
    for precision, asked in (("float32", 0), ("bfloat16", 1)):
        arguments["precision"] = precision
        call = partial(agent.update, level=0, **arguments)
        lowered = jax.jit(call).lower(a.learners[0], a.replays[0], a.key).as_text()
        products = [x for x in lowered.splitlines() if "stablehlo.dot_general" in x]
        rounded = ["lhs_precision_type = bf16" in x for x in products]
        assert len(products) > 50 and sum(rounded) == asked * len(products)


def test_an_update_survives_the_rounding_of_its_products(monkeypatch):
    """A CPU does not round when asked; here every product's inputs are rounded first.

    2⁻⁹ of each number: visible in every loss, and small.
    """
    _, _, exact = update(FLAT)
    product = lax_internal.dot_general
    bfloat16 = partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)

    def rounding(x, y, *args, **kwargs):
        return product(bfloat16(x), bfloat16(y), *args, **kwargs)

    monkeypatch.setattr(lax_internal, "dot_general", rounding)
    jax.clear_caches()
    learner, replay = copy((used(FLAT).learners[0], used(FLAT).replays[0]))
    call = partial(agent.update.__wrapped__, level=0, **update_arguments(FLAT))
    _, _, rounded, _ = jax.jit(call)(learner, replay, used(FLAT).key)
    monkeypatch.undo()
    jax.clear_caches()
    for name in ("loss_world_model", "kl", "grad_norm_world_model"):
        error = abs(float(rounded[name] / exact[name]) - 1)
        assert 1e-6 < error < 2e-2, (name, error)


# What an agent is made of


def shapes(config, picture=PICTURE, actions=ACTIONS):
    return jax.eval_shape(partial(agent.init_agents, config, picture, actions))


def test_replays_hold_the_whole_run_unless_told_otherwise():
    """Room for the endings that levels record besides, and for one window."""
    config = replace(CONFIG, steps=1600, capacity=10**6)
    held = [r.capacity for r in shapes(config).replays]
    assert held == [2005, 1600 + 1005, 1600 + 505]
    for n in (4, 9, 400):  # agent steps of every episode
        for stride, capacity in zip((1, 2, 4), held, strict=True):
            per_episode = n // stride + 1 + (n % stride > 0)
            assert 1600 // n * per_episode <= capacity
    long = shapes(replace(config, steps=100_000, period=4)).replays
    for stride, ring in zip((4, 16), long[1:], strict=True):
        per_episode = 20 // stride + 1 + (20 % stride > 0)
        assert 5_000 * per_episode <= ring.capacity
    small = shapes(replace(config, capacity=700))
    assert [r.capacity for r in small.replays] == [700, 700, 700]


def test_published_sizes():
    """11 + 13 + 12 million parameters, slow critics included; a flat agent 10."""
    count = lambda *trees: sum(x.size for x in jax.tree.leaves(trees)) / 1e6
    flat = shapes(replace(PRESETS["atari100k"], levels=1), (64, 64, 3), 18)
    assert count(flat.subactors) == pytest.approx(10, abs=0.6)
    a = shapes(PRESETS["atari100k"], (64, 64, 3), 18)
    sizes = [count(x.subactor, x.slow_critics) for x in a.learners]
    assert sizes == pytest.approx([11, 13, 12], abs=0.5)
    window = a.replays[1].steps.obs
    assert (window.z.dtype, window.h.dtype) == (jnp.uint8, jnp.float16)
    assert window.z.shape[1:] == (4, 32) and window.h.shape[1:] == (4, 256)
    assert a.replays[0].steps.goal.shape[1:] == (8,)


def test_no_two_rows_of_weights_start_alike():
    """Not in two layers, heads, critics or levels: no key is used twice."""
    rows = [
        row / np.linalg.norm(row)
        for leaf in map(np.asarray, jax.tree.leaves(fresh(TWO).subactors))
        if leaf.ndim > 1
        for row in leaf.reshape(-1, leaf.shape[-1])
        if np.ptp(row) > 0
    ]
    assert len({tuple(row.round(4)) for row in rows}) == len(rows)


def test_states_can_be_left_unscaled():
    """Δ22, through all that builds a level."""
    model = replace(FLAT.model, scaled=False)
    (learner,) = shapes(replace(FLAT, model=model)).learners
    blocks = learner.subactor.world_model.stack.blocks
    assert not any(block.ssm.scaled for block in blocks)


def test_the_seed_makes_the_agent():
    @jit
    def weights_and_keys():
        configs = [replace(FLAT, seed=seed) for seed in (0, 0, 1)]
        agents = [agent.init_agents(config, PICTURE, ACTIONS) for config in configs]
        weights = [a.learners[0].subactor.actor.hidden[0].weight for a in agents]
        return weights, [jax.random.key_data(a.key) for a in agents]

    for one, again, other in weights_and_keys():
        same(one, again)
        assert np.any(one != other)
