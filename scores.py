"""The statistics of Atari100k: what a set of runs allows one to claim, with intervals.

    HNS = (score - random) / (human - random)                          (SC 1)
    mean, median: over games of the mean over that game's runs         (SC 2)
    IQM = mean of the middle half of all runs of all games             (SC 3)
    optimality gap = mean over all runs of max(0, 1 - HNS)             (SC 4)
    profile(τ) = fraction of all runs with HNS > τ                     (SC 5)
    P(X > Y) = mean over games and pairs of [x > y] + ½ [x = y]        (SC 6)
    interval = 2.5 to 97.5 % of the statistic over replicates in which
               each game redraws its own runs with replacement         (SC 7)
    curve(s) = HNS of the mean return of the episodes that ended in the
               tenth of the budget before s, else of the last one      (SC 8)

Missing stays missing: a matrix holds NaN for a run without a score, and a statistic of
a set of games is NaN while one of them has no run. Sets: "25" (the paper's, without
UpNDown), "26", "played" (games every agent has played). UpNDown is blank in the table
in data/, whose columns give over 25 games, mean and median in percent: SimPLe 33.6,
11.1; TWM 93.9, 39.8; IRIS 107.8, 30.8; DreamerV3 114.4, 34.0; Hieros 120.3, 56.4.

Agarwal et al., "Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021.
Axes: R replicates, G games, N and M seeds of two agents, T thresholds τ.
"""

import csv
import json
import math
import sys
from collections.abc import Callable
from glob import glob
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import trim_mean

REFERENCE = Path(__file__).parent / "data" / "atari100k_scores.csv"
TAU = np.linspace(0.0, 8.0, 161)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Value = float | Float[np.ndarray, "..."]
Table = dict[str, dict[str, float]]


class BadInput(Exception):
    """One line that names the flag or folder and the remedy."""


def human_normalised(score: Value, random: Value, human: Value) -> Value:
    """0 plays like random, 1 like the human reference; human ≠ random. (SC 1)"""
    return (score - random) / (human - random)  # (SC 1)


def per_game(hns: Float[np.ndarray, "... G N"]) -> Float[np.ndarray, "... G"]:
    """Mean over the runs that a game has, NaN if it has none. (SC 2)"""
    runs = (~np.isnan(hns)).sum(-1)
    return np.where(runs > 0, np.nansum(hns, -1) / np.maximum(runs, 1), np.nan)


def all_runs(hns: Float[np.ndarray, "... G N"]) -> Float[np.ndarray, "... runs"]:
    """The runs of all games pooled; one NaN if a game has none.

    Leading axes must miss the same runs, as the replicates of `resample` do.
    """
    present = ~np.isnan(hns.reshape(-1, *hns.shape[-2:])[0])
    complete = present.any(-1).all()
    return hns[..., present] if complete else np.full((*hns.shape[:-2], 1), np.nan)


def mean(hns: Float[np.ndarray, "... G N"]) -> Value:
    """Mean over games. (SC 2)"""
    return per_game(hns).mean(-1)  # (SC 2)


def median(hns: Float[np.ndarray, "... G N"]) -> Value:
    """Median over games of the mean over runs. (SC 2)"""
    return np.median(per_game(hns), -1)  # (SC 2)


def iqm(hns: Float[np.ndarray, "... G N"]) -> Value:
    """Interquartile mean: ⌊n/4⌋ of all n runs are cut at either end. (SC 3)"""
    return trim_mean(all_runs(hns), 0.25, axis=-1)  # (SC 3)


def optimality_gap(hns: Float[np.ndarray, "... G N"]) -> Value:
    """How far runs fall short of the human; more than human earns nothing. (SC 4)"""
    return np.maximum(0.0, 1.0 - all_runs(hns)).mean(-1)  # (SC 4)


def profile(
    hns: Float[np.ndarray, "... G N"], tau: Float[np.ndarray, " T"] = TAU
) -> Float[np.ndarray, "... T"]:
    """Fraction of runs above each threshold. (SC 5)"""
    runs = all_runs(hns)
    above = [np.where(runs == runs, runs > level, runs) for level in tau]
    return np.stack(above, -2).mean(-1)  # (SC 5)


def improvement(
    x: Float[np.ndarray, "... G N"], y: Float[np.ndarray, "... G M"]
) -> Value:
    """Chance that a run of x beats one of y in the same game, ties half. (SC 6)"""
    wins = (np.sign(x[..., :, None] - y[..., None, :]) + 1) / 2  # (SC 6)
    return mean(wins.reshape(*wins.shape[:-2], x.shape[-1] * y.shape[-1]))


