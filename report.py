"""Pictures of a run: what it scored, was rewarded with, predicts and aims at.

    python report.py RUN_DIR    draws RUN_DIR/pictures of a finished or stopped run

    G = AE_i.decode(goal),  k* = argmax_k r_g(G, S_k)               (REP 1)
    [z_k*; symexp(S⁻¹(G))] → decode_i, last of the window → … → decode_0  (REP 2)
    e_t = mean (o_t - ô_t)²,  of copying: mean (o_t - o_c)²         (REP 3)

The goal of level i is decoded with the z of the replayed state k* that is closest to
it. ô_t is imagined from the frames up to o_c, the last of the context, and the true
actions, z ~ prior. Pictures are in [0, 1]; predictions are clipped to that.

Axes: W windows, T their steps, F the imagined ones, n states, M moments, H features
of h, S categoricals × K classes of z, h w c of a picture.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

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
GREY = "#666666"
# Okabe and Ito's palette: colours that everybody can tell apart.
LEVEL_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
CHANNEL_COLOURS = np.array(
    [(0, 158, 115), (240, 228, 66), (213, 94, 0), (86, 180, 233), (204, 121, 167)]
    + [(230, 159, 0), (0, 114, 178), (255, 255, 255), (153, 153, 153), (130, 80, 40)]
)
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
Pictures = Float[np.ndarray, "*B h w c"]


def read_lines(folder: Path) -> list[dict]:
    """metrics.jsonl as far as it can be read: a crash may have cut the last line."""
    path, lines = folder / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def series(lines: list[dict], name: str) -> Float[np.ndarray, "n 2"]:
    """Agent steps and values of one metric."""
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    return np.array(pairs, float).reshape(-1, 2)


def first_flags(run: Run) -> Bool[np.ndarray, " n"]:
    """is_first of level 0's replay, oldest first."""
    replay = run.agent.replays[0]
    return np.asarray(replay.steps.is_first[replay.rows(jnp.arange(replay.size))])


def frames(run: Run, ages: Int[np.ndarray, "*B"]) -> Pictures:
    """What the game showed at entries of level 0's replay."""
    replay = run.agent.replays[0]
    return np.asarray(replay.steps.obs[replay.rows(jnp.asarray(ages))]) / 255.0


def window_starts(
    is_first: Bool[np.ndarray, " n"], length: int
) -> Int[np.ndarray, " m"]:
    """Ages at which windows begin that lie within one episode."""
    episode = np.cumsum(is_first)
    return np.flatnonzero(episode[length - 1 :] == episode[: len(episode) - length + 1])


def acting_ages(
    is_first: Bool[np.ndarray, " n"], ended: bool, stride: int
) -> Int[np.ndarray, " m"]:
    """Ages of the level-0 entries at which a level acted; did the newest end a game?

    Entries before the first known start are left out: their clock is unknown.
    """
    age = np.arange(len(is_first))
    start = np.maximum.accumulate(np.where(is_first, age, -1))
    acts = ((age - start) % stride == 0) | np.append(is_first[1:], ended)
    return age[acts & (start >= 0)]


def predict(
    model: WorldModel,
    steps: Transition,
    carry: Carry,
    key: PRNGKeyArray,
    context: int,
    actions: int,
) -> tuple[Latent, Latent]:
    """Latents of a window's T steps, and of those after the context as imagined."""
    observe_key, imagine_key = jax.random.split(key)
    latent, _ = model.observe(steps, carry, key=observe_key)
    ready = model.discretise()

    def imagine(carry, action_key):
        latent = ready.imagine(carry, action_key[0], key=action_key[1])
        return latent.carry, latent

    taken = jax.nn.one_hot(steps.action[context:], actions)
    keys = jax.random.split(imagine_key, taken.shape[0])
    last = jax.tree.map(lambda x: x[context - 1], latent.carry)
    return latent, jax.lax.scan(imagine, last, (taken, keys))[1]


