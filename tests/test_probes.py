"""Tests of probes.py: the scores of its table, its laws, exact resume."""

import io
import itertools

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import probes

NAMES = list(probes.PROBES)
TABLE = {  # name: (expected return of uniform actions, of the best actions, steps)
    "catch": (-0.6, 1, 9),
    "recall": (0, 1, 12),
    "pinpad": (0.044, 7.300, 100),
    "cue": (0, 0, 12),
    "echo": (10, 20, 20),
    "probe-value": (1, 1, 1),
    "probe-observation": (0, 0, 1),
    "probe-discount": (1, 1, 2),
    "probe-policy": (0, 1, 1),
    "probe-both": (0, 1, 1),
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


def episode(env, policy):
    """Pictures, rewards (0 with the first picture) and how the episode ended."""
    pictures, rewards, ends = [env.reset()[0]], [0.0], (False, False)
    while not any(ends):
        picture, reward, *ends, _ = env.step(policy(env))
        pictures.append(picture)
        rewards.append(reward)
    return pictures, rewards, ends


def random_actions(env, key, steps):
    return np.random.default_rng([key, 1]).integers(env.rules.actions, size=steps)


def test_shape_hook_is_live():
    with pytest.raises(TypeError):
        probes.unpack(np.zeros((2, 2), np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_table(name):
    uniform, best, steps = TABLE[name]
    assert probes.scores(probes.PROBES[name]) == pytest.approx(
        (uniform, best), abs=5e-4
    )
    rows = [line.split() for line in (probes.__doc__ or "").splitlines()]
    row = next(row for row in rows if row and row[0] == name)
    assert [float(x) for x in row[-2:]] == [uniform, best]
    _, _, ends = episode(env := probes.make(name, seed=0), lambda env: 0)
    assert env.steps == steps
    assert ends == ([False, True] if name in ("pinpad", "echo") else [True, False])


@pytest.mark.parametrize("name", NAMES)
def test_uniform_actions_score_what_scores_says(name):
    env = probes.make(name, seed=1)
    rng = np.random.default_rng(2)
    returns = [
        sum(episode(env, lambda env: rng.integers(env.rules.actions))[1])
        for _ in range(200)
    ]
    margin = 4 * np.std(returns) / np.sqrt(len(returns)) + 1e-9
    assert abs(np.mean(returns) - TABLE[name][0]) < margin


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_gymnasium_accepts_it(name):
    check_env(probes.make(name, seed=0), skip_render_check=True)


@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 99),
    before=st.integers(0, 250),
    after=st.integers(1, 120),
)
@settings(deadline=None)
def test_resume_is_exact(name, seed, before, after):
    env, fresh = probes.make(name, seed=seed), probes.make(name, seed=seed + 1)
    actions = random_actions(env, seed, before + after)
    play(env, actions[:before])
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **env.get_state())
    file.seek(0)
    fresh.set_state(dict(np.load(file, allow_pickle=False)))
    assert np.array_equal(fresh.observation(), env.observation())
    assert play(fresh, actions[before:]) == play(env, actions[before:])


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_one_stream(name):
    first, second = probes.make(name, seed=3), probes.make(name, seed=3)
    actions = random_actions(first, 0, 300)
    assert play(first, actions) == play(second, actions)
    assert first.reset(seed=5)[0].tobytes() == second.reset(seed=5)[0].tobytes()
    if len(first.starts) > 1:
        other = probes.make(name, seed=4)
        assert play(first, actions) != play(other, actions)


def test_a_state_of_other_options_is_refused():
    saved = probes.make("recall", seed=0, delay=3).get_state()
    env = probes.make("recall", seed=0)
    before = env.get_state()["probe"].tobytes()
    with pytest.raises(ValueError, match="delay=3"):
        env.set_state(saved)
    assert env.get_state()["probe"].tobytes() == before