AGGREGATES = {"mean": mean, "median": median, "IQM": iqm, "gap": optimality_gap}
STATISTICS = AGGREGATES | {"profile": profile}


def resample(
    hns: Float[np.ndarray, "G N"], reps: int, rng: np.random.Generator
) -> Float[np.ndarray, "R G N"]:
    """Replicates; NaN stays in place, so each game keeps its number of runs. (SC 7)"""
    replicates = np.full((reps, *hns.shape), np.nan)
    for game, row in enumerate(hns):
        runs = row[~np.isnan(row)]
        if runs.size:
            draw = rng.integers(runs.size, size=(reps, runs.size))
            replicates[:, game, ~np.isnan(row)] = runs[draw]
    return replicates


def estimate(
    statistic: Callable, *hns: Float[np.ndarray, "G _"], reps: int = 2000, seed: int = 0
) -> Float[np.ndarray, "3 ..."]:
    """[statistic(*hns), low, high]: one matrix per agent, stratified bootstrap. (SC 7)

    No interval while a game has fewer than two runs: one run redrawn shows no spread.
    """
    point = statistic(*hns)
    if any(((~np.isnan(x)).sum(-1) < 2).any() for x in hns):
        return np.stack([point, point * np.nan, point * np.nan])
    rng = np.random.default_rng(seed)
    draws = statistic(*(resample(x, reps, rng) for x in hns))
    return np.stack([point, *np.percentile(draws, [2.5, 97.5], axis=0)])  # (SC 7)


def load_reference(path: Path = REFERENCE) -> Table:
    """Game → column (random, human, papers) → score in game points; blank is NaN."""
    rows = csv.DictReader(path.read_text().splitlines())
    return {r.pop("game"): {k: float(v or "nan") for k, v in r.items()} for r in rows}


class Run(NamedTuple):
    """One seed of an agent on one game; scores in game points, steps of 4 frames."""

    game: str
    seed: int
    score: float  # NaN if the run was not scored
    preset: str = ""
    steps: int = 0  # the budget
    returns: tuple[tuple[float, float], ...] = ()  # (step of an episode's end, return)


def read_run(path: Path, kind: str, return_key: str) -> Run:
    """From result.json with its `kind` (eval, train) of score, and metrics.jsonl if any.

    BadInput if one of them is torn, lacks an entry or holds one of the wrong type.
    """
    metrics = path.with_name("metrics.jsonl")
    try:
        x, text = (
            json.loads(path.read_text()),
            metrics.read_text() if metrics.exists() else "",
        )
        lines = [json.loads(line) for line in text.splitlines()]
        ends = tuple((y["step"], y[return_key]) for y in lines if return_key in y)
        score = math.nan if x[f"{kind}_score"] is None else float(x[f"{kind}_score"])
        return Run(x["game"], int(x["seed"]), score, x["preset"], int(x["steps"]), ends)
    except (KeyError, OSError, TypeError, ValueError) as error:
        what = f"{type(error).__name__} {error} in it or its metrics.jsonl"
        raise BadInput(f"{path}: {what}; repeat the run or leave it out") from None


def read_agent(folders: list[Path], kind: str, return_key: str) -> list[Run]:
    """Every run in or below the folders. BadInput if none, twice, or not comparable."""
    runs: dict[tuple[str, int], Run] = {}
    for folder in folders:
        paths = sorted(folder.rglob("result.json"))
        if not paths:
            raise BadInput(f"{folder}: no result.json in or below it; give run folders")
        for path in paths:
            run = read_run(path, kind, return_key)
            twin = runs.setdefault((run.game, run.seed), run)
            first = next(iter(runs.values()))
            if run.game not in load_reference():
                raise BadInput(f"{path}: {run.game} is not in Atari100k; leave it out")
            if twin is not run or run[3:5] != first[3:5]:
                what = f"{run[:5]} beside {twin[:5] if twin is not run else first[:5]}"
                raise BadInput(f"{path}: {what}; name agents with --agent NAME=GLOB")
    return list(runs.values())


def as_of(run: Run, step: float) -> Run:
    """The run with its train score at an agent step; NaN before any episode. (SC 8)"""
    ended = [(at, value) for at, value in run.returns if at <= step]
    window = [value for at, value in ended if at > step - run.steps / 10]  # (SC 8)
    score = np.mean(window or [value for _, value in ended][-1:] or math.nan)
    return run._replace(score=float(score))