@partial(jax.jit, static_argnames=("context", "actions"))
def predict_all(
    model: WorldModel, steps: Transition, carries: Carry, *, context: int, actions: int
) -> tuple[Latent, Latent]:
    """`predict` for W windows, a few at a time to save memory."""
    keys = jax.random.split(jax.random.key(0), steps.reward.shape[0])
    one = lambda window: predict(model, *window, context, actions)
    return jax.lax.map(one, (steps, carries, keys), batch_size=8)


def replayed(
    run: Run, level: int, ages: Int[np.ndarray, "W T"], context: int
) -> tuple[Latent, Latent]:
    """`predict_all` for windows of a level's replay, carried in as in training."""
    replay, subactor = run.agent.replays[level], run.agent.subactors[level]
    steps, before = replay.windows(replay.rows(jnp.asarray(ages)), run.config.carry)
    model, actions = subactor.world_model, subactor.action_shape[1]
    carries = load_carry(before, model.z_shape[1])
    return predict_all(model, steps, carries, context=context, actions=actions)


def decode_down(
    decoders: tuple[Callable, ...], z: Float[Array, "S K"], h: Float[Array, " H"]
) -> Float[Array, "h w c"]:
    """The picture of a latent of the last decoder's level; level 0 comes first."""
    for decoder in reversed(decoders[1:]):
        logits, window = decoder(jnp.concatenate([z.reshape(-1), h]))
        z, h = mode_onehot(logits[-1]), symexp(window[-1])
    predicted = decoders[0](jnp.concatenate([z.reshape(-1), h]))  # (REP 2)
    return jnp.clip(predicted + 0.5, 0, 1)


@jax.jit
def decode_all(
    decoders: tuple[Callable, ...],
    z: Float[Array, "*B S K"],
    h: Float[Array, "*B H"],
) -> Float[Array, "*B h w c"]:
    """`decode_down` for many latents, some at a time to save memory."""
    flat = (z.reshape(-1, *z.shape[-2:]), h.reshape(-1, h.shape[-1]))
    pictures = jax.lax.map(lambda x: decode_down(decoders, *x), flat, batch_size=64)
    return pictures.reshape(*h.shape[:-1], *pictures.shape[1:])


class OpenLoop(NamedTuple):
    """Windows of play, W × T pictures each.

    `model`: up to `context` decoded from each frame's own latent, then imagined;
    `seen`: decoded from each frame's own latent all along.
    """

    truth: Pictures
    model: Pictures
    seen: Pictures
    context: int

    def errors(self) -> dict[str, Float[np.ndarray, "W T"]]:
        """Mean squared error of every picture, by what is shown for it. (REP 3)"""
        guesses = {
            "imagined, not seeing the frame": self.model,
            "reconstructed, seeing the frame": self.seen,
            "copy of the last context frame": self.truth[:, [self.context - 1]],
        }
        return {k: ((self.truth - x) ** 2).mean((2, 3, 4)) for k, x in guesses.items()}


