"""Instruments on small cases worked by hand, and on a run that just began."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import instruments
import train
from config import TINY
from game import make_env, read_lines
from learner import Learner
from play import LevelPlay
from run import load_weights
from s5wm import Transition
from subgoal import Autoencoder


def blank_learner(**fields):
    """A learner that has nothing else."""
    learner = object.__new__(Learner)
    for name, value in fields.items():
        object.__setattr__(learner, name, value)
    return learner


def test_shape_hook_is_live():
    with pytest.raises(TypeCheckError):
        instruments.surprise_by_age(np.zeros((2, 2)), np.zeros(4), 4)


def test_surprise_by_age_of_two_episodes():
    age = np.concatenate([np.arange(10.0), np.arange(2.0)])
    found = instruments.surprise_by_age(np.arange(12.0), age, 4)
    assert found == {"to T/2": 22 / 4, "to T": 2.5, "to 2T": 5.5, "later": 8.5}
    assert instruments.surprise_by_age(age[:4], age[:4], 4)["to 2T"] is None


def test_rewards_are_recognised_with_their_sign():
    reward = np.array([0, 1, 0, -2, 1, 0.0])
    predicted = np.array([0.1, 0.9, 0.8, -1.5, -1, 0])
    found = instruments.detection(reward, predicted)
    assert found == {"rewards": 3, "precision": 2 / 4, "recall": 2 / 3}
    assert instruments.detection(np.zeros(3), predicted[:3])["recall"] is None
    assert instruments.detection(reward, np.zeros(6))["precision"] is None


def test_realised_returns():
    reward, value, on = np.array([1, 0, 4.0, 9]), np.full(4, 8.0), np.zeros(4, bool)
    for discount, came in (([0.5, 0.5, 0, 0.5], [2, 2, 4]), ([0.5] * 4, [3, 4, 8])):
        found = instruments.critic(reward, value, np.array(discount), on, 0.95)
        np.testing.assert_allclose(found["came"], came)


@pytest.mark.parametrize("over", [True, False])
def test_a_critic_of_a_game_that_ends_or_is_cut(over):
    """Reward 1 for ever, γ = 1/2: worth 2; as the last of a game it is worth 1."""
    terminal = np.array([False, False, over])
    found = instruments.critic(
        np.ones(3), np.full(3, 2.0), 0.5 * (1.0 - terminal), terminal, 0.95
    )
    np.testing.assert_allclose(found["came"], [1.75, 1.5] if over else [2, 2])
    np.testing.assert_allclose(found["lambda"][1], 1.5 if over else 2)
    np.testing.assert_allclose(found["value"], [2, 2])


def test_stretches_of_goals():
    parts = [list(range(9))[part] for part in instruments.stretches(9, 4)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7]]
    parts = [list(range(6))[part] for part in instruments.stretches(6, 4)]
    assert parts == [[0, 1, 2, 3], [4, 5]]
    assert instruments.stretches(1, 4) == []


def test_a_critic_that_is_right_up_to_a_shift():
    returns = np.array([0.0, 1, 2, 3])
    found = instruments.calibration(returns + 5, returns)
    assert found["correlation"] == pytest.approx(1)
    assert found["value_mean"] - found["return_mean"] == pytest.approx(5)
    assert instruments.calibration(np.zeros(4), returns)["correlation"] is None


def test_goals_that_are_reached_and_those_of_others():
    """Two goals, orthogonal; each is reached by the last of its four actions."""
    goal = np.repeat(np.eye(3), 4, axis=0)[:9]
    state = np.zeros((9, 3))
    state[[0, 4, 8]] = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    found = instruments.goal_reached(goal, state, 4)
    assert {k: x.tolist() for k, x in found.items()} == {
        "begin": [0, 0],
        "end": [1, 1],
        "end_others": [0, 0],
    }
    assert instruments.goal_reached(goal[:4], state[:4], 4)["end"].size == 0
    assert "end_others" not in instruments.goal_reached(goal[:5], state[:5], 4)


@pytest.mark.parametrize(
    "policy, moved", [([0.25, 0.75], [0, 0.5, 0.5, 0, 0.5, 0.5]), ([0.4, 0.4], [0] * 6)]
)
def test_an_actor_that_heeds_its_goal_and_one_that_does_not(monkeypatch, policy, moved):
    """Of six rows two have a goal of 1; half an episode later there is one of 0."""
    p = jnp.array(policy)

    def think(learner, steps, latent):
        chosen = p[steps.goal]
        return SimpleNamespace(policy=jnp.stack([chosen, 1 - chosen], -1))

    monkeypatch.setattr(instruments, "think", think)
    n = jnp.zeros(6)
    goal = jnp.array([[0], [1], [1], [0], [0], [0]], jnp.uint8)
    steps = Transition(
        n.reshape(6, 1, 1, 1).astype(jnp.uint8),
        *(goal, n, n.astype(bool), n.astype(bool), goal),
    )
    thoughts = SimpleNamespace(policy=np.asarray(think(None, steps, None).policy))
    level = LevelPlay(np.arange(6), steps, None, thoughts)
    np.testing.assert_allclose(instruments.heeded(blank_learner(), level), moved)


def test_what_actions_decide_of_a_state_by_hand(monkeypatch):
    """The first feature counts actions of one, the second goes by itself."""
    seen = []

    def imagine(model, carries, action):
        seen.append(np.asarray(action[0, :, 0, 1]))
        ones = carries[:, None] + jnp.cumsum(action[:, :, 0, 1], 1)
        return SimpleNamespace(h=jnp.stack([ones, 7 * jnp.ones_like(ones)], -1))

    monkeypatch.setattr(instruments, "imagine", imagine)
    subactor = SimpleNamespace(action_shape=(1, 2), world_model=None)
    learner = blank_learner(subactor=subactor, standardiser=lambda h: h)
    goal = np.repeat(np.array([[4.0, 0], [0, 14], [1, 1]]), 4, axis=0)[:9]
    latent = SimpleNamespace(carry=10 * jnp.arange(9.0))
    level = LevelPlay(np.arange(9), None, latent, SimpleNamespace(goal=goal))
    found = instruments.in_reach(learner, level, 4)
    ones = np.array(seen).sum(1)
    assert found["spread"] == pytest.approx([ones.var()] * 2) and ones.var() > 0.5
    best, length = [4 * ones, 7 * 14], [16, 49 + ones**2]
    # r_g = G·S / max(|G|, |S|)²
    first = best[0] / np.maximum(length[0], length[1])
    second = best[1] / np.maximum(14**2, 49 + (40 + ones) ** 2)
    assert found["mean"] == pytest.approx([first.mean(), second.mean()])
    assert found["best"] == pytest.approx([first.max(), second.max()])


class Double(Autoencoder):
    """A code of one row of three classes is half the state that it stands for."""

    def __init__(self):
        self.encoder = self.decoder = None
        self.code_shape = (1, 3)

    def encode(self, S):
        return S[None]

    def decode(self, code):
        return 2 * code[0]


def test_goals_like_no_state_that_was_met():
    """Of three features those met have the first alone."""
    double = Double()
    state, goal = np.eye(3)[[0, 0]], np.array([[2.0, 0, 0], [0, 3, 0], [1, 1, 0]])
    found = instruments.closest_met(double, goal, state)
    assert found["goal"] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert found["code of a state"] == 1 / 2
    drawn = np.random.default_rng(0).integers(0, 3, (3, 1))
    assert found["code drawn"] == pytest.approx((drawn == 0).mean() / 2)
    assert instruments.closest_met(double, goal[:0], state)["goal"] is None


def test_no_goal_is_held_to_its_end(monkeypatch):
    monkeypatch.setattr(
        instruments, "imagine", lambda *_: SimpleNamespace(h=np.zeros((0, 4, 2)))
    )
    subactor = SimpleNamespace(action_shape=(1, 2), world_model=None)
    learner = blank_learner(subactor=subactor, standardiser=lambda h: h)
    level = LevelPlay(
        np.arange(4),
        None,
        SimpleNamespace(carry=jnp.zeros(4)),
        SimpleNamespace(goal=np.ones((4, 2))),
    )
    assert instruments.means(instruments.in_reach(learner, level, 4)) == {
        "mean": None,
        "best": None,
        "spread": None,
    }


def test_rows_of_episodes_are_counted_alike():
    parts = [{"a": np.zeros(3), "b": np.ones(1)}, {"a": np.ones(1)}]
    found = {k: x.tolist() for k, x in instruments.joined(parts).items()}
    assert found == {"a": [0, 0, 0, 1], "b": [1]}


def test_rows_of_an_episode_by_hand(monkeypatch):
    """Seen is what z says, foreseen what the prior's mode does; ages begin at 0."""
    z = jnp.eye(2)[:, None]
    steps = SimpleNamespace(reward=jnp.array([0.0, 3.0]))
    latent = SimpleNamespace(prior=5 * z[::-1], z=z, h=jnp.zeros((2, 1)), feat=None)
    thoughts = SimpleNamespace(surprise=np.array([2.0, 1.0]))
    level = LevelPlay(np.arange(2), steps, latent, thoughts)
    says = lambda learner, z, h: z[:, 0, 1]
    monkeypatch.setattr(instruments, "predicted_rewards", says)
    three = tuple(np.full(2, x) for x in (4.0, 5.0, 6.0))
    monkeypatch.setattr(instruments, "losses", lambda *_: three)
    found = instruments.model_rows(blank_learner(), level)
    assert {k: x.tolist() for k, x in found.items()} == {
        "loss_observation": [4, 4],
        "loss_reward": [5, 5],
        "loss_cont": [6, 6],
        "age": [0, 1],
        "surprise": [2, 1],
        "reward": [0, 3],
        "seen": [0, 1],
        "foreseen": [1, 0],
    }


