"""The statistics of Atari100k: what a set of runs allows one to claim, with intervals.

    HNS = (score - random) / (human - random)                            (SC 1)
    mean, median = over games, of the mean over a game's runs            (SC 2)
    IQM = mean of the middle half of all runs                            (SC 3)
    optimality gap = mean over all runs of max(0, 1 - HNS)               (SC 4)
    profile(τ) = fraction of all runs with HNS > τ                       (SC 5)
    P(X > Y) = mean over games and pairs of runs of [x > y] + ½ [x = y]  (SC 6)
    interval = 2.5 to 97.5 % over redraws of every game's own runs       (SC 7)
    curve(s) = IQM with, as scores, the mean return of the episodes that
      ended in the tenth of the budget before s, else of the last one    (SC 8)

A run without a score is NaN, and so is a statistic of a set of games while one of them
has no run. Sets: "25" (the paper's, without UpNDown), "26" and, if it is neither of the
two, "played" (by every agent). The papers' columns lack UpNDown: no aggregate over 26.

Agarwal et al., "Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021.
Axes: R replicates, G games, N and M seeds of two agents, T thresholds τ.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.random import Generator
from scipy.stats import trim_mean

import atari
from config import UsageError

RETURN = "episode_return"  # the entry of metrics.jsonl with the return of an episode
TAU = np.linspace(0.0, 8.0, 161)
AGGREGATES = ("mean", "median", "IQM", "optimality gap")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
Value = float | Float[np.ndarray, "..."]
Matrix = Float[np.ndarray, "... G N"]
Table = dict[str, dict[str, float]]


def human_normalised(score: Value, random: Value, human: Value) -> Value:
    """0 plays like random, 1 like the human reference; human ≠ random. (SC 1)"""
    return (score - random) / (human - random)  # (SC 1)


def per_game(hns: Matrix) -> Float[np.ndarray, "... G"]:
    """Mean over the runs that a game has, NaN if it has none. (SC 2)"""
    runs = (~np.isnan(hns)).sum(-1)
    return np.where(runs > 0, np.nansum(hns, -1) / np.maximum(runs, 1), np.nan)


def all_runs(hns: Matrix) -> Float[np.ndarray, "... runs"]:
    """Runs of all games, absent alike in every replicate; NaN if a game has none."""
    present = ~np.isnan(hns.reshape(-1, *hns.shape[-2:])[0])
    complete = present.any(-1).all()
    return hns[..., present] if complete else np.full((*hns.shape[:-2], 1), np.nan)


def aggregates(hns: Matrix) -> Float[np.ndarray, "... 4"]:
    """AGGREGATES in their order; all in units of the human's lead over random."""
    games, runs = per_game(hns), all_runs(hns)
    mean, median = games.mean(-1), np.median(games, -1)  # (SC 2)
    iqm = trim_mean(runs, 0.25, axis=-1)  # (SC 3)
    gap = np.maximum(0.0, 1.0 - runs).mean(-1)  # (SC 4)
    return np.stack([mean, median, iqm, gap], -1)


def profile(hns: Matrix) -> Float[np.ndarray, "... T"]:
    """Fraction of runs above each threshold of TAU. (SC 5)"""
    runs = all_runs(hns)  # 0 * runs carries NaN over
    return np.stack([(0 * runs + (runs > x)).mean(-1) for x in TAU], -1)  # (SC 5)


def improvement(x: Matrix, y: Float[np.ndarray, "... G M"]) -> Value:
    """Chance that a run of x beats one of y in the same game, ties half. (SC 6)"""
    wins = (np.sign(x[..., :, None] - y[..., None, :]) + 1) / 2  # (SC 6)
    return per_game(wins.reshape(*wins.shape[:-2], -1)).mean(-1)


def resample(hns: Matrix, reps: int, rng: Generator) -> Float[np.ndarray, "R G N"]:
    """Redraws of each game's runs, at least one; NaN stays in place. (SC 7)"""
    replicates = np.full((reps, *hns.shape), np.nan)
    for game, row in enumerate(hns):
        runs = row[~np.isnan(row)]
        draw = rng.integers(runs.size, size=(reps, runs.size))
        replicates[:, game, ~np.isnan(row)] = runs[draw]
    return replicates


