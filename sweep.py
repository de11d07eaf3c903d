"""Games × seeds × arms on Ray: from one machine to many, and nothing done twice.

    python sweep.py --games all --seeds 5                      all of this machine
    python sweep.py --games all --seeds 5 --address auto       the cluster it is in
    python sweep.py --games Pong --arm "flat=--levels 1" --arm "deep=--levels 3" \\
        -- --preset cpu                                        flags of train.py

OUT/ARM/GAME-SEED is an ordinary run folder with its log beside it, on a path that all
machines share or behind a URL of fsspec (s3://, gs://, ...). The same command again
does what is missing: a run with a result.json is done, one with a checkpoint goes on
from it (worker.py). Where a worker or its machine dies, Ray gives its run to another
one, `--retries` times. Ctrl-C lets every run save a checkpoint first.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import tyro

import atari
from config import Config, UsageError
from cost import matmul_peak, update_flops
from evaluate import duration
from game import make_env
from train import FULL_FLOPS, MAY_CHANGE, by_name, parse
from worker import Board, Died, Job, Store, ray, train_one

ROOT = Path(__file__).parent
PAPER_HOURS = 14  # of a GPU for a game's 100,000 steps, as the paper's authors say
AT_WORK = ("training", "evaluating", "starting")


@dataclass(frozen=True)
class Sweep:
    """Trains games × seeds × arms; what is done is skipped, the rest goes on.

    Flags after a lone -- are those of train.py, for every run.
    """

    games: tuple[str, ...] = ("all",)
    """Names of games, or all."""
    seeds: int = 5
    """How many runs of each, seeds from 0."""
    arm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME="FLAGS of train.py"; may be repeated."""
    out: str = "runs/sweep"
    """Path that all machines share, or a URL of fsspec."""
    address: str | None = None
    """Of a Ray cluster ("auto": the one that this machine is in)."""
    cpus_per_run: float = 1.0
    """Cores that a run reserves."""
    gpus_per_run: float | None = None
    """GPUs, or a fraction of one. Default: 1 if this machine has any."""
    retries: int = 3
    """Of a run whose worker died."""
    tflops: float | None = None
    """Speed of a run for the estimate, in 10^12 FLOP per second."""
    dry_run: bool = False
    """Show the plan and an estimate of its hours, start nothing."""

    @property
    def gpus(self) -> float:
        """Those of a run."""
        if self.gpus_per_run is None:
            return float(shutil.which("nvidia-smi") is not None)
        return self.gpus_per_run

    @property
    def place(self) -> str:
        """`out` for any working folder."""
        return self.out if "://" in self.out else str(Path(self.out).resolve())


def plan(sweep: Sweep, flags: list[str]) -> list[tuple[Job, Config]]:
    """Every run, and its settings as train.py reads them. Raises UsageError."""
    arms = dict(text.partition("=")[::2] for text in sweep.arm) or {"": ""}
    if len(arms) < len(sweep.arm) or ("" in arms) == bool(sweep.arm):
        raise UsageError('--arm: give NAME="FLAGS of train.py", each NAME once')
    least = {"seeds": 1, "retries": 0, "cpus_per_run": 0, "gpus_per_run": 0}
    for name, low in least.items():
        if (value := getattr(sweep, name)) is not None and value < low:
            flag = f"--{name.replace('_', '-')} {value}"
            raise UsageError(f"{flag} is not possible: give {low} or more")
    if sweep.tflops is not None and sweep.tflops <= 0:
        raise UsageError(f"--tflops {sweep.tflops} is not possible: give more than 0")
    names = {name.lower(): name for name in atari.GAMES}
    games = atari.GAMES if sweep.games == ("all",) else sweep.games
    games = tuple(dict.fromkeys(names.get(game.lower(), game) for game in games))
    jobs = []
    for seed, (arm, own), game in product(range(sweep.seeds), arms.items(), games):
        try:
            words = [*flags, *shlex.split(own), "--game", game, "--seed", str(seed)]
        except ValueError as problem:
            raise UsageError(f"--arm {arm}={own}: {problem}") from None
        if "--preset" not in by_name(words) and sweep.gpus and game in atari.GAMES:
            words += ["--preset", "atari100k"]
        config = parse(words)
        if config.seeds > 1:
            raise UsageError("--seeds of train.py: give that of sweep.py, before --")
        if "--preset" not in by_name(words):
            words += ["--preset", config.preset]
        name = f"{arm}/{game.replace('/', '-')}-{seed}".removeprefix("/")
        jobs.append((Job(name, tuple(words), config.steps), config))
    return jobs


