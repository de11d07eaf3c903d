"""What a trained model knows, in numbers: how far it foresees, what its goals mean.

    G = AE_i.decode(goal),  k* = argmax_k r_g(G, S_k)               (DIA 1)
    [z_k*; symexp(S⁻¹(G))] → decode_i, last of the window → … → decode_0  (DIA 2)
    e_t = mean (o_t - ô_t)²,  ô_t imagined, reconstructed, copied or the mean  (DIA 3)

A goal of level i is decoded with the z of the replayed state k* that is closest to it.
A future is imagined from a context of frames and the true actions, z ~ prior. Pictures
are in [0, 1] and predictions clipped to that.

Axes: W windows, T their steps, F the imagined ones, n states, M moments, H features
of h, S categoricals × K classes of z, G × A action code, h w c of a picture.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from etbs import load_carry
from learner import Learner
from nets import mode_onehot, symexp
from run import Run
from s5wm import Carry, Latent, Transition, WorldModel
from subgoal import subgoal_reward

CONTEXT, IMAGINED, WINDOWS = 8, 24, 64
STATES, MOMENTS = 512, 6
Pictures = Float[np.ndarray, "... h w c"]
Ages = Int[np.ndarray, "..."]


def first_flags(run: Run) -> Bool[np.ndarray, " n"]:
    """is_first of level 0's replay, oldest first."""
    replay = run.agent.replays[0]
    return np.asarray(replay.steps.is_first[replay.rows(jnp.arange(replay.size))])


def frames(run: Run, ages: Ages) -> Pictures:
    """What the game showed at entries of level 0's replay."""
    replay = run.agent.replays[0]
    return np.asarray(replay.steps.obs[replay.rows(jnp.asarray(ages))]) / 255.0


def window_starts(is_first: Bool[np.ndarray, " n"], length: int) -> Ages:
    """Ages at which windows begin that lie within one episode."""
    episode = np.cumsum(is_first)
    return np.flatnonzero(episode[length - 1 :] == episode[: len(episode) - length + 1])


def acting_ages(is_first: Bool[np.ndarray, " n"], ended: bool, stride: int) -> Ages:
    """Ages in level 0's replay at which a level acted; `ended`: the newest is a last.

    Entries before the first known start are left out: their clock is unknown.
    """
    age = np.arange(len(is_first))
    start = np.maximum.accumulate(np.where(is_first, age, -1))
    acts = ((age - start) % stride == 0) | np.append(is_first[1:], ended)
    return age[acts & (start >= 0)]


def last_before(due: Ages, moments: Ages) -> Ages:
    """Index of the newest of `due` that is not after each moment."""
    return np.searchsorted(due, moments, side="right") - 1


@jax.jit
def observe(model: WorldModel, steps: Transition, carries: Carry) -> Latent:
    """Latents (W, T) of windows, a few at a time to save memory."""
    keys = jax.random.split(jax.random.key(0), steps.reward.shape[0])
    one = lambda x: model.observe(x[0], x[1], key=x[2])[0]
    return jax.lax.map(one, (steps, carries, keys), batch_size=8)


@jax.jit
def imagine(
    model: WorldModel, carries: Carry, action: Float[Array, "W F G A"]
) -> Latent:
    """Latents (W, F) that follow carries (W) under given actions, z ~ prior."""
    ready = model.discretise()

    def step(carry, action_key):
        latent = ready.imagine(carry, action_key[0], key=action_key[1])
        return latent.carry, latent

    keys = jax.random.split(jax.random.key(1), action.shape[:2])
    unroll = lambda carry, inputs: jax.lax.scan(step, carry, inputs)[1]
    return jax.vmap(unroll)(carries, (action, keys))


def replayed(run: Run, level: int, ages: Ages) -> tuple[Transition, Latent]:
    """Windows (W, T) of a level's replay and their latents, starting as in training."""
    replay, model = run.agent.replays[level], run.agent.subactors[level].world_model
    steps, before = replay.windows(replay.rows(jnp.asarray(ages)), run.config.carry)
    return steps, observe(model, steps, load_carry(before, model.z_shape[1]))


