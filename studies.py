"""Studies that two CPU cores can carry: tasks × arms × seeds, raw numbers, figures.

    python studies.py catch --seeds 5       runs what is missing, then writes
        results/catch.json   command, hardware, flags, every seed's numbers and curves
        results/catch.md     mean of the evaluation returns with 95 % interval
        results/catch.png    learning curves, or intervals where arms are many

`--report` starts nothing and writes what there is. Runs are ordinary run folders under
runs/studies, named by their flags, so that studies share them; one that was stopped is
resumed, one that is finished is read. Each run has one core to itself; what is not the
score is measured when all have ended. What `--out` has of the same settings and
measure, in any study's results, is kept and not run again, so that a study grows over
days and machines. To run all of it anew, give a new `--out` and move runs/studies away.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from queue import Queue
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import bootstrap

from game import read_lines
from instruments import goals_heeded
from machine import commit
from memory import MEASURES as MEMORY
from report import series
from train import parse

Values = Float[np.ndarray, " n"]
ROOT = Path(__file__).parent
RUNS = Path("runs/studies")
HEEDED = "policy moved by another goal"
MEASURES = MEMORY | {HEEDED: goals_heeded}


class Study(NamedTuple):
    """Flags of train.py by task and by arm; what is measured; losses to be drawn.

    `measure` is the evaluation score or one of MEASURES. `pictures` of each task's
    first run are kept beside the numbers.
    """

    tasks: dict[str, str]
    arms: dict[str, str]
    losses: tuple[str, ...] = ()
    measure: str = "eval score"
    pictures: tuple[str, ...] = ()

    def flags(self, task: str, arm: str) -> str:
        return f"{self.tasks[task]} {self.arms[arm]}"


LEVELS = {"1 level": "--levels 1", "3 levels": "--levels 3"}
MODELS = {"S5": "--levels 1", "RSSM": "--levels 1 --world-model rssm"}
SMALL = {
    "Breakout": "--game minatar/breakout --steps 10000",
    "Space Invaders": "--game minatar/space_invaders --steps 10000",
    "catch": "--game catch --steps 10000",
    "recall": "--game recall --steps 15000 --updates-per-step 1",
}
# The same number of updates for every delay: more steps, fewer updates for each.
RECALL = {
    "D = 10": SMALL["recall"],
    "D = 30": "--game recall --steps 30000 --updates-per-step 0.5 --env.delay 30",
    "D = 100": "--game recall --steps 60000 --updates-per-step 0.25 --env.delay 100",
    "D = 300": "--game recall --steps 120000 --updates-per-step 0.125 --env.delay 300",
}
# Do windows that begin before the cue help, or only more updates?
LONG = "--game recall --steps 40000 --updates-per-step 1 --env.delay 100"
LONGER = "--game recall --steps 80000 --updates-per-step 0.75 --env.delay 300"
WINDOWS = {
    "D = 100, T = 32": LONG,
    "D = 100, T = 128": f"{LONG} --length 128 --batch 2",
    "D = 300, T = 320": f"{LONGER} --length 320 --batch 1",
}
WEIGHTS = {
    "goals weigh 0": "--levels 3 --trainer.reward-weights 1 0 0.1",
    "goals weigh 1": "--levels 3 --trainer.reward-weights 1 1 0.1",
    "goals weigh 3": "--levels 3 --trainer.reward-weights 1 3 0.1",
    "the game's reward weighs 0": "--levels 3 --trainer.reward-weights 0 1 0.1",
}
CUE = "--game cue --steps {} --updates-per-step 1 --eval-episodes 1 "
GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
MINATAR = {game: f"--game minatar/{game}" for game in GAMES}
STUDIES = {
    "catch": Study({"catch": SMALL["catch"]}, LEVELS),
    "recall": Study(RECALL, MODELS),
    "carry": Study(
        {"T = 8, D = 16": CUE.format(18000) + "--levels 1 --length 8 --env.delay 16"},
        {"stored": "--carry stored", "zero": "--carry zero"},
        ("loss_reward",),
        measure="rewards foreseen",
    ),
    "memory": Study(
        {f"T = 32, D = {D}": CUE.format(6000) + f"--env.delay {D}" for D in (10, 100)},
        MODELS,
        measure="cue read from the state",
    ),
    "windows": Study(WINDOWS, MODELS),
    "pinpad": Study({"pinpad": "--game pinpad --steps 30000"}, LEVELS),
    "goals": Study(
        {"pinpad": "--game pinpad --steps 10000"},
        {
            "1 level": "--levels 1",
            "3 levels, as they are": "--levels 3",
            "code KL weight 0.5": "--levels 3 --trainer.code-kl-scale 0.5",
            "goals never end": "--levels 3 --trainer.goal-discount 1",
            "both": "--levels 3 --trainer.code-kl-scale 0.5 --trainer.goal-discount 1",
            "plain symlog(h) as goal": "--levels 3 --trainer.no-standardise",
        }
        | WEIGHTS,
    ),
    "heeded": Study(
        {"pinpad": "--game pinpad --steps 10000", "Breakout": SMALL["Breakout"]},
        {"3 levels, as they are": "--levels 3"} | WEIGHTS,
        measure=HEEDED,
    ),
    "minatar": Study(MINATAR, LEVELS),
    "breakout": Study(
        {"Breakout": MINATAR["breakout"]},
        LEVELS
        | {
            "3 levels, goals weigh 0": WEIGHTS["goals weigh 0"],
            "1 level, actor's rate 3e-4": "--levels 1 --trainer.actor-critic-lr 3e-4",
            "3 levels, actor's rate 3e-4": "--levels 3 --trainer.actor-critic-lr 3e-4",
        },
    ),
    "entropy": Study(
        MINATAR,
        {
            "η = 0.001": "--levels 1",
            "η = 0.003": "--levels 1 --trainer.entropy-scale 3e-3",
        },
    ),
    "atari": Study(
        {game: f"--game {game} --steps 50000" for game in ("Pong", "Krull")},
        {"3 levels": "--preset cpu --levels 3 --eval-episodes 20"},
        pictures=("open_loop.png",),
    ),
    "losses": Study(SMALL, MODELS, ("loss_observation", "loss_reward", "kl")),
    "ablations": Study(
        SMALL,
        {
            "as it is, 1 level": "--levels 1",
            "2 levels": "--levels 2",
            "3 levels": "--levels 3",
            "3 levels, plain symlog(h) as goal": "--levels 3 --trainer.no-standardise",
            "RSSM": "--levels 1 --world-model rssm",
            "h from states": "--levels 1 --model.h-source states",
            "h from output": "--levels 1 --model.h-source output",
            "states unscaled": "--levels 1 --model.no-scaled",
            "uniform sampling": "--levels 1 --sampler uniform",
            "balanced sampling": "--levels 1 --sampler balanced",
            "carry zero": "--levels 1 --carry zero",
            "returns as they are": "--levels 1 --trainer.no-normalise-returns",
        },
    ),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BINS = 40
KEPT = [
    "seed",
    "steps",
    "train_score",
    "eval_score",
    "wall_seconds",
    "updates",
    "hardware",
]


def folder_of(flags: str, seed: int) -> Path:
    """Where a run lives: equal flags, equal folder."""
    words = flags.replace("--", "").replace("/", "-").replace(".", "-").split()
    return RUNS / "-".join([*words, str(seed)])


@cache
def settings_of(flags: str) -> dict[str, Any]:
    """What these flags mean today, of any seed, as JSON has it. Not to be changed."""
    return without_seed(json.loads(json.dumps(asdict(parse(flags.split())))))


def without_seed(config: dict[str, Any]) -> dict[str, Any]:
    """Settings less those in which runs of one arm differ."""
    return {k: v for k, v in config.items() if k not in ("seed", "run_dir")}


def is_as_asked(flags: str, seed: int) -> bool:
    """Does a run's folder hold the settings that these flags mean today?"""
    saved = json.loads((folder_of(flags, seed) / "config.json").read_text())
    return without_seed(saved) == settings_of(flags)