def estimate(
    statistic: Callable, *hns: Float[np.ndarray, "G _"], reps: int = 2000, seed: int = 0
) -> Float[np.ndarray, "3 ..."]:
    """[statistic(*hns), low, high], one matrix per agent; redraws are seeded. (SC 7)"""
    point = statistic(*hns)
    # one run redrawn shows no spread: no interval rather than one of width zero
    if any(((~np.isnan(x)).sum(-1) < 2).any() for x in hns):
        return np.stack([point, point * math.nan, point * math.nan])
    rng = np.random.default_rng(seed)
    draws = statistic(*(resample(x, reps, rng) for x in hns))
    return np.stack([point, *np.percentile(draws, [2.5, 97.5], axis=0)])  # (SC 7)


class Result(NamedTuple):
    """One seed of an agent on one game; scores in game points, steps of 4 frames."""

    game: str
    seed: int
    score: float  # NaN if the run was not scored
    preset: str = ""
    steps: int = 0  # the budget
    returns: tuple[tuple[float, float], ...] = ()  # (step of an episode's end, return)
    hardware: str = "not stated"
    wall_seconds: float = math.nan


def read_result(path: Path, kind: str) -> Result:
    """From result.json (`kind` of score) and metrics.jsonl if any; else UsageError.

    evaluation.json of as many updates (evaluate.py checkpoint) stands above its own.
    """
    metrics, later = path.with_name("metrics.jsonl"), path.with_name("evaluation.json")
    try:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        logged = [json.loads(line) for line in lines]
        ends = ((float(x["step"]), float(x[RETURN])) for x in logged if RETURN in x)
        x = json.loads(path.read_text())
        again = json.loads(later.read_text()) if later.exists() else {}
        x |= again if again and again.get("updates") == x["updates"] else {}
        score = math.nan if x[f"{kind}_score"] is None else float(x[f"{kind}_score"])
        budget = str(x["preset"]), int(x["steps"])
        cost = x.get("hardware", "not stated"), float(x.get("wall_seconds", "nan"))
        return Result(
            str(x["game"]), int(x["seed"]), score, *budget, tuple(ends), *cost
        )
    except (KeyError, OSError, OverflowError, TypeError, ValueError) as error:
        what = f"no usable result.json, metrics.jsonl ({error!r}); give finished runs"
        raise UsageError(f"{path.parent}: {what}") from None


def read_agent(folders: list[Path], kind: str) -> list[Result]:
    """Every run in or below the folders. UsageError if none, twice, or not alike."""
    runs: dict[tuple, Result] = {}
    for folder in folders:
        for path in sorted(folder.rglob("result.json")) or [folder / "result.json"]:
            run = read_result(path, kind)
            if run.game not in atari.GAMES:
                raise UsageError(f"{path}: no Atari100k game: {run.game}; leave it out")
            other = runs.get(run[:2]) or next(iter(runs.values()), run)
            if run[:2] in runs or run[3:5] != other[3:5]:
                raise UsageError(f"{path}: {run[:5]} vs {other[:5]}: needs own --agent")
            runs[run[:2]] = run
    return list(runs.values())


def as_of(run: Result, tenth: int) -> Result:
    """With its train score after some tenths of the budget; NaN if none yet. (SC 8)"""
    ended = [(at, x) for at, x in run.returns if at <= run.steps * tenth / 10]
    window = [x for at, x in ended if at > run.steps * (tenth - 1) / 10]  # (SC 8)
    score = np.mean(window or [x for _, x in ended[-1:]] or math.nan)
    return run._replace(score=float(score))


