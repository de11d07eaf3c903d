"""Tests of rssm.py: observing = stepping, what depends on what, its interface."""

import inspect
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from test_s5wm import (
    ACTIONS,
    CONFIG,
    PICTURE,
    H,
    K,
    S,
    T,
    change,
    draw,
    numpy,
    overfit,
    row,
)

import agent
import nets
from rssm import RSSM
from s5wm import S5WM, Carry, WorldModel

keys = st.integers(0, 2**20)
times = st.integers(1, T - 2)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
same = np.testing.assert_array_equal


@cache
def world_model():
    config = replace(CONFIG, world_model="rssm")
    init = jax.jit(lambda key: agent.make_subactor(config, 0, PICTURE, ACTIONS, key))
    return init(jax.random.key(0)).world_model


def draw_steps(key, *batch):
    """A sequence with resets anywhere, and a carry that is not zero."""
    steps, carry = draw(0, key, *batch)
    x = np.random.default_rng(key).normal(size=(*batch, 1, H)).astype(np.float32)
    return steps, Carry(jnp.asarray(x), carry.z)


@jax.jit
def observe(model, steps, carry, key):
    return model.observe(steps, carry, key=jax.random.key(key))


@jax.jit
def each_step(model, steps, carry, key):
    """`step` after step with the keys of `observe`; also the logits of q(z | h, o)."""

    def step(carry, inputs):
        step, key = inputs
        latent = model.step(carry, step.action, step.is_first, step.obs, key=key)
        features = jnp.concatenate([model.encoder(step.obs), latent.h])
        logits = model.posterior(features).reshape(S, K)
        return latent.carry, (latent, logits)

    inputs = (steps, jax.random.split(jax.random.key(key), T))
    return jax.lax.scan(step, carry, inputs)[1]


@jax.jit
def predict(model, carry, action, is_first):
    onehot = jax.nn.one_hot(action, ACTIONS)
    return model.predict(carry, onehot, is_first)


def test_shape_hook_is_live():
    steps, carry = draw_steps(0)
    with pytest.raises(TypeCheckError):
        world_model().observe(steps, carry.x, key=jax.random.key(0))
    with pytest.raises(TypeCheckError):
        world_model().predict(carry, jnp.zeros(ACTIONS), jnp.array(False))


@given(keys)
def test_observe_is_step_after_step(key):
    """With resets in the middle, a carry-in and the same stream of keys."""
    steps, carry = draw_steps(key)
    latent, logits = observe(world_model(), steps, carry, key)
    stepped, q = each_step(world_model(), steps, carry, key)
    same(latent.z, stepped.z)
    for name in ("x", "h", "prior"):
        close(getattr(latent, name), getattr(stepped, name))
    close(logits, q)
    assert latent.x.shape == (T, 1, H) and latent.feat.shape == (T, S * K + H)
    same(latent.x[:, 0], latent.h)
    z = np.asarray(latent.z)
    assert ((z == 0) | (z == 1)).all() and (z.sum(-1) == 1).all()


@given(keys, st.booleans())
def test_predict_is_a_gru_on_z_and_action(key, is_first):
    """(RSSM 1), written out; a reset puts h = 0, its z and no action in place."""
    model, (steps, carry) = numpy(world_model()), draw_steps(key)
    action = row(steps, 0).action
    h, prior = predict(world_model(), carry, action, jnp.array(is_first))
    x, z = np.asarray(carry.x)[0], np.asarray(carry.z)
    code = np.eye(ACTIONS)[np.asarray(action)]
    if is_first:
        x, code = 0 * x, 0 * code
        z = np.asarray(world_model().init_carry().z)
    u = model.W_in.weight @ np.concatenate([z.ravel(), code.ravel()]) + model.W_in.bias
    u = (u - u.mean()) / np.sqrt(u.var() + 1e-3)
    u = u * model.norm_in.weight + model.norm_in.bias
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    u = u * sigmoid(u)
    reset, update, new = np.split(model.gru.weight_ih @ u + model.gru.bias, 3)
    from_x = np.split(model.gru.weight_hh @ x, 3)
    reset, update = sigmoid(reset + from_x[0]), sigmoid(update + from_x[1])
    new = np.tanh(new + reset * (from_x[2] + model.gru.bias_n))
    expected = new + update * (x - new)
    close(h, expected)
    close(prior.reshape(-1), prior_head(world_model(), jnp.asarray(expected, h.dtype)))


@jax.jit
def prior_head(model, h):
    return model.prior(h)


def test_an_episode_starts_at_zero_with_the_mode_of_the_prior():
    start = world_model().init_carry()
    assert start.x.shape == (1, H) and not np.any(start.x)
    logits = prior_head(world_model(), jnp.zeros(H)).reshape(S, K)
    same(start.z, np.eye(K)[np.asarray(logits).argmax(-1)])