def known_runs(
    study: Study, all_flags: list[str], out: Path
) -> dict[str, dict[int, dict]]:
    """For all flags the runs of the same settings and measure under `out`, by seed."""
    known: dict[str, dict[int, dict]] = {flags: {} for flags in all_flags}
    for name, other in STUDIES.items():
        path = out / f"{name}.json"
        if other.measure != study.measure or not path.exists():
            continue
        tasks = json.loads(path.read_text())["tasks"].values()
        for arm in (arm for arms in tasks for arm in arms.values()):
            whole = [x for x in arm["runs"] if set(study.losses) <= set(x["losses"])]
            for flags, runs in known.items():
                if arm.get("settings") == settings_of(flags):
                    runs.update((x["seed"], x) for x in whole)
    return known


def runs_lost(path: Path, known: dict[str, dict[int, dict]]) -> list[str]:
    """Arms of which a study's results hold runs that are not known any more."""
    found = json.loads(path.read_text())["tasks"] if path.exists() else {}
    return [
        f"{task}, {arm}"
        for task, arms in found.items()
        for arm, content in arms.items()
        if {x["seed"] for x in content["runs"]} - set(known.get(content["flags"], {}))
    ]


def run_one(flags: str, seed: int, core: int) -> None:
    """Trains one seed to its end on one core; does nothing if it is done."""
    folder = folder_of(flags, seed)
    if (folder / "result.json").exists():
        return
    command = [sys.executable, str(ROOT / "train.py")]
    if (folder / "config.json").exists():
        command += ["--resume", str(folder)]
    else:
        command += [*flags.split(), "--seed", str(seed), "--run-dir", str(folder)]
    with open(f"{folder}.log", "a") as log:
        print(f"commit {commit()}", file=log, flush=True)
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            os.sched_setaffinity(process.pid, {core})
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def run_all(jobs: list[tuple[str, int]]) -> list[Path]:
    """All runs, as many at once as there are cores; folders of those that failed."""
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def with_core(job):
        core = cores.get()
        try:
            run_one(*job, core)
        except subprocess.CalledProcessError:
            return folder_of(*job)
        finally:
            cores.put(core)
        return None

    with ThreadPoolExecutor(cores.qsize()) as pool:
        return [folder for folder in pool.map(with_core, jobs) if folder]


