"""Tests of minatar_env.py: the package's own dynamics, the protocol, exact resume."""

import importlib.util
import io

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import minatar_env

NAMES = [f"minatar/{game}" for game in minatar_env.GAMES]
needs_minatar = pytest.mark.skipif(
    importlib.util.find_spec("minatar") is None, reason="minatar is not installed"
)
SHAPES = {  # game: (actions, channels)
    "asterix": (5, 4),
    "breakout": (3, 4),
    "freeway": (3, 7),
    "seaquest": (6, 10),
    "space_invaders": (4, 6),
}


def play(env, actions):
    """Steps with a reset wherever one is due → list of (picture, reward, flags)."""
    seen = []
    for action in actions:
        if env.needs_reset:
            seen.append((env.reset()[0].tobytes(),))
        picture, *rest = env.step(action)
        seen.append((picture.tobytes(), *rest))
    return seen


def random_actions(env, key, steps):
    return np.random.default_rng([key, 1]).integers(len(env.actions), size=steps)


def test_shape_hook_is_live():
    env = object.__new__(minatar_env.MinAtar)
    env.game = type("Game", (), {"state": lambda self: np.zeros((10, 9, 4), bool)})()
    with pytest.raises(TypeError):
        env.observation()


@needs_minatar
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_package_game_without_sticky_actions(name):
    Environment = importlib.import_module("minatar").Environment  # takes seconds
    env = minatar_env.make(name, seed=7)
    official = Environment(env.name, sticky_action_prob=0.0)
    official.seed(7)
    # The package draws a number per step for stickiness; it must not come from the
    # stream of the game.
    official.random = np.random.RandomState(0)
    actions, channels = SHAPES[env.name]
    assert len(env.actions) == actions
    assert env.observation_space.shape == (10, 10, channels)
    for action in random_actions(env, 0, 3000):
        if env.needs_reset:
            official.reset()
            assert np.array_equal(env.reset()[0], 255 * official.state())
        picture, reward, terminated, truncated, _ = env.step(action)
        expected = official.act(official.minimal_action_set()[action])
        assert (reward, terminated or truncated) == expected
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, 255 * official.state())


@needs_minatar
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_gymnasium_accepts_it(name):
    check_env(minatar_env.make(name, seed=0), skip_render_check=True)


@needs_minatar
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 99),
    before=st.integers(0, 300),
    after=st.integers(1, 150),
)
@settings(deadline=None)
def test_resume_is_exact(name, seed, before, after):
    env = minatar_env.make(name, seed=seed, max_steps=90)
    fresh = minatar_env.make(name, seed=seed + 1, max_steps=90)
    actions = random_actions(env, seed, before + after)
    play(env, actions[:before])
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **env.get_state())
    file.seek(0)
    fresh.set_state(dict(np.load(file, allow_pickle=False)))
    assert np.array_equal(fresh.observation(), env.observation())
    assert play(fresh, actions[before:]) == play(env, actions[before:])


@needs_minatar
@pytest.mark.parametrize("name", NAMES)
def test_one_seed_one_stream(name):
    first, second = minatar_env.make(name, seed=3), minatar_env.make(name, seed=3)
    actions = random_actions(first, 0, 500)
    assert play(first, actions) == play(second, actions)
    assert play(first, actions) != play(minatar_env.make(name, seed=4), actions)
    third = minatar_env.make(name, seed=9)
    third.reset(seed=3)
    second = minatar_env.make(name, seed=3)
    second.reset()
    assert play(third, actions) == play(second, actions)


@needs_minatar
def test_a_state_of_another_game_or_cap_is_refused():
    env = minatar_env.make("minatar/breakout", seed=0)
    before = env.get_state()["minatar"].tobytes()
    for name, cap in [("minatar/asterix", 5000), ("minatar/breakout", 10)]:
        other = minatar_env.make(name, seed=0, max_steps=cap)
        with pytest.raises(ValueError, match="this is breakout"):
            env.set_state(other.get_state())
    assert env.get_state()["minatar"].tobytes() == before


@needs_minatar
def test_ends():
    """A lost ball terminates; the cap and the clock of Freeway truncate."""
    env = minatar_env.make("minatar/breakout", seed=0)
    *_, last = play(env, [0] * 6)
    assert last[2:4] == (True, False)
    env = minatar_env.make("minatar/breakout", seed=0, max_steps=5)
    *_, last = play(env, [0] * 5)
    assert last[2:4] == (False, True)
    env = minatar_env.make("minatar/freeway", seed=0)
    seen = play(env, [0] * 2501)
    assert not any(any(step[2:4]) for step in seen[1:-1])
    assert seen[-1][2:4] == (False, True)


@needs_minatar
def test_a_brick_pays_with_the_picture_in_which_it_is_gone():
    env = minatar_env.make("minatar/breakout", seed=0)
    bricks, paid = env.reset()[0][:, :, 3].astype(bool).sum(), 0
    for action in random_actions(env, 1, 2000):
        if env.needs_reset:
            bricks = env.reset()[0][:, :, 3].astype(bool).sum()
        picture, reward, *_ = env.step(action)
        left = picture[:, :, 3].astype(bool).sum()
        assert reward == bricks - left
        bricks, paid = left, paid + reward
    assert paid > 10


@needs_minatar
def test_steps_without_an_episode_or_an_action_are_refused():
    env = minatar_env.make("minatar/breakout", seed=0)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(0)
    env.reset()
    for action in (-1, 3):
        with pytest.raises(ValueError, match=f"action {action} is not in 0..2"):
            env.step(action)
    play(env, [0] * 6)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(0)


def test_bad_names_say_what_to_do():
    for name in ("minatar/brekout", "minitar/breakout"):
        with pytest.raises(ValueError) as error:
            minatar_env.make(name, seed=0)
        words = "did you mean minatar/breakout? choose from minatar/asterix, "
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[minatar\]'"):
        minatar_env.make("minatar/breakout", seed=0)
