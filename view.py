"""One page to step through: an episode, what the levels made of it, and imagination.

    python view.py RUN_DIR --play    writes one HTML file that needs nothing else

    z_0, h_0 of acting;  a_τ forced, or ~ π;  z_τ+1 ~ prior         (VIEW 1)

RUN_DIR is a run folder or a file of weights. The arrays of play.py, and the pictures
that levels decode, go into the template view.html as JSON and lossless WebP. All rows
of one start are imagined with the same random numbers: they differ by their actions
alone. Predictions are rounded to 32 shades per channel. Starts of imagination are as
dense as the size of the page allows.

Axes: W starts, C choices of action, F imagined steps, G × A action code, n pictures,
S categoricals × K classes of z, Sg of a goal, H features of h, h w c of a picture.
"""

import base64
import json
import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8
from PIL import Image

from checkpoint import CheckpointError
from config import Config
from diagnose import Pictures, decode, decode_down, nearest
from game import UsageError, make_env
from nets import symexp
from play import Episode, LevelPlay
from play import episode as let_play
from report import to_rgb
from run import keep_compiled, load_weights
from s5wm import Latent
from subactor import Learner, Subactor

TEMPLATE = Path(__file__).with_name("view.html")
PAGE_BYTES = 15_000_000
SHADES = 31
# Own steps from start to start at least, values of imagined pictures at most.
EVERY, DREAM_VALUES = 8, 55_000_000
IMAGINED, AHEAD = 16, (1, 2, 4, 8, 16)
BRANCH_STARTS, BRANCH_NODES, BRANCH_VALUES, REPEAT = 5, 2000, 4_500_000, 4


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
    """Steps without observations from a latent, the goal held. (VIEW 1)

    A forced action below 0 leaves the choice to the actor.
    """
    model = subactor.world_model.discretise()

    def step(latent, forced_key):
        act_key, model_key = jax.random.split(forced_key[1])
        chosen = subactor.act(latent, goal, key=act_key)
        action = jnp.where(forced_key[0] < 0, chosen, forced_key[0])  # (VIEW 1)
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
        sources.append(base64.b64encode(file.getvalue()).decode())
    return {"src": sources, "per": per, "columns": columns, "h": height, "w": width}


def rounded(values) -> list:
    """Four digits are enough to look at; what is not finite is null."""
    if np.ndim(values) > 1:
        return [rounded(x) for x in np.asarray(values)]
    found = np.asarray(values, float).tolist()
    return [float(f"{x:.4g}") if np.isfinite(x) else None for x in found]


class Level(NamedTuple):
    """One level of an episode and what decodes its latents to pixels."""

    learner: Learner
    lived: LevelPlay
    chosen: Int[np.ndarray, "rows G"]
    decoders: tuple[Callable, ...]

    @property
    def values(self) -> int:
        """Numbers in one decoded picture."""
        z, h = self.lived.latent.z[0], self.lived.latent.h[0]
        return jax.eval_shape(partial(decode_down, self.decoders), z, h).size

    def pictures(self, z: Float[Array, "*B S K"], h: Float[Array, "*B H"]) -> Pictures:
        return np.asarray(decode(self.decoders, z, h))


def levels_of(learners: tuple[Learner, ...], episode: Episode) -> list[Level]:
    """What was chosen at a row is in force below from there on, or was the action."""
    found, decoders = [], ()
    for i, (learner, lived) in enumerate(zip(learners, episode.levels, strict=True)):
        decoders += (learner.subactor.world_model.heads.decoder,)
        if i == 0:
            chosen = episode.action[:, None]
        else:
            below = episode.levels[i - 1]
            chosen = below.steps.goal[np.searchsorted(below.at, lived.at)]
        found.append(Level(learner, lived, np.asarray(chosen, int), decoders))
    return found