def binned(steps: Values, values: Values, total: int) -> list[float | None]:
    """Means of what fell into each of `BINS` intervals of a run of `total` steps."""
    index = np.minimum((steps - 1) * BINS // total, BINS - 1)
    parts = [values[index == i] for i in range(BINS)]
    return [float(part.mean()) if len(part) else None for part in parts]


def read_run(study: Study, flags: str, seed: int) -> dict | None:
    """What is kept of one run; None if it is not finished."""
    folder = folder_of(flags, seed)
    if not (folder / "result.json").exists():
        return None
    result = json.loads((folder / "result.json").read_text())
    lines = read_lines(folder)

    curve = lambda key: binned(*series(lines, key).T, result["steps"])
    log = Path(f"{folder}.log").read_text(errors="replace").splitlines()
    commits = [x.split()[1] for x in log if x.startswith("commit ")]
    if study.measure == "eval score":
        measured = result["eval_score"]
    else:
        measured = MEASURES[study.measure](folder)
        commits.append(commit())
    return {key: result[key] for key in KEPT} | {
        "measured": measured,
        "commits": list(dict.fromkeys(commits)),
        "curve": curve("episode_return"),
        "losses": {name: curve(f"level0/{name}") for name in study.losses},
    }


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over seeds, NaN for a single seed.

    Of few seeds it is too narrow: of three it is the range.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    found = bootstrap((values,), np.mean, rng=0, method="percentile")
    low, high = found.confidence_interval
    return mean, float(low), float(high)


def shown(values: list[float]) -> str:
    """Mean [interval], without the interval where one seed gives none."""
    mean, low, high = interval(values)
    return f"{mean:.2f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")


def cells(found: dict) -> Iterator[tuple[str, str, list[dict]]]:
    """Task, arm and finished runs."""
    for task, arms in found["tasks"].items():
        for arm, content in arms.items():
            yield task, arm, content["runs"]


def mean_return(run: dict) -> float:
    """In training, from first to last step: tells who learned sooner."""
    return float(np.mean([x for x in run["curve"] if x is not None]))