def hns_matrix(runs: list[Run], reference: Table) -> Float[np.ndarray, "G N"]:
    """Rows as the reference's games, seeds ascending, NaN missing."""
    games, seeds = list(reference), sorted({run.seed for run in runs})
    matrix = np.full((len(games), len(seeds)), np.nan)
    for run in runs:
        row = reference[run.game]
        hns = human_normalised(run.score, row["random"], row["human"])
        matrix[games.index(run.game), seeds.index(run.seed)] = hns
    return matrix


def summarise(agents: dict[str, list[Run]], reference: Table, reps: int = 2000) -> dict:
    """Every statistic per set of games, as `estimate` gives it; HNS as fractions.

    {set: {"games": [...], "rows": {agent or paper: {"mean", "median", "IQM", "gap",
    "profile", "curve", "steps", "scores": how many, "missing": games}}, "improvement":
    {"X > Y"}}}. A paper gives means per game, not runs: no IQM, gap, profile, curve.
    """
    names, summary = np.array(list(reference)), {}
    columns = [x for x in reference[names[0]] if x not in ("random", "human")]
    papers = {x: [Run(g, 0, row[x]) for g, row in reference.items()] for x in columns}
    hns = {x: hns_matrix(runs, reference) for x, runs in (papers | agents).items()}
    played = np.all([~np.isnan(hns[name]).all(-1) for name in agents], axis=0)
    sets = {"25": names != "UpNDown", "26": names != "", "played": played}
    for label, chosen in sets.items():
        part = summary[label] = {"games": names[chosen].tolist(), "rows": {}}
        for name, x in ((name, x[chosen]) for name, x in hns.items()):
            kinds = STATISTICS if name in agents else {"mean": mean, "median": median}
            row = {k: estimate(f, x, reps=reps) for k, f in kinds.items()}
            row["scores"] = int((~np.isnan(x)).sum())
            row["missing"] = names[chosen][np.isnan(x).all(-1)].tolist()
            part["rows"][name] = row
        for name, runs in agents.items():
            steps = np.linspace(0.1, 1, 10) * runs[0].steps
            then = [hns_matrix([as_of(r, s) for r in runs], reference) for s in steps]
            curve = np.stack([estimate(iqm, x[chosen], reps=reps) for x in then], 1)
            part["rows"][name] |= {"steps": steps, "curve": curve}
        part["improvement"] = {
            f"{a} > {b}": estimate(
                improvement, hns[a][chosen], hns[b][chosen], reps=reps
            )
            for a, b in combinations(agents, 2)
        }
    return summary


def show(point: float, low: float = math.nan, high: float = math.nan) -> str:
    """For people: a number, its interval if there is one; NaN is "missing"."""
    interval = "" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]"
    return "missing" if math.isnan(point) else f"{point:.1f}{interval}"


def per_game_rows(agents: dict[str, list[Run]], reference: Table) -> list[list[str]]:
    """Header, then a row per game: the reference's columns, then three per agent."""
    head = [f"{name}{x}" for name in agents for x in ("", " HNS %", " seeds")]
    rows = [["game", *next(iter(reference.values())), *head]]
    for game, row in reference.items():
        rows.append([game, *map(show, row.values())])
        for runs in agents.values():
            scores = [x.score for x in runs if x.game == game and x.score == x.score]
            score = float(np.mean(scores or math.nan))
            hns = 100 * human_normalised(score, row["random"], row["human"])
            seeds = f"{len(scores)}/{len({run.seed for run in runs})}"
            rows[-1] += [show(score), show(hns), seeds]
    return rows


def aggregate_rows(summary: dict) -> list[list[str]]:
    """Header, then a row per set of games and agent or paper; HNS in percent."""
    rows = [["games", "agent", "scores", *(f"{k} %" for k in AGGREGATES), "missing"]]
    for label, part in summary.items():
        for name, row in part["rows"].items():
            cells = [show(*100 * row[k]) if k in row else "-" for k in AGGREGATES]
            count, gone = str(row["scores"]), ", ".join(row["missing"])
            rows.append([label, name, count, *cells, gone])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """A table, numbers to the right."""
    rows = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw_intervals(axes: Axes, rows: dict[str, Any], xlabel: str) -> None:
    """A line per estimate, first on top: bar = interval, stroke = point; in percent."""
    for y, estimated in enumerate(rows.values()):
        point, low, high = 100 * estimated
        colour = COLOURS[y % len(COLOURS)]
        axes.barh(y, high - low, 0.6, low, color=colour, alpha=0.35)
        axes.plot([point, point], [y - 0.3, y + 0.3], color=colour, lw=2.5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))