def opened(place: str) -> Store:
    """The shared place. Raises UsageError where fsspec knows none of that kind."""
    try:
        return Store(place)
    except (ValueError, ImportError) as problem:
        raise UsageError(f"--out {place}: {problem}") from None


def check_done(jobs: list[tuple[Job, Config]], store: Store) -> None:
    """Raises UsageError where a finished run had other flags."""
    kept = lambda values: {
        k: x for k, x in values.items() if k not in {*MAY_CHANGE, "run_dir", "resume"}
    }
    for job, config in jobs:
        done = store.result(job.name) and store.read(job.name, "config.json")
        if done and kept(done) != kept(json.loads(json.dumps(asdict(config)))):
            place = store.remote or store.home
            raise UsageError(
                f"--out {place} has {job.name} trained with other flags: "
                "give another --out"
            )


def hours(config: Config, sweep: Sweep) -> tuple[float, str]:
    """Hours of one run by its counted FLOPs, and at what speed."""
    env = make_env(config, 0)
    shape, actions = env.observation_space.shape, int(env.action_space.n)
    per_step = sum(
        work * config.updates_per_step / config.period**level
        for level, work in enumerate(update_flops(config, shape, actions))
    )
    if sweep.tflops is not None:
        speed, why = 1e12 * sweep.tflops, f"--tflops {sweep.tflops:g}"
    elif sweep.gpus:
        speed = min(1, sweep.gpus) * FULL_FLOPS * 100_000 / (PAPER_HOURS * 3600)
        why = (
            f"{speed / 1e12:.2g} TFLOP/s, as the paper's {PAPER_HOURS} h on a whole GPU"
        )
    else:
        speed = matmul_peak()
        why = f"the {speed / 1e12:.2g} TFLOP/s of a matrix product here: a lower bound"
    return per_step * config.steps / speed / 3600, why


def estimate(jobs: list[tuple[Job, Config]], store: Store, sweep: Sweep) -> str:
    """What is to be done, run by run, and for how long: as finished runs of the same
    settings took or, if there are none, by `hours`."""
    lines, total = [], 0.0
    kind = lambda config: replace(config, seed=0, game="Pong")
    results = [store.result(job.name) for job, _ in jobs]
    known: dict[Config, tuple[float, str]] = {}
    for (_, config), found in zip(jobs, results, strict=True):
        if found:
            taken = found["wall_seconds"] / 3600
            known[kind(config)] = taken, "a finished run: measured"
    for (job, config), found in zip(jobs, results, strict=True):
        if not found and kind(config) not in known:
            known[kind(config)] = hours(config, sweep)
        each, why = (0.0, "") if found else known[kind(config)]
        state = "done" if found else f"{each:.2g} h, by {why}"
        lines.append(f"{job.name:<24} {config.preset}, {job.steps} steps: {state}")
        total += each
    gpus, missing = sweep.gpus, results.count(None)
    unit = f"GPU-hours at {gpus:g} GPU each" if gpus else "hours on CPU"
    end = f"{missing} of {len(jobs)} runs to do: {total * (gpus or 1):.2g} {unit}"
    return "\n".join([*lines, end])


def table(jobs: list[Job], rows: dict[str, dict[str, Any]]) -> str:
    """Runs that have begun, those at work first, and the sum of all."""
    form = "{:<24} {:<10} {:>15} {:>8} {:>9} {:>9}"
    lines, todo, speed = [], 0, 0.0
    states = {job: rows.get(job.name, {}).get("state", "waiting") for job in jobs}
    for job in sorted(jobs, key=lambda job: states[job] not in AT_WORK):
        row = {"step": 0, "speed": 0.0, "score": None} | rows.get(job.name, {})
        at_work = states[job] in AT_WORK
        todo += 0 if states[job] == "done" else job.steps - row["step"]
        speed += row["speed"] * at_work
        if states[job] != "waiting":
            score = "" if row["score"] is None else f"{row['score']:.4g}"
            steps, rest = f"{row['step']}/{job.steps}", job.steps - row["step"]
            moves = at_work and row["speed"] > 0
            left = duration(rest / row["speed"]) if moves else ""
            rate = f"{row['speed']:.1f}" if moves else ""
            lines.append(form.format(job.name, states[job], steps, rate, left, score))
    counts = Counter(states.values())
    text = ", ".join(f"{number} {state}" for state, number in counts.items())
    text += f"; about {duration(todo / speed)} left" if speed else ""
    head = form.format("run", "state", "step", "steps/s", "left", "score")
    return "\n".join([head, *lines, f"{len(jobs)} runs: {text}"])