def test_critics_of_an_episode_by_hand():
    """Rewards of 1 at γ = ½, to the end of the game; goals of 2 steps at γ = ¼."""
    both = lambda x: {name: np.full(5, x) for name in ("extrinsic", "subgoal")}
    thoughts = SimpleNamespace(rewards=both(1.0), values=both(4.0))
    steps = SimpleNamespace(is_terminal=np.arange(5) == 4)
    level = LevelPlay(np.arange(5), steps, None, thoughts)
    trainer = replace(TINY.trainer, discount=0.5, goal_discount=0.5)
    config = replace(TINY, period=2, trainer=trainer)
    found = instruments.critic_rows(config, level, "extrinsic")
    assert found["came"].tolist() == [1.9375, 1.875, 1.75, 1.5]
    found = instruments.critic_rows(config, level, "subgoal")
    assert found["came"].tolist() == found["lambda"].tolist() == [2, 2]


def test_a_level_is_examined_by_hand(monkeypatch):
    """Advantages of ±8 and ±2, over scales of 4 and 1 at least, weigh 1 and 0.3."""
    columns = dict.fromkeys(instruments.LOSSES, np.full(3, 2.0)) | {
        "age": np.arange(3.0),
        "surprise": np.array([1.0, 2.0, 6.0]),
        "reward": np.array([0.0, 1.0, 0.0]),
        "seen": np.array([0.0, 1.0, 0.0]),
        "foreseen": np.array([1.0, 0.0, 0.0]),
    }
    monkeypatch.setattr(instruments, "model_rows", lambda *_: columns)
    sizes, sign = {"extrinsic": 8, "subgoal": 2}, np.array([1.0, -1.0])

    def critic_rows(config, level, name):
        value, came = np.array([5.0, 7.0]), np.array([1.0, 4.0])
        return {"value": value, "came": came, "lambda": value + sizes[name] * sign}

    monkeypatch.setattr(instruments, "critic_rows", critic_rows)
    subactor = SimpleNamespace(rewards=tuple(sizes), autoencoder=None)
    learner = blank_learner(subactor=subactor, return_scale=np.array([4.0, 0.5]))
    level = LevelPlay(None, None, None, SimpleNamespace(goal=None))
    found = instruments.examine(replace(TINY, length=4), learner, [level])
    assert found["losses in play"] == dict.fromkeys(instruments.LOSSES, 2) | {"kl": 3}
    assert found["surprise"]["to T/2"] == 1.5 and found["surprise"]["to T"] == 6
    assert found["reward, frame seen"]["recall"] == 1
    assert found["reward, frame foreseen"]["recall"] == 0
    assert found["critic subgoal"]["return_mean"] == 2.5
    share = found["share of the advantage"]
    assert share == pytest.approx({"extrinsic": 2 / 2.6, "subgoal": 0.6 / 2.6})


