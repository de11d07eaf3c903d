"""Tests of subgoal.py, subactor.py and learner.py: codes, rewards, actor-critic.

`learner` is the middle one of three levels: goals from above, codes as actions, all
three rewards. Naive forms are in numpy, loops and float64.
"""

from dataclasses import asdict, replace
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import agent
import nets
from config import TINY
from learner import REWARDS, Trainer
from s5wm import Carry, Latent, Transition
from subactor import Rollout, Subactor, imagine, lambda_return
from subgoal import Autoencoder, Standardiser, autoencoder_loss, subgoal_reward

jit = jax.jit
S, K, H, SG, KG, M, HORIZON, ACTIONS, PICTURE = 3, 4, 8, 2, 5, 6, 5, 3, (3, 3, 1)
CONFIG = replace(
    TINY,
    levels=3,
    period=2,
    length=5,
    model=replace(
        TINY.model,
        z_categoricals=S,
        z_classes=K,
        features=H,
        layers=1,
        states=6,
        width=8,
        head_layers=1,
        channels=(),
        strides=(),
        vector_width=8,
        code_categoricals=SG,
        code_classes=KG,
    ),
    trainer=replace(
        TINY.trainer,
        horizon=HORIZON,
        imagination_starts=M,
        slow_rate=0.3,
        goal_discount=0.6,
    ),
)
TRAINER = agent.make_trainer(CONFIG)
# No scale between a reward and what is learned from it, and other weights.
PLAIN = agent.make_trainer(
    replace(
        CONFIG,
        trainer=replace(
            CONFIG.trainer, normalise_returns=False, reward_weights=(0.2, 1.5, 4.0)
        ),
    )
)
keys = st.integers(0, 2**20)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
same = np.testing.assert_array_equal


def normal(key, *shape):
    return np.random.default_rng(key).normal(size=shape).astype(np.float32)


def codes(key, *shape):
    """One-hot codes of shape (..., classes)."""
    rng = np.random.default_rng(key)
    return np.eye(shape[-1], dtype=np.float32)[rng.integers(shape[-1], size=shape[:-1])]


def random_subactor(config, level):
    """Random numbers in every leaf: heads that start at zero would hide their input.

    Vectors are near -1, so that S5 (ln Δ, ln -Re Λ) remembers for a few steps.
    """
    make = partial(agent.make_subactor, config, level, PICTURE, ACTIONS)
    rng = np.random.default_rng(level)

    def leaf(x):
        numbers = rng.normal(size=x.shape)
        small = numbers / np.sqrt(x.shape[-1]) if len(x.shape) > 1 else numbers / 2 - 1
        return jnp.asarray(small, x.dtype)

    return jax.tree.map(leaf, jax.eval_shape(make, jax.random.key(0)))


@cache
def learner(level=1):
    return TRAINER.init(random_subactor(CONFIG, level))


def parts_equal(a, b):
    """Names of a learner's parts, and whether they are the same bit for bit."""
    names = {
        "world_model": lambda x: x.subactor.world_model,
        "actor": lambda x: x.subactor.actor,
        "critics": lambda x: x.subactor.critics,
        "autoencoder": lambda x: x.subactor.autoencoder,
        "slow_critics": lambda x: x.slow_critics,
        "standardiser": lambda x: x.standardiser,
        "return_scale": lambda x: x.return_scale,
    }
    leaves = lambda x, where: [np.asarray(leaf) for leaf in jax.tree.leaves(where(x))]
    return {
        name: all(map(np.array_equal, leaves(a, where), leaves(b, where)))
        for name, where in names.items()
    }


def test_shape_hooks_are_live():
    with pytest.raises(TypeCheckError):
        subgoal_reward(jnp.zeros(3), jnp.zeros(4))
    with pytest.raises(TypeCheckError):
        lambda_return(jnp.zeros(3), jnp.zeros(3), jnp.zeros(4), 0.9)


# subgoal.py


agreement = jit(subgoal_reward)


@given(keys, st.sampled_from([1, 8, 256]))
def test_subgoal_reward_is_one_only_at_the_goal(key, size):
    """0 ≤ r_g ≤ 1 - |G - S|² / 2 max², so 1 iff G = S; symmetric."""
    goal, state = normal(key, 2, size)
    longest = max(goal @ goal, state @ state)
    bound = 1 - np.sum((goal - state) ** 2) / (2 * longest)
    assert 0 <= agreement(goal, state) <= max(0, bound) + 1e-5
    close(agreement(goal, state), agreement(state, goal))
    close(agreement(goal, goal), 1)


@given(keys, st.floats(-3, 3), st.sampled_from([0.01, 1.0, 30.0]))
def test_subgoal_reward_falls_with_the_ratio_of_lengths(key, factor, size):
    goal = np.float32(size * normal(key, 8))
    other = np.float32(factor) * goal
    expected = min(factor, 1 / factor) if factor > 0 else 0
    close(agreement(goal, other), expected, atol=1e-4)
    close(agreement(other, goal), expected, atol=1e-4)


def test_subgoal_reward_by_hand():
    pairs = [([3, 4], [4, -3]), ([3, 4], [0, 1]), ([3, 4], [5, 0]), ([0, 0], [0, 0])]
    rewards = [subgoal_reward(*map(jnp.float32, pair)) for pair in pairs]
    close(rewards, [0, 4 / 25, 15 / 25, 0])


@partial(jit, static_argnames="decay")
def updated(standardiser, h, decay):
    new = standardiser.update(h, decay)
    return new, new(h), new.inverse(new(h))


