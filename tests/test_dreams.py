"""Imagination under chosen actions: forced ones are taken, the rest is the model's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import dreams
from agent import init_learners
from config import TINY
from game import make_env
from play import episode as let_play

MODEL = replace(TINY.model, channels=(), strides=(), layers=1, head_layers=1)
CONFIG = replace(TINY, game="echo", period=2, model=MODEL)


@pytest.fixture(scope="module")
def levels():
    """Three levels with random parameters: untrained ones are too alike."""
    env = make_env(CONFIG, 0)
    shape, actions = env.observation_space.shape, int(env.action_space.n)
    learners = init_learners(CONFIG, shape, actions, key=jax.random.key(0))
    leaves, tree = jax.tree.flatten(learners)
    for i, leaf in enumerate(leaves):
        if leaf.dtype == jnp.float32:
            noise = jax.random.normal(jax.random.key(i), leaf.shape)
            leaves[i] = leaf + 0.3 * abs(noise) if i % 2 else leaf + 0.3 * noise
    learners = jax.tree.unflatten(tree, leaves)
    return dreams.levels_of(learners, let_play(CONFIG, learners, 2000))


def test_hook_is_live(levels):
    with pytest.raises(TypeCheckError):
        levels[0].dreams(np.zeros((1, 1), int), np.zeros((1, 1, 1, 1), int))


def test_a_fixed_action_is_fixed_and_matters(levels):
    """All actions are forced from one start; -1 leaves the choice to the actor."""
    A = levels[0].learners[-1].subactor.action_shape[1]
    forced = np.broadcast_to(np.arange(-1, A)[None, :, None, None], (1, A + 1, 5, 1))
    found = levels[0].dreams(np.array([3]), forced)
    np.testing.assert_array_equal(found.action[0, 1:], forced[0, 1:])
    assert (found.action[0, 0] < A).all()
    assert found.h.shape[:3] == (1, A + 1, 6)
    first = levels[0].lived.latent.h[3]
    np.testing.assert_array_equal(found.h[0, :, 0], np.tile(first, (A + 1, 1)))
    assert len(np.unique(np.asarray(found.h[0, 1:, 1]).round(4), axis=0)) == A


def test_choices_share_their_random_numbers(levels):
    """The same action twice is the same future; another row has another."""
    forced = np.zeros((2, 2, 4, 1), int)
    found = levels[0].dreams(np.array([3, 3]), forced)
    np.testing.assert_array_equal(found.z[:, 0], found.z[:, 1])
    assert (np.asarray(found.z[0]) != np.asarray(found.z[1])).any()


def test_what_a_level_chose_is_in_force_below(levels):
    """Level 0 its action; others the goal of the level below; nothing at the end."""
    for i, level in enumerate(levels):
        assert (level.chosen[-1] == -1).all()
        for row, t in enumerate(level.lived.at[:-1]):
            if i == 0:
                action = level.lived.steps.action[row + 1]
                assert level.chosen[row].tolist() == action.tolist()
            else:
                below = levels[i - 1].lived
                goal = below.steps.goal[below.at.tolist().index(t)]
                assert level.chosen[row].tolist() == goal.tolist()
