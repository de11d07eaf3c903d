"""Pictures of a run: what it scored, was rewarded with, predicts and aims at.

    python report.py RUN_DIR    draws RUN_DIR/pictures of a finished or stopped run

The numbers behind the last two are in diagnose.py. A picture whose data does not exist
is left out: a flat agent has no goals.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

import atari
import probes
from config import UsageError
from diagnose import STATES, Aim, OpenLoop, Pictures, aims, open_loop
from game import read_lines
from machine import keep_compiled
from run import Run, load

GREY, LINES = "#666666", ("-", "--", ":")
# Okabe and Ito's palette: colours that everybody can tell apart.
LEVEL_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
CHANNEL_COLOURS = (
    *("#009E73", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7"),
    *("#E69F00", "#0072B2", "#FFFFFF", "#999999", "#825028"),
)
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 120,
    "figure.constrained_layout.use": True,
}


def series(lines: list[dict], name: str) -> Float[np.ndarray, "n 2"]:
    """Agent steps and values of one metric."""
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    return np.array(pairs, float).reshape(-1, 2)


class Panel(NamedTuple):
    """One plot: metrics, each with a line style of its own, of some levels.

    `units` are what the values of each level are divided by.
    """

    title: str
    metrics: str
    levels: Sequence[int]
    log: bool = False
    limits: tuple[float | None, float | None] | None = None
    mark: tuple[float, str] | None = None
    units: Sequence[float] = (1, 1, 1, 1)


def plot(axes: Axes, panel: Panel, lines: list[dict]) -> bool:
    """Whether there was anything to plot."""
    for level in panel.levels:
        for name, style in zip(panel.metrics.split(), LINES, strict=False):
            data = series(lines, f"level{level}/{name}")
            marker = "." if len(data) < 30 else None
            steps, values = data.T / [[1], [panel.units[level]]]
            axes.plot(steps, values, style, color=LEVEL_COLOURS[level], marker=marker)
    found = any(len(line.get_xdata()) for line in axes.lines)
    axes.set_title(panel.title)
    if not found:
        axes.text(0.5, 0.5, "none", color=GREY, ha="center", transform=axes.transAxes)
    elif panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.minorticks_off()
    if panel.limits:
        axes.set_ylim(*panel.limits)
        axes.yaxis.set_inverted(False)  # where all values lie below the lower limit
    if found and panel.mark:
        reference(axes, *panel.mark)
    return found


def reference(axes: Axes, value: float, label: str) -> None:
    """A level line and its name, right of the plot."""
    axes.axhline(value, color=GREY, linestyle=(0, (1, 1)), linewidth=1)
    where = axes.get_yaxis_transform()
    axes.text(1.01, value, label, color=GREY, fontsize=8, va="center", transform=where)


def caption(figure: Figure, title: str, text: str, keys: Sequence = ()) -> None:
    """What it is and the key, above; what is shown, below."""
    place = {"loc": "outside upper left", "alignment": "left", "ncols": len(keys) or 1}
    figure.legend(handles=keys, title=title, title_fontsize=11, **place)
    text = fill(text, int(figure.get_size_inches()[0] * 17))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color=GREY)


def curves(
    run: Run,
    lines: list[dict],
    grid: list[list[Panel]],
    styles: str,
    *words: str,
    **share,
) -> Figure | None:
    """Metrics over agent steps; None where there are none. `words`: title, caption."""
    figure = Figure(figsize=(9, 1.2 + (1.6 if share else 2.2) * len(grid)))
    shape = (len(grid), len(grid[0]))
    axes = figure.subplots(*shape, sharex=True, squeeze=False, **share)
    panels = zip(axes.flat, chain(*grid), strict=True)
    if not any([plot(a, panel, lines) for a, panel in panels]):
        return None
    for last in axes[-1]:
        last.set(xlabel="agent steps", xlim=(0, 1.01 * run.step))
    used = LEVEL_COLOURS[: run.config.levels]
    keys = [Line2D([], [], color=c, label=f"level {i}") for i, c in enumerate(used)]
    for name, style in zip(styles.split(), LINES, strict=False):
        keys.append(Line2D([], [], color=GREY, ls=style, label=name))
    caption(figure, f"{run.config.game}: {words[0]}", words[1], keys)
    return figure


def rewards(run: Run, lines: list[dict]) -> Figure | None:
    """The partial rewards of every level, on replayed and on imagined states."""
    kinds = ("extrinsic", "subgoal", "novelty")[: 3 if run.config.levels > 1 else 1]
    panel = lambda i, kind: Panel(
        f"level {i}: {kind}", f"real_{kind} imagined_{kind}", (i,)
    )
    grid = [[panel(i, kind) for kind in kinds] for i in range(run.config.levels)]
    text = (
        "Unweighted means over training batches; one scale per column. The extrinsic "
        "reward of an upper level is per agent step. The top level is given no "
        "subgoal. Novelty has no weight at level 0."
    )
    words = ("partial rewards, mean per state", text)
    return curves(run, lines, grid, "replayed imagined", *words, sharey="col")


def losses(run: Run, lines: list[dict]) -> Figure | None:
    """What the world model of every level is trained on."""
    p = partial(Panel, levels=range(run.config.levels))
    free = (run.config.trainer.free_nats, "free\nnats")
    observation = p("observation", "loss_observation", log=True)
    reward = p("reward, two-hot (nats)", "loss_reward", log=True)
    cont = p("continue (nats)", "loss_cont", log=True)
    kl = p("KL[posterior ‖ prior] (nats)", "kl", limits=(0, None), mark=free)
    text = (
        "Means over training batches. Observation: at level 0 squared error, weighted "
        "like 64×64×3 values; above, cross-entropy of z plus squared error of h, over "
        "the window of the level below. The scales of the two do not compare."
    )
    grid = [[observation, reward], [cont, kl]]
    return curves(run, lines, grid, "", "losses of the world models", text)


def health(run: Run, lines: list[dict]) -> Figure | None:
    """Signs that actors, critics and goal codes are alive."""
    p = partial(Panel, levels=range(run.config.levels))
    shapes = [subactor.action_shape for subactor in run.agent.subactors]
    uniform = [groups * np.log(classes) for groups, classes in shapes]
    kinds = ("extrinsic", "subgoal", "novelty")
    named = lambda prefix: " ".join(f"{prefix}_{kind}" for kind in kinds)
    log = partial(p, log=True, limits=(1e-3, None))
    scale = log("return scale", named("return_scale"))
    advantage = log("|advantage|, weighted", named("advantage"))
    entropy = p("actor: entropy / uniform", "entropy_actor", units=uniform)
    random = "code_reward_own code_reward_random"
    grid = [
        [entropy._replace(limits=(0, 1.05)), scale, advantage],
        [
            p("code: KL per row (nats)", "code_kl_per_row", mark=(0.05, "dead")),
            p("code: explained variance", "code_explained_variance", limits=(-0.5, 1)),
            p("code: r_g of own (-), random (--)", random, limits=(0, 1)),
        ],
    ]
    text = (
        "Means over training batches. Advantages are divided by max(1, return scale). "
        "Under 0.05 nats a code says nothing: a random one earns as much r_g as a "
        "state's own. Return scale and advantage are cut below 0.001, explained "
        "variance below -0.5."
    )
    title = "health of actors, critics and goal codes"
    rows = grid[: min(2, run.config.levels)]  # a flat agent has no codes
    return curves(run, lines, rows, " ".join(kinds), title, text)


def references(run: Run) -> dict[str, float | None]:
    """Known scores of the game: random and human, or random and best of a probe."""
    game = run.config.game
    if game in probes.PROBES:
        return dict(
            zip(("random", "best"), probes.scores(run.game.env.rules), strict=True)
        )
    scores = atari.scores().get(game, {})
    return {name: scores.get(name) for name in ("random", "human")}


def learning_curve(run: Run, lines: list[dict]) -> Figure | None:
    """Return of every episode, running mean, evaluation; None without an episode."""
    data, config = series(lines, "episode_return"), run.config
    if len(data) == 0:
        return None
    figure = Figure(figsize=(9, 4))
    axes, returns = figure.subplots(), data[:, 1]
    axes.plot(*data.T, ".", color="#56B4E9", ms=5, label="an episode")
    n = int(np.clip(len(returns) // 20, 5, 100))
    if len(returns) > n:
        means = np.convolve(returns, np.ones(n) / n, "valid")
        axes.plot(data[n - 1 :, 0], means, "#0072B2", label=f"mean of the last {n}")
    path = run.folder / "result.json"
    scores = json.loads(path.read_text()).get("eval_returns") if path.exists() else []
    if scores:
        label = f"evaluation: {np.mean(scores):.3g}, mean of {len(scores)}"
        style = {"marker": "D", "ls": "", "color": "#D55E00", "clip_on": False}
        axes.plot(run.step, np.mean(scores), label=label, **style)
    low, high = min([*returns, *scores]), max([*returns, *scores])
    reach, far = max(high - low, 1), ""
    for name, value in references(run).items():
        if value is not None and low - reach <= value <= high + reach:
            reference(axes, value, f"{name}\n{value:.3g}")
        elif value is not None:
            far += f" Off the scale: {name} {value:.3g}."
    axes.set(xlabel="agent steps", xlim=(0, 1.01 * run.step), ylabel="return (points)")
    text = f"Preset {config.preset}, {config.levels} levels, seed {config.seed}." + far
    title = f"{config.game}: return of training episodes"
    caption(figure, title, text, axes.get_legend_handles_labels()[0])
    return figure


def to_rgb(picture: Pictures) -> Float[np.ndarray, "... h w 3"]:
    """Grey and colour as they are; other channels mix colours of their own."""
    channels = picture.shape[-1]
    if channels in (1, 3):
        return np.broadcast_to(picture, (*picture.shape[:-1], 3))
    colours = to_rgba_array(np.resize(CHANNEL_COLOURS, channels))[:, :3]
    return picture @ colours / np.maximum(1, picture.sum(-1, keepdims=True))


def show(axes: Axes, picture: Float[np.ndarray, "h w c"], row: str = ""):
    """Square pixels, and a name left of the row."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(row, rotation=0, ha="right", va="center")
    return axes.imshow(to_rgb(picture), interpolation="nearest")