def test_catch_follow_the_ball():
    env = probes.make("catch", seed=0)

    def follow(env):
        lit = np.argwhere(env.observation()[:, :, 0] == 255)
        ball, paddle = lit[0, 1], lit[-1, 1]
        return 1 + np.sign(ball - paddle)

    for _ in range(100):
        pictures, rewards, _ = episode(env, follow)
        assert rewards == [0.0] * 9 + [1.0]
        assert len(pictures) == 10
    assert pictures[0].shape == (10, 5, 1)


def test_catch_pays_for_the_picture_it_comes_with():
    """The last move counts: caught when ball and paddle are one lit pixel."""
    env, rng = probes.make("catch", seed=0), np.random.default_rng(1)
    late = 0
    for _ in range(200):
        pictures, rewards, _ = episode(env, lambda env: rng.integers(3))
        lit, before = (np.flatnonzero(p[-1, :, 0]) for p in pictures[:-3:-1])
        assert rewards[-1] == (1.0 if len(lit) == 1 else -1.0)
        late += len(lit) == 1 and before[0] != lit[0]
    assert late > 10


@given(delay=st.sampled_from([0, 1, 10, 40]), seed=st.integers(0, 99))
@settings(deadline=None)
def test_recall_needs_the_cue_and_nothing_else(delay, seed):
    env = probes.make("recall", seed=seed, delay=delay)
    rng, total = np.random.default_rng(seed), {0: 0.0, 1: 0.0}
    for cue, answer in itertools.product((0, 1), (0, 1)):
        env.reset()
        while env.state[0] != cue:
            env.reset()
        assert env.observation()[0, 2 * cue, 0] == 255
        for _ in range(delay):  # what is done before the go picture has no effect
            picture, reward, *ends, _ = env.step(rng.integers(2))
            assert not picture.any() and reward == 0.0 and not any(ends)
        picture, reward, *ends, _ = env.step(rng.integers(2))
        assert picture.any() and reward == 0.0 and not any(ends)
        picture, reward, *ends, _ = env.step(answer)
        assert picture[:, 2 * answer : 2 * answer + 2].all() and ends == [True, False]
        assert reward == (1.0 if answer == cue else -1.0)
        total[answer] += reward
    assert total == {0: 0.0, 1: 0.0}  # constant answers, over both cues


def pinpad_plan(rules, start):
    """A shortest list of actions to the reward, breadth first."""
    plans, queue = {start: []}, [start]
    for state in queue:
        for action in range(rules.actions):
            child, reward, _ = rules.move(state, action)
            if reward:
                return [*plans[state], action]
            if child not in plans:
                plans[child] = [*plans[state], action]
                queue.append(child)
    raise AssertionError(f"no way to the reward from {start}")


def test_pinpad_shortest_plans_are_the_optimum():
    """N(t) = mean over starts s of 1 + N(t - d(s) - 1) if d(s) ≤ t, else 0."""
    env = probes.make("pinpad", seed=0)
    plans = {s: pinpad_plan(env.rules, s) for s in env.starts}
    expected = [0.0]
    for t in range(1, 101):
        lengths = [len(plan) for plan in plans.values()]
        gains = [1 + expected[max(t - d - 1, 0)] if d <= t else 0 for d in lengths]
        expected.append(float(np.mean(gains)))
    assert expected[-1] == pytest.approx(probes.scores(env.rules)[1], abs=1e-9)
    todo, returns = [], []

    def follow(env):
        if env.state in plans:
            todo[:] = plans[env.state]
        return todo.pop(0) if todo else 0

    for _ in range(60):
        _, rewards, ends = episode(env, follow)
        assert ends == [False, True] and len(rewards) == 101
        returns.append(sum(rewards))
    assert abs(np.mean(returns) - expected[-1]) < 4 * np.std(returns) / np.sqrt(60)


