"""Train HIEROS on one game: `python train.py --game Pong`.

The run folder holds config.json, metrics.jsonl, TensorBoard events, checkpoints,
result.json and pictures. A run that was stopped continues with `--resume`.
"""

import io
import json
import os
import platform
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
from tqdm import tqdm

import atari
import checkpoint
import minatar_env
import probes
import report
from config import PRESETS, Config, out_of_bounds
from run import Diverged, Run, UsageError, evaluate, keep_compiled, load_config

# Matrix-product FLOPs of the published configuration per agent step (cost.py).
FULL_FLOPS = 6.5e11
DEAD_CODE_NATS = 0.05
MAY_CHANGE = {"eval_episodes", "checkpoint_every"}


def parse(argv: list[str]) -> Config:
    """The settings that a command line asks for. Raises UsageError."""
    named = dict(pairwise(argv))
    named |= dict(a.split("=", 1) for a in argv if a.startswith("--") and "=" in a)
    if "--resume" in named:
        folder = Path(named["--resume"])
        try:
            saved = replace(load_config(folder), resume=str(folder))
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
        return config
    preset = named.get("--preset") or default_preset(named.get("--game", Config.game))
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset} is unknown: choose {', '.join(PRESETS)}")
    config = ask_tyro(argv, PRESETS[preset])
    canonical = {name.lower(): name for name in atari.GAMES}
    config = replace(config, game=canonical.get(config.game.lower(), config.game))
    check(config)
    return config


def default_preset(game: str) -> str:
    if game in probes.PROBES:
        return "probe"
    if game.startswith("minatar/"):
        return "minatar"
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
    if config.resume is None:
        name = f"{config.game.replace('/', '-')}-{config.preset}-{config.seed}"
        folder = Path(config.run_dir or f"runs/{name}")
        if folder.exists():
            raise UsageError(
                f"--run-dir {folder} exists: continue it with --resume {folder}, "
                "or name another folder"
            )
        run = Run.start(config, folder)
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
        return run
    folder = Path(config.resume)
    run = Run.start(config, folder)
    for path in checkpoint.checkpoints(folder / "checkpoint"):
        try:
            run.restore(path)
            return run
        except checkpoint.CheckpointError as error:
            print(f"train.py: {error}; trying the one before", file=sys.stderr)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    print(
        f"train.py: {folder} has no usable checkpoint, starting over", file=sys.stderr
    )
    return run


def train(run: Run, stop: Stop) -> None:
    """To the end of the run. Raises Diverged, and Interrupted after saving."""
    config = run.config
    board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step)
    bar = tqdm(total=config.steps, initial=run.step, unit="step", dynamic_ncols=True)
    began, updates, before = time.monotonic(), sum(run.updates), run.seconds
    warned = set()
    while run.step < config.steps and not stop.asked:
        episodes = len(run.returns)
        run.advance()
        run.seconds = before + time.monotonic() - began
        bar.update()
        if len(run.returns) > episodes:
            board.add_scalar("episode/return", run.returns[-1][1], run.step)
        if run.step % config.log_every == 0:
            seconds = run.seconds - before
            scores = [value for _, value in run.returns] or [float("nan")]
            bar.set_postfix_str(
                f"{(sum(run.updates) - updates) / seconds:.1f} updates/s, "
                f"return last {scores[-1]:g} best {max(scores):g}"
            )
            for name, value in run.log().items():
                board.add_scalar(name, value, run.step)
                dead = name.endswith("code_kl_per_row") and value < DEAD_CODE_NATS
                if dead and run.step > config.steps // 10 and name not in warned:
                    warned.add(name)
                    bar.write(
                        f"WARNING: {name} {value:.3g}: this goal code says nothing"
                    )
        if run.step % config.checkpoint_every == 0 or run.step == config.steps:
            save(run, bar)
    if stop.asked:
        save(run, bar)
    bar.close()
    board.close()
    if stop.asked:
        raise Interrupted


def save(run: Run, bar: tqdm) -> None:
    """A checkpoint; a full disk costs a warning, not the run."""
    try:
        run.save()
    except OSError as error:
        bar.write(
            f"WARNING: no checkpoint at step {run.step}: {error}; training goes on"
        )


def finish(run: Run, stop: Stop) -> dict:
    """Evaluation, result.json and pictures. Raises Interrupted on a stop."""
    config = run.config
    with tqdm(total=config.eval_episodes, unit="episode", desc="evaluation") as bar:

        def watch(_):
            bar.update()
            if stop.asked:
                raise Interrupted

        scores = evaluate(
            config, run.agent.subactors, config.eval_episodes, watch=watch
        )
    late = [value for step, value in run.returns if step > 0.9 * config.steps]
    reference = atari.scores().get(config.game, {"random": None, "human": None})
    low, high = reference["random"], reference["human"]
    train_score = float(np.mean(late)) if late else None
    eval_score = float(np.mean(scores)) if scores else None
    hns = None
    if low is not None and high is not None and eval_score is not None:
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
        "hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"{platform.machine()}",
        "eval_returns": scores,
        "updates": run.updates,
    }
    (run.folder / "result.json").write_text(json.dumps(result, indent=1))
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


def show(result: dict) -> None:
    """The scores as a table."""
    names = ("train_score", "eval_score", "random", "human", "hns")
    cells = [result[name] for name in names]
    texts = ["-" if x is None else f"{x:.3g}" for x in cells]
    print(f"{'game':>16}" + "".join(f"{name:>13}" for name in names))
    print(f"{result['game']:>16}" + "".join(f"{text:>13}" for text in texts))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 3 not finite, 130 when stopped."""
    argv = sys.argv[1:] if argv is None else argv
    keep_compiled()
    try:
        config = parse(argv)
        run = open_run(config)
    except UsageError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    stop = Stop()
    describe(config, run)
    try:
        train(run, stop)
        show(finish(run, stop))
    except Interrupted:
        print(f"stopped at step {run.step}: python train.py --resume {run.folder}")
        return 130
    except Diverged as error:
        newest = next(iter(checkpoint.checkpoints(run.folder / "checkpoint")), "none")
        print(f"train.py: {error}; last good checkpoint: {newest}", file=sys.stderr)
        return 3
    print(f"run folder: {run.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