def draw_curves(axes: Axes, curves: dict[str, list], steps: int, ylabel: str) -> None:
    """Means over seeds per arm, their 95 % intervals shaded."""
    for (arm, values), colour in zip(curves.items(), COLOURS, strict=False):
        if not values:
            continue
        seeds = np.array(values, float)
        kept = ~np.isnan(seeds).all(0)
        if not kept.any():
            continue
        x = ((np.arange(BINS) + 0.5) * steps / BINS)[kept]
        bands = [interval(list(y[~np.isnan(y)])) for y in seeds[:, kept].T]
        mean, low, high = np.array(bands).T
        axes.plot(x, mean, color=colour, label=arm)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="agent steps", ylabel=ylabel)
    axes.locator_params(axis="x", nbins=4)
    axes.spines[["top", "right"]].set_visible(False)


def draw_intervals(axes: Axes, scores: dict[str, list[float]], xlabel: str) -> None:
    """What was measured per arm: mean, 95 % interval, every seed as a dot."""
    for row, values in enumerate(scores.values()):
        if values:
            mean, low, high = interval(values)
            axes.plot([low, high], [row, row], color=COLOURS[0], linewidth=2)
            axes.plot(mean, row, "o", color=COLOURS[0])
            axes.plot(values, [row] * len(values), ".", color="#999999", markersize=3)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set(xlabel=xlabel, ylim=(len(scores) - 0.5, -0.5))
    if xlabel in MEASURES:  # shares
        axes.set_xlim(0, 1.03)
    if xlabel in MEMORY:  # half is chance
        axes.axvline(0.5, color="#999999", linewidth=1, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)


def draw(found: dict, path: Path) -> None:
    """A column per task: losses, learning curves, or intervals of many arms."""
    all_tasks = found["tasks"]
    begun = {x: y for x, y in all_tasks.items() if any(a["runs"] for a in y.values())}
    tasks = begun or all_tasks
    measure = found["measure"]
    scored = measure == "eval score"
    many = not scored or max(map(len, tasks.values())) > len(COLOURS)
    losses = [] if many else found["losses"]
    rows, n = 2 if many and scored else max(1, len(losses)), len(tasks)
    width, height = (3.2, 3.0) if n > 1 else (6.4, 3.9)
    if many:
        height = 1.1 + 0.24 * max(map(len, tasks.values()))
    figure = Figure(figsize=(width * n + 1.5 * many, height * rows))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, n, squeeze=False, sharey="row" if many else False)
    for column, (task, arms) in zip(panels.T, tasks.items(), strict=True):
        runs = {arm: content["runs"] for arm, content in arms.items()}
        steps = next((each[0]["steps"] for each in runs.values() if each), 1)
        column[0].set_title(task, fontsize=10)
        for axes, name in zip(column, losses, strict=False):
            curves = {arm: [x["losses"][name] for x in xs] for arm, xs in runs.items()}
            draw_curves(axes, curves, steps, name.replace("_", " "))
            axes.set_yscale("log")
        if many:
            scores = {arm: [x["measured"] for x in xs] for arm, xs in runs.items()}
            draw_intervals(column[0], scores, measure)
            if scored:
                returns = {arm: list(map(mean_return, xs)) for arm, xs in runs.items()}
                draw_intervals(column[1], returns, "mean return in training")
        elif not losses:
            curves = {arm: [x["curve"] for x in xs] for arm, xs in runs.items()}
            draw_curves(column[0], curves, steps, "return in training")
    for axes in panels[:, 1:].flat:
        axes.set_ylabel("")
    lines = {line.get_label(): line for axes in panels.flat for line in axes.lines}
    if lines and not many:
        title = "mean over seeds, 95 % interval from two on"
        figure.legend(
            lines.values(),
            lines.keys(),
            loc="outside lower center",
            ncols=min(len(lines), 2 + n),
            frameon=False,
            title=title,
        )
    figure.savefig(path, dpi=130)


