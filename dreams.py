"""What the levels of an episode imagine from any of its steps, under chosen actions.

    z_0, h_0 of acting;  a_τ forced, or ~ π;  z_τ+1 ~ prior         (IMG 1)

The start is a latent of play.py. All futures of one start are imagined with the same
random numbers: they differ by their actions alone. The goal in force at the start is
held.

Axes: W starts, C choices of action, F imagined steps, G × A action code, rows of a
level's own steps, S categoricals × K classes of z, Sg of a goal, H features of h.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from diagnose import Pictures, decode
from learner import Learner
from play import Episode, LevelPlay
from s5wm import Latent
from subactor import Subactor


class Dream(NamedTuple):
    """What was imagined; action, reward and continuation belong to the step."""

    z: Float[Array, "*B F S K"]
    h: Float[Array, "*B F H"]
    action: UInt8[Array, "*B F G"]
    reward: Float[Array, "*B F"]
    cont: Float[Array, "*B F"]


def dream(
    subactor: Subactor,
    start: Latent,
    goal: UInt8[Array, " Sg"] | None,
    forced: Int[Array, "F G"],
    *,
    key: PRNGKeyArray,
) -> Dream:
    """Steps without observations from a latent, the goal held. (IMG 1)

    A forced action below 0 leaves the choice to the actor.
    """
    model = subactor.world_model.discretise()

    def step(latent, forced_key):
        act_key, model_key = jax.random.split(forced_key[1])
        chosen = subactor.act(latent, goal, key=act_key)
        action = jnp.where(forced_key[0] < 0, chosen, forced_key[0])  # (IMG 1)
        onehot = jax.nn.one_hot(action, subactor.action_shape[1])
        latent = model.imagine(latent.carry, onehot, key=model_key)
        reward, cont, _ = model.heads.outlook(latent)
        action = action.astype(jnp.uint8)
        return latent, Dream(latent.z, latent.h, action, reward, cont)

    keys = jax.random.split(key, forced.shape[0])
    return jax.lax.scan(step, start, (forced, keys))[1]


@jax.jit
def dreams(
    subactor: Subactor,
    starts: Latent,
    goals: UInt8[Array, "W Sg"] | None,
    forced: Int[Array, "W C F G"],
) -> Dream:
    """(W, C, F) of them, the same random numbers for all choices of a start."""
    keys = jax.random.split(jax.random.key(0), forced.shape[0])

    def one(inputs):
        start, goal, forced, key = inputs
        return jax.vmap(lambda f: dream(subactor, start, goal, f, key=key))(forced)

    return jax.lax.map(one, (starts, goals, forced, keys), batch_size=8)


class Level(NamedTuple):
    """One level of an episode, with the learners up to it that decode its latents."""

    learners: tuple[Learner, ...]
    lived: LevelPlay
    chosen: Int[np.ndarray, "rows G"]

    @property
    def decoders(self) -> tuple[Callable, ...]:
        return tuple(x.subactor.world_model.heads.decoder for x in self.learners)

    def pictures(self, z: Float[Array, "*B S K"], h: Float[Array, "*B H"]) -> Pictures:
        return np.asarray(decode(self.decoders, z, h))

    def dreams(
        self, rows: Int[np.ndarray, " W"], forced: Int[np.ndarray, "W C F G"]
    ) -> Dream:
        """What is imagined from rows; z and h begin with the row's own."""
        start = jax.tree.map(lambda x: jnp.asarray(x[rows]), self.lived.latent)
        goal, subactor = self.lived.steps.goal, self.learners[-1].subactor
        given = None if goal is None else jnp.asarray(goal)[rows]
        found = dreams(subactor, start, given, jnp.asarray(forced))

        def after(first, x):
            first = jnp.broadcast_to(
                first[:, None, None], (*x.shape[:2], 1, *x.shape[3:])
            )
            return jnp.concatenate([first, x], 2)

        return found._replace(z=after(start.z, found.z), h=after(start.h, found.h))

    def tree(
        self, rows: Int[np.ndarray, " W"], A: int, depth: int, repeat: int
    ) -> tuple[Array, ...]:
        """Every sequence of actions, each held for `repeat` steps, as a tree per row.

        Node 0 is the row, node A n + 1 + a follows node n by action a. At every node z,
        h, the reward of its steps, the reward and the continuation since the row.
        """
        sequences = np.indices((A,) * depth).reshape(depth, -1).T
        forced = np.repeat(sequences, repeat, 1)[..., None]
        found = self.dreams(rows, np.broadcast_to(forced, (len(rows), *forced.shape)))

        def nodes(x):
            # Sequences that begin alike are alike so far: one stands for them all.
            ends = [x[:, :: A ** (depth - j), j * repeat] for j in range(depth + 1)]
            return jnp.concatenate(ends, 1)

        begin = lambda x, first: jnp.insert(x, 0, first, -1)
        total = nodes(jnp.cumsum(begin(found.reward, 0), -1))
        cont = nodes(jnp.cumprod(begin(found.cont, 1), -1))
        reward = total - total[:, (np.arange(total.shape[1]) - 1) // A]
        return nodes(found.z), nodes(found.h), reward.at[:, 0].set(0), total, cont


def levels_of(learners: tuple[Learner, ...], episode: Episode) -> list[Level]:
    """What was chosen at a row is in force below from there on, or was the action.

    At an episode's end nothing is chosen: -1.
    """
    found = []
    for i, lived in enumerate(episode.levels):
        chosen = episode.action[:, None]
        if i > 0:
            below = episode.levels[i - 1]
            chosen = below.steps.goal[np.searchsorted(below.at, lived.at)]
        chosen = np.array(chosen, int)
        chosen[-1] = -1 if episode.is_last[-1] else chosen[-1]
        found.append(Level(learners[: i + 1], lived, chosen))
    return found