@given(keys, st.sampled_from([0.9, 0.99]))
def test_standardiser_starts_with_a_batch_and_follows_the_next(key, decay):
    first, second = 3 * normal(key, 2, 50, H) + normal(key + 1, H)
    a, b = np.asarray(nets.symlog(jnp.asarray(np.stack([first, second]))))
    one, S_first, plain = updated(Standardiser(H), first, decay)
    close(one.mean, a.mean(0))
    close(one.var, a.var(0))
    close(S_first.mean(0), np.zeros(H), atol=1e-4)
    close(S_first.std(0), np.ones(H), atol=1e-3)
    close(plain, a)
    two, S_second, plain = updated(one, second, decay)
    close(two.mean, decay * a.mean(0) + (1 - decay) * b.mean(0))
    close(two.var, decay * a.var(0) + (1 - decay) * b.var(0))
    close(plain, b)
    close(S_second, (b - two.mean) / np.sqrt(two.var + 1e-6))


def test_standardiser_switched_off_is_symlog():
    h = jnp.asarray(normal(0, 50, H))
    off, S_off, plain = updated(Standardiser(H, enabled=False), h, 0.9)
    close(S_off, nets.symlog(h))
    close(plain, nets.symlog(h))
    same(off.inverse(h), h)
    unchanged = replace(TRAINER, standardise=False)
    assert not unchanged.init(learner().subactor).standardiser.enabled


@cache
def autoencoder():
    init = lambda key: Autoencoder(
        H, (SG, KG), encoder_width=16, decoder_width=16, layers=3, key=key
    )
    return jit(init)(jax.random.key(0))


@jit
def coded(autoencoder, S):
    code = jax.vmap(autoencoder.encode)(S)
    return (
        jax.vmap(autoencoder.encoder)(S),
        code,
        jax.vmap(autoencoder.decoder)(code.reshape(len(S), -1)),
        jax.vmap(autoencoder.novelty)(S),
    )


@given(keys)
def test_code_is_the_likeliest_and_novelty_its_error(key):
    S = normal(key, 10, H)
    logits, code, S_hat, novelty = map(np.asarray, coded(autoencoder(), S))
    close(code, np.eye(KG)[logits.reshape(10, SG, KG).argmax(-1)], atol=1e-6)
    close(novelty, ((S - S_hat) ** 2).mean(-1))


@partial(jit, static_argnames="kl_scale")
def loss_of(autoencoder, S, kl_scale, key=0):
    key = jax.random.key(key)
    return autoencoder_loss(autoencoder, S, kl_scale=kl_scale, key=key)


def with_last(autoencoder, logits, output):
    """Last layers that ignore what comes in: given logits, a given decoded state."""
    where = lambda a: (
        a.encoder.last.weight,
        a.encoder.last.bias,
        a.decoder.last.weight,
        a.decoder.last.bias,
    )
    old = where(autoencoder)
    new = (0 * old[0], logits.reshape(-1), 0 * old[2], output)
    return eqx.tree_at(where, autoencoder, new)


def test_loss_of_a_dead_code_by_hand():
    """Uniform logits cost nothing; the mean of S as output explains nothing of it."""
    S = 0.3 * normal(0, 40, H) + 0.5
    dead = with_last(autoencoder(), jnp.zeros((SG, KG)), jnp.asarray(S.mean(0)))
    loss, metrics = loss_of(dead, S, 0.5)
    close(loss, S.var(0).mean())
    close(metrics["code_kl_per_row"], 0, atol=1e-6)
    close(metrics["code_explained_variance"], 0, atol=1e-4)
    close(metrics["code_reward_own"], metrics["code_reward_random"])
    assert metrics["code_reward_own"] > 0.3
    half = with_last(autoencoder(), jnp.zeros((SG, KG)), jnp.asarray(S.mean(0) + 0.3))
    _, metrics = loss_of(half, S, 0.5)
    close(metrics["code_explained_variance"], -0.09 / S.var(0).mean(), rtol=1e-3)


def test_loss_counts_the_mean_cost_of_a_row():
    """One row certain, one row uniform, in nats; 1 % of a uniform code is mixed in."""
    logits = jnp.zeros((SG, KG)).at[0, 2].set(100.0)
    certain = with_last(autoencoder(), logits, jnp.zeros(H))
    p = 0.01 / KG + 0.99 * np.eye(KG)[2]
    cost = np.sum(p * np.log(p * KG)) / SG
    S = jnp.zeros((4, H))
    for kl_scale in (0.5, 2.0):
        loss, metrics = loss_of(certain, S, kl_scale)
        close(metrics["code_kl_per_row"], cost)
        close(loss, kl_scale * cost)


def test_codes_are_sampled_in_training():
    S = normal(0, 4, H)
    losses = [float(loss_of(autoencoder(), S, 0.5, key)[0]) for key in range(3)]
    assert len(set(losses)) == 3


@jit
def trained(code, S):
    """The health of the code along 600 updates, with the published KL weight."""
    adam = optax.adam(3e-3)

    def step(state, key):
        code, opt = state
        grads, metrics = jax.grad(
            lambda code: autoencoder_loss(code, S, kl_scale=0.5, key=key), has_aux=True
        )(code)
        updates, opt = adam.update(grads, opt)
        return (optax.apply_updates(code, updates), opt), metrics

    keys = jax.random.split(jax.random.key(0), 600)
    return jax.lax.scan(step, (code, adam.init(code)), keys)[1]


