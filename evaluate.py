"""From run folders to a table that one can defend; from raw results to their page.

    python evaluate.py table runs --out table       the benchmark's statistics
    python evaluate.py checkpoint RUN_DIR --videos  plays on with a trained policy
    python evaluate.py random                       what chance scores in each game
    python evaluate.py minatar                      the study minatar beside others
    python evaluate.py page                         results/README.md from raw files

An evaluation has an environment, a random stream and a tower state of its own, samples
the policy and remembers nothing: its score is the one that train.py ends with, over as
many episodes as asked for.

A raw result is a JSON file with the keys of HEADER, `wall_seconds` being a number or a
list with one for each run. It may have `summary`, a line, and `cores` and `gpus`, what
each run kept busy. The statistics are those of scores.py.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from csv import DictReader
from dataclasses import replace
from glob import glob
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import gymnasium
import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

import atari
from checkpoint import CheckpointError
from config import Config, UsageError
from game import make_env
from machine import commit, keep_compiled
from minatar_env import MinAtar
from minatar_env import make as make_minatar
from report import to_rgb
from run import Recording, evaluation, load_weights, place_of
from scores import markdown, read_agent, write
from studies import interval, shown

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
HEADER = ("command", "commit", "hardware", "seeds", "wall_seconds")
# What the page calls the published configuration, and where its raw file will be.
PUBLISHED = ("Atari100k, published configuration", "atari100k/aggregates.json")
FILM = 1_200  # pictures of a video at most; longer episodes show every n-th step
# The literature's random column (Mnih et al. 2015, methods): 30 episodes of an agent
# that chooses one of all 18 actions every 6th frame.
THEIRS = 30
PROTOCOLS: dict[str, dict[str, Any]] = {
    "here": {},
    "6 frames": {"frame_skip": 6},
}
PROBLEMS = (UsageError, CheckpointError, OSError, ValueError, ImportError)
RunDirs = tyro.conf.Positional[tuple[Path, ...]]
Picture = UInt8[np.ndarray, "height width 3"]


def picture(env: gymnasium.Env, obs: UInt8[np.ndarray, "h w c"]) -> Picture:
    """Atari as its console draws it; pixels of other games enlarged."""
    if isinstance(env, atari.Atari):
        return env.screens.max(axis=0)
    pixels = (255 * to_rgb(obs / 255)).round().astype(np.uint8)
    times = -(-160 // len(pixels))
    return pixels.repeat(times, 0).repeat(times, 1)


def pictures(config: Config, episode: Recording) -> Iterator[Picture]:
    """The episode once more, in colour whatever the agent sees."""
    env = make_env(replace(config, env=replace(config.env, gray=False)), 0)
    env.set_state(episode.start)
    every = -(-len(episode.actions) // FILM)
    for step, action in enumerate(episode.actions, 1):
        obs = env.step(action)[0]
        if step % every == 0 or step == len(episode.actions):
            yield picture(env, obs)


def write_video(path: Path, frames: Iterator[Picture]) -> None:
    """A GIF at about the game's speed: a step lasts 67 ms, a picture 70."""
    dither = Image.Dither.NONE
    first, *rest = (Image.fromarray(x).quantize(256, dither=dither) for x in frames)
    path.parent.mkdir(exist_ok=True)
    first.save(path, save_all=True, append_images=rest, duration=70, loop=0)


