"""Tests of play.py: the same episode as acting, and what follows from its latents.

Untrained levels would be too alike: parameters are drawn at random instead.
"""

from collections import namedtuple
from dataclasses import replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import play
from agent import act_only, init_learners
from config import TINY
from game import env_step, make_env
from hieros import init_state
from learner import Learner
from nets import entropy, symlog, twohot_mean, unimix_probs
from subgoal import subgoal_reward

PERIOD, SEED = 2, 3
FLAT = replace(TINY.model, channels=(), strides=())
CONFIG = replace(TINY, game="catch", period=PERIOD, model=FLAT)
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
same = np.testing.assert_array_equal


@cache
def played(world_model="s5"):
    """Settings, levels with random parameters, and an episode of theirs."""
    config = replace(CONFIG, world_model=world_model)
    env = make_env(config, 0)
    shape, actions = env.observation_space.shape, int(env.action_space.n)
    learners = init_learners(config, shape, actions, key=jax.random.key(0))
    leaves, tree = jax.tree.flatten(learners)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    for i, (leaf, key) in enumerate(zip(leaves, keys, strict=True)):
        if leaf.dtype == jnp.float32:
            leaves[i] = leaf + 0.3 * jax.random.normal(key, leaf.shape)
    learners = tuple(map(spread, jax.tree.unflatten(tree, leaves)))
    return config, learners, play.episode(config, learners, 99, seed=SEED)


def spread(learner):
    """The same with a variance that is one."""
    var = lambda learner: learner.standardiser.var
    return eqx.tree_at(var, learner, 0.5 + jnp.abs(var(learner)))


def row(level, r):
    return jax.tree.map(lambda x: jnp.asarray(x[r]), level[1:])


def test_hook_is_live():
    with pytest.raises(TypeCheckError):
        play.screen(make_env(CONFIG, 0), np.zeros((3, 3, 1)))


def test_an_episode_is_what_acting_alone_would_play():
    config, learners, episode = played()
    subactors = tuple(learner.subactor for learner in learners)
    env, tower = make_env(config, SEED), init_state(subactors, PERIOD)
    seen = env_step(env.reset()[0], first=True)
    for t in range(len(episode.action)):
        same(episode.obs[t], seen.obs)
        same(episode.frames[t], seen.obs)
        assert (episode.reward[t], episode.is_last[t]) == (seen.reward, seen.is_last)
        key = jax.random.key(SEED)
        action, tower = act_only(
            subactors, tower, seen, key, np.int32(t), period=PERIOD, precision="auto"
        )
        assert episode.action[t] == action
        if seen.is_last:
            break
        obs, reward, terminated, truncated, _ = env.step(int(action))
        seen = env_step(obs, reward, last=terminated or truncated)
    assert t == len(episode.action) - 1 > 2 * PERIOD
    assert episode.is_last.sum() == 1


def test_it_stops_where_told():
    config, learners, episode = played()
    short = play.episode(config, learners, 5, seed=SEED)
    same(short.action, episode.action[:5])
    assert not short.is_last.any()


@pytest.mark.parametrize(
    ("game", "steps", "terminal"), [("catch", 9, True), ("echo", 20, False)]
)
def test_a_time_out_is_no_terminal(game, steps, terminal, monkeypatch):
    """Δ3, with a level that only passes on what it is shown."""
    Acted = namedtuple("Acted", "acts step latent")
    answer = lambda _, tower, seen, **options: (tower, 0, (Acted(True, seen, ()),))
    monkeypatch.setattr(play, "act", answer)
    monkeypatch.setattr(play, "think", lambda *_: None)
    monkeypatch.setattr("hieros.init_state", lambda *_: None)
    learner = object.__new__(Learner)
    object.__setattr__(learner, "subactor", None)
    episode = play.episode(replace(CONFIG, game=game), (learner,), 99)
    same(episode.is_last, [*[False] * steps, True])
    same(episode.levels[0].steps.is_terminal, [*[False] * steps, terminal])