@cache
def histories():
    """Health of the published 8 × 8 code: first and last updates for each of

    plain symlog(h) of variance .09 at 12 places, the same standardised, and 8 places.
    """
    size = 32
    code = jit(
        lambda key: Autoencoder(
            size, (8, 8), encoder_width=32, decoder_width=32, layers=2, key=key
        )
    )(jax.random.key(0))

    def states(places, enabled):
        where = 0.3 * normal(1, places, size) + 0.25 * np.sign(normal(2, size))
        plain = where[np.arange(96) % places] + 0.03 * normal(3, 96, size)
        h = jax.device_get(nets.symexp(jnp.asarray(plain)))
        return updated(Standardiser(size, enabled), h, 0.99)[1]

    S = jnp.stack([states(12, False), states(12, True), states(8, True)])
    assert 0.06 < S[0].var(0).mean() < 0.12
    history = jax.vmap(lambda S: trained(code, S))(S)
    mean = lambda part: {
        name: np.asarray(x)[:, part].mean(1) for name, x in history.items()
    }
    return mean(slice(5)), mean(slice(-50, None))


def test_code_dies_on_plain_symlog_and_lives_standardised():
    """Δ23. A dead code earns r_g, too, but the same for any goal."""
    _, last = histories()
    plain, standardised = 0, 1
    assert last["code_kl_per_row"][plain] < 0.001
    assert last["code_kl_per_row"][standardised] > 0.2
    gain = last["code_reward_own"] - last["code_reward_random"]
    assert abs(gain[plain]) < 0.02 and last["code_reward_own"][plain] > 0.2
    assert gain[standardised] > 0.5


def test_code_learns_a_few_states():
    first, last = histories()
    assert first["code_explained_variance"][2] < 0.1
    assert last["code_explained_variance"][2] > 0.8


# subactor.py: returns


@partial(jit, static_argnames="lambda_")
def returns_of(reward, value, discount, lambda_):
    """Of trajectories side by side, time first."""
    one = lambda r, v, gamma: lambda_return(r, v, gamma, lambda_)
    return jax.vmap(one, in_axes=1, out_axes=1)(reward, value, discount)


def test_lambda_return_by_hand():
    reward, value = jnp.arange(1.0, 5), 10 * jnp.arange(1.0, 5)
    discount = jnp.array([0.9, 0.8, 0.7, 0.6])
    close(lambda_return(reward, value, discount, 0.95), [24.77980, 26.76000, 31.00000])


def test_lambda_return_of_other_peoples_code(request):
    golden = np.load(request.path.parent / "golden/lambda_return.npz")
    returns = returns_of(golden["reward"], golden["value"], golden["discount"], 0.95)
    close(returns, golden["returns"])


@given(keys, st.sampled_from([2, 5, 16]))
def test_lambda_return_between_one_step_and_monte_carlo(key, horizon):
    reward, value, discount = normal(key, 3, horizon, 4)
    one_step = reward[:-1] + discount[:-1] * value[1:]
    close(returns_of(reward, value, discount, 0.0), one_step)
    monte_carlo, R = [], value[-1]
    for t in reversed(range(horizon - 1)):
        R = reward[t] + discount[t] * R
        monte_carlo.insert(0, R)
    close(returns_of(reward, value, discount, 1.0), monte_carlo, rtol=1e-3)


@given(keys, st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0]))
def test_an_end_cuts_the_future(key, end, lambda_):
    """cont_t = 0: no return up to t depends on what would come after t."""
    reward, value, discount = normal(key, 3, 5, 4)
    discount[end] = 0
    returns = returns_of(reward, value, discount, lambda_)
    same(returns[end], reward[end])
    for x in (reward, value, discount):
        x[end + 1 :] = 7
    same(returns_of(reward, value, discount, lambda_)[: end + 1], returns[: end + 1])


# subactor.py: what there is at each level


def test_levels_differ_in_rewards_goals_and_codes():
    def shapes(levels, level):
        config = replace(CONFIG, levels=levels)
        make = partial(agent.make_subactor, config, level, PICTURE, ACTIONS)
        return jax.eval_shape(make, jax.random.key(0))

    code, feat = (SG, KG), S * K + H
    expected = {  # (levels, level): rewards, weights, action, goal
        (1, 0): (["extrinsic"], [1], (1, ACTIONS), None),
        (2, 0): (["extrinsic", "subgoal"], [1, 0.3], (1, ACTIONS), code),
        (3, 1): (["extrinsic", "subgoal", "novelty"], [1, 0.3, 0.1], code, code),
        (3, 2): (["extrinsic", "novelty"], [1, 0.1], code, None),
    }
    for (levels, level), (rewards, weights, action, goal) in expected.items():
        subactor = shapes(levels, level)
        assert list(subactor.rewards) == rewards
        own_weights, discounts = TRAINER._of_each_reward(subactor)
        close(own_weights, weights)
        gamma = TRAINER.discount
        held = {"subgoal": TRAINER.goal_discount}
        close(discounts, [gamma * held.get(name, 1) for name in rewards])
        assert (subactor.action_shape, subactor.goal_shape) == (action, goal)
        assert (subactor.autoencoder is None) == (levels == 1)
        inputs = feat + 3 + (SG * KG if goal else 0)
        assert subactor.actor.hidden[0].weight.shape == (8, inputs)
        assert subactor.critics.hidden[0].weight.shape == (len(rewards), 8, inputs)
        assert subactor.actor.last.weight.shape == (action[0] * action[1], 8)
    assert TRAINER.init(learner(0).subactor).return_scale.shape == (2,)


def random_latent(key, *batch):
    return Latent(
        jnp.zeros((*batch, 1, 6), complex),
        jnp.asarray(codes(key, *batch, S, K)),
        jnp.asarray(normal(key + 1, *batch, H)),
        jnp.asarray(2 * normal(key + 2, *batch, S, K)),
    )


