"""Pictures of a run: what it scored, was rewarded with, predicts and aims at.

    python report.py RUN_DIR    draws RUN_DIR/pictures of a finished or stopped run

Of the goal that level i is given, decoded down to pixels, with k* the replayed state
that comes closest to it, [·; ·] the input of a decoder, and of an imagined future:

    G = AE_i.decode(goal),  k* = argmax_k r_g(G, S_k)               (REP 1)
    [z_k*; symexp(S^-1(G))] → decode_i → last of the window → … → decode_0  (REP 2)
    e_t = mean (o_t - ô_t)²,  copying: mean (o_t - o_c)²            (REP 3)

ô_t follows from the frames up to o_c, the last frame of the context, and from the true
actions, z ~ prior. Pixels are in [0, 1]; predictions are clipped to it.

Axes: W windows, T their steps, F the imagined ones, n states, M moments, H features
of h, S categoricals × K classes of z, h w c of a picture.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import fill

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from matplotlib import rc_context
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import atari
import checkpoint
import probes
from etbs import load_carry
from nets import mode_onehot, symexp
from run import Run, UsageError
from s5wm import Carry, Latent, Transition, WorldModel
from subactor import Learner, subgoal_reward

CONTEXT, IMAGINED, WINDOWS = 8, 24, 64
STATES, MOMENTS = 512, 6
KEY = 0
GREY = "#666666"
# Okabe and Ito's palette, made to be told apart by everybody.
LEVEL_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
CHANNEL_COLOURS = np.array(
    [(0, 158, 115), (240, 228, 66), (213, 94, 0), (86, 180, 233), (204, 121, 167)]
    + [(230, 159, 0), (0, 114, 178), (255, 255, 255), (153, 153, 153), (130, 80, 40)]
)
REWARD_STYLES = {"extrinsic": "-", "subgoal": "--", "novelty": ":"}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "savefig.dpi": 120,
    "figure.constrained_layout.use": True,
}
Series = tuple[np.ndarray, np.ndarray]


def read_lines(folder: Path) -> list[dict]:
    """metrics.jsonl; a last line that was cut short is left out."""
    lines, path = [], folder / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def series(lines: list[dict], name: str) -> Series:
    """Agent steps and values of one metric."""
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps), np.array(values)


def acting_ages(
    is_first: Bool[np.ndarray, " n"], ended: bool, stride: int
) -> Int[np.ndarray, " m"]:
    """Ages of the level-0 entries at which a level acted; `ended` is the last one's.

    Entries before the first known start are left out: their clock is unknown.
    """
    age = np.arange(len(is_first))
    start = np.maximum.accumulate(np.where(is_first, age, -1))
    is_last = np.append(is_first[1:], ended)
    return age[((age - start) % stride == 0) & (start >= 0) | is_last & (start >= 0)]


def window_starts(
    is_first: Bool[np.ndarray, " n"], length: int
) -> Int[np.ndarray, " m"]:
    """Ages at which windows begin that lie in one episode."""
    episode = np.cumsum(is_first)
    return np.flatnonzero(episode[length - 1 :] == episode[: len(episode) - length + 1])


def typical_length(is_first: Bool[np.ndarray, " n"]) -> int:
    """Length of the episode that the median entry belongs to."""
    episode = np.cumsum(is_first)
    return int(np.median(np.bincount(episode)[episode]))


def pixels(predicted: Float[Array, "*B h w c"]) -> Float[Array, "*B h w c"]:
    """A decoder's output on the scale of pictures."""
    return jnp.clip(predicted + 0.5, 0, 1)


def squared_error(
    truth: Float[np.ndarray, "W T h w c"], guess: Float[np.ndarray, "W #T h w c"]
) -> Float[np.ndarray, "W T"]:
    """Mean over a picture's values; a guess of one step stands for all. (REP 3)"""
    return ((truth - guess) ** 2).mean((2, 3, 4))  # (REP 3)


def predict(
    model: WorldModel,
    steps: Transition,
    carry: Carry,
    key: PRNGKeyArray,
    *,
    context: int,
    actions: int,
) -> tuple[Float[Array, "T h w c"], Float[Array, "F h w c"]]:
    """A window's frames as decoded from its own latents, and as imagined. (REP 3)"""
    observe_key, imagine_key = jax.random.split(key)
    latent, _ = model.observe(steps, carry, key=observe_key)
    ready = model.discretise()

    def imagine(carry, action_key):
        latent = ready.imagine(carry, action_key[0], key=action_key[1])
        return latent.carry, latent.feat

    taken = jax.nn.one_hot(steps.action[context:], actions)
    keys = jax.random.split(imagine_key, taken.shape[0])
    last = jax.tree.map(lambda x: x[context - 1], latent.carry)
    _, feat = jax.lax.scan(imagine, last, (taken, keys))
    decode = jax.vmap(model.heads.decoder)
    return pixels(decode(latent.feat)), pixels(decode(feat))


