"""One page to step through: an episode, what the levels made of it, and imagination.

    python view.py RUN_DIR --play    writes one HTML file that needs nothing else

RUN_DIR is a run folder or a file of weights. All that the page shows is prepared here:
sheets of pictures as lossless WebP, figures and strips that name pictures of a sheet,
curves as SVG. The script of the template view.html only picks what belongs to a step.
Predictions are rounded to 32 shades per channel. Starts of imagination are as dense as
the size of the page allows.

Axes: W starts, n pictures or entries, h w c of a picture, S rows × K classes of a code.
"""

import base64
import json
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
from config import Config
from diagnose import Pictures, sought
from game import UsageError, make_env
from imagine import Level, levels_of
from play import Episode
from play import episode as let_play
from report import to_rgb
from run import keep_compiled, load_weights
from subactor import Learner

TEMPLATE = Path(__file__).with_name("view.html")
PAGE_BYTES = 15_000_000
SHADES = 31
# Own steps from start to start at least, values of imagined pictures at most.
EVERY, DREAM_VALUES = 8, 55_000_000
IMAGINED, AHEAD = 16, (1, 2, 4, 8, 16)
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
</figcaption><div class="y">{marks}</div><div class="plot"><div class="wide">
<svg role="img" aria-labelledby="curve-{name}" viewBox="0 0 {wide} 100"
preserveAspectRatio="none"><path class="axis" d="M0 50H{wide}M0 0H{wide}"/>{drawn}</svg>
<i></i></div></div><div class="x">{ticks}</div><p class="x">agent step</p></figure>
"""


def sheet(
    pictures: Pictures | UInt8[np.ndarray, "n h w c"], per: int, columns: int
) -> dict[str, Any]:
    """Pictures (n, h, w, c), `per` of them to a file, as the page's script reads them.

    Bytes are kept as they are; predictions in [0, 1] are rounded.
    """
    if pictures.dtype != np.uint8:
        pictures = np.rint(np.rint(pictures * SHADES) * (255 / SHADES)).astype("u1")
    if pictures.shape[-1] not in (1, 3):
        pictures = np.rint(to_rgb(pictures / 255.0) * 255).astype("u1")
    height, width, channels = pictures.shape[1:]
    sources = []
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


def figures(levels: list[Level], i: int, sheets: dict[str, Any]) -> dict[str, Any]:
    """Pictures and codes of a level; `sheets` gain what they are drawn from.

    By figure of the page: the level to whose steps its entries belong; by layer a sheet
    and its pictures, None for all in turn, a second layer's being subtracted; texts.
    Goals are decoded like in diagnose.py, with the z of the state closest to them.
    """
    level, lived, learner = levels[i], levels[i].lived, levels[i].learners[-1]
    latent, decoded = jax.tree.map(jnp.asarray, lived.latent), f"decoded{i}"
    sheets[decoded] = sheet(level.pictures(latent.z, latent.h), 64, 8)
    sheets[f"z{i}"] = squares(latent.z)
    found = {
        "screen": (0, {"screen": None}),
        "seen": (0, {"seen": None}),
        "decoded": (i, {decoded: None}),
        "error": (i, {"seen": lived.at, decoded: None}),
        "z": (i, {f"z{i}": None}),
        "goal": (0, {"seen": ()}, [f"blank: nobody sets a goal for level {i}"]),
    }
    if "screen" not in sheets:
        del found["screen"]
    if i > 0:
        sheets[f"policy{i}"] = squares(lived.thoughts.policy, level.chosen)
        found["policy"] = (i, {f"policy{i}": None})
    if i + 1 < len(levels):
        above, goal = levels[i + 1].lived.at, np.asarray(lived.steps.goal)
        set_at = np.searchsorted(lived.at, above)
        G = jnp.asarray(lived.thoughts.goal[set_at])
        k, best, pictures = sought(level.learners, G, latent)
        encode, K = learner.subactor.autoencoder.encode, learner.subactor.goal_shape[1]
        own = np.argmax(jax.vmap(encode)(jnp.asarray(lived.thoughts.state)), -1)
        sheets[f"goal{i}"] = sheet(pictures, 64, 8)
        sheets[f"code{i}"] = squares(np.eye(K)[goal[set_at]])
        sheets[f"own{i}"] = squares(np.eye(K)[own])
        until, same = [*above[1:] - 1, levels[0].lived.at[-1]], (own == goal).sum(-1)
        agreed = lived.thoughts.rewards["subgoal"]
        said = f"set by level {i + 1} at step {{}}, held to {{}}".format
        near = "step {}: r_g {:.3g}".format
        like = f"{{}} of {goal.shape[1]}, r_g {{:.3g}}".format
        found |= {
            "goal": (i + 1, {f"goal{i}": None}, [*map(said, above, until)]),
            "closest": (i + 1, {"seen": lived.at[k]}, [*map(near, lived.at[k], best)]),
            "change": (i + 1, {f"goal{i}": None, decoded: k}),
            "code": (i + 1, {f"code{i}": None}),
            "own": (i, {f"own{i}": None}, [*map(like, same, agreed)]),
        }
    plain = lambda index: None if index is None else np.asarray(index, int).tolist()
    layers = lambda x: {name: plain(index) for name, index in x.items()}
    return {name: (x[0], layers(x[1]), *x[2:]) for name, x in found.items()}


def series(level: Level) -> dict[str, Float[np.ndarray, " rows"]]:
    """Numbers of every row of a level, by the names of curves."""
    thoughts, heads = (
        level.lived.thoughts,
        level.learners[-1].subactor.world_model.heads,
    )
    latent = jax.tree.map(jnp.asarray, level.lived.latent)
    foreseen, cont, _ = jax.vmap(heads.outlook)(latent)
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
    drawn = ""
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
    small = '<small class="l{0}" data-of="{0}" data-name="{1}"></small>'
    return CURVE.format(
        name=name,
        unit=CURVES[name],
        said="".join(small.format(i, name) for i in having),
        marks="".join(f"<span>{x:.3g}</span>" for x in np.linspace(high, low, 3)),
        ticks="<span></span>" * 5,
        wide=max(1, levels[0].lived.at[-1]),
        drawn=drawn,
    )


def futures(
    level: Level, names: list[str], reward: np.ndarray, sheets: dict[str, Any]
) -> dict[str, Any]:
    """Imagination from every n-th row: as it was played, by the actor, each action.

    Pictures of a start: all steps of the first two, those of AHEAD of the others. By
    strip and start: pictures of `sheet` from the start on, -1 for none, and texts.
    """
    i, at, last = len(level.learners) - 1, level.lived.at, len(level.lived.at) - 1
    shown = np.ones((2 + len(names), IMAGINED + 1), bool)
    shown[2:], shown[1:, 0] = np.isin(np.arange(IMAGINED + 1), AHEAD), False
    kept = int(shown.sum())
    every = max(EVERY, -(-len(at) * kept * level.values // DREAM_VALUES))
    rows = np.arange(0, max(1, last), every)
    ahead = rows[:, None] + np.arange(IMAGINED + 1)
    over, ahead = ahead > last, np.minimum(ahead, last)
    forced = np.repeat(level.chosen[ahead[:, None, :-1]], len(shown), 1)
    forced[:, 1:] = np.arange(-1, len(names))[:, None, None]
    found = level.dreams(rows, forced)
    pictures = level.pictures(found.z[:, shown], found.h[:, shown])
    pictures = pictures.reshape(-1, *pictures.shape[2:])
    sheets[f"imagined{i}"] = sheet(pictures, kept, IMAGINED + 1)
    cells = np.full((len(rows), *shown.shape), -1)
    cells[:, shown] = np.arange(len(pictures)).reshape(len(rows), -1)
    cells[:, 1:, 0], cells[:, 0][over] = cells[:, :1, 0], -1
    said = np.full(cells.shape, "–", object)
    total = np.cumsum(found.reward, -1)
    for w, c, f in np.ndindex(total.shape):
        numbers = found.reward[w, c, f], total[w, c, f], found.cont[w, c, f]
        text = "{:.3f}, {:.3f}, {:.3f}".format(*numbers).replace("-", "−")
        if names and c == 1:
            text += f": {names[found.action[w, c, f, 0]]}"
        said[w, c, f + 1] = text if c or not over[w, f + 1] else "the episode is over"
    passed = np.cumsum(reward)[at[ahead]]
    real = [[f"real Σ reward {x:.4g}" for x in y] for y in passed - passed[:, :1]]
    strips = [("seen", np.where(over, -1, at[ahead]).tolist(), real)]
    for c in range(len(shown)):
        strips.append((f"imagined{i}", cells[:, c].tolist(), said[:, c].tolist()))
    strips = [dict(zip(("sheet", "cells", "said"), x, strict=True)) for x in strips]
    return {"at": at[rows].tolist(), "strips": strips}


def thin(parts: list[dict], sheets: list[dict], room: int) -> None:
    """Drops every second start of the level with most of them until pictures fit."""
    size = lambda: sum(len(file) for found in sheets for file in found["src"])
    while size() > room and max(len(part["at"]) for part in parts) > 1:
        pairs = zip(parts, sheets, strict=True)
        part, found = max(pairs, key=lambda pair: len(pair[0]["at"]))
        files = [w for w, file in enumerate(found["src"]) if file]
        for w in files[1::2]:
            found["src"][w] = ""
        part["at"] = part["at"][::2]
        for strip in part["strips"]:
            strip |= {key: strip[key][::2] for key in ("cells", "said")}


def branches(level: Level, A: int, sheets: dict[str, Any]) -> dict[str, Any]:
    """Every sequence of actions, each held for some steps, from a few start states.

    A tree per start: node 0 is the start, node A n + 1 + a follows node n by action a.
    """
    nodes = lambda depth: sum(A**j for j in range(depth + 1))
    most, at = min(BRANCH_NODES, BRANCH_VALUES // level.values), level.lived.at
    depth = max([d for d in range(1, 6) if nodes(d) <= most], default=1)
    rows = np.linspace(0, max(0, len(at) - 2), BRANCH_STARTS).astype(int)
    sequences = np.indices((A,) * depth).reshape(depth, -1).T
    forced = np.repeat(sequences, REPEAT, 1)[..., None]
    found = level.dreams(rows, np.broadcast_to(forced, (len(rows), *forced.shape)))

    def tree(x):
        # Sequences that begin alike are alike so far: one stands for them all.
        ends = [x[:, :: A ** (depth - j), j * REPEAT] for j in range(depth + 1)]
        return jnp.concatenate(ends, 1)

    pictures = level.pictures(tree(found.z), tree(found.h))
    flat = pictures.reshape(-1, *pictures.shape[2:])
    sheets["branches"] = sheet(flat, nodes(depth), min(nodes(depth), 32))
    begin = lambda x, value: jnp.pad(x, ((0, 0), (0, 0), (1, 0)), constant_values=value)
    total = tree(jnp.cumsum(begin(found.reward, 0), -1))
    cont = tree(jnp.cumprod(begin(found.cont, 1), -1))
    parent = (np.arange(nodes(depth)) - 1) // A
    numbers = {"total": total, "reward": total - total[:, parent], "cont": cont}
    trees = [
        {"at": int(at[row]), "first": w * nodes(depth)}
        | {name: rounded(x[w]) for name, x in numbers.items()}
        for w, row in enumerate(rows)
    ]
    return {"depth": depth, "repeat": REPEAT, "trees": trees}


def action_names(config: Config, actions: int) -> list[str]:
    """The emulator's names of a game's actions, or their numbers."""
    known = getattr(make_env(config, 0), "actions", range(actions))
    return [getattr(a, "name", f"action {a}").lower() for a in known]


def contents(
    config: Config, levels: list[Level], episode: Episode, human: bool
) -> dict[str, Any]:
    """Everything that the page's script reads."""
    names = action_names(config, levels[0].lived.thoughts.policy.shape[-1])
    sheets = {"seen": sheet(episode.obs, 64, 8)}
    if episode.frames.shape != episode.obs.shape:
        sheets["screen"] = sheet(episode.frames, 64, 8)
    found = [
        {
            "at": level.lived.at.tolist(),
            "stride": config.period**i,
            "figures": figures(levels, i, sheets),
            "numbers": {key: rounded(x) for key, x in series(level).items()},
            "imagined": futures(level, names * (i == 0), episode.reward, sheets),
        }
        for i, level in enumerate(levels)
    ]
    policy = np.rint(levels[0].lived.thoughts.policy[:, 0] * 100).astype(int)
    return {
        "game": config.game,
        "steps": len(episode.action),
        "columns": IMAGINED + 1,
        "actions": names,
        "chosen": levels[0].chosen[:, 0].tolist(),
        "policy": policy.tolist(),
        "levels": found,
        "branches": branches(levels[0], len(names), sheets) if human else None,
        "sheets": sheets,
    }