def goals(level: Level, above: LevelPlay) -> dict[str, Any]:
    """Every goal a level was given, decoded like in diagnose.py, and its own codes.

    The z comes from the state of the episode that is closest to the goal.
    """
    learner, lived = level.learner, level.lived
    set_at = np.searchsorted(lived.at, above.at)
    S, G = jnp.asarray(lived.thoughts.state), jnp.asarray(lived.thoughts.goal[set_at])
    k, best = jax.lax.map(lambda goal: nearest(goal, S), G, batch_size=8)
    h = symexp(learner.standardiser.inverse(G))
    own = jnp.argmax(jax.vmap(learner.subactor.autoencoder.encode)(S), -1)
    return {
        "at": above.at.tolist(),
        "code": lived.steps.goal[set_at].tolist(),
        "shape": learner.subactor.goal_shape,
        "own": own.tolist(),
        "closest": np.asarray(k).tolist(),
        "agreement": rounded(best),
        "decoded": sheet(level.pictures(jnp.asarray(lived.latent.z)[k], h), 64, 8),
    }


def curves(level: Level) -> dict[str, Any]:
    """Numbers of every row of a level."""
    thoughts, latent = level.lived.thoughts, level.lived.latent
    heads = level.learner.subactor.world_model.heads
    foreseen, cont, _ = jax.vmap(heads.outlook)(jax.tree.map(jnp.asarray, latent))
    return {
        "surprise": rounded(thoughts.surprise),
        "reward": {name: rounded(x) for name, x in thoughts.rewards.items()},
        "value": {name: rounded(x) for name, x in thoughts.values.items()},
        "foreseen": rounded(foreseen),
        "cont": rounded(cont),
    }