@partial(jax.jit, static_argnames=("context", "actions"))
def predict_all(
    model: WorldModel, steps: Transition, carries: Carry, *, context: int, actions: int
) -> tuple[Float[Array, "W T h w c"], Float[Array, "W F h w c"]]:
    """`predict` for many windows, few at a time to save memory."""
    keys = jax.random.split(jax.random.key(KEY), steps.reward.shape[0])
    one = lambda x: predict(model, *x, context=context, actions=actions)
    return jax.lax.map(one, (steps, carries, keys), batch_size=8)


class OpenLoop(eqx.Module):
    """Windows of play: as it was, as the latents of each frame decode, as imagined."""

    truth: Float[np.ndarray, "W T h w c"]
    seen: Float[np.ndarray, "W T h w c"]
    imagined: Float[np.ndarray, "W F h w c"]

    @property
    def context(self) -> int:
        return self.truth.shape[1] - self.imagined.shape[1]

    @property
    def model(self) -> Float[np.ndarray, "W T h w c"]:
        """The context from its own latents, then imagination."""
        return np.concatenate([self.seen[:, : self.context], self.imagined], 1)

    def errors(self) -> dict[str, Float[np.ndarray, "W T"]]:
        """Of the model, of copying the last context frame, of seeing each frame."""
        copy = self.truth[:, self.context - 1 : self.context]
        guesses = {"model": self.model, "copy": copy, "seen": self.seen}
        return {k: squared_error(self.truth, x) for k, x in guesses.items()}


def open_loop(run: Run) -> OpenLoop | None:
    """Newest windows of level 0's replay that lie in one episode; None without any."""
    replay, subactor = run.agent.replays[0], run.agent.subactors[0]
    is_first = first_flags(run)
    if len(is_first) == 0:
        return None
    length = min(CONTEXT + IMAGINED, typical_length(is_first))
    context = max(1, length * CONTEXT // (CONTEXT + IMAGINED))
    starts = window_starts(is_first, length) if length > context else np.array([], int)
    if len(starts) == 0:
        return None
    starts = starts[::-1][:: max(1, context)][:WINDOWS]
    rows = replay.rows(jnp.asarray(starts[:, None] + np.arange(length)))
    steps, before = replay.windows(rows, run.config.carry)
    model = subactor.world_model
    carries = load_carry(before, model.z_shape[1])
    seen, imagined = predict_all(
        model, steps, carries, context=context, actions=subactor.action_shape[1]
    )
    return OpenLoop(np.asarray(steps.obs) / 255.0, np.asarray(seen), np.asarray(imagined))


def first_flags(run: Run) -> Bool[np.ndarray, " n"]:
    """is_first of level 0's replay, oldest first."""
    replay = run.agent.replays[0]
    return np.asarray(replay.steps.is_first[replay.rows(jnp.arange(replay.size))])


def nearest(
    goal: Float[Array, " H"], S: Float[Array, "n H"]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The state that is closest to a goal by the subgoal reward, and that reward."""
    agreement = jax.vmap(subgoal_reward, (None, 0))(goal, S)
    return jnp.argmax(agreement), jnp.max(agreement)  # (REP 1)


def decode_down(
    decoders: tuple[Callable, ...], z: Float[Array, "S K"], h: Float[Array, " H"]
) -> Float[Array, "h w c"]:
    """Pixels of a latent of the last decoder's level; decoders lowest first."""
    for decoder in reversed(decoders[1:]):
        logits, window = decoder(jnp.concatenate([z.reshape(-1), h]))
        z, h = mode_onehot(logits[-1]), symexp(window[-1])
    return pixels(decoders[0](jnp.concatenate([z.reshape(-1), h])))  # (REP 2)


@jax.jit
def observe_all(model: WorldModel, steps: Transition, carries: Carry) -> Latent:
    """Latents of many windows, one after the other in a row."""
    keys = jax.random.split(jax.random.key(KEY), steps.reward.shape[0])
    one = lambda x: model.observe(x[0], x[1], key=x[2])[0]
    latent = jax.lax.map(one, (steps, carries, keys), batch_size=8)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), latent)