def test_losses_in_training_are_the_newest(tmp_path):
    assert instruments.training_losses(read_lines(tmp_path), 0) == {}
    names = [f"level1/{name}" for name in (*instruments.LOSSES, "kl")]
    lines = [
        {"step": 4, **dict.fromkeys(names, 1.0)},
        {"step": 8, **dict.fromkeys(names, 2.0)},
        {"step": 9, "episode_return": 3.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 10, "torn')
    lines = read_lines(tmp_path)
    assert instruments.training_losses(lines, 0) == {}
    found = instruments.training_losses(lines, 1)
    assert found == {name: 2.0 for name in (*instruments.LOSSES, "kl")}


def test_a_run_is_examined(tmp_path, capsys):
    folder = tmp_path / "run"
    flags = "--preset tiny --game catch --model.channels --model.strides --steps 12"
    run = train.open_run(train.parse([*flags.split(), "--run-dir", str(folder)]))
    run.save()
    assert instruments.main(folder, episodes=0) == 2
    assert instruments.main(folder, steps=4**2) == 2
    said = capsys.readouterr().err
    assert "--episodes 0: give 1 or more" in said and "--steps 16: give 17" in said
    assert instruments.main(folder, episodes=2) == 0
    said = capsys.readouterr().out
    assert "level 2" in said and "critic novelty" in said
    levels = json.loads((folder / "instruments.json").read_text())["levels"]
    assert list(levels) == ["level 0", "level 1", "level 2"]
    assert levels["level 0"]["losses in training"] == {}
    play = levels["level 0"]["losses in play"]
    assert set(play) == {*instruments.LOSSES, "kl"}
    assert play["loss_reward"] == pytest.approx(np.log(255))  # nothing learned yet
    assert play["kl"] > 1
    goal = levels["level 0"]["goal"]
    assert 0 < goal["heeded"] < 1 and goal["goals"] == 2 * 2
    again = instruments.goals_heeded(folder, episodes=2)
    assert again == pytest.approx(goal["heeded"])
    assert levels["level 0"]["goal, random actions"]["reach"] > 0
    assert set(levels["level 1"]["goal, random actions"].values()) == {None}
    assert "goal" not in levels["level 2"]
    shares = levels["level 1"]["share of the advantage"]
    assert set(shares) == {"extrinsic", "subgoal", "novelty"}
    assert sum(shares.values()) == pytest.approx(1)
    config, learners = load_weights(folder)
    played = instruments.new_episodes(config, learners, episodes=8, steps=1)
    trained = [make_env(config, seed).reset()[0] for seed in range(8)]
    assert not np.array_equal([one.obs[0] for one in played], trained)
    assert instruments.main(tmp_path / "none") == 2
    assert capsys.readouterr().err.count("\n") == 1
