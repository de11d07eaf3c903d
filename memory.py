"""What a world model remembers of the probe `cue`, whose last reward tells its first.

    foreseen   does it know the reward before it comes?
    readable   can a linear map tell the cue from the state x, at the last step before?

Both play fresh episodes with a trained run, and are 0.5 without memory.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from config import Config
from instruments import predicted_rewards
from nets import mode_onehot, unimix_probs
from play import LevelPlay, episode
from run import load_weights
from subactor import Learner

Features = Float[np.ndarray, "n F"]
Signs = Float[np.ndarray, " n"]


def played(
    run_dir: Path, episodes: int
) -> tuple[Config, tuple[Learner, ...], list[LevelPlay]]:
    """Level 0's side of whole episodes that the run never saw."""
    config, learners = load_weights(run_dir)
    length = config.env.delay + 3
    found = [episode(config, learners, length, seed=s) for s in range(episodes)]
    return config, learners, [one.levels[0] for one in found]


def foreseen(run_dir: Path, episodes: int = 50) -> float:
    """Share of episodes whose reward has the sign predicted before its frame."""
    _, learners, levels = played(run_dir, episodes)
    right = []
    for level in levels:
        prior_z = mode_onehot(unimix_probs(level.latent.prior[-1:]))
        r = predicted_rewards(learners[0], prior_z, level.latent.h[-1:])
        right.append(np.sign(r[0]) == np.sign(level.steps.reward[-1]))
    return float(np.mean(right))


def linear_probe(x: Features, y: Signs, ridge: float = 1e-3) -> float:
    """Share of the second half's signs that a ridge regression on the first gets."""
    n = len(x) // 2
    centre, scale = x[:n].mean(0), x[:n].std(0) + 1e-6
    x = np.append((x - centre) / scale, np.ones((len(x), 1)), axis=1)
    gram = x[:n].T @ x[:n] + ridge * n * np.eye(x.shape[1])
    w = np.linalg.solve(gram, x[:n].T @ y[:n])
    return float((np.sign(x[n:] @ w) == y[n:]).mean())


def readable(run_dir: Path, episodes: int = 200) -> float:
    """`linear_probe` of the cue on the states one step before the reward."""
    _, _, levels = played(run_dir, episodes)
    x = np.stack([np.asarray(jax.device_get(level.latent.x[-2])) for level in levels])
    x = x.reshape(len(x), -1)
    x = np.concatenate([x.real, x.imag], 1) if np.iscomplexobj(x) else x
    cue = np.array([float(level.steps.reward[-1]) for level in levels])
    return linear_probe(x, np.sign(cue))


MEASURES: dict[str, Callable[[Path], float]] = {
    "rewards foreseen": foreseen,
    "cue read from the state": readable,
}
