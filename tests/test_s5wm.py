"""Tests of s5wm.py: observing = stepping, alignment in time, the loss, a toy world.

`level` 0 sees pictures of the echo probe, `level` 1 windows of two latents.
"""

from dataclasses import replace
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import agent
import nets
import probes
from config import TINY
from s5wm import POSTERIOR_SCALE, Carry, Transition, world_model_loss

B, T, S, K, H, N, P, PERIOD, ACTIONS = 2, 6, 3, 4, 16, 2, 8, 2, 4
CONFIG = replace(
    TINY,
    levels=2,
    period=PERIOD,
    model=replace(
        TINY.model,
        z_categoricals=S,
        z_classes=K,
        features=H,
        channels=(),
        strides=(),
        code_categoricals=2,
        code_classes=3,
    ),
)
PICTURE = (ACTIONS, ACTIONS, 1)
LEVELS = (0, 1)
FLOORS = (0.0, 1.0, 1e3)
keys = st.integers(0, 2**20)
times = st.integers(1, T - 2)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
same = np.testing.assert_array_equal


@partial(jax.jit, static_argnames="level")
def init(level, key, h_source="both"):
    config = replace(CONFIG, model=replace(CONFIG.model, h_source=h_source))
    key = jax.random.key(key)
    model = agent.make_subactor(config, level, PICTURE, ACTIONS, key).world_model
    # A reward head that starts at zero would hide what it is given.
    weight = 0.1 * jax.random.normal(key, model.heads.reward.last.weight.shape)
    return eqx.tree_at(lambda m: m.heads.reward.last.weight, model, weight)


@cache
def world_model(level, h_source="both"):
    """The same parameters always; `h_source` is no parameter."""
    if h_source != "both":
        other = jax.eval_shape(lambda: init.__wrapped__(level, 0, h_source))
        leaves = jax.tree.leaves(world_model(level))
        return jax.tree.unflatten(jax.tree.structure(other), leaves)
    return init(level, 0)


@cache
def opinionated(level):
    """A prior and a posterior that disagree, by more or by less than 1 nat."""
    where = lambda m: (m.prior.last.weight, m.posterior.last.weight)
    model = world_model(level)
    prior, posterior = where(model)
    return eqx.tree_at(where, model, (2 * prior, 2 / POSTERIOR_SCALE * posterior))


def draw(level, key, *batch):
    """A sequence with resets and endings anywhere, and a carry that is not zero.

    Drawn by numpy: every new shape of an operation that JAX runs costs a compilation.
    """
    rng = np.random.default_rng(key)
    classes = lambda shape, n: rng.integers(0, n, (*batch, *shape)).astype(np.uint8)
    if level == 0:
        obs, action = jnp.asarray(classes((T, *PICTURE), 256)), classes((T, 1), ACTIONS)
    else:
        h = rng.normal(size=(*batch, T, PERIOD, H)).astype(np.float16)
        obs = nets.Window(jnp.asarray(classes((T, PERIOD, S), K)), jnp.asarray(h))
        action = classes((T, 2), 3)
    reward = 2 * rng.normal(size=(*batch, T)).astype(np.float32)
    is_first, is_terminal = rng.random((2, *batch, T)) < 0.25
    steps = (action, reward, is_first, is_terminal)
    pair = rng.normal(size=(2, *batch, N, P)).astype(np.float32)
    z = np.eye(K, dtype=np.float32)[classes((S,), K)]
    carry = Carry(jnp.asarray(pair[0] + 1j * pair[1]), jnp.asarray(z))
    return Transition(obs, *map(jnp.asarray, steps), goal=None), carry


def change(tree, where, value):
    """`tree` with one leaf replaced by a numpy value of the same type."""
    old = where(tree)
    return eqx.tree_at(where, tree, jnp.asarray(np.asarray(value, old.dtype)))


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