def hns_matrix(runs: list[Result], reference: Table) -> Float[np.ndarray, "G N"]:
    """Rows as the reference's games, seeds ascending, NaN missing."""
    games, seeds = list(reference), sorted({run.seed for run in runs})
    matrix = np.full((len(games), len(seeds)), np.nan)
    for run in runs:
        row = reference[run.game]
        hns = human_normalised(run.score, row["random"], row["human"])
        matrix[games.index(run.game), seeds.index(run.seed)] = hns
    return matrix


def summarise(agents: dict[str, list[Result]], reference: Table) -> dict[str, Any]:
    """Every statistic per set of games, as `estimate` gives it; HNS as fractions.

    {set: {"games": [...], "rows": {agent or paper: {each of AGGREGATES, "profile" at
    "tau", "curve" at "steps", "scores": how many, "missing": [games]}}, "improvement":
    {"X > Y": ...}}}. A paper gives means per game, not runs: only mean and median.
    """
    names, summary, papers = np.array(list(reference)), {}, {}
    for column in list(reference[names[0]])[2:]:
        means = [Result(game, 0, row[column]) for game, row in reference.items()]
        papers[f"{column} (paper)"] = means
    hns = {x: hns_matrix(runs, reference) for x, runs in (agents | papers).items()}
    played = np.all([~np.isnan(hns[name]).all(-1) for name in agents], axis=0)
    sets = {"25": names != "UpNDown", "26": names != ""}
    if played.any() and not any((played == chosen).all() for chosen in sets.values()):
        sets["played"] = played
    for label, chosen in sets.items():
        games, rows, wins = names[chosen], {}, {}
        for name, x in ((name, x[chosen]) for name, x in hns.items()):
            known = AGGREGATES if name in agents else AGGREGATES[:2]
            rows[name] = dict(zip(known, estimate(aggregates, x).T, strict=False))
            rows[name]["scores"] = int((~np.isnan(x)).sum())
            rows[name]["missing"] = games[np.isnan(x).all(-1)].tolist()
        for name, runs in agents.items():
            past = [[as_of(run, tenth) for run in runs] for tenth in range(1, 11)]
            past = [hns_matrix(then, reference)[chosen] for then in past]
            curve = np.stack([estimate(aggregates, x) for x in past], 1)
            rows[name]["curve"] = curve[..., AGGREGATES.index("IQM")]
            rows[name]["steps"] = runs[0].steps * np.arange(1, 11) / 10
            rows[name] |= {"tau": TAU, "profile": estimate(profile, hns[name][chosen])}
        for x, y in combinations(agents, 2):
            wins[f"{x} > {y}"] = estimate(improvement, hns[x][chosen], hns[y][chosen])
        summary[label] = {"games": games.tolist(), "rows": rows, "improvement": wins}
    return summary


def show(point: float, low: float = math.nan, high: float = math.nan) -> str:
    """For people: a number, its interval if there is one; NaN is "missing"."""
    interval = "" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]"
    return "missing" if math.isnan(point) else f"{point:.1f}{interval}"


def per_game_rows(agents: dict[str, list[Result]], reference: Table) -> list[list[str]]:
    """Header, then a row per game: the reference's columns, then three per agent."""
    head = [f"{name}{x}" for name in agents for x in ("", " HNS %", " seeds")]
    rows = [["game", *next(iter(reference.values())), *head]]
    for game, row in reference.items():
        rows.append([game, *map(show, row.values())])
        for runs in agents.values():
            mine = [run.score for run in runs if run.game == game]
            scores = [score for score in mine if not math.isnan(score)]
            score = float(np.mean(scores or math.nan))
            hns = 100 * float(human_normalised(score, row["random"], row["human"]))
            seeds = f"{len(scores)}/{len({run.seed for run in runs})}"
            rows[-1] += [show(score), show(hns), seeds]
    return rows