def test_pinpad_by_hand():
    """Wrong pads reset, pads do not count twice, the reward shows the full strip."""
    env = probes.make("pinpad", seed=0)
    _, up, down, left, right = range(5)
    while env.reset() and env.state[:2] != (0, 1):
        pass
    for action, visited in [
        (left, (0, 0, 1)),
        (left, (0, 0, 1)),
        (down, (0, 0, 1)),
        (up, (0, 0, 1)),
        *[(right, (0, 0, 1))] * 3,
        (right, (0, 1, 2)),
        *[(left, (0, 1, 2))] * 3,
        (left, (1, 2, 1)),
        *[(right, (1, 2, 1))] * 3,
        (right, (2, 1, 2)),
        *[(down, (2, 1, 2))] * 3,
    ]:
        _, reward, *_ = env.step(action)
        assert env.state[2:] == visited and reward == 0.0
    # Pads 1, 2, 1, 2 and then 3: the last three are 1, 2, 3.
    picture, reward, *_ = env.step(down)
    assert env.state[2:] == (1, 2, 3) and reward == 1.0
    assert picture[0, :3].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    picture, reward, *_ = env.step(up)
    assert reward == 0.0 and not picture[0, :3].any() and env.state in env.starts


@pytest.mark.parametrize("name", ["catch", "pinpad", "echo"])
def test_pictures_tell_all_of_the_state(name):
    """No two states that can be reached look alike, but for the end of a catch."""
    rules = probes.PROBES[name]
    states = rules.starts()
    for state in states:
        for action in range(rules.actions):
            child, _, over = rules.move(state, action)
            if child and not over and child not in states:
                states.append(child)
    pictures = {rules.draw(state).tobytes() for state in states}
    assert len(pictures) == len(states) > 4


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
@settings(deadline=None)
def test_echo_shows_the_action_that_led_to_it(actions):
    env = probes.make("echo", seed=0)
    assert not env.reset()[0].any()
    for action in actions:
        picture, reward, *_ = env.step(action)
        assert picture.all(axis=(1, 2)).tolist() == [i == action for i in range(4)]
        assert picture.any(axis=(1, 2)).sum() == 1
        assert reward == action / 3


def test_one_step_probes_by_hand():
    """Reward as a function of the first picture and of the action."""
    expected = {
        "probe-value": {(0, 0): 1},
        "probe-observation": {(0, 0): -1, (1, 0): 1},
        "probe-policy": {(0, 0): -1, (0, 1): 1},
        "probe-both": {(0, 0): 1, (0, 1): -1, (1, 0): -1, (1, 1): 1},
    }
    for name, table in expected.items():
        env, seen = probes.make(name, seed=0), {}
        for _, action in itertools.product(range(20), range(env.rules.actions)):
            pictures, rewards, _ = episode(env, lambda env, action=action: action)
            assert len(pictures) == 2 and pictures[1][:, 2 * action].all()
            seen[int(pictures[0][0, 2, 0] == 255), action] = rewards[1]
        assert seen == table
    pictures, rewards, _ = episode(probes.make("probe-discount", seed=0), lambda env: 0)
    assert rewards == [0.0, 0.0, 1.0]
    assert pictures[1].any() and not pictures[1][0].any()


@pytest.mark.parametrize("name", NAMES)
def test_steps_without_an_episode_or_an_action_are_refused(name):
    env = probes.make(name, seed=0)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(0)
    env.reset()
    for action in (-1, env.rules.actions):
        with pytest.raises(ValueError, match=f"action {action} is not in 0"):
            env.step(action)
    episode(env, lambda env: 0)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cach", "'cach': did you mean catch? choose from catch, recall, pinpad"),
        ("zzz", "'zzz': choose from catch"),
    ],
)
def test_bad_names_say_what_to_do(name, words):
    with pytest.raises(ValueError) as error:
        probes.make(name, seed=0)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("catch", {"rows": 6, "columns": 3}, (6, 3, 1)),
        ("pinpad", {"size": 7, "pads": 4}, (8, 7, 3)),
        ("pinpad", {"size": 4, "pads": 2}, (5, 4, 3)),
        ("echo", {"actions": 2}, (2, 2, 1)),
    ],
)
def test_options_that_pass_can_be_played(name, options, shape):
    env = probes.make(name, seed=0, **options)
    assert env.observation_space.shape == shape
    play(env, random_actions(env, 0, 200))
    uniform, best = probes.scores(env.rules)
    assert uniform < best