@jit
def policy_input(subactor, latent, goal):
    heads = subactor.world_model.heads
    feat = latent.feat
    return subactor.policy_input(latent, goal), heads.reward(feat), heads.cont(feat)


@given(keys, st.sampled_from([1, 2]))
def test_policy_sees_latent_outlook_and_goal_in_this_order(key, level):
    """[z; h; symlog(r̂, ĉ, H[prior]); goal]; the top level has no goal."""
    latent = random_latent(key)
    goal = codes(key, SG, KG) if level == 1 else None
    subactor = learner(level).subactor
    (inputs, reward, cont), bins, logit = policy_input(subactor, latent, goal)
    bins = np.asarray(bins, np.float64)
    mean = np.exp(bins - bins.max()) @ np.linspace(-20, 20, 255)
    mean /= np.exp(bins - bins.max()).sum()
    e = np.exp(np.asarray(latent.prior, np.float64))
    p = 0.99 * e / e.sum(-1, keepdims=True) + 0.01 / K
    certain = 1 / (1 + np.exp(-np.asarray(logit)))
    parts = [latent.z.ravel(), latent.h, [mean], np.log1p(certain)]
    parts += [[np.log1p(-np.sum(p * np.log(p)))], [] if goal is None else goal.ravel()]
    close(inputs, np.concatenate(parts), atol=1e-4)
    close(reward, np.sign(mean) * np.expm1(abs(mean)), rtol=1e-3)
    close(cont, certain[0])


def test_actions_follow_the_policy_and_the_goal():
    """Frequencies of 4,000 draws of every row of the code; two goals, two policies."""

    @jit
    def draw(subactor, latent, goal, keys):
        inputs = subactor.policy_input(latent, jax.nn.one_hot(goal, KG))[0]
        act = lambda key: subactor.act(latent, goal, key=key)
        return jax.vmap(act)(keys), nets.unimix_probs(subactor.action_logits(inputs))

    latent, draws = random_latent(0), jax.random.split(jax.random.key(0), 4000)
    last = lambda s: s.actor.last.weight  # far from uniform
    subactor = learner(1).subactor
    subactor = eqx.tree_at(last, subactor, 4 * last(subactor))
    policies = []
    for goal in ([0, 1], [3, 2]):
        actions, p = draw(subactor, latent, jnp.array(goal, jnp.uint8), draws)
        counts = (np.asarray(actions)[..., None] == np.arange(KG)).mean(0)
        error = np.sqrt(p * (1 - p) / 4000) + 1e-4
        assert actions.dtype == jnp.uint8 and (abs(counts - p) < 4.5 * error).all()
        policies.append(np.asarray(p))
    assert abs(policies[0] - policies[1]).max() > 0.1


# subactor.py: imagination


@partial(jit, static_argnames="horizon")
def imagined(subactor, start, goal, key, horizon=HORIZON):
    return imagine(subactor, start, goal, horizon, key=jax.random.key(key))


@jit
def naive_step(subactor, latent, inputs, goal, key):
    """Every start by itself, with the keys that `imagine` would give it."""
    action_key, model_key = jax.random.split(key)
    logits = jax.vmap(subactor.actor)(inputs).reshape(M, *subactor.action_shape)
    action = nets.sample_onehot(logits, action_key)
    model = subactor.world_model.discretise()
    latent = jax.vmap(
        lambda latent, action, key: model.imagine(latent.carry, action, key=key)
    )(latent, action, jax.random.split(model_key, M))
    return latent, action, *jax.vmap(subactor.policy_input)(latent, goal)


def a_rollout(key, level=1):
    goal = jnp.asarray(codes(key, M, SG, KG)) if level == 1 else None
    start = random_latent(key, M)
    return start, goal, imagined(learner(level).subactor, start, goal, key)


@given(keys)
def test_imagination_is_step_after_step_from_the_start(key):
    start, goal, rollout = a_rollout(key)
    subactor, latent = learner(1).subactor, start
    inputs, reward, cont = jit(jax.vmap(Subactor.policy_input, (None, 0, 0)))(
        subactor, start, goal
    )
    for tau, step_key in enumerate(
        [*jax.random.split(jax.random.key(key), HORIZON - 1), None]
    ):
        close(rollout.inputs[tau], inputs)
        close(rollout.reward[tau], reward, rtol=1e-3)
        close(rollout.cont[tau], cont)
        close(rollout.h[tau], latent.h)
        same(rollout.inputs[tau, :, -SG * KG :], goal.reshape(M, -1))
        if step_key is not None:
            latent, action, inputs, reward, cont = naive_step(
                subactor, latent, inputs, goal, step_key
            )
            close(rollout.action[tau], action)
    assert rollout.h.shape == (HORIZON, M, H) and len(rollout.action) == HORIZON - 1
    same(rollout.h[0], start.h)
    assert np.ptp(rollout.h, axis=0).max() > 0.1


def test_imagination_has_no_gradient():
    def total(subactor, start):
        rollout = imagine(subactor, start, None, 3, key=jax.random.key(0))
        return sum(x.sum() for x in jax.tree.leaves(rollout))

    grads = jit(jax.grad(total))(learner(2).subactor, random_latent(0, M))
    assert not any(np.any(x) for x in jax.tree.leaves(grads))


