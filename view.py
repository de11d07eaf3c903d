"""One page to step through: an episode, what the levels made of it, and imagination.

    python view.py RUN_DIR --play    writes one HTML file that needs nothing else

RUN_DIR is a run folder or a file of weights. All that the page shows is prepared here:
sheets of pictures as lossless WebP, panels that name pictures of a sheet, texts, curves
as SVG. Clocks say which of them belong to an agent step: the script of the template
view.html only looks up. Predictions are rounded to 32 shades per channel. Starts of
imagination are as dense as the size of the page allows.

Axes: W starts, n pictures or entries, h w c of a picture, S rows × K classes of a code.
"""

import base64
import json
import math
import sys
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from checkpoint import CheckpointError
from config import Config, UsageError
from diagnose import Pictures, sought
from dreams import Level, levels_of
from game import make_env
from learner import Learner
from machine import keep_compiled
from play import Episode
from play import episode as let_play
from report import to_rgb
from run import load_weights, place_of

TEMPLATE = Path(__file__).with_name("view.html")
PAGE_BYTES = 15_000_000
SHADES = 31
# All pictures together at most, text of an imagined step, own steps between starts.
PICTURE_BYTES, TEXT_BYTES, EVERY = 12_500_000, 25, 8
IMAGINED, AHEAD = 16, (1, 2, 4, 8, 16)
# Agent steps of a curve in view, and between the numbers below it.
SPAN, TICKS = 120, 20
BRANCH_STARTS, BRANCH_NODES, BRANCH_VALUES, REPEAT = 5, 2000, 4_500_000, 4
SQUARE, GREY, ORANGE = 6, (96, 96, 96), (230, 159, 0)
DISCOUNTED = "discounted sum of the reward, over own steps"
CURVES = {
    "surprise": "KL[posterior ‖ prior], nats",
    "continuation": "ĉ, probability that the game goes on",
    "extrinsic reward": "points per agent step; faint: predicted r̂",
    "extrinsic value": DISCOUNTED,
    "subgoal reward": "r_g, 0 to 1: agreement of state and goal",
    "subgoal value": DISCOUNTED,
    "novelty reward": "mean squared error of S, which has unit variance",
    "novelty value": DISCOUNTED,
}
CURVE = """<figure><figcaption id="curve-{name}"><h3>{name}</h3><p>{unit}</p>{said}
</figcaption><div class="y">{marks}</div><div class="plot"><div class="wide"
onclick="slider.value = slider.max * event.offsetX / offsetWidth; show()">
<svg role="img" aria-labelledby="curve-{name}" viewBox="0 0 {wide} 100"
preserveAspectRatio="none"><path class="axis" d="M0 50H{wide}M0 0H{wide}"/>{drawn}</svg>
<i></i></div></div><div class="x"><div class="wide">{ticks}</div></div></figure>
"""
FIGURE = '<figure id="strip{}"><b>{}</b>{{{{canvas}}}}</figure>'
RADIO = "<label><input type=radio name=level value={0} accesskey={0} {1}>{0}</label>"
NUMBERS = "{:.3f}, {:.3f}, {:.3f}".format