def display(text: str, before: int) -> int:
    """On a terminal over the last `before` lines; returns how many lines it has."""
    if sys.stdout.isatty():
        *body, end = text.splitlines()
        text = "\n".join([*body[: shutil.get_terminal_size().lines - 3], end])
        print(f"\x1b[{before}F\x1b[J" if before else "", end="")
    print(text, flush=True)
    return text.count("\n") + 1


def run_all(jobs: list[Job], sweep: Sweep) -> dict[str, str]:
    """Runs the jobs and shows how they do; returns what became of each.

    Raises UsageError where no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    kind: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 10**8}
    if sweep.address:
        excludes = ["runs", "results", "notebooks", "tests"]
        kind = {"runtime_env": {"working_dir": str(ROOT), "excludes": excludes}}
    try:
        ray.init(sweep.address, log_to_driver=False, logging_level="ERROR", **kind)
    except ConnectionError as problem:
        raise UsageError(f"--address {sweep.address}: {problem}") from None
    try:
        node = ray.get_runtime_context().get_node_id()
        strategies = ray.util.scheduling_strategies
        here = strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": here}
        board = ray.remote(Board).options(**options).remote()
        task = ray.remote(train_one).options(
            num_cpus=sweep.cpus_per_run,
            num_gpus=sweep.gpus,
            max_retries=sweep.retries,
            retry_exceptions=[Died, OSError],
        )
        source = None if sweep.address else str(ROOT)
        start = lambda job: task.remote(job, sweep.place, sweep.gpus, source, board)
        return follow(jobs, {start(job): job.name for job in jobs}, board)
    finally:
        ray.shutdown()


def follow(jobs: list[Job], waiting: dict[Any, str], board) -> dict[str, str]:
    """Shows the table until all tasks have ended; Ctrl-C asks them to."""
    ended: dict[str, str] = {}
    go_on, lines, shown, every = True, 0, 0.0, 2 if sys.stdout.isatty() else 60
    while waiting:
        try:
            done, _ = ray.wait(list(waiting), timeout=1)
            for ref in done:
                try:
                    end = ray.get(ref)
                except ray.exceptions.RayError as error:
                    end = str(error).strip().splitlines()[-1]
                ended[waiting.pop(ref)] = end
            rows = ray.get(board.read.remote(go_on))
            if time.monotonic() - shown > every or not waiting:
                states = {k: {"state": v.partition(":")[0]} for k, v in ended.items()}
                both = {k: rows.get(k, {}) | states.get(k, {}) for k in rows | states}
                lines, shown = display(table(jobs, both), lines), time.monotonic()
        except KeyboardInterrupt:
            if not go_on:
                raise  # asked twice: at once, from the checkpoints that there are
            go_on, lines = False, 0
            print("\nstopping: every run saves a checkpoint first", flush=True)
    return ended


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all done, 1 some runs failed, 2 bad input, 130 stopped."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    sweep = tyro.cli(Sweep, args=argv[:split])
    jax.config.update("jax_platforms", "cpu")  # this process needs no GPU
    try:
        jobs, store = plan(sweep, argv[split + 1 :]), opened(sweep.place)
        check_done(jobs, store)
        if sweep.dry_run:
            print(estimate(jobs, store, sweep))
            return 0
        todo = [job for job, _ in jobs if not store.result(job.name)]
        done = len(jobs) - len(todo)
        print(f"{done} of {len(jobs)} runs are done already", flush=True)
        ended = run_all(todo, sweep) if todo else {}
    except UsageError as problem:
        print(f"sweep.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    bad = {name: end for name, end in ended.items() if end not in ("done", "stopped")}
    for name, end in bad.items():
        print(f"sweep.py: {name}: {end}", file=sys.stderr)
    stopped = "stopped" in ended.values()
    if stopped or bad:
        print("the same command goes on with what is missing")
    return 130 if stopped else int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
