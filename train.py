"""Train HIEROS on one game: `python train.py --game Pong`.

The run folder holds config.json, metrics.jsonl, TensorBoard events, checkpoints,
result.json and pictures. A run that was stopped continues with `--resume`.
"""

import io
import json
import os
import re
import signal
import sys
import time
from contextlib import redirect_stderr
from dataclasses import asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import tyro
from tensorboardX import SummaryWriter
from tqdm import tqdm, trange

import atari
import checkpoint
import minatar_env
import probes
import report
from agent import precision_here
from config import PRESETS, Config, UsageError, out_of_bounds
from game import GameError
from machine import hardware, keep_buffers, keep_compiled, keep_memory
from run import Diverged, Run, evaluation, load_config

# Matrix-product FLOPs of the published configuration per agent step (cost.py).
FULL_FLOPS = 6.5e11
DEAD_CODE_NATS = 0.05
MAY_CHANGE = {"eval_episodes", "checkpoint_every", "checkpoint_minutes"}


def by_name(argv: list[str]) -> dict[str, str]:
    """Flags and what follows them, before tyro has seen them."""
    named = dict(pairwise(argv))
    return named | dict(
        a.split("=", 1) for a in argv if a.startswith("--") and "=" in a
    )


def parse(argv: list[str]) -> Config:
    """The settings that a command line asks for. Raises UsageError."""
    named = by_name(argv)
    if "--resume" in named:
        folder = Path(named["--resume"])
        try:
            saved = replace(load_config(folder), resume=named["--resume"])
        except UsageError as error:
            raise UsageError(f"--resume {error}") from None
        config = ask_tyro(argv, saved)
        changed = differences(saved, config)
        if forbidden := [line for name, line in changed if name not in MAY_CHANGE]:
            allowed = ", ".join(sorted(MAY_CHANGE))
            raise UsageError(
                f"--resume {folder} has another configuration: {'; '.join(forbidden)}; "
                f"leave these flags out (only {allowed} may differ)"
            )
        check(config)
        return config
    preset = named.get("--preset") or default_preset(named.get("--game", Config.game))
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset} is unknown: choose {', '.join(PRESETS)}")
    config = ask_tyro(argv, PRESETS[preset])
    canonical = {name.lower(): name for name in atari.GAMES}
    config = replace(
        config,
        game=canonical.get(config.game.lower(), config.game),
        precision=precision_here(config.precision),
    )
    check(config)
    return config


def is_small(game: str) -> bool:
    """Probes and MinAtar: a few cells each way, no pictures to convolve."""
    return game in probes.PROBES or game.startswith("minatar/")


def default_preset(game: str) -> str:
    if is_small(game):
        return "probe" if game in probes.PROBES else "minatar"
    return "cpu" if jax.default_backend() == "cpu" else "atari100k"