def aggregate_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per set of games and agent or paper; HNS in percent."""
    rows = [["games", "agent", "scores", *(f"{k} %" for k in AGGREGATES), "missing"]]
    for label, part in summary.items():
        for name, row in part["rows"].items():
            cells = [show(*100 * row[k]) if k in row else "-" for k in AGGREGATES]
            gone = ", ".join(row["missing"][:3]) + " ..." * (len(row["missing"]) > 3)
            rows.append([label, name, str(row["scores"]), *cells, gone])
    return rows


def draw_intervals(axes: Axes, rows: dict[str, Any], xlabel: str) -> None:
    """First on top: bar = interval, stroke = point, grey without interval; percent."""
    for y, estimated in enumerate(rows.values()):
        point, low, high = 100 * estimated
        colour = "grey" if math.isnan(low) else COLOURS[y % len(COLOURS)]
        axes.plot([low, high], [y, y], c=colour, alpha=0.4, lw=9, solid_capstyle="butt")
        axes.plot(point, y, "|", color=colour, ms=11, mew=2.5)
        if math.isnan(point):
            centre = {"ha": "center", "va": "center", "color": "grey"}
            axes.text(0.5, y, "missing", transform=axes.get_yaxis_transform(), **centre)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)


def draw_curves(axes: Axes, rows: dict[str, Any], x: str, y: str) -> None:
    """A line and its 95 % band for every row that has entries x and y; y in percent."""
    for i, (name, row) in enumerate((k, row) for k, row in rows.items() if y in row):
        point, low, high = 100 * row[y]
        colour, dash = COLOURS[i % len(COLOURS)], ("-", "--", "-.", ":")[i % 4]
        axes.plot(row[x], point, dash, color=colour, label=name)
        axes.fill_between(row[x], low, high, color=colour, alpha=0.2, lw=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw(part: dict[str, Any], out: Path, label: str) -> None:
    """PNG files of one set of games of `summarise`, named by what they show."""
    rows, wins = part["rows"], part["improvement"]
    figures = defaultdict(lambda: Figure((9, 4.5), dpi=110, layout="constrained"))
    for i, kind in enumerate(AGGREGATES):
        of = {name: row[kind] for name, row in rows.items() if kind in row}
        axes = figures["aggregates"].add_subplot(2, 2, i + 1)
        draw_intervals(axes, of, f"{kind} of HNS (%)")
    axes = figures["profile"].add_subplot(ylabel="runs with HNS above τ (%)")
    draw_curves(axes, rows, "tau", "profile")
    axes.set(xlabel="threshold τ (1 = human)", xlim=(0, TAU[-1]))
    if any((row["curve"] > -np.inf).any() for row in rows.values() if "curve" in row):
        axes = figures["efficiency"].add_subplot(xlabel="agent steps (4 frames each)")
        draw_curves(axes, rows, "steps", "curve")
        axes.set(ylabel="IQM of training HNS (%)")
    if wins:
        axes = figures["improvement"].add_subplot(xlim=(-2, 102))
        draw_intervals(axes, wins, "P(a run of X scores above one of Y) (%)")
        axes.axvline(50, color="black", ls=":")
    for name, figure in figures.items():
        figure.suptitle(f"{len(part['games'])} game(s), 95 % interval; human = 100 %")
        figure.savefig(out / f"{name}_{label}.png")


def markdown(rows: list[list[str]]) -> str:
    """A header and its rows as a table; all but the first column to the right."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    lines = [f"| {' | '.join(cells)} |\n" for cells in (rows[0], rule, *rows[1:])]
    return "".join(lines)


def write(agents: dict[str, list[Result]], out: Path, header: dict[str, Any]) -> None:
    """table.md, table.csv, aggregates.csv, aggregates.json (NaN → null) with `header`
    in front; figures of every set of games that no agent misses one of."""
    reference = atari.scores()
    summary, rows = summarise(agents, reference), per_game_rows(agents, reference)
    tables = {"table": rows, "aggregates": aggregate_rows(summary)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join(map(markdown, tables.values())))
    for name, rows in tables.items():
        with (out / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    text = json.dumps(header | summary, default=np.ndarray.tolist)
    strict = json.loads(text, parse_constant=lambda nan: None)
    (out / "aggregates.json").write_text(json.dumps(strict))
    for label, part in summary.items():
        if not any(part["rows"][name]["missing"] for name in agents):
            draw(part, out, label)