def row(tree, n):
    """Row n of every leaf, without compiling an index."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[n]), tree)


@jax.jit
def observe(model, steps, carry, key):
    return model.observe(steps, carry, key=jax.random.key(key))


@partial(jax.jit, static_argnames="parallel")
def predict_all(model, z, carry, action, is_first, parallel=False):
    latent = model.predict_all(z, carry, action, is_first, parallel=parallel)
    return latent.x, latent.h, latent.prior


@jax.jit
def predict_each(model, z, carry, action, is_first):
    """`predict` step after step, given all z."""
    model = model.discretise()
    onehot = jax.nn.one_hot(action, model.action_classes)

    def step(carry, inputs):
        z, *inputs = inputs
        x, h, prior = model.predict(carry, *inputs)
        return Carry(x, z), (x, h, prior)

    return jax.lax.scan(step, carry, (z, onehot, is_first))[1]


@jax.jit
def step(model, carry, action, is_first, obs, key):
    latent = model.step(carry, action, is_first, obs, key=jax.random.key(key))
    z = nets.sample_onehot(model.posterior_logits(obs), jax.random.key(key))
    return latent, z


def test_shape_hook_is_live():
    steps, carry = draw(0, 0)
    with pytest.raises(TypeCheckError):
        predict_all(world_model(0), carry.z, carry, steps.action, steps.is_first)
    with pytest.raises(TypeCheckError):
        Carry(carry.x, carry.z[0, 0])


# Two forms


@pytest.mark.parametrize("level", LEVELS)
@given(keys)
def test_observe_is_predict_step_after_step(level, key):
    """With resets in the middle and a carry-in, given the z that were sampled."""
    (steps, carry), model = draw(level, key), world_model(level)
    latent, logits = observe(model, steps, carry, key)
    inputs = (model, latent.z, carry, steps.action, steps.is_first)
    forms = (predict_each(*inputs), predict_all(*inputs, parallel=True))
    for x, h, prior in forms:
        close(latent.x, x)
        close(latent.h, h)
        close(latent.prior, prior)
    z = np.asarray(latent.z)
    assert ((z == 0) | (z == 1)).all() and (z.sum(-1) == 1).all()
    close(logits, posterior_logits(model, steps.obs))


@jax.jit
def posterior_logits(model, obs):
    return jax.vmap(model.posterior_logits)(obs)


@pytest.mark.parametrize("level", LEVELS)
@given(keys)
def test_step_is_the_next_step_of_observe(level, key):
    (steps, carry), model = draw(level, key), world_model(level)
    latent, _ = observe(model, steps, carry, key)
    for t in range(T):
        now, before = row(steps, t), row(latent.carry, t - 1) if t else carry
        stepped, z = step(model, before, now.action, now.is_first, now.obs, key + t)
        close(stepped.x, latent.x[t])
        close(stepped.h, latent.h[t])
        close(stepped.prior, latent.prior[t])
        same(stepped.z, z)


@pytest.mark.parametrize("level", LEVELS)
def test_imagine_is_predict_with_z_from_the_prior(level):
    @jax.jit
    def imagined_and_predicted(model, carry, action, key):
        model = model.discretise()
        action = jax.nn.one_hot(action, model.action_classes)
        latent = model.imagine(carry, action, key=key)
        x, h, prior = model.predict(carry, action, jnp.array(False))
        return latent, (x, nets.sample_onehot(prior, key), h, prior)

    for key in range(5):
        steps, carry = draw(level, key)
        inputs = (carry, row(steps, 0).action, jax.random.key(key))
        latent, predicted = imagined_and_predicted(world_model(level), *inputs)
        for a, b in zip(jax.tree.leaves(latent), predicted, strict=True):
            same(a, b)


def test_batched_is_single():
    steps, carry = draw(0, 0, 3)
    model, numbers = world_model(0), jnp.arange(3)
    all_at_once = jax.vmap(observe, in_axes=(None, 0, 0, 0))
    batched = numpy(all_at_once(model, steps, carry, numbers))
    for n in range(3):
        single = observe(model, row(steps, n), row(carry, n), n)
        jax.tree.map(close, row(batched, n), single)


@pytest.mark.parametrize("level", LEVELS)
@given(keys, times)
def test_cut_anywhere_and_carried_on(level, key, t):
    (steps, carry), model = draw(level, key), world_model(level)
    latent, _ = observe(model, steps, carry, key)
    middle = row(latent.carry, t - 1)
    # One compiled length serves all cuts: the rest is padded behind.
    rest = lambda v: jnp.asarray(np.concatenate([v[t:], np.zeros_like(v[:t])]))
    inputs = numpy((latent.z, steps.action, steps.is_first))
    z, action, is_first = map(rest, inputs)
    x, h, prior = predict_all(model, z, middle, action, is_first)
    for a, b in ((x, latent.x), (h, latent.h), (prior, latent.prior)):
        close(np.asarray(a)[: T - t], np.asarray(b)[t:])


# What depends on what


@pytest.mark.parametrize("level", LEVELS)
@given(keys, times)
def test_nothing_before_a_reset_reaches_beyond(level, key, t):
    """Neither carry, z nor action; without the reset they do."""
    (steps, carry), model = draw(level, key), world_model(level)
    (others, other_carry), at = draw(level, key + 1), np.arange(T)
    z, other_z = (numpy(c.z)[None].repeat(T, 0) for c in (carry, other_carry))
    action, other_action = np.asarray(steps.action), np.asarray(others.action)
    z = np.where((at < t)[:, None, None], other_z, z), z
    action = np.where((at <= t)[:, None], other_action, action), action

    def after(reset, branch):
        is_first = np.where(at < t, False, np.asarray(steps.is_first))
        is_first[t] = reset
        inputs = z[branch], action[branch], is_first
        z_all, *inputs = map(jnp.asarray, inputs)
        start = (other_carry, carry)[branch]
        return [leaf[t:] for leaf in numpy(predict_all(model, z_all, start, *inputs))]

    for a, b in zip(after(True, 0), after(True, 1), strict=True):
        close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(after(False, 0), after(False, 1), strict=True):
        assert np.abs(a - b)[0].max() > 1e-3


@pytest.mark.parametrize("level", LEVELS)
@given(keys, times)
def test_the_prior_sees_the_action_before_and_not_the_observation(level, key, t):
    """Prior at t: actions up to the one that led to o_t, z before t, no later one."""
    (steps, carry), model = draw(level, key), opinionated(level)
    steps = change(steps, lambda s: s.is_first, np.zeros(T))
    latent, _ = numpy(observe(model, steps, carry, key))

    action = np.asarray(steps.action) + 0
    action[t] = (action[t] + 1) % model.action_classes
    acted, _ = observe(model, change(steps, lambda s: s.action, action), carry, key)
    same(acted.z, latent.z)
    for name in ("x", "h", "prior"):
        old, new = getattr(latent, name), np.asarray(getattr(acted, name))
        same(new[:t], old[:t])
        assert (np.abs(new - old)[t:].reshape(T - t, -1).max(-1) > 1e-5).all()

    others, _ = draw(level, key + 1)
    swap = lambda a, b: np.where(
        np.arange(T).reshape(-1, *[1] * (a.ndim - 1)) == t, b, a
    )
    obs = jax.tree.map(lambda a, b: jnp.asarray(swap(a, b)), steps.obs, others.obs)
    seen, _ = observe(model, eqx.tree_at(lambda s: s.obs, steps, obs), carry, key)
    seen, at = numpy(seen), np.arange(T) != t
    same(seen.z[at], latent.z[at])
    changed = (seen.z[t] != latent.z[t]).any()
    for name in ("x", "h", "prior"):
        old, new = getattr(latent, name), getattr(seen, name)
        same(new[: t + 1], old[: t + 1])
        assert (np.abs(new[t + 1] - old[t + 1]).max() > 1e-5) == changed


def test_observations_change_z():
    """So that the test above compares something."""
    runs = [observe(opinionated(0), *draw(0, key), 0)[0].z for key in range(10)]
    runs = np.stack(runs)
    assert (runs[1:] != runs[:-1]).any((-1, -2)).mean() > 0.4


@pytest.mark.parametrize("kind", ["s5", "rssm"])
def test_the_posterior_says_something_from_the_start(kind):
    """Δ26. An untrained one tells pictures apart, and is sure of what it says."""
    config = replace(CONFIG, world_model=kind)
    make = agent.make_subactor
    parts = jax.vmap(lambda k: make(config, 0, PICTURE, ACTIONS, k).world_model)
    model = jax.jit(parts)(jax.random.split(jax.random.key(0), 64))
    rows = jnp.eye(ACTIONS, dtype=jnp.uint8)[:2, :, None, None]
    obs = jnp.broadcast_to(255 * rows, (2, *PICTURE))  # as echo draws them
    see = lambda model, o: model.posterior(
        jnp.concatenate([model.encoder(o), *[jnp.zeros(H)] * (kind == "rssm")])
    )
    logits = jax.vmap(jax.vmap(see, (None, 0)), (0, None))(model, obs)
    assert logits.std() > 1
    codes = logits.reshape(64, 2, S, K).argmax(-1)
    assert (codes[:, 0] != codes[:, 1]).any(-1).mean() > 0.7


def test_an_episode_starts_from_a_learned_z_and_an_empty_memory():
    model, (steps, carry) = world_model(0), draw(0, 0)
    start = model.init_carry()
    assert not np.any(start.x)
    z = np.asarray(start.z)
    assert ((z == 0) | (z == 1)).all() and (z.sum(-1) == 1).all()
    same(z, nets.mode_onehot(model.prior(model.m_init).reshape(S, K)))
    # A reset with any carry and action = this start with no reset and no action.
    zeros = jnp.zeros((T, 1), jnp.uint8)
    first = jnp.asarray(np.arange(T) == 0)
    z = jnp.asarray(np.asarray(carry.z)[None].repeat(T, 0))
    after_reset = predict_all(model, z, carry, steps.action, first)[2]
    no_action = eqx.tree_at(
        lambda m: m.W_in.weight, model, model.W_in.weight.at[:, S * K :].set(0)
    )
    from_start = predict_all(no_action, z, start, zeros, jnp.zeros(T, bool))[2]
    close(after_reset[0], from_start[0])


@pytest.mark.parametrize("h_source", ["both", "states", "output"])
@given(keys, st.booleans())
def test_predict_is_its_equations(h_source, key, is_first):
    """(WM 2) to (WM 6) written out, on top of one step of the stack."""
    model, (steps, carry) = world_model(0, h_source), draw(0, key)
    action = row(steps, 0).action
    x, h, prior = predict(model, carry, action, jnp.array(is_first))

    code = np.eye(ACTIONS)[np.asarray(action)] * (not is_first)
    z = np.asarray(model.init_carry().z if is_first else carry.z)
    u = linear(model.W_in, np.concatenate([z.ravel(), code.ravel()]))
    u = (u - u.mean()) / np.sqrt(u.var() + 1e-3)
    u = u * model.norm_in.weight + model.norm_in.bias
    u = np.asarray(u / (1 + np.exp(-u)), np.float32)
    stack_x, y = numpy(stack_step(model.stack, carry.x, u, jnp.array(is_first)))
    close(x, stack_x)
    m = linear(model.W_m, y)
    states = linear(model.W_h, np.concatenate([x.real.ravel(), x.imag.ravel()]))
    read = {"both": states + m, "states": states, "output": m}[h_source]
    close(h, np.sign(read) * np.log1p(np.abs(read)))
    close(prior.ravel(), prior_head(model, np.asarray(m, np.float32)))
    assert model.W_m.bias is None


def linear(layer, v):
    out = np.asarray(layer.weight) @ v
    return out if layer.bias is None else out + np.asarray(layer.bias)


@jax.jit
def predict(model, carry, action, is_first):
    onehot = jax.nn.one_hot(action, model.action_classes)
    return model.discretise().predict(carry, onehot, is_first)


@jax.jit
def stack_step(stack, x, u, is_first):
    return stack.discretise().step(x, u, is_first)


@jax.jit
def prior_head(model, m):
    return model.prior(m)


# The loss


@partial(jax.jit, static_argnames="floors")
def losses(model, batch, carry, key, floors=FLOORS):
    """Loss at each floor of the KL; latents, posterior and parts at the first."""
    key = jax.random.key(key)
    at = lambda f: world_model_loss(model, batch, carry, free_nats=f, key=key)
    loss, (latent, metrics) = at(floors[0])
    q = jax.vmap(jax.vmap(model.posterior_logits))(batch.obs)
    return jnp.stack([loss, *[at(f)[0] for f in floors[1:]]]), latent, q, metrics


PARTS = ("loss_observation", "loss_reward", "loss_cont")


@pytest.mark.parametrize("level", LEVELS)
@given(keys)
def test_loss_is_its_equation_step_by_step(level, key):
    model, (batch, carry) = opinionated(level), draw(level, key, B)
    loss, latent, q, metrics = losses(model, batch, carry, key)
    parts = np.zeros((B, T, 3))
    feat = np.concatenate([np.asarray(latent.z).reshape(B, T, -1), latent.h], -1)
    same(latent.feat, feat)
    predicted, reward, cont = numpy(read_heads(model.heads, latent.feat))
    terminal = np.asarray(batch.is_terminal)
    parts[..., 2] = np.log1p(np.exp(np.where(terminal, cont, -cont)))
    two_bins = np.asarray(nets.twohot(batch.reward))
    log_p = reward - np.log(np.exp(reward).sum(-1, keepdims=True))
    parts[..., 1] = -(two_bins * log_p).sum(-1)
    if level == 0:
        error = predicted - (np.asarray(batch.obs) / np.float32(255) - 0.5)
        parts[..., 0] = 12288 / 16 * (error**2).sum((2, 3, 4))
    else:
        logits, h = predicted
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        hit = np.eye(K)[np.asarray(batch.obs.z)] * log_p
        error = h - np.asarray(batch.obs.h, np.float32)
        parts[..., 0] = (error**2).sum((2, 3)) - hit.sum((2, 3, 4))
    for name, part in zip(PARTS, parts.mean((0, 1)), strict=True):
        close(metrics[name], part, rtol=1e-3)
    kl = np.asarray(nets.kl_divergence(q, latent.prior))
    close(metrics["kl"], kl.mean())
    assume((kl < FLOORS[1]).any() and (kl > FLOORS[1]).any())
    for value, floor in zip(loss, FLOORS, strict=True):
        kl_part = value - sum(metrics[name] for name in PARTS)
        close(kl_part, 0.6 * np.maximum(floor, kl).mean(), atol=5e-3)
    close(metrics["loss_world_model"], loss[0])


@jax.jit
def read_heads(heads, feat):
    read = lambda f: (heads.decoder(f), heads.reward(f), heads.cont(f)[0])
    return jax.vmap(jax.vmap(read))(feat)


def test_losses_by_hand():
    """Heads that ignore what they are given, so that every part is known."""
    model, (batch, carry) = world_model(0), draw(0, 0, B)
    batch = change(
        batch, lambda b: b.is_terminal, np.arange(B * T).reshape(B, T) % 4 == 3
    )
    batch = change(batch, lambda b: b.obs, np.full((B, T, *PICTURE), 255))
    heads = jax.tree.map(jnp.zeros_like, model.heads)
    heads = eqx.tree_at(lambda h: h.cont.last.bias, heads, jnp.array([2.0]))
    zero = lambda m: (m.prior.last, m.posterior.last)
    zeros = jax.tree.map(jnp.zeros_like, zero(model))
    model = eqx.tree_at(lambda m: (m.heads, *zero(m)), model, (heads, *zeros))
    loss, latent, _, metrics = losses(model, batch, carry, 0)
    # All classes are as likely: windows, times, categoricals draw each for itself.
    z = np.asarray(latent.z).argmax(-1)
    assert all((z != z.take([0], axis)).any() for axis in range(3))
    close(metrics["loss_observation"], 12288 * 0.25)
    close(metrics["loss_reward"], np.log(255))
    softplus = lambda x: np.log1p(np.exp(x))
    cont = 0.75 * softplus(-2) + 0.25 * softplus(2)
    close(metrics["loss_cont"], cont)
    close(metrics["kl"], 0)
    for entropy in ("entropy_prior", "entropy_posterior"):
        close(metrics[entropy], S * np.log(K))
    # A KL below the floor costs the floor.
    expected = 12288 * 0.25 + np.log(255) + cont + 0.6 * np.array(FLOORS)
    close(loss, expected)


@given(keys, st.integers(0, B - 1), st.integers(0, T - 1))
def test_every_reward_counts_where_it_arrives(key, b, t):
    """Also at the ending and with the first observation of an episode (Δ2)."""
    model, (batch, carry) = world_model(0), draw(0, key, B)
    reward, flag = np.asarray(batch.reward) + 0, np.zeros((B, T))
    reward[b, t] += 3
    flag[b, t] = 1
    for where in (lambda s: s.is_terminal, lambda s: s.is_first):
        old = change(batch, where, flag)
        new = change(old, lambda s: s.reward, reward)
        _, latent, _, before = losses(model, old, carry, key)
        _, _, _, after = losses(model, new, carry, key)
        logits = read_heads(model.heads, latent.feat)[1]
        gain = nets.twohot_log_prob(logits, old.reward)
        gain = np.asarray(gain - nets.twohot_log_prob(logits, new.reward))[b, t]
        assert abs(gain) > 1e-4
        more_loss = after["loss_reward"] - before["loss_reward"]
        close(more_loss * B * T, gain, atol=1e-3)


GROUPS = {
    "posterior": lambda m: (m.encoder, m.posterior),
    "prior": lambda m: (m.prior, m.W_m, m.stack, m.W_in, m.norm_in),
    "W_h": lambda m: m.W_h,
    "heads": lambda m: m.heads,
}


@jax.jit
def gradients(model, batch, carry):
    """Sizes of the gradients of each part of the loss, by group of parameters."""

    def parts(model):
        loss, _, _, metrics = losses(model, batch, carry, 0, (0.0, 1e3))
        prediction = sum(metrics[name] for name in PARTS)
        kl_rep = (loss[0] - prediction - 0.5 * metrics["kl"]) / 0.1
        return jnp.stack([metrics["kl"], kl_rep, loss[1] - prediction, prediction])

    jacobian = jax.jacrev(parts)(model)
    leaves = lambda group: jax.tree.leaves(group(jacobian))
    size = lambda leaf: jnp.abs(leaf.reshape(4, -1)).max(1)
    return {
        name: jnp.stack([size(leaf) for leaf in leaves(group)]).max(0)
        for name, group in GROUPS.items()
    }


def test_gradients_reach_what_they_should_and_nothing_else():
    """With a reset at each step, for z hands L_dyn on to earlier posteriors."""
    model, (batch, carry) = opinionated(0), draw(0, 0, B)
    batch = change(batch, lambda b: b.is_first, np.ones((B, T)))
    size = numpy(gradients(model, batch, carry))
    dyn, rep, below_floor, prediction = range(4)
    zero = 2e-4
    assert size["posterior"][dyn] == 0
    assert size["prior"][dyn] > 10 * zero
    assert size["posterior"][rep] > 10 * zero
    assert size["prior"][rep] < zero
    assert max(size["W_h"][[dyn, rep]]) < zero
    assert max(size["heads"][[dyn, rep]]) < zero
    for name in GROUPS:
        assert size[name][below_floor] < zero
        assert size[name][prediction] > 10 * zero
    flowing = change(batch, lambda b: b.is_first, np.zeros((B, T)))
    assert gradients(model, flowing, carry)["posterior"][dyn] > 10 * zero


# Learning

WINDOWS, LENGTH, UPDATES = 8, 8, 400


@jax.jit
def train(model, batches, key):
    """Adam on the batches (UPDATES, WINDOWS, LENGTH), each from an episode's start."""
    adam = optax.adam(3e-3)
    start = model.init_carry()
    carry = jax.tree.map(lambda c: jnp.stack([c] * WINDOWS), start)

    def update(state, batch_key):
        model, adam_state = state
        batch, key = batch_key
        loss = partial(world_model_loss, free_nats=0.1, key=key)
        grads, (_, metrics) = jax.grad(loss, has_aux=True)(model, batch, carry)
        step, adam_state = adam.update(grads, adam_state)
        return (optax.apply_updates(model, step), adam_state), metrics

    keys = jax.random.split(jax.random.key(key), UPDATES)
    (model, _), metrics = jax.lax.scan(
        update, (model, adam.init(model)), (batches, keys)
    )
    return model, metrics