def checkpoint(run_dirs: RunDirs, *, episodes: int = 100, videos: bool = False) -> None:
    """Eval score of trained policies: RUN_DIR/evaluation.json.

    For weights runs/NAME/evaluation.json. `table` prefers that of a finished run.

    Args:
        run_dirs: run folders, or files of weights
        episodes: how many to play, policy sampled
        videos: GIFs of the best and the median episode, in pictures beside it
    """
    if episodes < 1 or not run_dirs:
        raise UsageError(f"--episodes {episodes}: give 1 or more, and some RUN_DIRS")
    keep_compiled()
    for path in run_dirs:
        config, learners = load_weights(path)
        stream = evaluation(config, tuple(learner.subactor for learner in learners))
        played = [next(stream) for _ in tqdm(range(episodes), desc=str(path))]
        returns = [episode.score for episode in played]
        mean, low, high = interval(returns)
        found = {
            "eval_score": mean,
            "interval": [low, high],
            "eval_returns": returns,
            "updates": [int(learner.updates) for learner in learners],
        }
        folder = place_of(path)
        (folder / "evaluation.json").write_text(json.dumps(found, indent=1))
        print(f"{path}: eval score {mean:.4g} [{low:.4g}, {high:.4g}]")
        order = np.argsort(returns, kind="stable") if videos else []
        for name, place in (("best", -1), ("median", (episodes - 1) // 2)):
            if len(order):
                film, which = folder / "pictures" / f"{name}.gif", int(order[place])
                write_video(film, pictures(config, played[which]))
                print(f"{film}: episode {which + 1}, return {returns[which]:g}")


def header(command: str, seeds: list[int], seconds: Any, hardware: str) -> dict:
    """HEADER of a raw result, measured by this version of the program."""
    values = (command, commit(), hardware, seeds, seconds)
    return dict(zip(HEADER, values, strict=True))


def table(
    run_dirs: RunDirs = (),
    *,
    out: Path | None = None,
    agent: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    score: Literal["eval", "train"] = "eval",
) -> None:
    """Table, aggregates and figures of Atari100k from finished runs.

    Args:
        run_dirs: run folders, or folders of them, of the agent "ours"
        out: folder for tables (Markdown, CSV), aggregates.json and PNG files
        agent: NAME=GLOB, another agent and its folders; may be repeated
        score: which score of result.json; the two are never mixed
    """
    folders = {"ours": list(run_dirs)} if run_dirs else {}
    for text in agent:
        name, _, pattern = text.partition("=")
        paths = [Path(x) for x in sorted(glob(pattern))]
        if not name or name in folders or set(name) & set(",|") or not paths:
            raise UsageError(
                f"--agent {text}: give NAME=GLOB, NAME new, GLOB of folders"
            )
        folders[name] = paths
    if not folders or out is None or out.is_file():
        what = f"--out {out}: is no folder" if folders else "RUN_DIRS: none given"
        raise UsageError(f"{what}; usage: evaluate.py table RUN_DIR ... --out DIR")
    agents = {x: read_agent(paths, score) for x, paths in folders.items()}
    runs = [run for found in agents.values() for run in found]
    words = [*map(str, run_dirs), *(f"--agent '{x}'" for x in agent), f"--out {out}"]
    command = " ".join(["python evaluate.py table", *words, f"--score {score}"])
    seeds, seconds = sorted({x.seed for x in runs}), [x.wall_seconds for x in runs]
    hardware = "; ".join(sorted({x.hardware for x in runs}))
    write(agents, out, header(command, seeds, seconds, hardware))


def chance(game: str, count: int, *, frame_skip: int = 4) -> dict[str, Any]:
    """Uniformly random play in the environment of training: returns and lengths."""
    env = atari.make(game, seed=0, frame_skip=frame_skip)
    black = env.observation()
    env.observation = lambda: black  # nobody looks
    return play_uniformly(env, count)


def play_uniformly(env: atari.Atari | MinAtar, count: int) -> dict[str, Any]:
    """Returns and lengths, in agent steps, of `count` episodes of random actions."""
    rng = np.random.default_rng(0)
    returns, lengths = [], []
    for _ in range(count):
        env.reset()
        total, steps, over = 0.0, 0, False
        while not over:
            _, reward, *ends, _ = env.step(rng.integers(len(env.actions)))
            total, steps, over = total + float(reward), steps + 1, any(ends)
        returns.append(total)
        lengths.append(steps)
    return {"actions": len(env.actions), "returns": returns, "lengths": lengths}


def apart(ours: list[float], theirs: float) -> float:
    """Standard errors between two means, if their THEIRS episodes spread like ours."""
    error = stdev(ours) * sqrt(1 / len(ours) + 1 / THEIRS)
    return abs(fmean(ours) - theirs) / max(error, 1e-9)


def verdict(played: dict[str, Any], game: str, theirs: float) -> str:
    """Where the literature's number lies, and what explains it if that is outside."""
    ours = played["here"][game]["returns"]
    _, low, high = interval(ours)
    if low <= theirs <= high:
        return "inside"
    if apart(ours, theirs) < 1.96:
        return f"within the error of their {THEIRS} episodes"
    others = {name: x[game]["returns"] for name, x in played.items() if game in x}
    fits = [name for name, x in others.items() if apart(x, theirs) < 1.96]
    return f"that of {' or '.join(fits)}" if fits else "unexplained"


def random_table(played: dict[str, Any]) -> tuple[str, str]:
    """A summary in one line; every game beside the literature's column."""
    text = lambda x: f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}"
    others, verdicts = [name for name in list(PROTOCOLS)[1:] if played[name]], []
    rows = [["game", "actions", "here [95 %]", "literature", *others, "literature is"]]
    for game, row in atari.scores().items():
        if one := played["here"].get(game):
            mean, low, high = map(text, interval(one["returns"]))
            measured = [played[name].get(game) for name in others]
            means = [text(fmean(x["returns"])) if x else "" for x in measured]
            theirs = row["random"]
            cells = [str(one["actions"]), f"{mean} [{low}, {high}]", text(theirs)]
            verdicts.append(verdict(played, game, theirs))
            rows.append([game, *cells, *means, verdicts[-1]])
    inside, open_ = verdicts.count("inside"), verdicts.count("unexplained")
    summary = f"of {len(verdicts)} games the literature's random score is inside our "
    summary += f"95 % interval in {inside}, outside and unexplained in {open_}"
    return summary, markdown(rows)


def random(
    games: tuple[str, ...] = ("all",),
    *,
    episodes: int = 100,
    out: Path = RESULTS / "random_baseline.json",
) -> None:
    """Random play in our environment beside the literature's: what is missing of it.

    A game in which the two differ is played again by the rules of PROTOCOLS, until one
    explains the difference.

    Args:
        games: names, or all
        episodes: of each game
        out: raw file; a table is written beside it
    """
    names = atari.GAMES if games == ("all",) else tuple(map(atari.find, games))
    raw = json.loads(out.read_text()) if out.exists() else {}
    if episodes < 2 or raw.get("episodes", episodes) != episodes:
        raise UsageError(f"--episodes {episodes}: give 2 or more, as many as in {out}")
    here = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    command = f"python evaluate.py random --episodes {episodes}"
    raw = header(command, [0], 0.0, here) | {"cores": 1, "episodes": episodes} | raw
    played = raw.setdefault("played", {protocol: {} for protocol in PROTOCOLS})
    literature = {game: row["random"] for game, row in atari.scores().items()}
    open_ = lambda game: verdict(played, game, literature[game]) == "unexplained"
    for protocol, options in PROTOCOLS.items():
        for game in tqdm(names, desc=protocol, unit="game"):
            if game in played[protocol] or (options and not open_(game)):
                continue
            began = time.monotonic()
            played[protocol][game] = chance(game, episodes, **options)
            raw["wall_seconds"] += round(time.monotonic() - began, 1)
            raw["summary"], text = random_table(played)
            out.with_suffix(".part").write_text(json.dumps(raw))
            out.with_suffix(".part").replace(out)
            out.with_suffix(".md").write_text(text)


def minatar(*, episodes: int = 1000, study: Path = RESULTS / "minatar.json") -> None:
    """MinAtar: random play here, the study's agents and a published figure.

    Args:
        episodes: of random play in each game
        study: what `python studies.py minatar` wrote; the table is written beside it
    """
    if episodes < 2:
        raise UsageError(f"--episodes {episodes}: give 2 or more")
    if not study.is_file():
        raise UsageError(f"--study {study}: not there, run python studies.py minatar")
    found, began = json.loads(study.read_text())["tasks"], time.monotonic()
    with open(ROOT / "data" / "minatar_scores.csv", newline="") as file:
        published = {row["game"]: row["published"] for row in DictReader(file)}
    arms = list(dict.fromkeys(arm for task in found.values() for arm in task))
    rows = [["game", "random", *arms, "PPO, 10,000,000 steps"]]
    played = {}
    for game, task in found.items():
        played[game] = play_uniformly(make_minatar(f"minatar/{game}", seed=0), episodes)
        scores = [[run["measured"] for run in task[arm]["runs"]] for arm in arms]
        cells = [f"{shown(x)} (n = {len(x)})" if x else "not run" for x in scores]
        rows.append([game, shown(played[game]["returns"]), *cells, published[game]])
    seconds = round(time.monotonic() - began, 1)
    here = f"{platform.processor() or platform.machine()}, one core"
    command = f"python evaluate.py minatar --episodes {episodes}"
    command += f" --study {os.path.relpath(study)}"
    means = [f"{game}: {shown(x['returns'])}" for game, x in played.items()]
    raw = header(command, [0], seconds, here) | {"cores": 1, "played": played}
    raw["summary"] = "random play, mean [95 %] over episodes: " + "; ".join(means)
    out = study.with_name(f"{study.stem}_scores.json")
    out.write_text(json.dumps(raw))
    out.with_suffix(".md").write_text(markdown(rows))


def duration(seconds: float) -> str:
    """For people: minutes up to two hours, then hours."""
    short = seconds < 7200
    return f"{seconds / 60:.1f} min" if short else f"{seconds / 3600:.1f} h"


def page_row(name: str, raw: dict[str, Any]) -> list[str]:
    """One raw result in the page's table; a dash for what it does not say."""
    many = lambda x: x if isinstance(x, list) else [x]
    seconds = [float(x) for x in many(raw["wall_seconds"]) if x is not None]
    kinds = {"core": raw.get("cores"), "GPU": raw.get("gpus")}
    times = ["-", "-"]
    if seconds:
        cost = [
            f"{fmean(seconds) / 3600 * number:.2g} {kind}-hours"
            for kind, number in kinds.items()
            if number
        ]
        each = f"{duration(fmean(seconds))}; {', '.join(cost) or 'cores not stated'}"
        times = [duration(sum(seconds)), each]
    cells = (
        *(name, raw.get("summary", "-"), raw["hardware"]),
        " ".join(map(str, many(raw["seeds"]))) or "-",
        *times,
        raw["commit"],
    )
    return [str(cell).replace("|", "/") for cell in cells]


def make_page(folder: Path) -> str:
    """The page of a results folder: a table, then command, tables, pictures of each."""
    head = ["result", "what came out", "hardware", "seeds", "wall time", "per run"]
    rows, parts, headless = [], [], []
    if not (folder / PUBLISHED[1]).exists():
        rows.append([PUBLISHED[0], "**not run**", "-", "-", "-", "-", "-"])
    files = sorted(folder.rglob("*.json"))
    stems = [path.with_suffix("").relative_to(folder).as_posix() for path in files]
    for path, stem in zip(files, stems, strict=True):
        raw, name = json.loads(path.read_text()), path.relative_to(folder).as_posix()
        if not isinstance(raw, dict) or not set(HEADER) <= set(raw):
            headless.append(name)
            continue
        title = PUBLISHED[0] if name == PUBLISHED[1] else name.removesuffix(".json")
        rows.append(page_row(f"[{title}]({name})", raw))
        parts.append(f"\n## {title}\n\n`{raw['command']}`\n")
        if path.with_suffix(".md").exists():
            parts.append("\n" + path.with_suffix(".md").read_text())
        longer = [x for x in stems if x != stem and x.startswith(stem)]
        for picture in sorted(folder.glob(f"{stem}*.png")):
            if picture.relative_to(folder).as_posix().startswith(tuple(longer)):
                continue
            parts.append(f"\n![{picture.stem}]({picture.relative_to(folder)})\n")
    text = (
        "# Results\n\nWritten by `python evaluate.py page` from the raw files beside "
    )
    text += (
        "it. Wall times are those of runs\nthat may have shared their machine; cost "
    )
    text += "is hours of what a run kept busy, without a price.\n\n"
    text += markdown([[*head, "commit"], *rows]).replace("---:", "---")
    without = f"\nWithout a header: {', '.join(headless)}.\n" if headless else ""
    return text + without + "".join(parts)


def page(folder: Path = RESULTS) -> None:
    """Writes README.md of a folder of raw results."""
    (folder / "README.md").write_text(make_page(folder))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input."""
    commands = {f.__name__: f for f in (table, checkpoint, random, minatar, page)}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, args=argv)
    except PROBLEMS as problem:
        print(f"evaluate.py: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