def test_a_level_has_a_row_per_step_of_its_own():
    _, _, episode = played()
    n = len(episode.action)
    for i, level in enumerate(episode.levels):
        due = [t for t in range(n) if t % PERIOD**i == 0 or t == n - 1]
        same(level.at, due)
        assert all(len(x) == len(due) for x in jax.tree.leaves(level))
        held = level.held(n)
        assert all(level.at[r] <= t for t, r in enumerate(held))
        same(held[level.at], np.arange(len(due)))
        for r, begin in enumerate(level.at):
            since = level.at[r - 1] + 1 if r else 0
            reward = episode.reward[since : begin + 1].sum() / PERIOD**i
            close(level.thoughts.rewards["extrinsic"][r], reward)


def test_goals_are_the_actions_of_the_level_above():
    _, _, episode = played()
    for below, above in zip(episode.levels[:-1], episode.levels[1:], strict=True):
        taken = above.steps.action[1:]  # taken at the row before
        for row, action in enumerate(taken[:-1]):
            same(below.steps.goal[np.isin(below.at, above.at[row])], [action])
    same(episode.levels[0].steps.action[1:, 0], episode.action[:-1])


@pytest.mark.parametrize("world_model", ["s5", "rssm"])
def test_thoughts_are_those_of_one_row_at_a_time(world_model):
    _, learners, episode = played(world_model)
    for learner, level in zip(learners, episode.levels, strict=True):
        model = learner.subactor.world_model
        for r in (0, 1, len(level.at) - 1):
            steps, latent, thoughts = row(level, r)
            carry = row(level, max(r - 1, 0))[1].carry
            onehot = jax.nn.one_hot(steps.action, model.action_classes)
            predicted = model.discretise().predict(carry, onehot, jnp.array(r == 0))
            close(predicted[-2], latent.h)
            close(predicted[-1], latent.prior)
            if world_model == "s5":
                q = model.posterior_logits(steps.obs)
            else:
                embed = model.encoder(steps.obs)
                q = model.posterior(jnp.concatenate([embed, latent.h]))
            close(thoughts.posterior, q.reshape(model.z_shape))
            check_choice(learner, steps, latent, thoughts)


def check_choice(learner, steps, latent, thoughts):
    """Surprise, policy, values and rewards of one row, written out."""
    subactor = learner.subactor
    q, p = unimix_probs(thoughts.posterior), unimix_probs(latent.prior)
    close(thoughts.surprise, (q * np.log(q / p)).sum())
    heads = subactor.world_model.heads
    reward = twohot_mean(heads.reward(latent.feat))
    cont = jax.nn.sigmoid(heads.cont(latent.feat)[0])
    outlook = symlog(jnp.stack([reward, cont, entropy(latent.prior)]))
    goal = jnp.zeros(0)
    if subactor.goal_shape is not None:
        goal = jax.nn.one_hot(steps.goal, subactor.goal_shape[1])
    inputs = jnp.concatenate([latent.feat, outlook, goal.reshape(-1)])
    logits = subactor.actor(inputs).reshape(subactor.action_shape)
    close(thoughts.policy, unimix_probs(logits))
    assert set(thoughts.values) == set(subactor.rewards)
    for i, name in enumerate(subactor.rewards):
        critic = jax.tree.map(lambda x, i=i: x[i], subactor.critics)
        close(thoughts.values[name], twohot_mean(critic(inputs)))
    S = learner.standardiser(latent.h)
    close(thoughts.state, S)
    close(thoughts.rewards["novelty"], subactor.autoencoder.novelty(S))
    if subactor.goal_shape is None:
        assert thoughts.goal is None and "subgoal" not in thoughts.rewards
    else:
        close(thoughts.goal, subactor.autoencoder.decode(goal))
        close(thoughts.rewards["subgoal"], subgoal_reward(thoughts.goal, S))


def test_a_game_of_its_own_resolution_is_shown_in_it():
    config = replace(TINY, game="Pong", levels=1)
    env = make_env(config, 0)
    shape, actions = env.observation_space.shape, int(env.action_space.n)
    learners = init_learners(config, shape, actions, key=jax.random.key(0))
    episode = play.episode(config, learners, 2)
    assert episode.frames.shape == (2, 210, 160, 3)
    assert episode.obs.shape == (2, 16, 16, 1)
    assert len(np.unique(episode.frames[0].reshape(-1, 3), axis=0)) > 2
    (level,) = episode.levels
    assert level.thoughts.state is None and set(level.thoughts.rewards) == {"extrinsic"}