def ask_tyro(argv: list[str], default: Config) -> Config:
    """tyro's own parse; its boxed error becomes one line."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(Config, default=default, args=argv)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = re.sub(r"[│╭╮╰╯─|+]|-{3,}", "", box.getvalue())
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        hint = re.split("Argument helptext|For full helptext", " ".join(lines[1:5]))[0]
        raise UsageError(f"{hint.strip()} (see python train.py --help)") from None


def differences(old, new, prefix: str = "") -> list[tuple[str, str]]:
    """Fields of two configurations that differ: name, and a phrase that says how."""
    found = []
    for f in fields(old):
        a, b, name = getattr(old, f.name), getattr(new, f.name), prefix + f.name
        if is_dataclass(a):
            found += differences(a, b, name + ".")
        elif a != b:
            found.append((name, f"--{name.replace('_', '-')} is {a}, not {b}"))
    return found


def check(config: Config) -> None:
    """Raises UsageError for settings that cannot be run."""
    minis = [f"minatar/{name}" for name in minatar_env.GAMES]
    names = [*atari.GAMES, *probes.PROBES, *minis]
    if config.game not in names:
        near = get_close_matches(config.game, names, 3, 0.3) or atari.GAMES[:3]
        raise UsageError(
            f"--game {config.game} is unknown: did you mean {', '.join(near)}?"
        )
    for complaint in out_of_bounds(config):
        raise UsageError(complaint)
    model = config.model
    for holds, complaint in (
        (
            config.length <= config.steps,
            f"--length {config.length} is more than --steps {config.steps}",
        ),
        (
            config.prefill < config.steps,
            f"--prefill {config.prefill} is not less than --steps {config.steps}: "
            "lower it or train longer",
        ),
        (
            config.length < config.capacity,
            f"--capacity {config.capacity} is not more than --length {config.length}",
        ),
        (
            len(model.channels) == len(model.strides),
            "--model.channels and --model.strides differ in length",
        ),
        (
            model.states % model.blocks == 0,
            f"--model.blocks {model.blocks} does not divide "
            f"--model.states {model.states}",
        ),
        (
            not model.overlap or all(s % 2 == 0 for s in model.strides),
            "--model.strides must be even: or give --model.no-overlap",
        ),
    ):
        if not holds:
            raise UsageError(complaint)


class Interrupted(Exception):
    """Somebody asked the run to stop."""


class Stop:
    """Ctrl-C or SIGTERM once asks for an orderly end, twice leaves at once."""

    def __init__(self):
        self.asked = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, number, _):
        if self.asked:
            os._exit(128 + number)
        self.asked = True


def open_run(config: Config) -> Run:
    """A new run with its folder, or one continued. Raises UsageError."""
    folder = Path(config.resume or config.run_dir or default_folder(config))
    if config.resume is None and folder.exists():
        raise UsageError(
            f"--run-dir {folder} exists: continue it with --resume {folder}, "
            "or name another folder"
        )
    run = Run.start(config, folder)
    if config.resume is None:
        make_folder(run)
    elif not run.restore_newest():
        if run.saved_steps():
            raise UsageError(
                f"--resume {folder} has checkpoints, but none that can be used: "
                "move the folder away to start over"
            )
        print(
            f"train.py: {folder} has no checkpoint yet, starting over",
            file=sys.stderr,
        )
    for game in run.games:
        game.cut()
    return run


def default_folder(config: Config) -> str:
    name = f"runs/{config.game.replace('/', '-')}-{config.preset}-{config.seed}"
    last = config.seed + config.seeds - 1
    return name if config.seeds == 1 else f"{name}-to-{last}"


def write_config(folder: Path, config: Config) -> None:
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))


def make_folder(run: Run) -> None:
    """The run's folder with its settings, or none if something happens meanwhile."""
    partial = run.folder.with_name(f"{run.folder.name}.partial")
    for game in run.games:
        inside = partial / game.folder.relative_to(run.folder)
        (inside / "checkpoint").mkdir(parents=True, exist_ok=True)
        write_config(inside, game.config)
    write_config(partial, run.config)
    partial.rename(run.folder)


def train(run: Run, stop: Stop) -> None:
    """To the end of the run. Raises Diverged, GameError, Interrupted after saving."""
    config = run.config
    boards = [
        SummaryWriter(str(game.folder / "tensorboard"), purge_step=run.step)
        for game in run.games
    ]
    progress = tqdm(
        total=config.steps, initial=run.step, unit="step", dynamic_ncols=True
    )
    began, updates, before = time.monotonic(), sum(run.updates), run.seconds
    saved = began
    with progress as bar:
        while run.step < config.steps and not stop.asked:
            run.advance()
            run.seconds = before + time.monotonic() - began
            bar.update()
            for game, board in zip(run.games, boards, strict=True):
                if game.returns and game.returns[-1][0] == run.step:
                    board.add_scalar("episode/return", game.returns[-1][1], run.step)
            if run.step % config.log_every == 0:
                rate = (sum(run.updates) - updates) / (run.seconds - before)
                bar.set_postfix_str(f"{rate:.1f} updates/s, {returns_so_far(run)}")
                for values, board in zip(run.log(), boards, strict=True):
                    for name, value in values.items():
                        board.add_scalar(name, value, run.step)
                    warn_of_dead_codes(run, values, bar)
            late = time.monotonic() - saved > 60 * config.checkpoint_minutes
            due = late or run.step % config.checkpoint_every == 0
            if due or run.step == config.steps:
                save(run, bar)
                saved = time.monotonic()
        if stop.asked:
            save(run, bar)
    for board in boards:
        board.close()
    if stop.asked:
        raise Interrupted


def returns_so_far(run: Run) -> str:
    """Newest and best return; of several seeds the mean of each."""
    seeds = [[value for _, value in game.returns] for game in run.games]
    seeds = [values for values in seeds if values] or [[float("nan")]]
    last, best = np.mean([(values[-1], max(values)) for values in seeds], 0)
    return f"return last {last:g} best {best:g}"