def play(steps, seed):
    """Random play of the echo probe, as numpy arrays by field of `Transition`."""
    env, rng = probes.make("echo", seed=seed), np.random.default_rng(seed)
    rows, over = [], True
    for _ in range(steps):
        if over:
            rows.append((env.reset()[0], [0], 0.0, True, False))
            over = False
            continue
        action = rng.integers(ACTIONS)
        picture, reward, terminal, truncated, _ = env.step(action)
        rows.append((picture, [action], reward, False, terminal))
        over = terminal or truncated
    types = (np.uint8, np.uint8, np.float32, bool, bool)
    return [np.array(c, t) for c, t in zip(zip(*rows, strict=True), types, strict=True)]


def windows(fields, starts):
    """Windows at `starts`, each entered as an episode's start."""
    rows = starts[..., None] + np.arange(LENGTH)
    obs, action, reward, is_first, is_terminal = (field[rows] for field in fields)
    is_first[..., 0] = True
    leaves = map(jnp.asarray, (obs, action, reward, is_first, is_terminal))
    return Transition(*leaves, goal=None)


def training_windows(fields):
    rng = np.random.default_rng(0)
    return windows(fields, rng.integers(0, len(fields[0]) - LENGTH, (UPDATES, WINDOWS)))


@jax.jit
def imagine(model, steps, actions, key):
    """Row lit and reward at each of the states imagined after `steps`."""
    observe_key, *keys = jax.random.split(jax.random.key(key), len(actions) + 1)
    latent, _ = model.observe(steps, model.init_carry(), key=observe_key)
    model = model.discretise()

    def step(carry, inputs):
        action, key = inputs
        onehot = jax.nn.one_hot(action[None], ACTIONS)
        latent = model.imagine(carry, onehot, key=key)
        picture = model.heads.decoder(latent.feat)
        reward, cont, _ = model.heads.outlook(latent)
        return latent.carry, (picture.mean((1, 2)).argmax(), reward, cont)

    last = jax.tree.map(lambda leaf: leaf[-1], latent.carry)
    return jax.lax.scan(step, last, (actions, jnp.stack(keys)))[1]