def futures(level: Level, names: list[str]) -> dict[str, Any]:
    """Imagination from every n-th row: as it was played, by the actor, each action.

    Pictures of a start: all steps of the first two, those of AHEAD of the others.
    """
    lived, subactor = level.lived, level.learner.subactor
    kept = 2 * IMAGINED + len(names) * len(AHEAD)
    every = max(EVERY, -(-len(lived.at) * kept * level.values // DREAM_VALUES))
    rows = np.arange(0, max(1, len(lived.at) - 1), every)
    ahead = np.minimum(rows[:, None] + np.arange(IMAGINED), len(lived.at) - 1)
    played, actor = level.chosen[ahead], np.full_like(level.chosen[ahead], -1)
    each = [np.full_like(actor, action) for action in range(len(names))]
    starts = jax.tree.map(lambda x: jnp.asarray(x[rows]), lived.latent)
    given = None if lived.steps.goal is None else jnp.asarray(lived.steps.goal[rows])
    forced = jnp.asarray(np.stack([played, actor, *each], 1))
    found = dreams(subactor, starts, given, forced)

    def keep(x):
        some = x[:, :2], x[:, 2:, np.array(AHEAD) - 1]
        flat = [y.reshape(len(rows), -1, *y.shape[3:]) for y in some]
        return jnp.concatenate(flat, 1)

    pictures = level.pictures(keep(found.z), keep(found.h))
    return {
        "rows": rows.tolist(),
        "every": every,
        "choices": ["as played", "the actor", *names],
        "steps": IMAGINED,
        "ahead": AHEAD,
        "action": found.action[:, 1].tolist(),
        "reward": rounded(found.reward),
        "cont": rounded(found.cont),
        "pictures": sheet(pictures.reshape(-1, *pictures.shape[2:]), kept, IMAGINED),
    }


def thin(levels: list[dict], room: int) -> None:
    """Keeps imagination from every second start until its pictures fit."""
    parts = [level["imagined"] for level in levels]
    while sum(len(s) for p in parts for s in p["pictures"]["src"]) > room:
        if max(len(p["rows"]) for p in parts) == 1:
            break
        for part in parts:
            for name in ("rows", "action", "reward", "cont"):
                part[name] = part[name][::2]
            part["pictures"]["src"] = part["pictures"]["src"][::2]
            part["every"] *= 2


def branches(level: Level, names: list[str]) -> dict[str, Any]:
    """Every sequence of actions, each held for some steps, from a few start states.

    A tree per start: node 0 is the start, node A n + 1 + a follows node n by action a.
    """
    lived, A = level.lived, len(names)
    nodes = lambda depth: sum(A**j for j in range(depth + 1))
    most = min(BRANCH_NODES, BRANCH_VALUES // level.values)
    depth = max([d for d in range(1, 6) if nodes(d) <= most], default=1)
    rows = np.linspace(0, max(0, len(lived.at) - 2), BRANCH_STARTS).astype(int)
    sequences = np.indices((A,) * depth).reshape(depth, -1).T
    forced = np.repeat(sequences, REPEAT, 1)[..., None]
    start = jax.tree.map(lambda x: jnp.asarray(x[rows]), lived.latent)
    given = None if lived.steps.goal is None else jnp.asarray(lived.steps.goal[rows])
    forced = jnp.broadcast_to(forced, (len(rows), *forced.shape))
    found = dreams(level.learner.subactor, start, given, forced)

    def tree(first, x):
        # Sequences that begin alike are alike so far: one stands for them all.
        ends = [x[:, :: A ** (depth - j), j * REPEAT - 1] for j in range(1, depth + 1)]
        return jnp.concatenate([first[:, None], *ends], 1)

    pictures = level.pictures(tree(start.z, found.z), tree(start.h, found.h))
    ones, total = jnp.ones(len(rows)), jnp.cumsum(found.reward, -1)
    flat = pictures.reshape(-1, *pictures.shape[2:])
    return {
        "at": lived.at[rows].tolist(),
        "rows": rows.tolist(),
        "depth": depth,
        "repeat": REPEAT,
        "total": rounded(tree(0 * ones, total)),
        "cont": rounded(tree(ones, jnp.cumprod(found.cont, -1))),
        "pictures": sheet(flat, nodes(depth), min(nodes(depth), 32)),
    }


def action_names(config: Config, actions: int) -> list[str]:
    """The emulator's names of a game's actions, or their numbers."""
    known = getattr(make_env(config, 0), "actions", range(actions))
    return [getattr(a, "name", f"action {a}").lower() for a in known]


def describe(level: Level, above: LevelPlay | None) -> dict[str, Any]:
    """What the page shows of a level beside imagination."""
    lived, subactor = level.lived, level.learner.subactor
    latent = jax.tree.map(jnp.asarray, lived.latent)
    return {
        "at": lived.at.tolist(),
        "updates": int(level.learner.updates),
        "decoded": sheet(level.pictures(latent.z, latent.h), 64, 8),
        "z": np.argmax(lived.latent.z, -1).tolist(),
        "zShape": subactor.world_model.z_shape,
        "policy": np.rint(lived.thoughts.policy * 100).astype(int).tolist(),
        "chosen": level.chosen.tolist(),
        "goals": goals(level, above) if above is not None else None,
        **curves(level),
    }


def page(
    config: Config, learners: tuple[Learner, ...], episode: Episode, human: bool
) -> str:
    """The HTML. `human`: with branches in which a person chooses the actions."""
    levels = levels_of(learners, episode)
    names = action_names(config, learners[0].subactor.action_shape[1])
    above = [*episode.levels[1:], None]
    found = [describe(x, up) for x, up in zip(levels, above, strict=True)]
    data = {
        "game": config.game,
        "preset": config.preset,
        "worldModel": config.world_model,
        "period": config.period,
        "steps": len(episode.action),
        "ended": bool(episode.is_last[-1]),
        "reward": rounded(episode.reward),
        "actions": names,
        "screen": None,
        "seen": sheet(episode.obs, 64, 8),
        "levels": found,
        "branches": branches(levels[0], names) if human else None,
    }
    if episode.frames.shape != episode.obs.shape:
        data["screen"] = sheet(episode.frames, 64, 8)
    for i, level in enumerate(levels):
        found[i]["imagined"] = futures(level, names if i == 0 else [])
    rest = len(json.dumps(data)) - sum(
        len(s) for x in found for s in x["imagined"]["pictures"]["src"]
    )
    thin(found, PAGE_BYTES - TEMPLATE.stat().st_size - rest)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return TEMPLATE.read_text().replace("/*DATA*/", text.replace("</", "<\\/"))


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