def decode_down(
    decoders: tuple[Callable, ...], z: Float[Array, "S K"], h: Float[Array, " H"]
) -> Float[Array, "h w c"]:
    """The picture of a latent of the last decoder's level; level 0 comes first."""
    for decoder in reversed(decoders[1:]):
        logits, window = decoder(jnp.concatenate([z.reshape(-1), h]))
        z, h = mode_onehot(logits[-1]), symexp(window[-1])
    predicted = decoders[0](jnp.concatenate([z.reshape(-1), h]))  # (DIA 2)
    return jnp.clip(predicted + 0.5, 0, 1)


@jax.jit
def decode(
    decoders: tuple[Callable, ...], z: Float[Array, "*B S K"], h: Float[Array, "*B H"]
) -> Float[Array, "*B h w c"]:
    """`decode_down` for many latents, some at a time to save memory."""
    flat = (z.reshape(-1, *z.shape[-2:]), h.reshape(-1, h.shape[-1]))
    pictures = jax.lax.map(lambda x: decode_down(decoders, *x), flat, batch_size=64)
    return pictures.reshape(*h.shape[:-1], *pictures.shape[1:])


class OpenLoop(NamedTuple):
    """Windows of play, W × T pictures each, the best predicted first.

    `seen` is decoded from each frame's own latent; `model` too up to `context`, then
    it is imagined.
    """

    truth: Pictures
    model: Pictures
    seen: Pictures
    context: int

    def errors(self) -> dict[str, Float[np.ndarray, "W T"]]:
        """Of every picture, by what stands for it. (DIA 3)"""
        guesses = {
            "imagined": self.model,
            "reconstructed, seeing the frame": self.seen,
            "copy of the last frame seen": self.truth[:, self.context - 1, None],
            "mean of all frames": self.truth.mean((0, 1)),
        }
        return {k: ((self.truth - x) ** 2).mean((2, 3, 4)) for k, x in guesses.items()}

    def views(self, windows: list[int]) -> dict[str, Pictures]:
        """What to show of some windows; errors are the largest over the channels."""
        truth, model = self.truth[windows], self.model[windows]
        error = np.abs(truth - model).max(-1, keepdims=True)
        top = max(error.max(), 0.01)
        return {"truth": truth, "model": model, f"|error|\n0 to {top:.2f}": error / top}