def table(found: dict) -> str:
    """Evaluation scores as Markdown, every seed shown, missing seeds too."""
    measure = f"{found['measure']}, mean [95 %]"
    head = ("task", "arm", measure, "each seed", "mean return in training", "minutes")
    rows = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    for task, arm, runs in cells(found):
        missing = len(set(range(found["seeds_asked"])) - {x["seed"] for x in runs})
        each = " ".join(f"{run['measured']:.2f}" for run in runs)
        each += f" ({missing} missing)" if missing else ""
        score, whole, minutes = "", "", ""
        if runs:
            score = shown([run["measured"] for run in runs])
            whole = shown(list(map(mean_return, runs)))
            minutes = f"{np.median([run['wall_seconds'] for run in runs]) / 60:.1f}"
        rows.append(f"| {task} | {arm} | {score} | {each} | {whole} | {minutes} |")
    return "\n".join(rows) + "\n"


def header(found: dict) -> dict[str, Any]:
    """What results/README.md (evaluate.py page) says of a study."""
    all_runs = [run for _, _, runs in cells(found) for run in runs]
    phrases = []
    for task, arm, runs in cells(found):
        if runs:
            phrases.append(f"{task}, {arm}: {shown([r['measured'] for r in runs])}")
    commits = dict.fromkeys(c for run in all_runs for c in run["commits"])
    hardware = dict.fromkeys(run["hardware"] for run in all_runs)
    return {
        "commit": ", ".join(commits),
        "hardware": f"{'; '.join(hardware)}, one core per run",
        "seeds": sorted({run["seed"] for run in all_runs}),
        "wall_seconds": [run["wall_seconds"] for run in all_runs],
        "cores": 1,
        "summary": f"{found['measure']}, mean [95 %] over seeds: " + "; ".join(phrases),
    }


def main(
    study: Annotated[str, tyro.conf.Positional],
    seeds: int = 5,
    report: bool = False,
    out: Path = Path("results"),
) -> int:
    """Runs what is missing of a study and writes its results.

    Seeds that the results in `out` have of the same settings are not missing.

    Args:
        study: One of those that this file lists.
        seeds: Runs of every arm on every task.
        report: Starts nothing, only writes what there is.
        out: Folder of the results.
    """
    if study not in STUDIES:
        print(
            f"studies.py: {study} is unknown: choose {', '.join(STUDIES)}",
            file=sys.stderr,
        )
        return 2
    asked = STUDIES[study]
    arms = [(x, y, asked.flags(x, y)) for x in asked.tasks for y in asked.arms]
    known = known_runs(asked, [flags for _, _, flags in arms], out)
    jobs = [(x, i) for i in range(seeds) for x in known if i not in known[x]]
    for job in jobs:
        if (folder_of(*job) / "config.json").exists() and not is_as_asked(*job):
            print(
                f"studies.py: {folder_of(*job)} is of other settings: move it away",
                file=sys.stderr,
            )
            return 2
    path = out / f"{study}.json"
    if lost := runs_lost(path, known):
        print(
            f"studies.py: {path} has runs of other settings ({', '.join(lost)}): "
            "move it away or give another --out",
            file=sys.stderr,
        )
        return 2
    failed = []
    if not report:
        RUNS.mkdir(parents=True, exist_ok=True)
        failed = run_all(jobs)
    found = {
        "command": f"python studies.py {study} --seeds {seeds}",
        "seeds_asked": seeds,
        "losses": asked.losses,
        "measure": asked.measure,
        "tasks": {task: {} for task in asked.tasks},
    }
    for task, arm, flags in arms:
        read = {i: read_run(asked, x, i) for x, i in jobs if x == flags}
        runs = known[flags] | {seed: run for seed, run in read.items() if run}
        found["tasks"][task][arm] = {
            "flags": flags,
            "settings": settings_of(flags),
            "runs": [runs[seed] for seed in sorted(runs)],
        }
    found = header(found) | found
    out.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1))
    (out / f"{study}.md").write_text(table(found))
    draw(found, out / f"{study}.png")
    for task, arms in found["tasks"].items():
        first = next(iter(arms.values()))
        for name in asked.pictures if first["runs"] else ():
            folder = folder_of(first["flags"], first["runs"][0]["seed"])
            if folder.exists():  # otherwise kept from before, picture and all
                shutil.copy(folder / "pictures" / name, out / f"{study}_{task}_{name}")
    print(table(found), end="")
    for folder in failed:
        print(f"studies.py: failed, see {folder}.log", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
