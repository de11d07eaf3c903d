"""What a world model remembers of the probe `cue`, whose last reward tells its first.

    foreseen   does it know the reward before it comes?
    readable   can a linear map tell the cue from the state x, at the last step before?

Both play new episodes of a trained run, of which the cue makes two kinds: what else
differs is z, sampled. The two kinds count alike: without memory both are 0.5.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from instruments import new_episodes, predicted_rewards
from learner import Learner
from nets import mode_onehot
from play import LevelPlay
from run import load_weights

Features = Float[np.ndarray, "n F"]
Signs = Float[np.ndarray, " n"]


def played(run_dir: Path, episodes: int) -> tuple[Learner, list[LevelPlay]]:
    """Level 0 and its side of whole episodes."""
    config, learners = load_weights(run_dir)
    found = new_episodes(config, learners, episodes, steps=config.env.delay + 3)
    return learners[0], [one.levels[0] for one in found]


def foreseen(run_dir: Path, episodes: int = 50) -> float:
    """Share of episodes whose reward has the sign predicted before its frame."""
    learner, levels = played(run_dir, episodes)
    cue, said = [], []
    for level in levels:
        prior_z = mode_onehot(level.latent.prior[-1:])
        r = predicted_rewards(learner, prior_z, level.latent.h[-1:])
        cue.append(np.sign(level.steps.reward[-1]))
        said.append(np.sign(r[0]))
    return balanced(np.array(said, float), np.array(cue, float))


def balanced(said: Signs, cue: Signs) -> float:
    """Mean over the two cues of the share of signs that are right."""
    return float(np.mean([(said[cue == sign] == sign).mean() for sign in (-1, 1)]))


def linear_probe(x: Features, y: Signs) -> float:
    """`balanced` on the second half, of a ridge regression on the first.

    The ridge is chosen within the first half: states of S5 and of a GRU differ in size.
    """
    n = len(x) // 2
    centre, scale = x[:n].mean(0), x[:n].std(0) + 1e-6
    x = np.append((x - centre) / scale, np.ones((len(x), 1)), axis=1)

    def score(ridge: float, train: slice, test: slice) -> float:
        gram = x[train].T @ x[train] + ridge * len(y[train]) * np.eye(x.shape[1])
        w = np.linalg.solve(gram, x[train].T @ y[train])
        return balanced(np.sign(x[test] @ w), y[test])

    ridges = [10.0**k for k in range(2, -4, -1)]
    best = max(ridges, key=lambda r: score(r, slice(0, n // 2), slice(n // 2, n)))
    return score(best, slice(0, n), slice(n, None))


def readable(run_dir: Path, episodes: int = 400) -> float:
    """`linear_probe` of the cue on the states one step before the reward."""
    _, levels = played(run_dir, episodes)
    x = np.stack([np.asarray(jax.device_get(level.latent.x[-2])) for level in levels])
    x = x.reshape(len(x), -1)
    x = np.concatenate([x.real, x.imag], 1) if np.iscomplexobj(x) else x
    cue = np.array([float(level.steps.reward[-1]) for level in levels])
    return linear_probe(x, np.sign(cue))


MEASURES: dict[str, Callable[[Path], float]] = {
    "rewards foreseen": foreseen,
    "cue read from the state": readable,
}
