"""Why a trained agent does what it does: numbers of each level, from episodes it plays.

    G_t = Σ_{s ≥ t} γ^{s-t} r_s  to the episode's end                (INS 1)
    A_t = (R_t - V_t) / scale · weight,  share = mean |A_r| / Σ_r' mean |A_r'|  (INS 2)

`python instruments.py RUN_DIR` prints them and writes RUN_DIR/instruments.json. They
answer: does surprise grow beyond the windows it was trained on? Are rewards foreseen?
Which reward moves the actor? Are goals reached, more than goals of other times? Does
the code say anything? Do critics predict what comes?

Axes: n rows of a level's own steps, H features of h, Sg × Kg goal code.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Float

from checkpoint import CheckpointError
from config import Config
from game import UsageError
from nets import mode_onehot, twohot_mean, unimix_probs
from play import Episode, LevelPlay, episode
from run import keep_compiled, load_weights
from subactor import REWARDS, Learner, lambda_return
from subgoal import autoencoder_loss, subgoal_reward

Rows = Float[np.ndarray, " n"]
Numbers = dict[str, float | int | None]


def surprise_by_age(surprise: Rows, length: int) -> Numbers:
    """Mean KL in nats of rows by their age in windows of training, T = `length`."""
    T, n = length, len(surprise)
    edges = {"to T/2": (0, T // 2), "to T": (T // 2, T), "to 2T": (T, 2 * T)}
    edges["later"] = (2 * T, max(n, 2 * T))
    parts = {name: surprise[a:b] for name, (a, b) in edges.items()}
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


def realised(reward: Rows, discount: Rows, after: float | int) -> Rows:
    """What really followed, `after` being worth what came beyond the end. (INS 1)"""
    total, found = after, np.zeros(len(reward))
    for t in reversed(range(len(reward))):
        total = reward[t] + discount[t] * total  # (INS 1)
        found[t] = total
    return found


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


def goal_reached(
    goal: Float[np.ndarray, "n H"], state: Float[np.ndarray, "n H"], length: int
) -> Numbers:
    """r_g where a goal begins, at its last own step, and there for other goals."""
    starts = np.arange(0, len(goal) - length + 1, length)
    reward = jax.jit(jax.vmap(subgoal_reward))
    if len(starts) < 2:
        return {"goals": len(starts), "begin": None, "end": None, "end_others": None}
    ends = starts + length - 1
    other = np.roll(goal[starts], len(starts) // 2, axis=0)
    return {
        "goals": len(starts),
        "begin": float(reward(goal[starts], state[starts]).mean()),
        "end": float(reward(goal[starts], state[ends]).mean()),
        "end_others": float(reward(other, state[ends]).mean()),
    }


@jax.jit
def predicted_rewards(learner: Learner, z, h) -> Float[jax.Array, " n"]:
    """r̂ of states given as z (n, S, K) and h (n, H)."""
    feat = jnp.concatenate([z.reshape(len(z), -1), h], -1)
    return twohot_mean(jax.vmap(learner.subactor.world_model.heads.reward)(feat))


def examine(config: Config, learner: Learner, level: LevelPlay, ended: bool) -> dict:
    """All instruments on one level of one episode."""
    steps, latent, thoughts = level.steps, level.latent, level.thoughts
    reward = np.asarray(steps.reward)
    prior_z = mode_onehot(unimix_probs(latent.prior))
    gamma = config.trainer.discount * (1.0 - np.asarray(steps.is_terminal, float))
    found = {
        "surprise": surprise_by_age(thoughts.surprise, config.length),
        "reward, frame seen": detection(
            reward, np.asarray(predicted_rewards(learner, latent.z, latent.h))
        ),
        "reward, frame foreseen": detection(
            reward, np.asarray(predicted_rewards(learner, prior_z, latent.h))
        ),
    }
    weights = dict(zip(REWARDS, config.trainer.reward_weights, strict=True))
    size, names = {}, learner.subactor.rewards
    for name, scale in zip(names, np.asarray(learner.return_scale), strict=True):
        r, V = np.asarray(thoughts.rewards[name]), np.asarray(thoughts.values[name])
        discount = gamma * (config.trainer.goal_discount if name == "subgoal" else 1.0)
        came = realised(r, discount, 0.0 if ended else V[-1])
        found[f"critic {name}"] = calibration(V, came)
        R = np.asarray(
            lambda_return(*map(jnp.asarray, (r, V, discount)), config.trainer.lambda_)
        )
        advantage = weights[name] * (R - V[:-1]) / max(1.0, scale)  # (INS 2)
        size[name] = np.abs(advantage).mean()
    total = sum(size.values()) or 1.0
    found["share of the advantage"] = {k: float(x / total) for k, x in size.items()}
    if thoughts.goal is not None:
        found["goal"] = goal_reached(thoughts.goal, thoughts.state, config.period)
    if learner.subactor.autoencoder is not None:
        _, health = autoencoder_loss(
            learner.subactor.autoencoder,
            jnp.asarray(thoughts.state),
            kl_scale=config.trainer.code_kl_scale,
            key=jax.random.key(0),
        )
        found["code"] = {k: float(x) for k, x in health.items() if "loss" not in k}
    return found


def mean(parts: list[dict]) -> dict:
    """Numbers of several episodes averaged, None where none of them has one."""
    found = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts if part.get(name) is not None]
        if isinstance(value, dict):
            found[name] = mean(values)
        else:
            found[name] = float(np.mean(values)) if values else None
    return found


def main(
    run_dir: Annotated[Path, tyro.conf.Positional], episodes: int = 3, steps: int = 2000
) -> int:
    """Plays episodes of at most so many agent steps; exit code 2 for bad input."""
    try:
        config, learners = load_weights(run_dir)
    except (UsageError, CheckpointError) as error:
        print(f"instruments.py: {error}", file=sys.stderr)
        return 2
    played: list[Episode] = [
        episode(config, learners, steps, seed=seed) for seed in range(episodes)
    ]
    found = {}
    for i, learner in enumerate(learners):
        parts = [
            examine(config, learner, one.levels[i], bool(one.is_last[-1]))
            for one in played
        ]
        found[f"level {i}"] = mean(parts)
    for level, parts in found.items():
        for name, numbers in parts.items():
            shown = {k: "-" if x is None else f"{x:.3g}" for k, x in numbers.items()}
            texts = ", ".join(f"{k} {x}" for k, x in shown.items())
            print(f"{level}  {name:>24}  {texts}")
    folder = run_dir if run_dir.is_dir() else Path("runs")
    folder.mkdir(exist_ok=True)
    out = folder / "instruments.json"
    out.write_text(json.dumps({"episodes": episodes, "levels": found}, indent=1))
    print(out)
    return 0


if __name__ == "__main__":
    keep_compiled()
    sys.exit(tyro.cli(main))