def accuracy(model, fields, shift=0):
    """How often imagined pictures and rewards are those of the changed actions.

    The actions have nothing to do with those that were taken; `shift` 1 asks instead
    for the action of the step before.
    """
    rng, n, length = np.random.default_rng(1), 16, 10
    steps = windows(fields, rng.integers(0, len(fields[0]) - LENGTH, n))
    actions = rng.integers(0, ACTIONS, (n, length)).astype(np.uint8)
    batched = jax.vmap(imagine, in_axes=(None, 0, 0, 0))
    rows, reward, cont = batched(model, steps, jnp.asarray(actions), jnp.arange(n))
    wanted = actions[:, : length - shift]
    rows, reward = np.asarray(rows)[:, shift:], np.asarray(reward)[:, shift:]
    assert np.mean(cont) > 0.9
    return np.mean(rows == wanted), np.mean(np.rint(3 * reward) == wanted)


def overfit(model):
    """First and last metrics of training on one batch whose parts go ill together."""
    rng, fields = np.random.default_rng(0), play(WINDOWS * LENGTH, 0)
    fields = [rng.permutation(field) for field in fields[:3]]
    no_reset, endings = np.zeros(len(fields[0]), bool), rng.random(len(fields[0])) < 0.2
    one = windows([*fields, no_reset, endings], np.arange(WINDOWS) * LENGTH)
    batches = jax.tree.map(lambda leaf: np.stack([leaf] * UPDATES), one)
    metrics = numpy(train(model, batches, 0)[1])
    first = {name: values[0] for name, values in metrics.items()}
    return first, {name: values[-20:].mean() for name, values in metrics.items()}