@given(keys, times)
def test_nothing_before_a_reset_reaches_beyond(key, t):
    """Neither carry, observations nor actions; without the reset they do."""
    (steps, carry), (others, other_carry) = draw_steps(key), draw_steps(key + 1)
    at = np.arange(T)

    def after(reset, steps_before, carry):
        def mix(old, new):
            old, new = np.asarray(old), np.asarray(new)
            return np.where((at < t).reshape(T, *[1] * (old.ndim - 1)), old, new)

        mixed = jax.tree.map(lambda *ab: jnp.asarray(mix(*ab)), steps_before, steps)
        action, is_first = np.asarray(mixed.action) + 0, np.asarray(mixed.is_first) + 0
        action[t] = np.asarray(steps_before.action)[t]
        is_first[t], is_first[:t] = reset, False
        mixed = change(mixed, lambda s: s.action, action)
        mixed = change(mixed, lambda s: s.is_first, is_first)
        latent, logits = numpy(observe(world_model(), mixed, carry, key))
        return [leaf[t:] for leaf in (latent.x, latent.h, latent.prior, logits)]

    for reset in (True, False):
        leaves = zip(
            after(reset, steps, carry), after(reset, others, other_carry), strict=True
        )
        for a, b in leaves:
            if reset:
                close(a, b, rtol=1e-5, atol=1e-6)
            else:
                assert np.abs(a - b)[0].max() > 1e-4


@given(keys, times)
def test_posterior_sees_memory_and_observation_the_prior_only_memory(key, t):
    steps, carry = draw_steps(key)
    steps = change(steps, lambda s: s.is_first, np.zeros(T))
    latent, logits = numpy(observe(world_model(), steps, carry, key))
    obs, action = np.asarray(steps.obs) + 0, np.asarray(steps.action) + 0
    obs[t] = 255 - obs[t]
    action[t] = (action[t] + 1) % ACTIONS
    seen, seen_q = numpy(
        observe(world_model(), change(steps, lambda s: s.obs, obs), carry, key)
    )
    acted, acted_q = numpy(
        observe(world_model(), change(steps, lambda s: s.action, action), carry, key)
    )
    for name in ("x", "h", "prior"):
        same(getattr(seen, name)[: t + 1], getattr(latent, name)[: t + 1])
        same(getattr(acted, name)[:t], getattr(latent, name)[:t])
        assert np.abs(getattr(acted, name) - getattr(latent, name))[t].max() > 1e-4
    for q in (seen_q, acted_q):
        same(q[:t], logits[:t])
        assert np.abs(q - logits)[t].max() > 1e-4


def test_batched_is_single():
    steps, carry = draw_steps(0, 3)
    all_at_once = jax.vmap(observe, in_axes=(None, 0, 0, 0))
    batched = numpy(all_at_once(world_model(), steps, carry, jnp.arange(3)))
    for n in range(3):
        single = observe(world_model(), row(steps, n), row(carry, n), n)
        jax.tree.map(close, row(batched, n), single)


def test_imagine_is_predict_with_z_from_the_prior():
    @jax.jit
    def imagined_and_predicted(model, carry, action, key):
        action = jax.nn.one_hot(action, ACTIONS)
        h, prior = model.predict(carry, action, jnp.array(False))
        z = nets.sample_onehot(prior, key)
        return model.discretise().imagine(carry, action, key=key), (
            h[None],
            z,
            h,
            prior,
        )

    for key in range(5):
        steps, carry = draw_steps(key)
        inputs = (carry, row(steps, 0).action, jax.random.key(key))
        latent, predicted = imagined_and_predicted(world_model(), *inputs)
        for a, b in zip(jax.tree.leaves(latent), predicted, strict=True):
            same(a, b)


def test_interface_is_that_of_s5wm():
    """The methods of `WorldModel`, with the same parameters, and its fields."""
    methods = ("init_carry", "discretise", "observe", "step", "imagine")
    assert {n for n in vars(WorldModel) if n[0] != "_"} == set(methods)
    for name in methods:
        twins = [getattr(model, name) for model in (WorldModel, S5WM, RSSM)]
        protocol, s5, rssm = (inspect.signature(m).parameters for m in twins)
        kinds = lambda parameters: [(p.name, p.kind) for p in parameters.values()]
        assert kinds(s5) == kinds(rssm) == kinds(protocol)
    model = world_model()
    assert model.discretise() is model
    assert (model.z_shape, model.features) == ((S, K), H)
    for field in ("heads", "z_shape", "features", "action_classes", "encoder"):
        assert field in S5WM.__dataclass_fields__ and hasattr(model, field)


def test_one_batch_is_overfitted():
    """By the loss of s5wm.py."""
    first, last = overfit(world_model())
    assert last["loss_world_model"] < first["loss_world_model"] / 20
    assert last["loss_reward"] < 1.6 and first["loss_reward"] > 5
    assert last["loss_cont"] < 0.35 and first["loss_cont"] > 0.5