def warn_of_dead_codes(run: Run, values: dict[str, float], bar: tqdm) -> None:
    """Once per level and tenth of the run, from the second on."""
    tenth = max(1, run.config.steps // 10)
    if run.step % tenth >= run.config.log_every:
        return
    for name, value in values.items():
        if name.endswith("code_kl_per_row") and value < DEAD_CODE_NATS:
            bar.write(f"WARNING: {name} {value:.3g}: this goal code says nothing")


def save(run: Run, bar: tqdm) -> None:
    """A checkpoint; if the disk has no room for it, the run goes on."""
    try:
        run.save()
    except OSError as error:
        bar.write(
            f"WARNING: no checkpoint at step {run.step}: {error}; training goes on"
        )


def finish(run: Run, stop: Stop) -> dict:
    """Evaluation, result.json and pictures of one seed. Raises Interrupted."""
    config, returns = run.config, run.game.returns
    episodes, scores = evaluation(config, run.agent.subactors), []
    for _ in trange(config.eval_episodes, unit="episode", desc="evaluation"):
        scores.append(next(episodes).score)
        if stop.asked:
            raise Interrupted
    late = [value for step, value in returns if step > 0.9 * config.steps]
    late = late or [value for _, value in returns[-1:]]  # as scores.as_of has it
    reference = atari.scores().get(config.game, {"random": None, "human": None})
    low, high = reference["random"], reference["human"]
    train_score = float(np.mean(late)) if late else None
    eval_score = float(np.mean(scores)) if scores else None
    hns = None
    if low is not None and eval_score is not None:
        hns = (eval_score - low) / (high - low)
    parameters = [
        sum(x.size for x in jax.tree.leaves(subactor))
        for subactor in run.agent.subactors
    ]
    result = {
        "game": config.game,
        "seed": config.seed,
        "preset": config.preset,
        "steps": run.step,
        "train_score": train_score,
        "eval_score": eval_score,
        "random": low,
        "human": high,
        "hns": hns,
        "wall_seconds": round(run.seconds, 1),
        "parameters": parameters,
        "hardware": hardware(),
        "precision": config.precision,
        "eval_returns": scores,
        "updates": run.updates,
    }
    partial = run.folder / "result.json.tmp"
    partial.write_text(json.dumps(result, indent=1))
    partial.rename(run.folder / "result.json")
    report.draw(run)
    return result


def describe(config: Config, run: Run) -> None:
    """One line: which preset, on what, and what the published one would take here."""
    text = f"preset {config.preset} on {jax.devices()[0].device_kind}"
    if jax.default_backend() == "cpu":
        text += ", JAX finds no accelerator"
    if config.preset == "cpu":
        seconds, work = run.measure_update()
        days = FULL_FLOPS * PRESETS["atari100k"].steps * seconds / work / 86_400
        text += (
            f"; an update of level 0 takes {1e3 * seconds:.0f} ms, so --preset "
            f"atari100k would take about {days:.1f} days here"
        )
    print(text, flush=True)


def show(results: list[dict]) -> None:
    """The scores as a table, a row per seed."""
    names = ("seed", "train_score", "eval_score", "random", "human", "hns")
    print(f"{'game':>16}" + "".join(f"{name:>13}" for name in names))
    for result in results:
        cells = [result[name] for name in names]
        texts = ["-" if x is None else f"{x:.3g}" for x in cells]
        print(f"{result['game']:>16}" + "".join(f"{text:>13}" for text in texts))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 3 not finite, 4 game or disk failed, 130 stopped.

    Of a run that failed the checkpoints stay.
    """
    argv = sys.argv[1:] if argv is None else argv
    keep_compiled()
    try:
        config = parse(argv)
        run = open_run(config)
    except UsageError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"--run-dir: {error}; give a folder that can be written"
        print(f"train.py: {what}", file=sys.stderr)
        return 2
    stop = Stop()
    describe(config, run)
    try:
        train(run, stop)
        show([finish(run.solo(i), stop) for i in range(config.seeds)])
    except Interrupted:
        print(f"stopped at step {run.step}: python train.py --resume {run.folder}")
        return 130
    except (Diverged, GameError, OSError) as error:
        newest = next(iter(checkpoint.checkpoints(run.games[0].folder)), "none")
        print(f"train.py: {error}; last good checkpoint: {newest}", file=sys.stderr)
        return 3 if isinstance(error, Diverged) else 4
    print(f"run folder: {run.folder}")
    return 0


def wants_one_heap(argv: list[str]) -> bool:
    """Atari, unless of the published size: there it takes 4 GiB more."""
    named = by_name(argv)
    game, preset = named.get("--game", Config.game), named.get("--preset", "cpu")
    if "--resume" in named:
        try:
            saved = load_config(Path(named["--resume"]))
        except UsageError:
            return False
        game, preset = saved.game, saved.preset
    return preset != "atari100k" and not is_small(game)


if __name__ == "__main__":
    if wants_one_heap(sys.argv[1:]):
        keep_memory()
    else:
        keep_buffers()
    sys.exit(main())