def recent_latents(run: Run, level: int, entries: int) -> Latent:
    """Of a level's newest entries: at most `entries`, a multiple of the window."""
    replay = run.agent.replays[level]
    length = min(run.config.length, entries)
    ages = replay.size - entries // length * length + np.arange(entries)
    ages = ages[: entries // length * length].reshape(-1, length)
    steps, before = replay.windows(replay.rows(ages), run.config.carry)
    model = run.agent.subactors[level].world_model
    return observe_all(model, steps, load_carry(before, model.z_shape[1]))


class Aims(eqx.Module):
    """The goals of a level at M moments.

    `now` and `best` are r_g of the state at that moment and of the closest one, whose
    index is `closest`; `own` is its latent decoded, `goal` the same with G for its h.
    """

    now: Float[Array, " M"]
    best: Float[Array, " M"]
    closest: Int[Array, " M"]
    own: Float[Array, "M h w c"]
    goal: Float[Array, "M h w c"]


@jax.jit
def aims(
    learner: Learner,
    decoders: tuple[Callable, ...],
    latent: Latent,
    codes: Int[Array, "M Sg"],
    at: Int[Array, " M"],
) -> Aims:
    """`at` are the indices of the moments among the latents. (REP 1) (REP 2)"""
    autoencoder = learner.subactor.autoencoder
    S = learner.standardiser(latent.h)
    code = jax.nn.one_hot(codes, autoencoder.code_shape[1])
    G = jax.vmap(autoencoder.decode)(code)
    closest, best = jax.vmap(nearest, (0, None))(G, S)  # (REP 1)
    decode = jax.vmap(partial(decode_down, decoders))
    return Aims(
        now=jax.vmap(subgoal_reward)(G, S[at]),
        best=best,
        closest=closest,
        own=decode(latent.z[closest], latent.h[closest]),
        goal=decode(latent.z[closest], symexp(learner.standardiser.inverse(G))),
    )


class Goals(eqx.Module):
    """Frames at M moments and, per level that is given goals, frames and aims."""

    now: Float[np.ndarray, "M h w c"]
    levels: tuple[tuple[int, Float[np.ndarray, "M h w c"], Aims], ...]


def goals(run: Run) -> Goals | None:
    """At recent moments at which the top level set a goal; None where there are none."""
    agent, config = run.agent, run.config
    is_first = first_flags(run)
    ages = range(config.levels)
    due = [acting_ages(is_first, run.clock == 0, config.period**i) for i in ages]
    known = [min(STATES, int(agent.replays[i].size), len(due[i])) for i in ages]
    trained = [i for i in ages[:-1] if run.updates[i] and known[i]]
    if not trained or min(known) == 0:
        return None
    latents = {i: recent_latents(run, i, known[i]) for i in trained}
    since = max(due[i][-len(x.h)] for i, x in latents.items())
    final = np.append(is_first[1:], run.clock == 0)
    moments = due[-1][(due[-1] >= since) & ~final[due[-1]]]
    moments = moments[np.linspace(0, len(moments) - 1, MOMENTS).astype(int)]
    decoders = tuple(s.world_model.heads.decoder for s in agent.subactors)

    def frames(ages):
        steps = agent.replays[0].steps
        return np.asarray(steps.obs[agent.replays[0].rows(jnp.asarray(ages))]) / 255.0

    levels = []
    for i, latent in latents.items():
        at = np.searchsorted(due[i], moments) - len(due[i])
        replay = agent.replays[i]
        codes = replay.steps.goal[replay.rows(replay.size + jnp.asarray(at))]
        found = aims(agent.learners[i], decoders[: i + 1], latent, codes, len(latent.h) + at)
        levels.append((i, frames(due[i][np.asarray(found.closest) - len(latent.h)]), found))
    return Goals(frames(moments), tuple(levels))


def to_rgb(picture: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w 3"]:
    """Grey and colour pictures as they are; other channels mix colours of their own."""
    channels = picture.shape[-1]
    if channels in (1, 3):
        return np.broadcast_to(picture, (*picture.shape[:2], 3))
    colours = np.resize(CHANNEL_COLOURS, (channels, 3)) / 255
    return picture @ colours / np.maximum(1, picture.sum(-1, keepdims=True))


def imshow(axes: Axes, picture: Float[np.ndarray, "h w c"], title: str = "") -> None:
    """Every pixel a square, no axes."""
    axes.imshow(to_rgb(picture), vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8, loc="center", pad=3)


def error_picture(a, b) -> Float[np.ndarray, "h w 1"]:
    """The largest absolute difference over the channels."""
    return np.abs(a - b).max(-1, keepdims=True)


def caption(figure: Figure, text: str) -> None:
    """What is shown, under the figure."""
    width = int(figure.get_size_inches()[0] * 15)
    figure.supxlabel(fill(text, width), x=0.01, ha="left", fontsize=8, color=GREY)


def line(axes: Axes, data: Series, level: int, style: str = "-", label=None) -> None:
    """One curve in the colour of its level; few points are marked."""
    marker = "." if len(data[0]) < 30 else None
    axes.plot(*data, style, color=LEVEL_COLOURS[level], marker=marker, label=label)


def level_legend(figure: Figure, levels: int, styles: dict[str, str]) -> None:
    """Colours of the levels and meanings of the line styles, above all panels."""
    colours = LEVEL_COLOURS[:levels]
    handles = [Line2D([], [], color=c, label=f"level {i}") for i, c in enumerate(colours)]
    handles += [
        Line2D([], [], color=GREY, linestyle=s, label=name) for name, s in styles.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))


def references(run: Run) -> dict[str, float]:
    """Known scores of the game: random and human, or random and best for a probe."""
    game = run.config.game
    if game in probes.PROBES:
        return dict(zip(("random", "best"), probes.scores(run.env.rules), strict=True))
    scores = atari.scores().get(game, {})
    return {k: scores[k] for k in ("random", "human") if scores.get(k) is not None}


def learning_curve(run: Run, lines: list[dict]) -> Figure | None:
    """Return of every episode, their running mean, the evaluation."""
    steps, returns = series(lines, "episode_return")
    if len(steps) == 0:
        return None
    config = run.config
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    axes.plot(steps, returns, ".", color="#56B4E9", markersize=4, label="one episode")
    window = int(np.clip(len(returns) // 20, 5, 100))
    if len(returns) >= window:
        means = np.convolve(returns, np.ones(window) / window, "valid")
        label = f"mean of {window} episodes"
        axes.plot(steps[window - 1 :], means, color=LEVEL_COLOURS[0], label=label)
    path = run.folder / "result.json"
    scores = json.loads(path.read_text())["eval_returns"] if path.exists() else []
    if scores:
        label = f"evaluation, {len(scores)} episodes: {np.mean(scores):.3g}"
        axes.plot(run.step, np.mean(scores), "D", color="#D55E00", label=label)
    seen = np.append(returns, scores)
    reach = max(np.ptp(seen), 1)
    far = []
    for name, value in references(run).items():
        if seen.min() - reach <= value <= seen.max() + reach:
            axes.axhline(value, color=GREY, linestyle="--", linewidth=0.8)
            axes.text(1.005, value, f"{name} {value:g}", color=GREY, va="center", transform=axes.get_yaxis_transform())
        else:
            far.append(f"{name} {value:g}")
    axes.set(xlabel="agent steps", ylabel="return", xlim=(0, run.step * 1.02))
    axes.set_title(f"{config.game}: return of every training episode")
    axes.legend()
    text = f"Preset {config.preset}, {config.levels} levels, seed {config.seed}."
    if far:
        text += f" Outside the picture: {', '.join(far)}."
    caption(figure, text)
    return figure


def rewards(run: Run, lines: list[dict]) -> Figure | None:
    """The partial rewards of every level, replayed and imagined."""
    names = [n for n in REWARD_STYLES if any(len(series(lines, f"level{i}/real_{n}")[0]) for i in range(run.config.levels))]
    if not names:
        return None
    levels = run.config.levels
    figure = Figure(figsize=(9, 1 + 1.6 * levels))
    grid = figure.subplots(levels, len(names), sharex=True, sharey="col", squeeze=False)
    for i in range(levels):
        for axes, name in zip(grid[i], names, strict=True):
            for kind, style in (("real", "-"), ("imagined", ":")):
                line(axes, series(lines, f"level{i}/{kind}_{name}"), i, style)
            if i == 0:
                axes.set_title(f"{name} reward per step")
            if not axes.lines[0].get_xdata().size:
                axes.text(0.5, 0.5, "none", color=GREY, ha="center", transform=axes.transAxes)
        grid[i, 0].set_ylabel(f"level {i}")
    for axes in grid[-1]:
        axes.set_xlabel("agent steps")
    level_legend(figure, levels, {"replayed": "-", "imagined": ":"})
    figure.suptitle(f"{run.config.game}: partial rewards of every level", x=0.01, ha="left")
    caption(figure, "Means over training batches, each column on one scale. Extrinsic reward of an upper level: mean per agent step of its window. The top level is given no goal; novelty is only logged at level 0.")
    return figure


def world_model_losses(run: Run, lines: list[dict]) -> Figure | None:
    """Observation, reward, continue and KL of every level."""
    panels = {
        "loss_observation": "observation",
        "loss_reward": "reward: −ln p of the two-hot target (nats)",
        "loss_cont": "continue: −ln p (nats)",
        "kl": "KL[posterior ‖ prior] (nats)",
    }
    levels = range(run.config.levels)
    if not len(series(lines, "level0/kl")[0]):
        return None
    figure = Figure(figsize=(9, 5.6))
    for axes, (name, title) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        for i in levels:
            line(axes, series(lines, f"level{i}/{name}"), i)
        axes.set_title(title)
        axes.set_yscale("log")
    return figure
