"""Why a trained agent does what it does: numbers of each level, from episodes it plays.

    G_t = Σ_{t ≤ s < e} γ^{s-t} r_s + γ^{e-t} V_e                    (INS 1)
    A_t = (R_t - V_t) / scale · weight,  share = mean |A_r| / Σ_r' mean |A_r'|  (INS 2)
    heeded = mean ½ Σ_a |π(a | feat, goal) - π(a | feat, another goal)|  (INS 3)
    reach = Σ_H Var[S_k over actions] / Σ_H Var[S over rows]         (INS 4)
    closest = mean over goals of max_t r_g(goal, S_t)                (INS 5)

`python instruments.py RUN_DIR` prints them and writes RUN_DIR/instruments.json. They
answer: does the model know more than its replay? Does surprise grow beyond the windows
it was trained on? Are rewards foreseen? Which reward moves the actor? Are goals
reached, more than goals of other times? Is any state met like them? Does the actor
heed them, and how much of the state can actions decide while one is held? Does the code
say anything? Do critics predict what comes? e is the last row of the episode, for the
subgoal reward of the goal; a terminal is worth its reward instead of V_e.

Axes: n rows of a level's own steps, H features of h, Sg × Kg goal code.
"""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Float

from checkpoint import CheckpointError
from config import Config, UsageError
from diagnose import imagine, nearest
from game import read_lines
from learner import REWARDS, Learner
from machine import keep_compiled
from nets import mode_onehot, twohot_mean
from play import Episode, LevelPlay, episode, think
from run import EVAL_SEED, load_weights, place_of
from s5wm import Transition, prediction_losses
from subactor import lambda_return
from subgoal import Autoencoder, autoencoder_loss, subgoal_reward

Rows = Float[np.ndarray, " n"]
Columns = dict[str, np.ndarray]  # rows of different stretches, by name
Numbers = dict[str, float | int | None]
SEQUENCES = 32  # of actions, drawn uniformly, that are imagined from where goals begin
closest = jax.jit(jax.vmap(nearest, (0, None)))
returns_of = jax.jit(lambda_return, static_argnames="lambda_")
LOSSES = ("loss_observation", "loss_reward", "loss_cont")  # as metrics.jsonl calls them


