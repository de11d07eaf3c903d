"""Small studies that two CPU cores can carry: arms × seeds, raw numbers, one figure.

    python studies.py catch --seeds 5       runs what is missing, then writes
        results/catch.json   command, commit, hardware, flags, every seed's curve
        results/catch.md     mean of the evaluation returns with 95 % interval
        results/catch.png    learning curves

Runs are ordinary run folders under runs/studies; one that was stopped is resumed, one
that is finished is read. Each run has one core to itself.
"""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Annotated

import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy.stats import bootstrap

STUDIES = {
    "catch": {
        "1 level": "--game catch --levels 1",
        "3 levels": "--game catch --levels 3",
    },
    "recall": {
        "S5": "--game recall --levels 1",
        "RSSM": "--game recall --levels 1 --world-model rssm",
    },
    "carry": {
        "stored": "--game recall --levels 1 --length 8 --env.delay 16",
        "zero": "--game recall --levels 1 --length 8 --env.delay 16 --carry zero",
    },
    "features": {
        "both": "--game catch --levels 1",
        "states": "--game catch --levels 1 --model.h-source states",
        "output": "--game catch --levels 1 --model.h-source output",
        "unscaled": "--game catch --levels 1 --model.no-scaled",
    },
    "breakout": {
        "1 level": "--game minatar/breakout --levels 1 --steps 20000",
        "3 levels": "--game minatar/breakout --levels 3 --steps 20000",
    },
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BINS = 40


def run_one(flags: str, folder: Path, core: int) -> None:
    """Trains one seed to its end on one core; does nothing if it is done."""
    if (folder / "result.json").exists():
        return
    command = [sys.executable, "train.py"]
    if (folder / "config.json").exists():
        command += ["--resume", str(folder)]
    else:
        command += [*flags.split(), "--run-dir", str(folder)]
    with open(f"{folder}.log", "a") as log:
        subprocess.run(
            command,
            stdout=log,
            stderr=log,
            check=True,
            cwd=Path(__file__).parent,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )


def run_all(jobs: list[tuple[str, Path]]) -> None:
    """All jobs, as many at once as there are cores."""
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def with_core(job):
        core = cores.get()
        try:
            run_one(*job, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(with_core, jobs))


def curve(folder: Path, steps: int) -> list[float | None]:
    """Mean return of the training episodes that end in each of `BINS` intervals."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = np.array([x["step"] for x in lines if "episode_return" in x])
    returns = np.array([x["episode_return"] for x in lines if "episode_return" in x])
    index = np.minimum((ends - 1) * BINS // steps, BINS - 1)
    parts = [returns[index == i] for i in range(BINS)]
    return [float(part.mean()) if len(part) else None for part in parts]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over seeds; no interval for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, mean, mean
    found = bootstrap((values,), np.mean, rng=0, method="percentile")
    low, high = found.confidence_interval
    return mean, float(low), float(high)


def draw(study: dict, path: Path) -> None:
    """Learning curves: mean over seeds, the range of seeds shaded."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, arm), colour in zip(study["arms"].items(), COLOURS, strict=False):
        curves = np.array([run["curve"] for run in arm["runs"]], float)
        steps = (np.arange(BINS) + 0.5) * arm["runs"][0]["steps"] / BINS
        kept = ~np.isnan(curves).all(0)
        steps, curves = steps[kept], curves[:, kept]
        axes.plot(steps, np.nanmean(curves, 0), color=colour, label=name)
        low, high = np.nanmin(curves, 0), np.nanmax(curves, 0)
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="agent steps", ylabel="return of training episodes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="mean; shaded: range of seeds")
    figure.savefig(path, dpi=130)


def table(study: dict) -> str:
    """Evaluation scores as Markdown, every seed shown."""
    rows = [
        "| arm | eval score, mean [95 %] | seeds | minutes per run |",
        "|---|---|---|---|",
    ]
    for name, arm in study["arms"].items():
        scores = [run["eval_score"] for run in arm["runs"]]
        mean, low, high = interval(scores)
        each = " ".join(f"{score:.2f}" for score in scores)
        minutes = np.median([run["wall_seconds"] for run in arm["runs"]]) / 60
        rows.append(
            f"| {name} | {mean:.2f} [{low:.2f}, {high:.2f}] | {each} | {minutes:.1f} |"
        )
    return "\n".join(rows) + "\n"


def header(study: dict) -> dict:
    """What results/README.md (evaluate.py page) says of a study."""
    runs = [run for arm in study["arms"].values() for run in arm["runs"]]
    scores = {
        name: interval([run["eval_score"] for run in arm["runs"]])
        for name, arm in study["arms"].items()
    }
    each = (
        f"{k} {x:.2f} [{low:.2f}, {high:.2f}]" for k, (x, low, high) in scores.items()
    )
    return {
        "seeds": sorted({run["seed"] for run in runs}),
        "wall_seconds": [run["wall_seconds"] for run in runs],
        "cores": 1,
        "summary": "eval score, mean [95 %] over seeds: " + ", ".join(each),
    }


def main(
    study: Annotated[str, tyro.conf.Positional],
    seeds: int = 5,
    out: Path = Path("results"),
) -> int:
    """Runs what is missing of a study and writes its results."""
    if study not in STUDIES:
        print(
            f"studies.py: {study} is unknown: choose {', '.join(STUDIES)}",
            file=sys.stderr,
        )
        return 2
    folders = {
        arm: [
            Path(f"runs/studies/{study}-{arm.replace(' ', '-')}-{s}")
            for s in range(seeds)
        ]
        for arm in STUDIES[study]
    }
    Path("runs/studies").mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    run_all(
        [
            (f"{STUDIES[study][arm]} --seed {seed}", folder)
            for seed in range(seeds)
            for arm, folder in ((arm, runs[seed]) for arm, runs in folders.items())
        ]
    )
    found = {
        "command": f"python studies.py {study} --seeds {seeds}",
        "commit": commit.stdout.strip(),
        "hardware": f"{platform.processor() or platform.machine()}, one core per run",
        "arms": {},
    }
    for arm, flags in STUDIES[study].items():
        runs = []
        for folder in folders[arm]:
            result = json.loads((folder / "result.json").read_text())
            kept = (
                "seed",
                "steps",
                "train_score",
                "eval_score",
                "wall_seconds",
                "updates",
            )
            runs.append(
                {k: result[k] for k in kept} | {"curve": curve(folder, result["steps"])}
            )
        found["arms"][arm] = {"flags": flags, "runs": runs}
    out.mkdir(exist_ok=True)
    found = header(found) | found
    (out / f"{study}.json").write_text(json.dumps(found, indent=1))
    (out / f"{study}.md").write_text(table(found))
    draw(found, out / f"{study}.png")
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