def open_loop(run: Run) -> OpenLoop | None:
    """Newest windows of level 0's replay, each within an episode; None without any.

    Where episodes are short, so are windows: as long as the median entry's episode.
    """
    is_first = first_flags(run)
    if len(is_first) < 2:
        return None
    episode = np.cumsum(is_first)
    typical = np.median(np.bincount(episode)[episode])
    length = max(2, min(CONTEXT + IMAGINED, int(typical)))
    context = max(1, length * CONTEXT // (CONTEXT + IMAGINED))
    starts = window_starts(is_first, length)[::-context][:WINDOWS]
    if len(starts) == 0:
        return None
    ages = starts[:, None] + np.arange(length)
    decoders = (run.agent.subactors[0].world_model.heads.decoder,)
    latents = replayed(run, 0, ages, context)
    seen, imagined = (np.asarray(decode_all(decoders, x.z, x.h)) for x in latents)
    model = np.concatenate([seen[:, :context], imagined], 1)
    return OpenLoop(frames(run, ages), model, seen, context)


def nearest(
    goal: Float[Array, " H"], S: Float[Array, "n H"]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The state that agrees best with a goal, and their subgoal reward. (REP 1)"""
    agreement = jax.vmap(subgoal_reward, (None, 0))(goal, S)
    return jnp.argmax(agreement), jnp.max(agreement)  # (REP 1)


class Aim(NamedTuple):
    """Goals of one level at M moments.

    `now` and `best` are r_g of the state at the moment and of the closest state;
    `frame` is what the game showed then, `own` that state decoded, `goal` the goal.
    """

    level: int
    now: Float[Array, " M"]
    best: Float[Array, " M"]
    frame: Pictures
    own: Pictures
    goal: Pictures


def aim(
    run: Run,
    level: int,
    latent: Latent,
    due: Int[np.ndarray, " m"],
    moments: Int[np.ndarray, " M"],
) -> Aim:
    """The goals given to a level, whose newest latents these are. (REP 1) (REP 2)

    `due` are the ages in level 0's replay of all entries of the level's own.
    """
    learner, replay = run.agent.learners[level], run.agent.replays[level]
    autoencoder = learner.subactor.autoencoder
    back = np.searchsorted(due, moments) - len(due)
    goals = replay.steps.goal[replay.rows(replay.size + jnp.asarray(back))]
    G = jax.vmap(autoencoder.decode)(jax.nn.one_hot(goals, autoencoder.code_shape[1]))
    S = learner.standardiser(latent.h)
    k, best = jax.vmap(nearest, (0, None))(G, S)  # (REP 1)
    h_goal = symexp(learner.standardiser.inverse(G))
    below = run.agent.subactors[: level + 1]
    decoders = tuple(s.world_model.heads.decoder for s in below)
    return Aim(
        level=level,
        now=jax.vmap(subgoal_reward)(G, S[back]),
        best=best,
        frame=frames(run, due[np.asarray(k) - len(S)]),
        own=np.asarray(decode_all(decoders, latent.z[k], latent.h[k])),
        goal=np.asarray(decode_all(decoders, latent.z[k], h_goal)),  # (REP 2)
    )


def aims(run: Run) -> tuple[Pictures, list[Aim]] | None:
    """Frames at moments when the top level set a goal, and the goals in force then."""
    config, ended, is_first = run.config, run.clock == 0, first_flags(run)
    levels = range(config.levels)
    due = [acting_ages(is_first, ended, config.period**i) for i in levels]
    latents = {}
    for i in levels[:-1]:
        size = int(run.agent.replays[i].size)
        n = min(STATES, size, len(due[i]))
        if n == 0 or run.updates[i] == 0:
            continue
        T = min(config.length, n)
        ages = size - n // T * T + np.arange(n // T * T).reshape(-1, T)
        latent, _ = replayed(run, i, ages, T - 1)
        latents[i] = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), latent)
    since = max([due[i][-len(x.h)] for i, x in latents.items()], default=len(is_first))
    final = np.append(is_first[1:], ended)
    moments = due[-1][(due[-1] >= since) & ~final[due[-1]]]
    if len(moments) == 0:
        return None
    moments = moments[np.linspace(0, len(moments) - 1, MOMENTS).astype(int)]
    found = [aim(run, i, x, due[i], moments) for i, x in latents.items()]
    return frames(run, moments), found


class Panel(NamedTuple):
    """One plot: metrics with the style of their lines, for some levels."""

    title: str
    metrics: dict[str, str]
    levels: tuple[int, ...]
    scale: str = "linear"
    limits: tuple[float, float] | None = None
    mark: tuple[float, str] | None = None


def plot(axes: Axes, panel: Panel, lines: list[dict]) -> bool:
    """Whether there was anything to plot."""
    found = False
    for level in panel.levels:
        for name, style in panel.metrics.items():
            data = series(lines, f"level{level}/{name}")
            marker = "." if len(data) < 30 else None
            axes.plot(*data.T, style, color=LEVEL_COLOURS[level], marker=marker)
            found = found or len(data) > 0
    axes.set(title=panel.title, yscale=panel.scale if found else "linear")
    if not found:
        axes.text(0.5, 0.5, "none", color=GREY, ha="center", transform=axes.transAxes)
    elif panel.limits:
        axes.set_ylim(*panel.limits)
    if found and panel.mark:
        reference(axes, *panel.mark)
    return found


def reference(axes: Axes, value: float, label: str) -> None:
    """A level line and its name, right of the plot."""
    axes.axhline(value, color=GREY, linestyle=(0, (1, 1)), linewidth=1)
    where = axes.get_yaxis_transform()
    axes.text(1.01, value, label, color=GREY, fontsize=8, va="center", transform=where)


def caption(figure: Figure, title: str, text: str) -> None:
    """What it is, above; what is shown, below."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    text = fill(text, int(figure.get_size_inches()[0] * 17))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color=GREY)


def curves(
    lines: list[dict],
    grid: list[list[Panel]],
    styles: dict[str, str],
    words: tuple[str, str],
    *,
    sharey: str = "none",
    height: float = 2.3,
) -> Figure | None:
    """Metrics over agent steps; None where there are none. `words` is the caption."""
    figure = Figure(figsize=(9, 1.2 + height * len(grid)))
    shape = (len(grid), len(grid[0]))
    axes = figure.subplots(*shape, sharex=True, sharey=sharey, squeeze=False)
    panels = [panel for row in grid for panel in row]
    if not any([plot(a, p, lines) for a, p in zip(axes.flat, panels, strict=True)]):
        return None
    for last in axes[-1]:
        last.set_xlabel("agent steps")
    levels = sorted({i for p in panels for i in p.levels})
    keys = [Line2D([], [], color=LEVEL_COLOURS[i], label=f"level {i}") for i in levels]
    keys += [Line2D([], [], color=GREY, ls=s, label=name) for name, s in styles.items()]
    figure.legend(handles=keys, loc="outside upper right", ncols=len(keys))
    caption(figure, *words)
    return figure


def rewards(run: Run, lines: list[dict]) -> Figure | None:
    """The partial rewards of every level, on replayed and on imagined states."""
    columns = ("extrinsic", "subgoal", "novelty")[: 3 if run.config.levels > 1 else 1]
    styles = lambda name: {f"real_{name}": "-", f"imagined_{name}": ":"}
    grid = [
        [Panel(f"level {i}: {name}", styles(name), (i,)) for name in columns]
        for i in range(run.config.levels)
    ]
    words = (
        f"{run.config.game}: partial rewards per state",
        "Means over training batches, unweighted; one scale per column. Extrinsic: of an "
        "upper level per agent step. The top level is given no subgoal; at level 0 novelty "
        "is only watched.",
    )
    styles = {"replayed": "-", "imagined": ":"}
    return curves(lines, grid, styles, words, sharey="col", height=1.6)


def losses(run: Run, lines: list[dict]) -> Figure | None:
    """What the world model of every level is trained on."""
    log = partial(Panel, levels=tuple(range(run.config.levels)), scale="log")
    free = (run.config.trainer.free_nats, "free\nnats")
    grid = [
        [log("observation", {"loss_observation": "-"})]
        + [log("reward, two-hot (nats)", {"loss_reward": "-"})],
        [log("continue (nats)", {"loss_cont": "-"})]
        + [log("KL[posterior ‖ prior] (nats)", {"kl": "-"}, mark=free)],
    ]
    words = (
        f"{run.config.game}: losses of the world models",
        "Means over training batches. Observation: at level 0 squared error with the weight "
        "of 64×64×3 values; above, cross-entropy of z plus squared error of h of a window.",
    )
    return curves(lines, grid, {}, words)


def health(run: Run, lines: list[dict]) -> Figure | None:
    """Signs that actors, critics and goal codes are alive."""
    lines = [dict(x) for x in lines]
    for i, subactor in enumerate(run.agent.subactors):
        groups, classes = subactor.action_shape
        for x in lines:
            if (entropy := x.get(f"level{i}/entropy_actor")) is not None:
                x[f"level{i}/entropy_share"] = entropy / (groups * np.log(classes))
    p = partial(Panel, levels=tuple(range(run.config.levels)))
    kinds = {"extrinsic": "-", "subgoal": "--", "novelty": ":"}
    named = lambda prefix: {f"{prefix}_{kind}": s for kind, s in kinds.items()}
    codes = {"code_reward_own": "-", "code_reward_random": "--"}
    variance, dead = {"code_explained_variance": "-"}, (0.05, "dead")
    grid = [
        [
            p("actor's entropy / chance's", {"entropy_share": "-"}, limits=(0, 1.05)),
            p("return scale", named("return_scale"), scale="log", mark=(1, "floor")),
            p("|weighted advantage|", named("advantage"), scale="log"),
        ],
        [
            p("code: KL per row (nats)", {"code_kl_per_row": "-"}, mark=dead),
            p("code: explained variance", variance, limits=(-0.5, 1)),
            p("code: r_g, own (-) and random (--)", codes, limits=(0, 1)),
        ],
    ]
    words = (
        f"{run.config.game}: health of actors, critics and goal codes",
        "Means over training batches. Advantages are divided by max(floor, return scale) "
        "and weighted. A code with a KL per row under 0.05 nats says nothing: then a "
        "random goal earns as much r_g as the state's own. Explained variance is cut "
        "at -0.5.",
    )
    return curves(lines, grid, kinds, words)


def references(run: Run) -> dict[str, float]:
    """Known scores of the game: random and human, or random and best of a probe."""
    game = run.config.game
    if game in probes.PROBES:
        return dict(zip(("random", "best"), probes.scores(run.env.rules), strict=True))
    scores = atari.scores().get(game, {})
    known = {name: scores.get(name) for name in ("random", "human")}
    return {name: x for name, x in known.items() if x is not None}


def learning_curve(run: Run, lines: list[dict]) -> Figure | None:
    """Return of every episode, running mean, evaluation; None without an episode."""
    data = series(lines, "episode_return")
    if len(data) == 0:
        return None
    figure = Figure(figsize=(8, 4))
    axes, returns = figure.subplots(), data[:, 1]
    axes.plot(*data.T, ".", color="#56B4E9", markersize=4, label="one episode")
    n = int(np.clip(len(returns) // 20, 5, 100))
    if len(returns) > n:
        means = np.convolve(returns, np.ones(n) / n, "valid")
        axes.plot(data[n - 1 :, 0], means, color="#0072B2", label=f"mean of {n}")
    path = run.folder / "result.json"
    scores = json.loads(path.read_text())["eval_returns"] if path.exists() else []
    if scores:
        label = f"evaluation: mean of {len(scores)} is {np.mean(scores):.3g}"
        axes.plot(run.step, np.mean(scores), "D", color="#D55E00", label=label)
    low, high = min([*returns, *scores]), max([*returns, *scores])
    reach, text = max(high - low, 1), ""
    for name, value in references(run).items():
        if low - reach <= value <= high + reach:
            reference(axes, value, f"{name}\n{value:.3g}")
        else:
            text += f" Outside: {name} {value:g}."
    axes.set(xlabel="agent steps", ylabel="return (game points)")
    axes.legend(loc="best")
    config = run.config
    text = f"Preset {config.preset}, {config.levels} levels, seed {config.seed}." + text
    caption(figure, f"{config.game}: return of every training episode", text)
    return figure


def to_rgb(picture: Pictures) -> Float[np.ndarray, "*B h w 3"]:
    """Grey and colour as they are; other channels mix colours of their own."""
    channels = picture.shape[-1]
    if channels in (1, 3):
        return np.broadcast_to(picture, (*picture.shape[:-1], 3))
    colours = np.resize(CHANNEL_COLOURS, (channels, 3)) / 255
    return picture @ colours / np.maximum(1, picture.sum(-1, keepdims=True))


def show(axes: Axes, picture: Float[np.ndarray, "h w c"], row: str = ""):
    """Square pixels, the whole range from 0 to 1, and a name left of the row."""
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(row, rotation=0, ha="right", va="center")
    return axes.imshow(to_rgb(picture), interpolation="nearest")


def views(play: OpenLoop, window: int) -> dict[str, Pictures]:
    """Truth, model and the largest difference over the channels, (T, h, w, c)."""
    truth, model = play.truth[window], play.model[window]
    error = np.abs(truth - model).max(-1, keepdims=True)
    return {"truth": truth, "model": model, "|error|": error}


def by_error(play: OpenLoop) -> Int[np.ndarray, " W"]:
    """Windows, best imagined first."""
    error = (play.truth - play.model)[:, play.context :] ** 2
    return np.argsort(error.mean((1, 2, 3, 4)))


def film_strip(run: Run, play: OpenLoop) -> Figure:
    """The window of median error, and the errors of all windows."""
    W, T = play.truth.shape[:2]
    ahead = np.unique(np.geomspace(1, T - play.context, 9).round().astype(int))
    past = np.arange(max(0, play.context - 3), play.context)
    shown = [*past, *(play.context - 1 + ahead)]
    figure = Figure(figsize=(9, 5.6))
    grid = figure.add_gridspec(4, len(shown), height_ratios=(1, 1, 1, 2.2))
    for row, (name, pictures) in enumerate(views(play, by_error(play)[W // 2]).items()):
        for column, t in enumerate(shown):
            axes = figure.add_subplot(grid[row, column])
            show(axes, pictures[t], name if column == 0 else "")
            if row == 0:
                ahead = t - play.context + 1
                text = f"imagined\n+{ahead}" if ahead > 0 else f"context\n{ahead}"
                axes.set_title(text, fontsize=8, loc="center")
    axes = figure.add_subplot(grid[3, :])
    styles = ("-", ":", "--")
    colours = ("#0072B2", "#56B4E9", GREY)
    for (name, error), ls, c in zip(play.errors().items(), styles, colours, strict=True):
        since = 0 if ls == ":" else play.context - (ls == "--")
        steps = np.arange(T) - play.context + 1
        axes.plot(steps[since:], error.mean(0)[since:], ls, color=c, label=name)
    axes.set(xlabel="frames since the last one seen", ylabel="mean squared error")
    axes.set_ylim(bottom=0)
    axes.legend()
    words = (
        f"{run.config.game}: open-loop prediction of level 0",
        f"Pictures: of {W} windows of {T} steps, the one of median error; pixels and "
        "errors from 0 (black) to 1. Curves: mean over the windows and pixels. The model "
        "follows the true actions, z drawn from the prior, once per window. The windows "
        "are the newest of the replay: most have been trained on.",
    )
    caption(figure, *words)
    return figure


def write_film(run: Run, play: OpenLoop, path: Path) -> None:
    """A GIF of three windows, at the quartiles of the error."""
    W, T = play.truth.shape[:2]
    chosen = by_error(play)[np.array([W // 4, W // 2, 3 * W // 4])]
    figure = Figure(figsize=(5, 5.6))
    grid, images = figure.subplots(3, 3), []
    for axes, window in zip(grid, chosen, strict=True):
        for a, (name, pictures) in zip(axes, views(play, window).items(), strict=True):
            images.append((show(a, pictures[0]), to_rgb(pictures)))
            a.set_title(name if window == chosen[0] else "", loc="center")
    writer = PillowWriter(fps=4)
    with writer.saving(figure, str(path), dpi=80):
        for t in [*range(T), *[T - 1] * 4]:
            for image, pictures in images:
                image.set_data(pictures[t])
            ahead = t - play.context + 1
            kind = f"imagined +{ahead}" if ahead > 0 else f"context {ahead}"
            figure.suptitle(f"{run.config.game}, frame {kind}")
            writer.grab_frame()


def goal_sheet(run: Run, now: Pictures, found: list[Aim]) -> Figure:
    """Frames, and under them the goals of every level decoded down to pixels."""
    rows = {"the game": now}
    text = ""
    for goal in found:
        rows[f"level {goal.level} goal:\nclosest state"] = goal.frame
        rows["that state,\ndecoded" + " " * goal.level] = goal.own
        rows["the goal,\ndecoded" + " " * goal.level] = goal.goal
        rms = lambda x: np.sqrt((x**2).mean())
        text += (
            f" Level {goal.level}: the goal moves the picture by {rms(goal.goal - goal.own):.3f}"
            f", another state by {rms(goal.own - np.roll(goal.own, 1, 0)):.3f} (rms)."
        )
    figure = Figure(figsize=(9, 1 + len(rows) * 1.2 * now.shape[1] / now.shape[2]))
    grid = figure.subplots(len(rows), len(now), squeeze=False)
    for axes, (name, pictures) in zip(grid, rows.items(), strict=True):
        for m, picture in enumerate(pictures):
            show(axes[m], picture, name if m == 0 else "")
    for n, goal in enumerate(found):
        for m, axes in enumerate(grid[3 * n + 3]):
            axes.set_xlabel(f"r_g {goal.now[m]:.2f}, {goal.best[m]:.2f}", fontsize=8)
    caption(figure, f"{run.config.game}: goals in force", "Text." + text)
    return figure


def draw(run: Run) -> list[Path]:
    """Draws what the run has data for into its folder `pictures`."""
    folder, lines = run.folder / "pictures", read_lines(run.folder)
    paths = []
    with rc_context(STYLE):
        play, goals = open_loop(run), aims(run)
        figures = {
            "learning_curve": learning_curve(run, lines),
            "rewards": rewards(run, lines),
            "world_model_losses": losses(run, lines),
            "health": health(run, lines),
            "open_loop": film_strip(run, play) if play else None,
            "goals": goal_sheet(run, *goals) if goals else None,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, figure in figures.items():
                if figure is not None:
                    paths.append(folder / f"{name}.png")
                    figure.savefig(paths[-1])
            if play:
                paths.append(folder / "open_loop.gif")
                write_film(run, play, paths[-1])
        except OSError as error:
            print(f"report.py: pictures are missing: {error}", file=sys.stderr)
    return paths


def load(folder: Path) -> Run:
    """A run from its newest good checkpoint; changes nothing. Raises UsageError."""
    from train import load_config  # noqa: PLC0415, train imports this module

    config = load_config(folder)
    # Restoring cuts metrics.jsonl of the run's own folder: here one that is not there.
    run = Run.start(config, folder / "not-there")
    for path in checkpoint.checkpoints(folder / "checkpoint"):
        try:
            run.restore(path)
        except checkpoint.CheckpointError as error:
            print(f"report.py: {error}; trying the one before", file=sys.stderr)
            continue
        run.folder = folder
        return run
    raise UsageError(f"{folder} has no usable checkpoint")


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 bad input."""
    try:
        if len(argv) != 1:
            raise UsageError("give one run folder: python report.py RUN_DIR")
        run = load(Path(argv[0]))
    except UsageError as error:
        print(f"report.py: {str(error).removeprefix('--resume ')}", file=sys.stderr)
        return 2
    for path in draw(run):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