def test_one_batch_is_overfitted():
    first, last = overfit(init(0, 1))
    assert last["loss_world_model"] < first["loss_world_model"] / 20
    assert last["loss_reward"] < 1.6 and first["loss_reward"] > 5
    assert last["loss_cont"] < 0.35 and first["loss_cont"] > 0.5
    assert last["entropy_posterior"] < first["entropy_posterior"] / 2


def test_imagination_answers_changed_actions_at_the_next_step():
    """A model whose actions are one step off, by training or by use, does not."""
    fields, fresh = play(2000, 0), play(400, 1)
    model, _ = train(world_model(0), training_windows(fields), 0)
    picture, reward = accuracy(model, fresh)
    assert picture > 0.9 and reward > 0.85
    assert max(accuracy(model, fresh, shift=1)) < 0.5
    fields[1] = np.roll(fields[1], -1, 0)
    late, _ = train(world_model(0), training_windows(fields), 0)
    assert max(accuracy(late, fresh)) < 0.5


def test_a_discretised_model_is_still_a_world_model():
    model, (steps, carry) = world_model(0), draw(0, 0)
    ready = model.discretise().discretise()
    same(ready.init_carry().x, model.init_carry().x)
    first = row(steps, 0)

    @jax.jit
    def step(model):
        key = jax.random.key(0)
        return model.step(carry, first.action, first.is_first, first.obs, key=key)

    close(step(ready).h, step(model).h)
