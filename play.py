"""One episode with everything the tower computed, step by step, to look at.

    surprise_t = KL[q(z_t | o_t) ‖ p(z_t | m_t)]                    (PLAY 1)

`episode` lets trained levels play and keeps what they saw, believed, wanted and chose:
the tower of hieros.py without training and without a replay. Every level keeps one
row per step of its own. Prior and latent are those of acting, not recomputed.

Axes: n agent steps, rows of a level's own steps, h w c of a picture, S categoricals ×
K classes of z, H features of h, G × A action, R rewards.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import Env
from jaxtyping import Array, Float, Int, UInt8

import hieros
from agent import matmul_precision
from atari import Atari
from config import Config
from game import env_step, make_env
from learner import Learner
from nets import kl_divergence, twohot_mean, unimix_probs
from s5wm import Latent, Transition
from subactor import critic_logits

act = jax.jit(hieros.act, static_argnames="period")


class Thoughts(NamedTuple):
    """What follows from a level's latents: rows of it, rewards by name.

    `posterior` are logits, `policy` probabilities under the goal in force, `surprise`
    is in nats; `goal` and `state` are G and S, None where nothing asks for them.
    """

    posterior: Float[Array, "rows S K"]
    surprise: Float[Array, " rows"]
    policy: Float[Array, "rows G A"]
    rewards: dict[str, Float[Array, " rows"]]
    values: dict[str, Float[Array, " rows"]]
    state: Float[Array, "rows H"] | None
    goal: Float[Array, "rows H"] | None


class LevelPlay(NamedTuple):
    """What one level lived through.

    `at` are the agent steps at which it acted. `steps.action` led to the row, the one
    chosen there is in the next row; `steps.goal` is in force from the row on. Steps and
    latents are on the device, to be imagined from; the rest is on the host.
    """

    at: Int[np.ndarray, " rows"]
    steps: Transition
    latent: Latent
    thoughts: Thoughts

    def held(self, n: int) -> Int[np.ndarray, " n"]:
        """The newest row at each of n agent steps."""
        return np.searchsorted(self.at, np.arange(n), side="right") - 1


class Episode(NamedTuple):
    """An episode's agent steps and its levels, lowest first.

    `frames` are as large as the game draws them, `obs` what level 0 saw; `action` was
    chosen on a step's observation, `reward` arrived with it. The action of an
    episode's last step, where `is_last` ends in True, means nothing.
    """

    frames: UInt8[np.ndarray, "n height width 3"] | UInt8[np.ndarray, "n h w c"]
    obs: UInt8[np.ndarray, "n h w c"]
    action: Int[np.ndarray, " n"]
    reward: Float[np.ndarray, " n"]
    is_last: np.ndarray
    levels: tuple[LevelPlay, ...]


def screen(
    env: Env, obs: UInt8[np.ndarray, "h w c"]
) -> UInt8[np.ndarray, "height width channels"]:
    """The game's own colour picture, or what the agent sees where there is none."""
    return env.ale.getScreenRGB() if isinstance(env, Atari) else obs


@jax.jit
def think(learner: Learner, steps: Transition, latent: Latent) -> Thoughts:
    """Everything about a level's rows that acting computes and does not return."""
    subactor = learner.subactor
    model, autoencoder = subactor.world_model, subactor.autoencoder
    goal = subactor.goal_onehot(steps.goal)
    before = jax.tree.map(lambda x: jnp.concatenate([x[:1], x[:-1]]), latent.carry)
    # Windows of one step: q sees the very carry that acting had, in an RSSM too.
    alone = jax.tree.map(lambda x: x[:, None], steps)
    observe = lambda steps, carry: model.observe(steps, carry, key=jax.random.key(0))
    posterior = jax.vmap(observe)(alone, before)[1][:, 0]
    inputs = jax.vmap(subactor.policy_input)(latent, goal)[0]
    logits = critic_logits(subactor.critics, inputs[:, None])[:, :, 0]
    return Thoughts(
        posterior=posterior,
        surprise=kl_divergence(posterior, latent.prior),  # (PLAY 1)
        policy=unimix_probs(jax.vmap(subactor.action_logits)(inputs)),
        rewards=learner.rewards(steps.reward, latent.h, goal),
        values=dict(zip(subactor.rewards, twohot_mean(logits), strict=True)),
        state=None if autoencoder is None else learner.standardiser(latent.h),
        goal=None if goal is None else jax.vmap(autoencoder.decode)(goal),
    )


def episode(
    config: Config, learners: tuple[Learner, ...], steps: int, *, seed: int = 0
) -> Episode:
    """At most `steps` agent steps from an episode's start, the policy sampled.

    The same seed gives the same episode.
    """
    subactors = tuple(learner.subactor for learner in learners)
    tower = hieros.init_state(subactors, config.period)
    env, key = make_env(config, seed), jax.random.key(seed)
    seen, rows = env_step(env.reset()[0], first=True), []
    while True:
        fold = jax.random.fold_in(key, len(rows))
        with matmul_precision(config.precision):
            tower, action, acted = act(
                subactors, tower, seen, period=config.period, key=fold
            )
        rows.append((screen(env, seen.obs), seen, int(action), acted))
        if seen.is_last or len(rows) == steps:
            break
        obs, reward, terminated, truncated, _ = env.step(int(action))
        last = terminated or truncated
        seen = env_step(obs, reward, last=last, terminal=terminated)
    stack = lambda *leaves: np.stack(leaves)
    frames, seen, action, acted = jax.tree.map(stack, *jax.device_get(rows))
    levels = []
    for learner, level in zip(learners, acted, strict=True):
        at = np.flatnonzero(level.acts)
        own = jax.tree.map(lambda x, at=at: jnp.asarray(x[at]), level)
        thoughts = jax.device_get(think(learner, own.step, own.latent))
        levels.append(LevelPlay(at, own.step, own.latent, thoughts))
    return Episode(frames, seen.obs, action, seen.reward, seen.is_last, tuple(levels))