def sheet(
    axes: np.ndarray, rows: dict[str, Pictures], titles: Sequence[str] = ()
) -> None:
    """Pictures on a grid of axes, one named row each, all on the same scale."""
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for column, (a, picture) in enumerate(zip(row, pictures, strict=True)):
            show(a, picture, name if column == 0 else "")
    for a, title in zip(axes[0], titles, strict=False):
        a.set_title(title, fontsize=8, loc="center")


def film_strip(run: Run, play: OpenLoop) -> Figure:
    """The window of median error, and the errors of all windows."""
    W, T, height, width = play.truth.shape[:4]
    ahead = np.arange(T) - play.context + 1
    far = {-1, 0, *np.geomspace(1, ahead[-1], 7).round().astype(int)}
    shown = [t for t in range(T) if ahead[t] in far]
    tall = min(8 / len(shown) * height / width, 1.2)
    figure = Figure(figsize=(9, 3 * tall + 3.9))
    grid = figure.add_gridspec(4, len(shown), height_ratios=(tall, tall, tall, 2.1))
    for row, (name, pictures) in enumerate(play.views([W // 2]).items()):
        for column, t in enumerate(shown):
            axes = figure.add_subplot(grid[row, column])
            show(axes, pictures[0, t], name if column == 0 else "")
            if row == 0:
                axes.set_title(moment(int(ahead[t]), "\n"), fontsize=8, loc="center")
    axes, styles = figure.add_subplot(grid[3, :]), ("-", "-", "--", ":")
    colours, begin = ("#0072B2", "#56B4E9", GREY, GREY), (1, ahead[0], 0, ahead[0])
    for i, (name, error) in enumerate(play.errors().items()):
        part = ahead >= begin[i]
        style = {"ls": styles[i], "color": colours[i], "zorder": 9 - i}
        axes.plot(ahead[part], error.mean(0)[part], label=name, **style)
    axes.set(xlabel="frames after the last one seen", ylabel="mean squared error")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    text = (
        f"Pictures: of {W} windows of {T} steps, the one of median error. Curves: "
        "means over windows and pixels (0 to 1). Imagined under the true actions, z "
        "drawn from the prior, once. The windows are the newest of the replay: most "
        "have been trained on. A model in which nothing moves scores like the mean of "
        "all frames." + " Colours: channels of the game." * (play.truth.shape[4] > 3)
    )
    title = f"{run.config.game}: open-loop prediction of level 0"
    caption(figure, title, text, axes.get_legend_handles_labels()[0])
    return figure


def moment(ahead: int, between: str = " ") -> str:
    """The name of a frame by its distance to the last one seen."""
    return f"imagined{between}+{ahead}" if ahead > 0 else f"context{between}{ahead}"


def write_film(run: Run, play: OpenLoop, path: Path) -> None:
    """A GIF of three windows, at the quartiles of the error."""
    W, T, height, width = play.truth.shape[:4]
    views = play.views([W // 4, W // 2, 3 * W // 4])
    figure = Figure(figsize=(5, 0.6 + 3 * 1.6 * min(height / width, 1.2)))
    grid, images = figure.subplots(3, 3), []
    for column, (name, pictures) in enumerate(views.items()):
        grid[0, column].set_title(name, loc="center")
        for axes, window in zip(grid[:, column], pictures, strict=True):
            images.append((show(axes, window[0]), to_rgb(window)))
    writer = PillowWriter(fps=4)
    with writer.saving(figure, str(path), dpi=80):
        for t in [*range(T), *[T - 1] * 4]:
            for image, window in images:
                image.set_data(window[t])
            figure.suptitle(f"{run.config.game}: {moment(t - play.context + 1)}")
            writer.grab_frame()


def goal_sheet(run: Run, now: Pictures, found: list[Aim]) -> Figure:
    """Frames, and under them the goals of every level decoded down to pixels."""
    rms = lambda x: np.sqrt((x**2).mean())
    rows, text = {"the game": now}, ""
    for goal in found:
        name = f"level {goal.level} goal"
        rows[f"{name}:\nclosest state"] = goal.frame
        rows[f"{name}:\nthat, decoded"] = goal.state
        rows[f"{name},\ndecoded"] = goal.goal
        text += (
            f" Level {goal.level}, {run.updates[goal.level]} updates: decoding changes "
            f"a state's frame by {rms(goal.state - goal.frame):.2g}, the goal what is "
            f"decoded by {rms(goal.goal - goal.state):.2g} (rms of pixels, 0 to 1)."
        )
    tall = min(1.2 * now.shape[1] / now.shape[2], 1.4)
    figure = Figure(figsize=(8.5, 1.2 + len(rows) * tall))
    grid = figure.subplots(len(rows), len(now), squeeze=False)
    sheet(grid, rows)
    for axes, goal in zip(grid[3::3], found, strict=True):
        for a, r, best in zip(axes, goal.now, goal.best, strict=True):
            a.set_xlabel(f"r_g {r:.2f}, closest {best:.2f}", fontsize=7)
    text = (
        f"Closest: by r_g, of the level's newest {STATES} states at most. A goal is an "
        "h without a z, so it is decoded with the z of the closest state. r_g: of the "
        "state at the moment, and of the closest." + text
    )
    title = f"{run.config.game}: goals in force at {len(now)} recent moments"
    caption(figure, title, text)
    return figure


def draw(run: Run) -> list[Path]:
    """Draws what the run has data for into its folder `pictures`."""
    folder, lines, paths = run.folder / "pictures", read_lines(run.folder), []
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
                    figure.savefig(folder / f"{name}.png")
                    paths.append(folder / f"{name}.png")
            if play:
                write_film(run, play, folder / "open_loop.gif")
                paths.append(folder / "open_loop.gif")
        except OSError as error:
            print(f"report.py: pictures are missing: {error}", file=sys.stderr)
    return paths


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if len(argv) != 1:
            raise UsageError("give one run folder: python report.py RUN_DIR")
        keep_compiled()
        run = load(Path(argv[0]))
    except UsageError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print(*draw(run), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