def test_starts_are_states_with_their_goal_and_no_weight_after_an_end():
    """All of them in order if there are no more than M, else M different ones."""
    batch, length = 4, 3
    index = np.arange(batch * length).reshape(batch, length)
    ended = index % 5 == 2
    latent = random_latent(0, batch, length)
    latent = eqx.tree_at(
        lambda x: x.h, latent, jnp.asarray(index[..., None] + np.zeros(H))
    )
    goal = np.stack([index % KG, index // KG], -1).astype(np.uint8)
    steps = eqx.tree_at(
        lambda s: (s.is_terminal, s.goal),
        blank(batch, length),
        (jnp.asarray(ended), jnp.asarray(goal)),
    )
    starts = jit(
        lambda trainer, learner, latent, steps, key: trainer._starts(
            learner, latent, steps, key=key
        )
    )
    seen = []
    for key in range(20):
        start, goals, alive = starts(
            TRAINER, learner(1), latent, steps, jax.random.key(key)
        )
        chosen = np.asarray(start.h[:, 0]).astype(int)
        assert len(set(chosen)) == M
        same(goals.argmax(-1), goal.reshape(-1, SG)[chosen])
        same(goals.sum(-1), np.ones((M, SG)))
        same(alive, 1 - ended.ravel()[chosen])
        same(start.z, latent.z.reshape(-1, S, K)[chosen])
        seen += list(chosen)
    assert set(seen) == set(range(12))
    many = replace(TRAINER, imagination_starts=12)
    start, _, alive = starts(many, learner(1), latent, steps, jax.random.key(0))
    same(start.h[:, 0], np.arange(12))
    same(alive, 1 - ended.ravel())


def blank(*batch):
    """A batch of the middle level, all zeros."""
    byte = partial(jnp.zeros, dtype=jnp.uint8)
    return Transition(
        nets.Window(byte((*batch, 2, S)), jnp.zeros((*batch, 2, H), jnp.float16)),
        byte((*batch, SG)),
        jnp.zeros(batch),
        jnp.zeros(batch, bool),
        jnp.zeros(batch, bool),
        byte((*batch, SG)),
    )


# subactor.py: one update


def test_update_imagines_from_the_replayed_and_learns_from_the_imagined():
    """What the parts of an update hand on, by parts that do not learn."""
    seen, latent = {}, random_latent(0, 2, 3)
    rng = np.random.default_rng(0)
    batch = eqx.tree_at(
        lambda s: (s.reward, s.is_terminal, s.goal),
        blank(2, 3),
        (
            jnp.asarray(normal(0, 2, 3)),
            jnp.arange(6).reshape(2, 3) % 3 == 1,
            jnp.asarray(rng.integers(KG, size=(2, 3, SG)), jnp.uint8),
        ),
    )

    class Looking(Trainer):
        def _learn_world_model(self, learner, batch, carry, *, key):
            return learner, latent, {}

        def _learn_behaviour(self, learner, rollout, goal, alive):
            seen.update(rollout=rollout, goal=goal, alive=alive)
            return learner, {}

        def _learn_code(self, learner, h, *, key):
            seen.update(h=h)
            return learner, {}

    trainer, before = Looking(**asdict(CONFIG.trainer)), trained_before(0)

    start = jax.tree.map(lambda x: x[:, 0], latent.carry)

    @jit
    def update(learner, batch, carry):
        return *trainer.update(learner, batch, carry, key=jax.random.key(0)), seen

    after, carries, metrics, given = update(before, batch, start)
    h, goal = latent.h.reshape(M, H), np.eye(KG)[np.asarray(batch.goal)]
    rollout = given["rollout"]
    assert rollout.h.shape == (HORIZON, M, H)
    same(rollout.h[0], h)
    same(rollout.inputs[:, :, -SG * KG :], [goal.reshape(M, -1)] * HORIZON)
    same(given["goal"], goal.reshape(M, SG, KG))
    same(given["alive"], [1, 0, 1, 1, 0, 1])
    same(given["h"], rollout.h)
    jax.tree.map(same, carries, latent.carry)
    states = rollout.h.reshape(-1, H)
    spread = updated(before.standardiser, states, TRAINER.running_decay)[0]
    jax.tree.map(close, after.standardiser, spread)
    code, S = before.subactor.autoencoder, spread(h)
    wanted = jax.vmap(code.decode)(given["goal"])
    close(metrics["real_extrinsic"], batch.reward.mean())
    close(metrics["real_subgoal"], jax.vmap(agreement)(wanted, S).mean())
    close(metrics["real_novelty"], jax.vmap(code.novelty)(S).mean())
    assert after.updates == before.updates + 1


def test_world_model_warms_up_behind_its_clip(monkeypatch):
    """Adam by hand, for a loss whose gradient is the same for every parameter."""

    def loss(model, batch, carry, *, free_nats, key):
        total = sum(x.sum() for x in jax.tree.leaves(model))
        latent = random_latent(0, 1, 1)
        return batch.reward.sum() * total, (latent, {"floor": jnp.array(free_nats)})

    monkeypatch.setattr("learner.world_model_loss", loss)
    settings = {"world_model_lr": 0.1, "world_model_warmup": 2}
    settings |= {"world_model_clip": 5.0, "free_nats": 0.7}
    trainer, key = replace(TRAINER, **settings), jax.random.key(0)
    state = trainer.init(learner().subactor)
    number = lambda x: x.subactor.world_model.W_h.bias[0]
    size = sum(x.size for x in jax.tree.leaves(state.subactor.world_model))
    carry = random_latent(0, 1).carry
    learn = jit(lambda x, b: trainer._learn_world_model(x, b, carry, key=key))
    m = v = 0.0
    for n, gradient in enumerate([1e-3, 1e6, -1e-3, 1e6], 1):
        batch = eqx.tree_at(lambda b: b.reward, blank(1, 1), jnp.full((1, 1), gradient))
        old, (state, _, metrics) = number(state), learn(state, batch)
        clipped = gradient * min(1, 5 / (abs(gradient) * np.sqrt(size)))
        m, v = 0.9 * m + 0.1 * clipped, 0.999 * v + 0.001 * clipped**2
        rate = 0.1 * min(1, (n - 1) / 2)
        step = rate * m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
        close(number(state) - old, -step, rtol=1e-3, atol=1e-6)
        close(metrics["floor"], 0.7)


def test_code_learns_standardised_states_at_its_own_rate():
    """Adam's first step is as long as its rate."""
    before, h = trained_before(0), random_rollout(0)[0].h
    learn = jit(lambda x, h: TRAINER._learn_code(x, h, key=jax.random.key(0)))
    after, metrics = learn(before, h)
    S = before.standardiser(h.reshape(-1, H))
    loss, _ = loss_of(before.subactor.autoencoder, S, TRAINER.code_kl_scale)
    close(metrics["loss_autoencoder"], loss)
    changed = {name for name, equal in parts_equal(before, after).items() if not equal}
    assert changed == {"autoencoder"}
    moved = lambda x, y: float(jnp.abs(x - y).max())
    codes = before.subactor.autoencoder, after.subactor.autoencoder
    close(max(jax.tree.leaves(jax.tree.map(moved, *codes))), 1e-3, rtol=1e-2)


# subactor.py: actor and critics


@jit
def behave(trainer, learner, rollout, goal, alive):
    return trainer._learn_behaviour(learner, rollout, goal, alive)


def random_rollout(key):
    """Numbers of the right shapes, goals, and one start after an end."""
    inputs = S * K + H + 3 + SG * KG
    rng = np.random.default_rng(key)
    rollout = Rollout(
        inputs=jnp.asarray(normal(key, HORIZON, M, inputs)),
        action=jnp.asarray(codes(key, HORIZON - 1, M, SG, KG)),
        reward=jnp.asarray(3 * normal(key + 1, HORIZON, M)),
        cont=jnp.asarray(rng.uniform(0.2, 1, (HORIZON, M)), jnp.float32),
        h=jnp.asarray(normal(key + 2, HORIZON, M, H)),
    )
    alive = jnp.ones(M).at[key % M].set(0)
    return rollout, jnp.asarray(codes(key + 3, M, SG, KG)), alive


def trained_before(key):
    """A learner in the middle of training: slow critics, scales, spread of h."""
    critics = learner().subactor.critics
    noise = lambda x: x + normal(key, *x.shape)
    standardiser = updated(Standardiser(H), normal(key, 50, H), 0.9)[0]
    return eqx.tree_at(
        lambda x: (x.slow_critics, x.return_scale, x.standardiser, x.updates),
        learner(),
        (
            jax.tree.map(noise, critics),
            jnp.array([0.5, 2.0, 0.1]),
            standardiser,
            jnp.array(7),
        ),
    )


def mlp(net, x, activation):
    for linear, norm in zip(net.hidden, net.norms, strict=True):
        x = linear.weight @ x
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-3) * norm.weight + norm.bias
        x = activation(x)
    return net.last.weight @ x + net.last.bias


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def value_of(logits):
    y = softmax(logits) @ np.linspace(-20, 20, 255)
    return np.sign(y) * np.expm1(np.abs(y))


def log_likelihood(logits, value):
    """Two-hot: the two bins next to symlog(value) share the weight."""
    position = (np.sign(value) * np.log1p(abs(value)) + 20) / (40 / 254)
    low = int(position)
    log_p = np.log(softmax(logits))
    return (1 - position + low) * log_p[low] + (position - low) * log_p[low + 1]


def naive_rewards(learner, rollout, goal):
    """(GOAL 1), (GOAL 4) and (GOAL 5), extrinsic rewards first."""
    spread, code = learner.standardiser, learner.subactor.autoencoder
    reward = np.zeros((3, HORIZON, M))
    for tau, m in np.ndindex(HORIZON, M):
        h = rollout.h[tau, m]
        h = (np.sign(h) * np.log1p(abs(h)) - spread.mean) / np.sqrt(spread.var + 1e-6)
        wanted = mlp(code.decoder, goal[m].ravel(), gelu)
        own = mlp(code.encoder, h, gelu).reshape(SG, KG)
        own = mlp(code.decoder, np.eye(KG)[own.argmax(-1)].ravel(), gelu)
        longest = max(wanted @ wanted, h @ h)
        agreement = max(0, wanted @ h / longest)
        reward[:, tau, m] = rollout.reward[tau, m], agreement, np.mean((h - own) ** 2)
    return reward


def naive_behaviour(trainer, learner, rollout, goal, alive):
    """(SUB 2) to (SUB 5), one state at a time."""
    to64 = lambda x: (
        np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    )
    learner, rollout, goal, alive = jax.tree.map(to64, (learner, rollout, goal, alive))
    subactor = learner.subactor
    reward = naive_rewards(learner, rollout, goal)
    names = ("extrinsic", "subgoal", "novelty")
    gamma, rate = trainer.discount * rollout.cont, trainer.slow_rate
    past = np.concatenate([np.ones((1, M)), gamma[:-2]])
    weights = np.asarray(alive) * np.cumprod(past, 0)
    actor_loss, metrics = 0.0, {f"loss_critic_{name}": 0.0 for name in names}
    value, logits = np.zeros((3, HORIZON, M)), np.zeros((3, HORIZON, M, 255))
    target, returns = np.zeros((3, HORIZON, M)), np.zeros((3, HORIZON - 1, M))
    scale = np.ones(3)
    for r in range(3):
        critic = jax.tree.map(lambda x, r=r: x[r], subactor.critics)
        slow = jax.tree.map(lambda x, r=r: x[r], learner.slow_critics)
        slow = jax.tree.map(lambda s, f: (1 - rate) * s + rate * f, slow, critic)
        for tau, m in np.ndindex(HORIZON, M):
            logits[r, tau, m] = mlp(critic, rollout.inputs[tau, m], silu)
            value[r, tau, m] = value_of(logits[r, tau, m])
            target[r, tau, m] = value_of(mlp(slow, rollout.inputs[tau, m], silu))
        R = value[r, -1]
        for tau in reversed(range(HORIZON - 1)):
            ahead = (1 - trainer.lambda_) * value[r, tau + 1] + trainer.lambda_ * R
            kept = trainer.goal_discount if names[r] == "subgoal" else 1.0
            R = returns[r, tau] = reward[r, tau] + kept * gamma[tau] * ahead
        if trainer.normalise_returns:
            low, high = np.percentile(returns[r], [5, 95])
            keep = trainer.running_decay if learner.updates > 0 else 0
            scale[r] = keep * learner.return_scale[r] + (1 - keep) * (high - low)
        metrics[f"return_scale_{names[r]}"] = scale[r]
        metrics[f"return_{names[r]}"] = returns[r].mean()
        met = (weights * reward[r, :-1]).sum() / weights.sum()
        metrics[f"imagined_{names[r]}"] = met
    entropies = []
    for tau, m in np.ndindex(HORIZON - 1, M):
        weight = alive[m] * np.prod(gamma[:tau, m])
        close(weight, weights[tau, m])
        p = mlp(subactor.actor, rollout.inputs[tau, m], silu).reshape(SG, KG)
        p = 0.99 * softmax(p) + 0.01 / KG
        ln_pi = np.log(p[rollout.action[tau, m] == 1]).sum()
        entropies.append(-np.sum(p * np.log(p)))
        advantage = 0.0
        for r, name in enumerate(names):
            R = returns[r, tau, m]
            advantage += (
                trainer.reward_weights[r] * (R - value[r, tau, m]) / max(1, scale[r])
            )
            fit = log_likelihood(logits[r, tau, m], R)
            fit += log_likelihood(logits[r, tau, m], target[r, tau, m])
            metrics[f"loss_critic_{name}"] -= weight * fit / returns[r].size
        objective = ln_pi * advantage + trainer.entropy_scale * entropies[-1]
        actor_loss -= weight * objective / len(returns[0].ravel())
    return metrics | {"loss_actor": actor_loss, "entropy_actor": np.mean(entropies)}


@given(keys, st.booleans(), st.booleans())
def test_losses_are_those_of_the_naive_form(key, plain, begun):
    """Weights of time and of rewards, scales, returns, slow targets, all of it."""
    trainer = PLAIN if plain else TRAINER
    before = trained_before(key) if begun else learner()
    inputs = random_rollout(key)
    _, metrics = behave(trainer, before, *inputs)
    for name, expected in naive_behaviour(trainer, before, *inputs).items():
        close(metrics[name], expected, rtol=2e-3, atol=2e-4, err_msg=name)


def test_entropy_and_log_probability_sum_over_rows():
    """A uniform code has entropy Sg ln Kg, any code log-probability -Sg ln Kg."""
    where = lambda x: (x.subactor.actor.last.weight, x.subactor.actor.last.bias)
    uniform = eqx.tree_at(
        where, learner(), jax.tree.map(jnp.zeros_like, where(learner()))
    )
    rollout, goal, alive = random_rollout(0)
    _, metrics = behave(PLAIN, uniform, rollout, goal, alive)
    close(metrics["entropy_actor"], SG * np.log(KG))
    expected = naive_behaviour(PLAIN, uniform, rollout, goal, alive)
    close(metrics["loss_actor"], expected["loss_actor"], rtol=1e-3)


def test_behaviour_changes_actor_and_critics_and_nothing_else():
    before = trained_before(0)
    after, metrics = behave(TRAINER, before, *random_rollout(0))
    changed = {name for name, equal in parts_equal(before, after).items() if not equal}
    assert changed == {"actor", "critics", "slow_critics", "return_scale"}
    for part in ("actor", "critics"):
        assert 0 < metrics[f"grad_norm_{part}"] < np.inf
    rate, fast = TRAINER.slow_rate, before.subactor.critics
    expected = jax.tree.map(
        lambda slow, fast: (1 - rate) * slow + rate * fast, before.slow_critics, fast
    )
    jax.tree.map(close, after.slow_critics, expected)


def test_every_critic_learns_its_rewards():
    """Nothing follows, so that returns are rewards."""
    rollout, goal, alive = random_rollout(0)
    rollout = eqx.tree_at(lambda r: r.cont, rollout, 0 * rollout.cont)
    after, first = behave(TRAINER, learner(), rollout, goal, alive)
    for _ in range(50):
        after, last = behave(TRAINER, after, rollout, goal, alive)
    for name in REWARDS:
        assert last[f"loss_critic_{name}"] < first[f"loss_critic_{name}"] - 0.01


def test_critics_do_not_feel_the_actors_objective():
    """Advantages are constants: their weights and scales reach the actor alone."""
    inputs = random_rollout(0)
    one, _ = behave(TRAINER, trained_before(0), *inputs)
    two, _ = behave(PLAIN, trained_before(0), *inputs)
    equal = parts_equal(one, two)
    jax.tree.map(close, one.subactor.critics, two.subactor.critics)
    assert not equal["actor"]


@given(keys)
def test_starts_after_an_end_teach_nothing(key):
    rollout, goal, alive = random_rollout(key)
    dead = key % M
    other, other_goal, _ = random_rollout(key + 1)
    mixed, mixed_goal = jax.tree.map(
        lambda x, y, axis: x.at[(slice(None),) * axis + (dead,)].set(
            y[(slice(None),) * axis + (dead,)]
        ),
        (rollout, goal),
        (other, other_goal),
        (jax.tree.map(lambda _: 1, rollout), 0),
    )
    one, _ = behave(PLAIN, learner(), rollout, goal, alive)
    two, _ = behave(PLAIN, learner(), mixed, mixed_goal, alive)
    assert all(parts_equal(one, two).values())
    three, _ = behave(PLAIN, learner(), mixed, mixed_goal, jnp.ones(M))
    assert not parts_equal(one, three)["actor"]


@given(keys, st.integers(0, HORIZON - 2))
def test_what_comes_after_an_imagined_end_teaches_nothing(key, end):
    rollout, goal, alive = random_rollout(key)
    other, _, _ = random_rollout(key + 1)
    cut = lambda x, y: jnp.concatenate([x[: end + 1], y[end + 1 :]])
    rollout = eqx.tree_at(lambda r: r.cont, rollout, rollout.cont.at[end].set(0))
    one, _ = behave(PLAIN, learner(), rollout, goal, alive)
    two, _ = behave(PLAIN, learner(), jax.tree.map(cut, rollout, other), goal, alive)
    assert all(parts_equal(one, two).values())


# A world of one choice


class Payoff(eqx.Module):
    """Heads that know: the reward of what was chosen, and that nothing follows."""

    reward: jax.Array

    def outlook(self, latent):
        return latent.z[0] @ self.reward, 1 - latent.z.sum(), jnp.zeros(())


class Bandit(eqx.Module):
    """z is the last choice, h the place that it leads to; the start is neither."""

    heads: Payoff
    places: jax.Array
    z_shape: tuple[int, int] = eqx.field(static=True)
    features: int = eqx.field(static=True)

    def init_carry(self):
        return Carry(jnp.zeros((1, 1)), jnp.zeros(self.z_shape))

    def discretise(self):
        return self

    def observe(self, steps, carry, *, key):
        raise NotImplementedError

    def step(self, carry, action, is_first, obs, *, key):
        raise NotImplementedError

    def imagine(self, carry, action, *, key):
        return Latent(carry.x, action, action[0] @ self.places, jnp.zeros(self.z_shape))


@jit
def learn_bandit(payoff, key):
    """Policies (2 goals, 2 actions) after 300 updates; goal i is the code of place i.

    The code has 200 updates before: an actor that chose while both goals were still
    one would not come back. R_0 = r_0 + γ (r_1 + 0): the choice shows in the state
    after it.
    """
    places = jnp.where(jnp.arange(2 * H).reshape(2, H) % 3 == 0, 1.0, -1.0)
    places = places * jnp.array([[1.0], [-1.0]])
    world_key, code_key, key = jax.random.split(key, 3)
    code = Autoencoder(
        H, (SG, KG), encoder_width=16, decoder_width=16, layers=1, key=code_key
    )
    rewards = ("extrinsic", "subgoal")
    subactor = Subactor(
        Bandit(Payoff(payoff), places, (1, 2), H),
        code,
        (1, 2),
        (SG, KG),
        rewards,
        width=16,
        layers=1,
        key=world_key,
    )
    trainer = replace(TRAINER, horizon=3, actor_critic_lr=1e-2, autoencoder_lr=1e-2)
    nothing = Latent(
        jnp.zeros((M, 1, 1)),
        jnp.zeros((M, 1, 2)),
        jnp.zeros((M, H)),
        jnp.zeros((M, 1, 2)),
    )
    frozen = trainer.init(subactor)

    def goals(learner):
        S = learner.standardiser(places)
        return jax.vmap(learner.subactor.autoencoder.encode)(S)

    def step(learner, inputs):
        acts, key = inputs
        imagine_key, code_key = jax.random.split(key)
        goal = goals(learner)[jnp.arange(M) % 2]
        rollout = imagine(learner.subactor, nothing, goal, 3, key=imagine_key)
        standardiser = learner.standardiser.update(rollout.h.reshape(-1, H), 0.99)
        learner = eqx.tree_at(lambda x: x.standardiser, learner, standardiser)
        better, _ = trainer._learn_behaviour(learner, rollout, goal, jnp.ones(M))
        learner = jax.tree.map(lambda b, x: jnp.where(acts, b, x), better, learner)
        learner, _ = trainer._learn_code(learner, rollout.h, key=code_key)
        return learner, None

    inputs = jnp.arange(500) >= 200, jax.random.split(key, 500)
    learner, _ = jax.lax.scan(step, frozen, inputs)
    start = jax.tree.map(lambda x: x[:2], nothing)
    inputs, _, _ = jax.vmap(learner.subactor.policy_input)(start, goals(learner))
    return nets.unimix_probs(jax.vmap(learner.subactor.action_logits)(inputs))[:, 0]


def test_the_better_action_is_learned_and_without_reward_the_goal_decides():
    payoffs = jnp.array([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]])
    learn = jax.vmap(learn_bandit, in_axes=(0, None))
    first, second, goal = np.asarray(learn(payoffs, jax.random.key(0)))
    assert (first[:, 0] > 0.9).all()
    assert (second[:, 1] > 0.9).all()
    assert (goal.diagonal() > 0.9).all()