def sheet(
    pictures: Pictures | UInt8[np.ndarray, "*n h w c"], per: int, columns: int
) -> dict[str, Any]:
    """Pictures (…, h, w, c), `per` of them to a file, as the page's script finds them.

    Bytes are kept as they are; predictions in [0, 1] are rounded.
    """
    if pictures.dtype != np.uint8:
        pictures = np.rint(np.rint(pictures * SHADES) * (255 / SHADES)).astype("u1")
    if pictures.shape[-1] not in (1, 3):
        pictures = np.rint(to_rgb(pictures / 255.0) * 255).astype("u1")
    height, width, channels = pictures.shape[-3:]
    pictures, sources = pictures.reshape(-1, height, width, channels), []
    for first in range(0, len(pictures), per):
        some = pictures[first : first + per]
        rows = -(-len(some) // columns)
        some = np.pad(some, [(0, rows * columns - len(some)), *[(0, 0)] * 3])
        some = some.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
        whole, file = some.reshape(rows * height, columns * width, channels), BytesIO()
        image = Image.fromarray(np.broadcast_to(whole, (*whole.shape[:2], 3)))
        image.save(file, "webp", lossless=True)
        coded = base64.b64encode(file.getvalue()).decode()
        sources.append("data:image/webp;base64," + coded)
    return {"src": sources, "per": per, "columns": columns, "h": height, "w": width}


def squares(
    p: Float[Array | np.ndarray, "n S K"], chosen: Int[np.ndarray, "n S"] | None = None
) -> dict[str, Any]:
    """A sheet of codes as S × K squares, black 0 to white 1; the chosen are framed."""
    n, S, K = p.shape
    chosen = np.full((n, S), -1) if chosen is None else chosen
    framed = (chosen[..., None] == np.arange(K))[..., None, None, None]
    found = np.tile(np.where(framed, ORANGE, GREY).astype("u1"), (SQUARE, SQUARE, 1))
    found[..., 1:-1, 1:-1, :] = np.rint(np.asarray(p) * 255)[..., None, None, None]
    found = found.swapaxes(2, 3).reshape(n, S * SQUARE, K * SQUARE, 3)
    return sheet(found, 256, 16)


def rounded(values) -> list:
    """Four digits are enough to look at; what is not finite is null."""
    found = np.asarray(values, float).tolist()
    return [float(f"{x:.4g}") if np.isfinite(x) else None for x in found]


def panel(
    clock: str, layers: dict[str, Any], said: Any, blank: str = "", told: str = ""
) -> dict[str, Any]:
    """What a figure of the page shows by rows of a clock; its texts may have another.

    `layers`: pictures by sheet, those of a second one are subtracted. Without such a
    row nothing is drawn and `blank` is said.
    """
    cells = [(name, np.reshape(x, (len(x), -1))) for name, x in layers.items()]
    found = {"clock": clock, "told": told or clock, "layers": cells}
    return found | {"said": list(said), "blank": blank}


def figures(levels: list[Level], i: int, sheets: dict[str, Any]) -> dict[str, Any]:
    """Panels of a level's pictures and codes; `sheets` gain what they are drawn from.

    Goals are decoded like in diagnose.py, with the z of the state closest to them.
    """
    level, lived = levels[i], levels[i].lived
    latent, decoded = jax.tree.map(jnp.asarray, lived.latent), f"decoded{i}"
    sheets[decoded] = sheet(level.pictures(latent.z, latent.h), 64, 8)
    sheets[f"z{i}"] = squares(latent.z)
    steps, rows = levels[0].lived.at, np.arange(len(lived.at))
    real, own = ([f"step {t}" for t in at] for at in (steps, lived.at))
    acting = partial(panel, "acts", blank=f"blank: level {i} does not act at this step")
    found = {
        "seen": panel("step", {"seen": steps}, real),
        "decoded": acting({decoded: rows}, own),
        "error": acting({"seen": lived.at, decoded: rows}, own),
        "z": acting({f"z{i}": rows}, own),
        "goal": panel(
            "step", {"seen": 0 * steps - 1}, (), f"blank: nobody sets level {i} a goal"
        ),
    }
    if "screen" in sheets:
        found["screen"] = panel("step", {"screen": steps}, real)
    if i > 0:
        sheets[f"policy{i}"] = squares(lived.thoughts.policy, level.chosen)
        found["policy"] = acting({f"policy{i}": rows}, own)
    if i + 1 < len(levels):
        above, goal = levels[i + 1].lived.at, np.asarray(lived.steps.goal)
        set_at, goals = np.searchsorted(lived.at, above), np.arange(len(above))
        onehot = np.eye(level.learners[-1].subactor.goal_shape[1])
        G = jnp.asarray(lived.thoughts.goal[set_at])
        k, best, pictures = sought(level.learners, G, latent)
        sheets[f"goal{i}"] = sheet(pictures, 64, 8)
        sheets[f"code{i}"] = squares(onehot[goal[set_at]])
        kept = f"set by level {i + 1} at step {{}}, held to {{}}".format
        kept = [*map(kept, above, [*above[1:] - 1, steps[-1]])]
        near = map("step {}: r_g {:.3g}".format, lived.at[k], best)
        found["goal"] = panel("goal", {f"goal{i}": goals}, kept)
        found["closest"] = panel("goal", {"seen": lived.at[k]}, near)
        found["code"] = panel("goal", {f"code{i}": goals}, kept)
    return found


def series(level: Level) -> dict[str, Float[np.ndarray, " rows"]]:
    """Numbers of every row of a level, by the names of curves."""
    thoughts, learner = level.lived.thoughts, level.learners[-1]
    latent = jax.tree.map(jnp.asarray, level.lived.latent)
    foreseen, cont, _ = jax.vmap(learner.subactor.world_model.heads.outlook)(latent)
    found = {"surprise": thoughts.surprise, "continuation": cont}
    found |= {"predicted extrinsic reward": foreseen}
    found |= {f"{name} reward": x for name, x in thoughts.rewards.items()}
    found |= {f"{name} value": x for name, x in thoughts.values.items()}
    return {name: np.asarray(x, float) for name, x in found.items()}


def curve(name: str, levels: list[Level], numbers: list[dict[str, np.ndarray]]) -> str:
    """One number of all levels that have it, as HTML with axes.

    x is in agent steps, y in percent from the top: the page stretches both.
    """
    having = [i for i, found in enumerate(numbers) if name in found]
    keys = [(f"predicted {name}", "faint"), (name, "")]
    lines = [(i, numbers[i][k], x) for k, x in keys for i in having if k in numbers[i]]
    finite = np.concatenate([[0], *(y[np.isfinite(y)] for _, y, _ in lines)])
    low, high = min(finite), max(min(finite) + 1e-3, *finite)
    drawn, last = "", int(levels[0].lived.at[-1])
    for i, y, faint in lines:
        known, at = np.isfinite(y), levels[i].lived.at
        y = (high - y[known]) / (high - low) * 100
        pens = np.where(known & np.append(False, known[:-1]), "L", "M")[known]
        points = [f"{t} {v:.3g}" for t, v in zip(at[known], y, strict=True)]
        line = "".join(map("".join, zip(pens, points, strict=True)))
        drawn += f'<path class="l{i} {faint}" d="{line}"/>'
        if i > 0 and not faint:
            dots = "".join(f"M{point}h0" for point in points)
            drawn += f'<path class="l{i} dots" d="{dots}"/>'
    small = '<small class="l{0}">level {0}: <span data-of="{1} {0}"></span></small>'
    tick = '<span class="{}" style="left: {:.2%}">{}</span>'.format
    fine = max(1, min(TICKS, last // 5))
    far, end = fine * max(1, last // fine // 5), max(1, last)
    ticks = [("fine" * (t % far > 0), t / end, t) for t in range(0, last + 1, fine)]
    return CURVE.format(
        name=name,
        unit=CURVES[name],
        said="".join(small.format(i, name) for i in having),
        marks="".join(f"<span>{x:.3g}</span>" for x in np.linspace(high, low, 3)),
        ticks="".join(tick(*x) for x in ticks),
        wide=end,
        drawn=drawn,
    )


def futures(
    level: Level, names: list[str], reward: np.ndarray, sheets: dict, room: float
) -> tuple[Int[np.ndarray, " W"], dict[str, Any]]:
    """Imagination from every n-th row: as it was played, by the actor, each action.

    Pictures of a start: all steps of the first two, those of AHEAD of the others. Agent
    steps of the starts, which need about `room` bytes, and a panel for each strip.
    """
    i, at, last = len(level.learners) - 1, level.lived.at, len(level.lived.at) - 1
    shown = np.ones((2 + len(names), IMAGINED + 1), bool)
    shown[2:], shown[1:, 0] = np.isin(np.arange(IMAGINED + 1), AHEAD), False
    kept = int(shown.sum())
    # Imagined pictures compress about as well as reconstructed ones.
    picture = sum(map(len, sheets[f"decoded{i}"]["src"])) / len(at)
    start = shown.size * TEXT_BYTES + kept * picture
    every = max(EVERY, math.ceil(len(at) * start / max(1, room)))
    rows = np.arange(0, max(1, last), every)
    ahead = rows[:, None] + np.arange(IMAGINED + 1)
    over, ahead = ahead > last, np.minimum(ahead, last)
    forced = np.repeat(level.chosen[ahead[:, None, :-1]], len(shown), 1)
    forced[:, 1:] = np.arange(-1, len(names))[:, None, None]
    found = level.dreams(rows, forced)
    pictures = level.pictures(found.z[:, shown], found.h[:, shown])
    sheets[f"imagined{i}"] = sheet(pictures, kept, IMAGINED + 1)
    cells = np.full((len(rows), *shown.shape), -1)
    cells[:, shown] = np.arange(len(rows) * kept).reshape(-1, kept)
    cells[:, 1:, 0], cells[:, 0][over] = cells[:, :1, 0], -1
    said = np.full(cells.shape, "–", object)
    total = np.cumsum(found.reward, -1)
    for w, c, f in np.ndindex(total.shape):
        text = NUMBERS(found.reward[w, c, f], total[w, c, f], found.cont[w, c, f])
        if names and c == 1:
            text += f": {names[found.action[w, c, f, 0]]}"
        said[w, c, f + 1] = text if c or not over[w, f + 1] else "the episode is over"
    passed = zip(at[rows], np.cumsum(reward)[at[ahead]], strict=True)
    real = [[f"from step {t}: real Σ r {x - y[0]:.4g}" for x in y] for t, y in passed]
    strips = [({"seen": np.where(over, -1, at[ahead])}, real)]
    strips += [({f"imagined{i}": cells[:, c]}, said[:, c]) for c in range(len(shown))]
    strips = [panel("start", x, np.ravel(text), told="told") for x, text in strips]
    return at[rows], {f"strip{c}": strip for c, strip in enumerate(strips)}


def clocks(
    levels: list[Level], i: int, starts: Int[np.ndarray, " W"]
) -> dict[str, Int[np.ndarray, " n"]]:
    """Which rows of a level's panels belong to each of n agent steps, -1 for none.

    Goals and starts hold on; `column`: how many own steps ago the newest start was.
    """
    step, at = levels[0].lived.at, levels[i].lived.at
    both = levels[i], levels[min(i + 1, len(levels) - 1)]
    held, goal = (x.lived.held(len(step)) for x in both)
    start = np.searchsorted(starts, step, side="right") - 1
    column = held - held[starts[start]]
    told = start * (IMAGINED + 1) + np.minimum(column, IMAGINED)
    found = {"step": step, "acts": np.where(at[held] == step, held, -1), "start": start}
    return found | {"column": column, "told": told, "goal": goal}


def branches(level: Level, A: int, sheets: dict[str, Any]) -> dict[str, Any]:
    """Trees of level 0's actions from a few start states, as deep as there is room."""
    nodes = lambda depth: sum(A**j for j in range(depth + 1))
    values, at = level.lived.steps.obs[0].size, level.lived.at
    most = min(BRANCH_NODES, BRANCH_VALUES // values)
    depth = max([d for d in range(1, 6) if nodes(d) <= most], default=1)
    rows = np.linspace(0, max(0, len(at) - 2), BRANCH_STARTS).astype(int)
    z, h, *numbers = level.tree(rows, A, depth, REPEAT)
    sheets["branches"] = sheet(level.pictures(z, h), nodes(depth), 32)
    trees = [
        {"at": at[row], "first": w * nodes(depth), "said": [NUMBERS(*x) for x in each]}
        for w, (row, each) in enumerate(zip(rows, np.stack(numbers, -1), strict=True))
    ]
    return {"depth": depth, "trees": trees}


def action_names(config: Config, actions: int) -> list[str]:
    """The emulator's names of a game's actions, or their numbers."""
    known = getattr(make_env(config, 0), "actions", range(actions))
    return [getattr(a, "name", f"action {a}").lower() for a in known]


def contents(
    names: list[str], levels: list[Level], numbers: list, episode: Episode, human: bool
) -> dict[str, Any]:
    """Everything that the page's script looks up; `numbers`: the levels' series."""
    policy, n = levels[0].lived.thoughts.policy[:, 0], len(episode.action)
    sheets = {"seen": sheet(episode.obs, 64, 8)}
    if episode.frames.shape != episode.obs.shape:
        sheets["screen"] = sheet(episode.frames, 64, 8)
    panels, hands = [figures(levels, i, sheets) for i in range(len(levels))], []
    trees = branches(levels[0], len(names), sheets) if human else None
    for i, level in reversed([*enumerate(levels)]):
        used = sum(len(src) for x in sheets.values() for src in x["src"])
        room, fixed = (PICTURE_BYTES - used) / (i + 1), names * (i == 0)
        starts, strips = futures(level, fixed, episode.reward, sheets, room)
        panels[i] |= strips
        hands.insert(0, clocks(levels, i, starts))
    chosen = zip(levels[0].chosen[:, 0], policy, strict=True)
    does = [f"{names[a]} ({p[a]:.0%})" if a >= 0 else "–, the end" for a, p in chosen]
    said = f"Step {{}} of {n - 1}: reward {{:.3g}}; chosen: {{}}.".format
    texts = {"status": [*map(said, range(n), episode.reward, does)]}
    for i, level in enumerate(levels):
        for name, x in numbers[i].items():
            texts[f"{name} {i}"] = rounded(x[level.lived.held(n)])
    percent = np.rint(policy * 100).astype(int)
    found = {"texts": texts, "actions": names, "policy": percent}
    found |= {"panels": panels, "clocks": hands, "branches": trees, "sheets": sheets}
    return found


def page(
    config: Config, learners: tuple[Learner, ...], episode: Episode, human: bool
) -> str:
    """The HTML. `human`: with branches in which a person chooses the actions."""
    levels = levels_of(learners, episode)
    numbers = [*map(series, levels)]
    names = action_names(config, levels[0].lived.thoughts.policy.shape[-1])
    data = contents(names, levels, numbers, episode, human)
    trees, last = data["branches"]["trees"] if human else [], len(episode.action) - 1
    so_far = "" if episode.is_last[-1] else " so far: the episode goes on"
    shown = [name for name in CURVES if any(name in x for x in numbers)]
    strides = " / ".join(str(config.period**i) for i in range(len(levels)))
    updates = " / ".join(str(int(x.updates)) for x in learners)
    button = '<button accesskey="{1}" onclick="take({0})">{1} {2}</button>'.format
    keys = [(str(a), chr(97 + a), x) for a, x in enumerate(names)] if human else []
    keys += [("", "x", "start again")] * human
    strips = ["truth", "as played", "the actor", *(f"always {x}" for x in names)]
    texts = {
        "title": f"{config.game}: an episode and what its levels make of it",
        "about": f"{last + 1} agent steps, return "
        f"{sum(episode.reward):.4g}{so_far}. Preset {config.preset}, world model "
        f"{config.world_model}. Level 0 and up act every {strides} steps and had "
        f"{updates} updates. Policy sampled.",
        "last": str(last),
        "zoom": f"{max(1, last / SPAN):.4g}",
        "levels": [RADIO.format(i, "checked" * (i == 0)) for i in range(len(levels))],
        "policy": [f'<label><meter max="100"></meter> {x}</label>' for x in names],
        "strips": [FIGURE.format(c, x) for c, x in enumerate(strips)],
        "canvas": '<canvas role="img"></canvas><figcaption></figcaption>',
        "columns": [f"<small>{c}</small>" for c in range(IMAGINED + 1)],
        "curves": [curve(name, levels, numbers) for name in shown],
        "hidden": "" if human else "hidden",
        "starts": [f'<option value="{i}">{x["at"]}' for i, x in enumerate(trees)],
        "actions": [button(*x) for x in keys],
    }
    dump = partial(json.dumps, separators=(",", ":"), allow_nan=False)
    texts["images"] = [
        f'<img id="{name}-{k}" src="{src}" alt="">'
        for name, found in data["sheets"].items()
        for k, src in enumerate(found.pop("src"))
    ]
    texts["data"] = dump(data, default=lambda x: x.tolist()).replace("</", "<\\/")
    html = TEMPLATE.read_text()
    for name, text in texts.items():
        html = html.replace(f"{{{{{name}}}}}", "".join(text))
    return html


def main(
    run_dir: Annotated[Path, tyro.conf.Positional],
    *,
    episode_steps: int = 2000,
    seed: int = 0,
    out: Path | None = None,
    play: bool = False,
) -> None:
    """One HTML page to step through an episode and the model's imagination of it.

    Args:
        run_dir: run folder, or file of weights
        episode_steps: agent steps at most; Pong ends within 2000
        seed: another seed, another episode
        out: file to write; default: RUN_DIR/view.html, for weights runs/NAME/view.html
        play: add branches of imagination in which you choose the actions
    """
    for flag, value, low in (("episode-steps", episode_steps, 1), ("seed", seed, 0)):
        if value < low:
            raise UsageError(f"--{flag} {value} is not possible: give {low} or more")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")
    keep_compiled()
    config, learners = load_weights(run_dir)
    out = out or place_of(run_dir) / "view.html"
    episode = let_play(config, learners, episode_steps, seed=seed)
    text = page(config, learners, episode, play)
    out.write_text(text)
    print(f"{out}: {len(text) / 1e6:.1f} MB")
    if len(text) > PAGE_BYTES:
        print("view.py: a smaller page: give fewer --episode-steps", file=sys.stderr)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (UsageError, CheckpointError, OSError) as problem:
        sys.exit(print(f"view.py: {problem}", file=sys.stderr) or 2)