def page(
    config: Config, learners: tuple[Learner, ...], episode: Episode, human: bool
) -> str:
    """The HTML. `human`: with branches in which a person chooses the actions."""
    levels = levels_of(learners, episode)
    data, numbers = contents(config, levels, episode, human), [*map(series, levels)]
    names, trees = data["actions"], data["branches"]["trees"] if human else []
    so_far = "" if episode.is_last[-1] else " so far: the episode goes on"
    shown = [name for name in CURVES if any(name in x for x in numbers)]
    strides = " / ".join(str(x["stride"]) for x in data["levels"])
    updates = " / ".join(str(int(x.updates)) for x in learners)
    lettered = [f"{chr(97 + a)} {name}" for a, name in enumerate(names)]
    button = '<button onclick="{}" data-key="{}">{}</button>'.format
    tick = '<small style="grid-column: {}"></small>'.format
    canvas = '<canvas role="img"></canvas><figcaption></figcaption>'
    strips = ["truth", "as played", "the actor", *(f"always {x}" for x in names)]
    texts = {
        "title": f"{config.game}: an episode and what its levels make of it",
        "about": f"{len(episode.action)} agent steps, return "
        f"{sum(episode.reward):.4g}{so_far}. Preset {config.preset}, world model "
        f"{config.world_model}. Level 0 and up act every {strides} steps and had "
        f"{updates} updates. Policy sampled.",
        "last": str(len(episode.action) - 1),
        "levels": [
            button(f"level = {i}; later()", i, f"level {i}") for i in range(len(levels))
        ],
        "policy": "<li></li>" * len(names),
        "canvas": canvas,
        "strips": [f"<figure><b>{x}</b>{canvas}</figure>" for x in strips],
        "ticks": [tick(c + 2) for c in range(0, IMAGINED + 1, 4)],
        "curves": [curve(name, levels, numbers) for name in shown],
        "starts": [f'<option value="{i}">{x["at"]}' for i, x in enumerate(trees)],
        "actions": [button(f"take({a})", x[0], x) for a, x in enumerate(lettered)],
    }
    html = TEMPLATE.read_text()
    for name, text in texts.items():
        html = html.replace(f"{{{{{name}}}}}", "".join(text))
    dump = partial(json.dumps, separators=(",", ":"), allow_nan=False)
    dreamt = [data["sheets"][f"imagined{i}"] for i in range(len(levels))]
    rest = len(html + dump(data)) - sum(len(s) for x in dreamt for s in x["src"])
    thin([x["imagined"] for x in data["levels"]], dreamt, PAGE_BYTES - rest)
    return html.replace("{{data}}", dump(data).replace("</", "<\\/"))


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
        out: file to write; default: RUN_DIR/view.html, for weights runs/NAME.html
        play: add branches of imagination in which you choose the actions
    """
    for flag, value, low in (("episode-steps", episode_steps, 1), ("seed", seed, 0)):
        if value < low:
            raise UsageError(f"--{flag} {value} is not possible: give {low} or more")
    if out is None:
        page_of = Path("runs") / f"{run_dir.stem}.html"
        out = run_dir / "view.html" if run_dir.is_dir() else page_of
        out.parent.mkdir(exist_ok=True)
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")
    keep_compiled()
    config, learners = load_weights(run_dir)
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