def draw_curves(axes: Axes, rows: dict[str, Any], xlabel: str, ylabel: str) -> None:
    """A line and its band per name, values (x, estimate of y); y in percent."""
    for i, (name, (x, estimated)) in enumerate(rows.items()):
        point, low, high = 100 * estimated
        colour, dash = COLOURS[i % len(COLOURS)], ("-", "--", "-.", ":")[i % 4]
        axes.plot(x, point, dash, color=colour, label=name)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)


def draw(part: dict, out: Path, label: str) -> None:
    """PNG files of one set of games of `summarise`, named by what they show."""
    figures, rows, wins = {}, part["rows"], part["improvement"]
    runs = {name: row for name, row in rows.items() if "curve" in row}

    def panels(name: str, count: int, height: float) -> Any:
        figures[name] = Figure((4 + 2 * count, height), dpi=130, layout="constrained")
        figures[name].suptitle(f"{len(part['games'])} games, 95 % bootstrap intervals")
        return figures[name].subplots(1, count, sharey=True, squeeze=False)[0]

    height = 1.5 + 0.3 * len(rows)
    for axes, k in zip(panels("aggregates", 4, height), AGGREGATES, strict=True):
        of = {name: row.get(k, np.full(3, np.nan)) for name, row in rows.items()}
        draw_intervals(axes, of, f"{k} of HNS (%)")
    of = {name: (TAU, row["profile"]) for name, row in runs.items()}
    draw_curves(
        *panels("profile", 1, 4), of, "τ (HNS, 1 = human)", "runs with HNS > τ (%)"
    )
    of = {name: (row["steps"], row["curve"]) for name, row in runs.items()}
    xlabel = "agent steps (4 frames each)"
    draw_curves(*panels("efficiency", 1, 4), of, xlabel, "IQM of training HNS (%)")
    if wins:
        [axes] = panels("improvement", 1, 1.5 + 0.3 * len(wins))
        draw_intervals(axes, wins, "P(X > Y) (%)")
        axes.axvline(50, color="grey", lw=1, ls=":")
    for name, figure in figures.items():
        figure.savefig(out / f"{name}_{label}.png")


def write(agents: dict[str, list[Run]], out: Path) -> None:
    """table.md, table.csv, aggregates.json (NaN → null) and the figures of each set of
    games that every agent has played, "played" itself only if it is neither 25 nor 26.
    """
    reference = load_reference()
    summary, rows = summarise(agents, reference), per_game_rows(agents, reference)
    out.mkdir(parents=True, exist_ok=True)
    tables = [markdown(rows), markdown(aggregate_rows(summary))]
    (out / "table.md").write_text("\n".join(tables))
    (out / "table.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    text = json.dumps(summary, default=np.ndarray.tolist)
    strict = json.loads(text, parse_constant=lambda nan: None)
    (out / "aggregates.json").write_text(json.dumps(strict, indent=1))
    played = summary["played"]["games"]
    whole = [x for x in ("25", "26") if set(summary[x]["games"]) <= set(played)]
    for label in whole or (["played"] if played else []):
        draw(summary[label], out, label)


def main(
    run_dirs: tyro.conf.Positional[tuple[Path, ...]] = (),
    agent: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    *,
    out: Path,
    score: Literal["eval", "train"] = "eval",
    return_key: str = "episode_return",
) -> None:
    """Table, aggregates and figures of Atari100k from finished runs.

    Args:
        run_dirs: run folders, or folders of them, of the agent "ours"
        agent: NAME=GLOB, another agent and its folders; may be repeated
        out: folder for table.md, table.csv, aggregates.json and PNG files
        score: which score of result.json; the two are never mixed
        return_key: entry of metrics.jsonl with the return of an ended episode
    """
    folders = {"ours": list(run_dirs)} if run_dirs else {}
    for text in agent:
        name, _, pattern = text.partition("=")
        if set(name) & set(",|") or not name or name in folders:
            raise BadInput(
                f"--agent {text}: needs NAME=GLOB, each NAME once, no , or |"
            )
        folders[name] = sorted(map(Path, glob(pattern)))
        if not folders[name]:
            raise BadInput(f"--agent {text}: no such folder; quote the GLOB")
    if not folders:
        raise BadInput(
            "RUN_DIR: none given; name run folders, or use --agent NAME=GLOB"
        )
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is a file; name a folder")
    agents = {x: read_agent(dirs, score, return_key) for x, dirs in folders.items()}
    write(agents, out)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except BadInput as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