def surprise_by_age(surprise: Rows, age: Rows, length: int) -> Numbers:
    """Mean KL in nats of rows by their age in windows of training, T = `length`."""
    edges = {"to T/2": (0, length // 2), "to T": (length // 2, length)}
    edges |= {"to 2T": (length, 2 * length), "later": (2 * length, math.inf)}
    parts = {
        k: surprise[(low <= age) & (age < high)] for k, (low, high) in edges.items()
    }
    return {name: float(x.mean()) if len(x) else None for name, x in parts.items()}


def detection(reward: Rows, predicted: Rows) -> Numbers:
    """How well rewards are recognised: half the smallest one divides yes from no."""
    real = np.abs(reward) > 1e-6
    if not real.any():
        return {"rewards": 0, "precision": None, "recall": None}
    threshold = np.abs(reward[real]).min() / 2
    called = np.abs(predicted) > threshold
    right = called & real & (np.sign(predicted) == np.sign(reward))
    return {
        "rewards": int(real.sum()),
        "precision": float(right.sum() / called.sum()) if called.any() else None,
        "recall": float(right.sum() / real.sum()),
    }


def calibration(value: Rows, returns: Rows) -> Numbers:
    """A critic beside what came: bias, spread of what came, correlation."""
    spread = float(returns.std())
    alike = spread < 1e-9 or value.std() < 1e-9
    return {
        "value_mean": float(value.mean()),
        "return_mean": float(returns.mean()),
        "return_spread": spread,
        "correlation": None if alike else float(np.corrcoef(value, returns)[0, 1]),
    }


def goal_starts(n: int, length: int) -> np.ndarray:
    """Rows of an episode where goals begin that are held to their end."""
    return np.arange(0, n - length, length)


def goal_reached(
    goal: Float[np.ndarray, "n H"], state: Float[np.ndarray, "n H"], length: int
) -> Columns:
    """r_g where each goal begins, after its last action, and there for other goals."""
    starts = goal_starts(len(goal), length)
    ends = starts + length
    other = np.roll(starts, len(starts) // 2)
    pairs = {"begin": (starts, starts), "end": (starts, ends)}
    if len(starts) > 1:
        pairs["end_others"] = (other, ends)
    return {
        k: np.asarray(reward_of_goals(goal[g], state[s])) for k, (g, s) in pairs.items()
    }


def heeded(learner: Learner, level: LevelPlay) -> Rows:
    """Probability moved by the goal of another time, mean over groups. (INS 3)"""
    other = jnp.roll(level.steps.goal, len(level.at) // 2, 0)
    others = think(learner, replace(level.steps, goal=other), level.latent)
    moved = np.abs(level.thoughts.policy - np.asarray(others.policy))
    return 0.5 * moved.sum(-1).mean(-1)  # (INS 3)


def new_episodes(
    config: Config, learners: tuple[Learner, ...], episodes: int, steps: int
) -> list[Episode]:
    """Episodes of at most so many steps, from seeds far from those of training."""
    seeds = range(EVAL_SEED, EVAL_SEED + episodes)
    return [episode(config, learners, steps, seed=seed) for seed in seeds]


def goals_heeded(run_dir: Path, episodes: int = 3, steps: int = 2000) -> float:
    """Mean of (INS 3) over what level 0 does in new episodes; of two levels or more."""
    config, learners = load_weights(run_dir)
    played = new_episodes(config, learners, episodes, steps)
    moved = [heeded(learners[0], one.levels[0]) for one in played]
    return float(np.concatenate(moved).mean())


def in_reach(learner: Learner, level: LevelPlay, length: int) -> Columns:
    """What random actions make of S by each goal's end: r_g and spread. (INS 4)

    Imagined, z drawn alike for all sequences, so that only the actions differ.
    """
    subactor, goal = learner.subactor, level.thoughts.goal
    G, A = subactor.action_shape
    starts = goal_starts(len(goal), length)
    carries = jax.tree.map(lambda x: x[starts], level.latent.carry)
    drawn = jax.random.randint(jax.random.key(2), (SEQUENCES, length, G), 0, A)

    def end(sequence):
        actions = jnp.broadcast_to(sequence, (len(starts), *sequence.shape))
        latent = imagine(subactor.world_model, carries, actions)
        return np.asarray(learner.standardiser(latent.h[:, -1]))

    S = np.stack([end(sequence) for sequence in jax.nn.one_hot(drawn, A)])
    r_g = np.stack([np.asarray(reward_of_goals(goal[starts], s)) for s in S])
    return {"mean": r_g.mean(0), "best": r_g.max(0), "spread": S.var(0).sum(-1)}


def closest_met(
    autoencoder: Autoencoder,
    goal: Float[np.ndarray, "goals H"],
    state: Float[np.ndarray, "n H"],
) -> Numbers:
    """r_g of that state, of all that were met, which is most like a goal. (INS 5)

    Beside it for codes drawn uniformly, which is what a level above asks for before it
    learns, and for the codes of states that were met.
    """
    random, n = np.random.default_rng(0), len(goal)
    Sg, Kg = autoencoder.code_shape
    drawn = jax.nn.one_hot(random.integers(0, Kg, (n, Sg)), Kg)
    some = jnp.asarray(state)[random.integers(0, len(state), n)]
    own, decode = jax.vmap(autoencoder.encode)(some), jax.vmap(autoencoder.decode)
    asked = {"goal": goal, "code drawn": decode(drawn), "code of a state": decode(own)}
    return means({k: np.asarray(closest(G, state)[1]) for k, G in asked.items()})


def stretches(n: int, length: int) -> list[slice]:
    """n rows cut into parts of `length` rows, the last one shorter, none of one row."""
    return [slice(i, min(i + length, n)) for i in range(0, n - 1, length)]


reward_of_goals = jax.jit(jax.vmap(subgoal_reward))


@jax.jit
def predicted_rewards(learner: Learner, z, h) -> Float[jax.Array, " n"]:
    """r̂ of states given as z (n, S, K) and h (n, H)."""
    feat = jnp.concatenate([z.reshape(len(z), -1), h], -1)
    return twohot_mean(jax.vmap(learner.subactor.world_model.heads.reward)(feat))


@jax.jit
def losses(
    learner: Learner, steps: Transition, feat: Float[jax.Array, "n F"]
) -> tuple[Float[jax.Array, " n"], ...]:
    """Losses of observation, reward and continuation, row by row."""
    heads = learner.subactor.world_model.heads
    per_row = jax.vmap(partial(prediction_losses, heads))
    return per_row(feat, steps.obs, steps.reward, steps.is_terminal)


def model_rows(learner: Learner, level: LevelPlay) -> Columns:
    """An episode's losses, rewards beside those predicted, surprise and age, by row."""
    latent, surprise = level.latent, np.asarray(level.thoughts.surprise)
    prior_z = mode_onehot(latent.prior)
    found = map(np.asarray, losses(learner, level.steps, latent.feat))
    return dict(zip(LOSSES, found, strict=True)) | {
        "age": np.arange(float(len(surprise))),
        "surprise": surprise,
        "reward": np.asarray(level.steps.reward),
        "seen": np.asarray(predicted_rewards(learner, latent.z, latent.h)),
        "foreseen": np.asarray(predicted_rewards(learner, prior_z, latent.h)),
    }


def critic(
    reward: Rows, value: Rows, discount: Rows, terminal: np.ndarray, lambda_: float
) -> Columns:
    """V_t, G_t and R_t of the rows of a stretch but the last, whose worth closes it.

    That is its value, or after a terminal nothing but its reward: a stretch that is
    merely cut goes on, as critics learn (Δ3).
    """
    after = float(reward[-1] if terminal[-1] else value[-1])
    value = np.append(value[:-1], after)
    steps = tuple(map(jnp.asarray, (reward, value, discount)))
    return {
        "value": value[:-1],
        "came": np.asarray(returns_of(*steps, 1.0)),  # (INS 1)
        "lambda": np.asarray(returns_of(*steps, lambda_)),
    }


def critic_rows(config: Config, level: LevelPlay, name: str) -> Columns:
    """`critic` of an episode; for the subgoal reward goal by goal.

    A goal's last value closes it: what comes later pays another goal.
    """
    terminal = np.asarray(level.steps.is_terminal)
    discount = config.trainer.discount * (1.0 - terminal)
    length = max(2, len(terminal))
    if name == "subgoal":
        discount, length = discount * config.trainer.goal_discount, config.period
    reward, value = (
        np.asarray(x[name]) for x in (level.thoughts.rewards, level.thoughts.values)
    )
    return joined(
        [
            critic(
                reward[i], value[i], discount[i], terminal[i], config.trainer.lambda_
            )
            for i in stretches(len(terminal), length)
        ]
    )


def joined(parts: list[Columns]) -> Columns:
    """Rows of several stretches or episodes behind one another, by name."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {k: np.concatenate([x[k] for x in parts if k in x]) for k in names}


def means(columns: Columns) -> Numbers:
    """Of every column; None of an empty one."""
    return {k: float(x.mean()) if len(x) else None for k, x in columns.items()}


def examine(config: Config, learner: Learner, levels: list[LevelPlay]) -> dict:
    """All instruments on one level, rows of all episodes counted alike."""
    subactor, trainer = learner.subactor, config.trainer
    model = joined([model_rows(learner, level) for level in levels])
    found = {
        "losses in play": {name: float(model[name].mean()) for name in LOSSES}
        | {"kl": float(model["surprise"].mean())},
        "surprise": surprise_by_age(model["surprise"], model["age"], config.length),
        "reward, frame seen": detection(model["reward"], model["seen"]),
        "reward, frame foreseen": detection(model["reward"], model["foreseen"]),
    }
    weights, size = dict(zip(REWARDS, trainer.reward_weights, strict=True)), {}
    scales = np.asarray(learner.return_scale)
    for name, scale in zip(subactor.rewards, scales, strict=True):
        rows = joined([critic_rows(config, level, name) for level in levels])
        found[f"critic {name}"] = calibration(rows["value"], rows["came"])
        advantage = (rows["lambda"] - rows["value"]) / max(1.0, scale)  # (INS 2)
        size[name] = weights[name] * np.abs(advantage).mean()
    total = sum(size.values()) or 1.0
    found["share of the advantage"] = {k: float(x / total) for k, x in size.items()}
    if levels[0].thoughts.goal is not None:
        thoughts = [level.thoughts for level in levels]
        goals = joined([goal_reached(x.goal, x.state, config.period) for x in thoughts])
        goals["heeded"] = np.concatenate([heeded(learner, level) for level in levels])
        found["goal"] = {"goals": len(goals["begin"])} | means(goals)
        reach = joined([in_reach(learner, level, config.period) for level in levels])
        met = np.concatenate([x.state for x in thoughts])
        reach["reach"] = reach.pop("spread") / met.var(0).sum()  # (INS 4)
        found["goal, random actions"] = means(reach)
        asked = [x.goal[goal_starts(len(x.goal), config.period)] for x in thoughts]
        near = closest_met(subactor.autoencoder, np.concatenate(asked), met)
        found["goal, closest state met"] = near
    if subactor.autoencoder is not None:
        _, health = autoencoder_loss(
            subactor.autoencoder,
            jnp.concatenate([level.thoughts.state for level in levels]),
            kl_scale=trainer.code_kl_scale,
            key=jax.random.key(0),
        )
        found["code"] = {k: float(x) for k, x in health.items() if "loss" not in k}
    return found


def training_losses(lines: list[dict], level: int) -> Numbers:
    """The newest of metrics.jsonl; empty where there are none."""
    names = {name: f"level{level}/{name}" for name in (*LOSSES, "kl")}
    logged = [x for x in lines if names["kl"] in x]
    return {k: logged[-1][x] for k, x in names.items()} if logged else {}


def main(
    run_dir: Annotated[Path, tyro.conf.Positional], episodes: int = 3, steps: int = 2000
) -> int:
    """Plays episodes of at most so many agent steps; exit code 2 for bad input."""
    try:
        if episodes < 1:
            raise UsageError(f"--episodes {episodes}: give 1 or more")
        config, learners = load_weights(run_dir)
        least = config.period ** (config.levels - 1) + 1  # the highest acts twice
        if steps < least:
            raise UsageError(f"--steps {steps}: give {least} or more")
    except (UsageError, CheckpointError) as error:
        print(f"instruments.py: {error}", file=sys.stderr)
        return 2
    played = new_episodes(config, learners, episodes, steps)
    lines = read_lines(run_dir)
    found = {
        f"level {i}": {"losses in training": training_losses(lines, i)}
        | examine(config, learner, [one.levels[i] for one in played])
        for i, learner in enumerate(learners)
    }
    for level, parts in found.items():
        for name, numbers in parts.items():
            shown = {k: "-" if x is None else f"{x:.3g}" for k, x in numbers.items()}
            texts = ", ".join(f"{k} {x}" for k, x in shown.items())
            print(f"{level}  {name:>24}  {texts}")
    out = place_of(run_dir) / "instruments.json"
    out.write_text(json.dumps({"episodes": episodes, "levels": found}, indent=1))
    print(out)
    return 0


if __name__ == "__main__":
    keep_compiled()
    sys.exit(tyro.cli(main))