def open_loop(run: Run) -> OpenLoop | None:
    """Newest windows of level 0's replay, each within an episode; None without any.

    Where episodes are short, so are windows: as long as the median entry's episode.
    """
    is_first = first_flags(run)
    if len(is_first) < 2:
        return None
    episode = np.cumsum(is_first)
    typical = int(np.median(np.bincount(episode)[episode]))
    T = max(2, min(CONTEXT + IMAGINED, typical))
    context = max(1, T * CONTEXT // (CONTEXT + IMAGINED))
    starts = window_starts(is_first, T)[::-context][:WINDOWS]
    if len(starts) == 0:
        return None
    ages, subactor = starts[:, None] + np.arange(T), run.agent.subactors[0]
    steps, latent = replayed(run, 0, ages)
    taken = jax.nn.one_hot(steps.action[:, context:], subactor.action_shape[1])
    last = jax.tree.map(lambda x: x[:, context - 1], latent.carry)
    dream = imagine(subactor.world_model, last, taken)
    decoders = (subactor.world_model.heads.decoder,)
    seen, dreamt = (np.asarray(decode(decoders, x.z, x.h)) for x in (latent, dream))
    truth, model = frames(run, ages), np.concatenate([seen[:, :context], dreamt], 1)
    order = np.argsort(((truth - model)[:, context:] ** 2).mean((1, 2, 3, 4)))
    return OpenLoop(truth[order], model[order], seen[order], context)


def nearest(
    goal: Float[Array, " H"], S: Float[Array, "n H"]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The state that agrees best with a goal, and their subgoal reward. (DIA 1)"""
    agreement = jax.vmap(subgoal_reward, (None, 0))(goal, S)
    return jnp.argmax(agreement), jnp.max(agreement)  # (DIA 1)


def sought(
    learners: tuple[Learner, ...], G: Float[Array, "M H"], latent: Latent
) -> tuple[Int[Array, " M"], Float[Array, " M"], Pictures]:
    """Goals of the highest of some levels, lowest first, sought among its latents (n).

    The closest latents, their subgoal reward, and the goals as pictures. (DIA 2)
    """
    standardise = learners[-1].standardiser
    k, best = jax.vmap(nearest, (0, None))(G, standardise(latent.h))  # (DIA 1)
    decoders = tuple(x.subactor.world_model.heads.decoder for x in learners)
    h = symexp(standardise.inverse(G))
    return k, best, np.asarray(decode(decoders, latent.z[k], h))  # (DIA 2)


class Aim(NamedTuple):
    """Goals of one level at M moments.

    `now` and `best` are r_g of the state at the moment and of the closest state;
    `frame` is what the game showed then, `state` that state decoded, `goal` the goal.
    """

    level: int
    now: Float[np.ndarray, " M"]
    best: Float[np.ndarray, " M"]
    frame: Pictures
    state: Pictures
    goal: Pictures


def aim(run: Run, level: int, due: Ages, entries: int, moments: Ages) -> Aim:
    """The goals in force at a level, sought among its newest entries. (DIA 2)

    `due` are the ages, in level 0's replay, of all of the level's own entries.
    """
    learner, replay = run.agent.learners[level], run.agent.replays[level]
    autoencoder, standardise = learner.subactor.autoencoder, learner.standardiser
    back = last_before(due, moments) - len(due)
    codes = replay.steps.goal[replay.rows(replay.size + jnp.asarray(back))]
    G = jax.vmap(autoencoder.decode)(jax.nn.one_hot(codes, autoencoder.code_shape[1]))
    newest = int(replay.size) - entries + np.arange(entries)
    latent = jax.tree.map(lambda x: x[0], replayed(run, level, newest[None])[1])
    k, best, pictures = sought(run.agent.learners[: level + 1], G, latent)
    below = run.agent.subactors[: level + 1]
    decoders = tuple(s.world_model.heads.decoder for s in below)
    return Aim(
        level=level,
        now=np.asarray(jax.vmap(subgoal_reward)(G, standardise(latent.h[back]))),
        best=np.asarray(best),
        frame=frames(run, due[np.asarray(k) - entries]),
        state=np.asarray(decode(decoders, latent.z[k], latent.h[k])),
        goal=pictures,
    )


def aims(run: Run) -> tuple[Pictures, list[Aim]] | None:
    """Frames at recent moments and the goals in force then; None without any."""
    config, ended, is_first = run.config, run.game.clock == 0, first_flags(run)
    levels = [i for i in range(config.levels - 1) if run.updates[i]]
    due = [acting_ages(is_first, ended, config.period**i) for i in levels]
    sizes = [int(run.agent.replays[i].size) for i in levels]
    known = [min(STATES, n, len(d)) for n, d in zip(sizes, due, strict=True)]
    if min(known, default=0) == 0:
        return None
    since = max(d[-n] for n, d in zip(known, due, strict=True))
    goes_on = np.flatnonzero(~np.append(is_first[1:], ended))
    moments = goes_on[goes_on >= since]
    if len(moments) == 0:
        return None
    moments = moments[np.unique(np.linspace(0, len(moments) - 1, MOMENTS).astype(int))]
    found = zip(levels, due, known, strict=True)
    return frames(run, moments), [aim(run, i, d, n, moments) for i, d, n in found]
