"""What things cost here: `python bench.py`, a table, a figure and raw numbers.

Every time is a median after a first call that compiles; every share is of the speed of
a large matrix product in the same precision, measured in the same run, so that numbers
from noisy machines can be compared. Every part has a process of its own, so that its
peak of memory is its own; those of the preset that trains here have the heap that
train.py gives it. FLOPs are matrix products counted in the traced
program (cost.py); beside them stands XLA's own count, which enters each loop once.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental.compilation_cache import compilation_cache
from matplotlib.figure import Figure

from agent import (
    act_and_store,
    init_agents,
    make_trainer,
    matmul_precision,
    precision_here,
    update,
)
from config import PRESETS, Config
from cost import flops, matmul_peak, update_arguments
from etbs import Replay, StoredCarry, load_carry
from game import env_step
from machine import commit, hardware, keep_compiled, one_heap
from run import Run, updates_by
from s5wm import Carry, Transition
from subactor import imagine

PICTURE, ACTIONS = (64, 64, 3), 18
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of a call whose results are waited for."""
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - began)
    return float(np.median(found[1:]))


def filled(replay: Replay, size: int, key) -> Replay:
    """As if `size` entries had come, with noise for pictures and states."""

    def noise(x):
        if x.dtype == jnp.uint8:
            bits = jax.random.bits(key, x.shape, jnp.uint8)
            return bits if x.ndim > 3 else bits % 4
        return x if x.dtype == bool else jax.random.normal(key, x.shape).astype(x.dtype)

    where = lambda r: (r.steps, r.carries, r.head, r.size)
    steps, carries = jax.tree.map(noise, (replay.steps, replay.carries))
    head, count = jnp.array(size, jnp.int32), jnp.array(size, jnp.int32)
    return eqx.tree_at(where, replay, (steps, carries, head, count))


def phase(function: Callable, *inputs) -> tuple[Any, dict[str, float]]:
    """What a function returns, its time and its work.

    GFLOP by the formula, and with each loop entered once beside XLA's own count.
    """
    traced = jax.make_jaxpr(function)(*inputs).jaxpr
    compiled = jax.jit(function).lower(*inputs).compile()
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return compiled(*inputs), {
        "ms": 1e3 * seconds(lambda: compiled(*inputs)),
        "gflop": flops(traced) / 1e9,
        "gflop_loops_once": flops(traced, loops_once=True) / 1e9,
        "gflop_loops_once_by_xla": analysis["flops"] / 1e9,
    }


def phases(config: Config, level: int, parts: bool = True) -> dict[str, dict]:
    """One update of one level and, if asked, the parts of it."""
    agent = init_agents(config, PICTURE, ACTIONS)
    learner, trainer, found = agent.learners[level], make_trainer(config), {}
    replay = filled(agent.replays[level], 4 * config.length, jax.random.key(0))
    whole = partial(update.__wrapped__, level=level, **update_arguments(config))
    _, found["update"] = phase(whole, learner, replay, agent.key)
    if not parts:
        return found
    keys = jax.random.split(jax.random.key(1), 5)
    with matmul_precision(config.precision):
        _, rows = replay.sample(config.batch, config.length, "etbs", 0.3, key=keys[0])
        steps, before = replay.windows(rows, "stored")
        carry = load_carry(before, config.model.z_classes)
        learn = partial(trainer._learn_world_model, key=keys[1])
        (_, latent, _), found["world model"] = phase(learn, learner, steps, carry)
        starts = jax.jit(partial(trainer._starts, key=keys[2]))
        start, goal, alive = starts(learner, latent, steps)
        dream = partial(imagine, horizon=config.trainer.horizon, key=keys[3])
        rollout, found["imagination"] = phase(dream, learner.subactor, start, goal)
        behave = trainer._learn_behaviour
        _, found["actor-critic"] = phase(behave, learner, rollout, goal, alive)
        code = partial(trainer._learn_code, key=keys[4])
        if learner.subactor.autoencoder is not None:
            _, found["autoencoder"] = phase(code, learner, rollout.h)
    return found


def acting(config: Config, clock: int) -> float:
    """Milliseconds of one call of the tower at this moment of an episode."""
    agent = init_agents(config, PICTURE, ACTIONS)
    step = env_step(np.zeros(PICTURE, np.uint8), first=clock == 0)
    held = [agent.tower, agent.replays]

    def call():
        now = jnp.array(clock, jnp.int32)
        tower = eqx.tree_at(lambda tower: tower.clock, held[0], now)
        action, held[0], held[1], _ = act_and_store(
            agent.subactors,
            tower,
            held[1],
            step,
            np.array(True),
            agent.key,
            agent.calls,
            period=config.period,
            precision=config.precision,
        )
        return action

    return 1e3 * seconds(call, 50)


def end_to_end(config: Config, steps: int) -> dict[str, float]:
    """Agent steps per second on Pong once all levels learn, and where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(replace(config, game="Pong"), Path(folder))
        update_all, run.update = run.update, lambda: None
        while run.game.entries[-1] < config.length:
            run.advance()
        began = time.perf_counter()
        for _ in range(steps):
            run.advance()
        acting_only = (time.perf_counter() - began) / steps
        levels = range(config.levels)
        run.updates = [updates_by(config, i, run.step) for i in levels]
        run.update = update_all
        for i in levels:
            run.update_level(i)
        jax.block_until_ready(run.agent)
        began = time.perf_counter()
        for _ in range(steps):
            run.advance()
        jax.block_until_ready(run.agent)
        whole = (time.perf_counter() - began) / steps
        once = [
            seconds(lambda i=i: (run.update_level(i), run.agent.learners[i])[1])
            for i in range(config.levels)
        ]
        env = run.game.env
        began = time.perf_counter()
        for _ in range(steps):
            _, _, over, late, _ = env.step(0)
            if over or late:
                env.reset()
        emulator = (time.perf_counter() - began) / steps
        answer = seconds(lambda: run.act([True]), 50)
    rates = [config.updates_per_step / config.period**i for i in range(config.levels)]
    in_calls = answer + sum(rate * one for rate, one in zip(rates, once, strict=True))
    return {
        "agent_steps_per_second": 1 / whole,
        "ms_per_agent_step": 1e3 * whole,
        "ms_per_agent_step_without_updates": 1e3 * acting_only,
        "ms_acting": 1e3 * answer,
        "ms_emulator": 1e3 * emulator,
        "ms_update_by_level": [1e3 * one for one in once],
        "share_outside_calls": 1 - in_calls / whole,
    }


def compiling(config: Config) -> dict[str, float]:
    """Seconds until all levels' update programs are there: first time, then cached."""
    agent = init_agents(config, PICTURE, ACTIONS)
    before = jax.config.jax_compilation_cache_dir
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # JAX opens the folder once per process
        for name in ("cold", "cached"):
            jax.clear_caches()
            began = time.perf_counter()
            for i in range(config.levels):
                arguments = update_arguments(config)
                inputs = (agent.learners[i], agent.replays[i], agent.key)
                update.lower(*inputs, level=i, **arguments).compile()
            found[f"seconds_{name}"] = time.perf_counter() - began
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()
    return found


def sequence_forms(config: Config, lengths: list[int]) -> dict[str, dict]:
    """Gradient of a sequence through S5, both scans, and through the recurrent twin."""
    S, K = config.model.z_categoricals, config.model.z_classes

    def s5_loss(model, z, action, first, parallel):
        out = model.discretise().predict_all(
            z, model.init_carry(), action, first, parallel=parallel
        )
        return (out.h**2).sum()

    def gru_loss(model, z, action, first):
        def step(x, inputs):
            z, action, first = inputs
            h, _ = model.predict(Carry(x, z), jax.nn.one_hot(action, ACTIONS), first)
            return h[None], h

        h = jax.lax.scan(step, model.init_carry().x, (z, action, first))[1]
        return (h**2).sum()

    losses = {
        "S5, parallel": partial(s5_loss, parallel=True),
        "S5, sequential": partial(s5_loss, parallel=False),
        "GRU": gru_loss,
    }
    found = {name: {} for name in losses}
    for name, loss in losses.items():
        kind = "rssm" if name == "GRU" else "s5"
        one = replace(config, world_model=kind, levels=1, steps=1, length=2)
        model = init_agents(one, PICTURE, ACTIONS).subactors[0].world_model
        gradient = jax.jit(jax.grad(loss))
        for T in lengths:
            inputs = (jnp.zeros((T, S, K)), jnp.zeros((T, 1), jnp.uint8))
            call = partial(gradient, model, *inputs, jnp.zeros(T, bool))
            found[name][T] = 1e3 * seconds(call)
    return found


def draws(sizes: list[int]) -> dict[str, dict]:
    """Drawing 16 windows of 64 from a full ring of so many entries."""
    found = {}
    for sampler in ("etbs", "balanced"):
        found[sampler] = {}
        for size in sizes:
            false = jnp.array(False)
            nothing = jnp.zeros((), jnp.uint8)
            step = Transition(nothing, nothing, jnp.zeros(()), false, false, None)
            replay = Replay(
                size, step, StoredCarry((jnp.zeros((1, 1)),), jnp.zeros(1, jnp.uint8))
            )
            held = [filled(replay, size, jax.random.key(0))]
            draw = jax.jit(
                lambda r, key, s=sampler: r.sample(16, 64, s, 0.3, key=key),
                donate_argnums=0,
            )

            def call(draw=draw, held=held):
                held[0], rows = draw(held[0], jax.random.key(0))
                return rows

            found[sampler][size] = 1e3 * seconds(call, 20)
    return found


def updates_of(config: Config, level: int = 0, entries: int | None = None) -> float:
    """Milliseconds of one update of a level with so many entries in its replay."""
    picture = (config.env.size, config.env.size, 1 if config.env.gray else 3)
    agent = init_agents(config, picture, ACTIONS)
    fill = partial(filled, size=entries or 4 * config.length, key=jax.random.key(0))
    replay = agent.replays[level]
    replay = fill(replay) if config.seeds == 1 else jax.vmap(fill)(replay)
    held = [agent.learners[level], replay]

    def call():
        held[0], held[1], metrics, _ = update(
            *held, agent.key, level=level, **update_arguments(config)
        )
        return metrics

    return 1e3 * seconds(call)


def peak_memory() -> float:
    """GiB at most: of the device where it tells, otherwise of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class Bench:
    """Times every part of training here and writes results/bench_HARDWARE.*"""

    preset: str = ""
    """Whose speed end to end is measured. Default: cpu without an accelerator."""
    steps: int = 400
    """Agent steps that are timed end to end."""
    out: Path = Path("results")
    part: str = ""
    """Measures only this, in this process, and prints it as JSON."""


def measurements(bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is measured, by name, in this order."""
    here = {"precision": precision_here("auto"), "steps": 2_000}
    full = replace(PRESETS["atari100k"], **here)
    small = replace(full, batch=4, length=16)
    fallback = "cpu" if jax.default_backend() == "cpu" else "atari100k"
    preset = replace(PRESETS[bench.preset or fallback], **here)
    long = replace(preset, steps=100_000, capacity=100_000)
    minatar = replace(PRESETS["minatar"], **here)
    levels = range(full.levels)
    windows = lambda config: f"{config.batch} windows of {config.length}"
    several = lambda config, parts: {
        f"level {i}": phases(config, i, parts) for i in levels
    }
    yield windows(small), lambda: several(small, True)
    moments = {"all levels act": 0, "level 0 acts": 1}
    yield "acting", lambda: {name: acting(full, at) for name, at in moments.items()}
    yield f"end to end, {preset.preset}", lambda: end_to_end(preset, bench.steps)
    per_step = lambda n: end_to_end(replace(preset, levels=n), bench.steps)
    yield "levels", lambda: {n: per_step(n)["ms_per_agent_step"] for n in (1, 2, 3)}
    yield "sequence length", lambda: sequence_forms(full, [64, 256, 1024, 4096])
    yield "draws", lambda: draws([10**n for n in range(3, 8)])
    filling = (10**3, 10**4, 10**5 - 1)
    yield "filling", lambda: {n: updates_of(long, 0, n) for n in filling}
    batches, seeds = (4, 8, 16, 32), (1, 2, 4)
    yield "batch", lambda: {b: updates_of(replace(preset, batch=b)) for b in batches}
    yield (
        "seeds at once",
        lambda: {n: updates_of(replace(minatar, seeds=n)) for n in seeds},
    )
    yield "compiling", lambda: compiling(full)
    yield windows(full), lambda: several(full, False)


def with_shares(found: dict) -> dict:
    """Every phase with its fraction of the matrix product's speed."""
    peak = float(np.median(found["matmul_gflops"]))
    for part in found.values():
        for level in part.values() if isinstance(part, dict) else ():
            for phase in level.values() if isinstance(level, dict) else ():
                if isinstance(phase, dict) and "gflop" in phase:
                    phase["share_of_peak"] = phase["gflop"] / phase["ms"] * 1e3 / peak
    return found


def summary(found: dict) -> str:
    """Shares of whole updates, and the speed end to end, in a line."""
    parts = []
    for windows, levels in found.items():
        if "windows of" in windows and isinstance(levels, dict):
            shares = [100 * x["update"]["share_of_peak"] for x in levels.values()]
            text = " / ".join(f"{share:.0f}" for share in shares)
            parts.append(f"{windows}: {text} % of the matmul peak")
        if windows.startswith("end to end"):
            speed = levels["agent_steps_per_second"]
            parts.append(f"{windows}: {speed:.1f} agent steps/s")
    return "; ".join(parts)


def table(found: dict) -> str:
    """Phases as Markdown."""
    rows = [
        "| windows | level | phase | ms | GFLOP | of matmul peak |",
        "|---|---|---|---|---|---|",
    ]
    for windows, levels in found.items():
        if "windows of" in windows and isinstance(levels, dict):
            for level, parts in levels.items():
                for name, x in parts.items():
                    rows.append(
                        f"| {windows} | {level} | {name} | {x['ms']:.1f} | "
                        f"{x['gflop']:.2f} | {100 * x['share_of_peak']:.0f} % |"
                    )
    return "\n".join(rows) + "\n"


def draw(found: dict, path: Path) -> None:
    """How time grows: with sequence length, replay size, batch, seeds and levels."""
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    panels = figure.subplots(1, 5)
    curves = (
        ("sequence length", "steps of a sequence"),
        ("draws", "entries in the replay"),
        ("batch", "windows per update"),
        ("seeds at once", "seeds in one process"),
        ("levels", "levels"),
    )
    for axes, (name, label) in zip(panels, curves, strict=True):
        lines = found[name]
        if not isinstance(next(iter(lines.values())), dict):
            lines = {"agent step" if name == "levels" else "update": lines}
        for (line, values), colour in zip(lines.items(), COLOURS, strict=False):
            x = [float(n) for n in values]
            axes.loglog(x, values.values(), "o-", color=colour, label=line)
        if name in ("batch", "seeds at once", "levels"):
            axes.set(xscale="linear", yscale="linear", xlim=0, ylim=0, xticks=x)
        axes.set(xlabel=label, ylabel="ms" if axes is panels[0] else "")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def measure(bench: Bench) -> dict[str, Any]:
    """One part, with the peaks of speed and memory of this process."""
    peak = matmul_peak(4096, precision=precision_here("auto"))
    found = dict(measurements(bench))[bench.part]()
    return {"found": found, "gflops": peak / 1e9, "GiB": peak_memory()}


def measure_elsewhere(part: str, argv: list[str]) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, *argv, "--part", part]
    as_trained = part.startswith(("end to end", "levels", "filling", "batch"))
    heap = one_heap() if as_trained else {}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | heap
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 for a part that does not exist."""
    keep_compiled()
    argv = sys.argv[1:] if argv is None else argv
    bench = tyro.cli(Bench, args=argv)
    # This process leaves the device's memory to those of the parts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if bench.preset not in ("", *PRESETS):
        choice = ", ".join(PRESETS)
        print(f"bench.py: --preset {bench.preset}: choose {choice}", file=sys.stderr)
        return 2
    parts = [name for name, _ in measurements(bench)]
    if bench.part and bench.part not in parts:
        choice = ", ".join(repr(name) for name in parts)
        print(f"bench.py: --part {bench.part}: choose {choice}", file=sys.stderr)
        return 2
    if bench.part:
        print(json.dumps(measure(bench)))
        return 0
    began, device = time.time(), jax.devices()[0].device_kind
    raw = {
        "command": f"python bench.py {' '.join(argv)}".strip(),
        "commit": commit(),
        "hardware": hardware(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "seeds": [0],
        "matmul_gflops": [],
        "peak GiB": {},
    }
    slug = f"{device}-{os.cpu_count()}-cores".lower().replace(" ", "-")
    bench.out.mkdir(exist_ok=True)
    path = bench.out / f"bench_{slug}.json"
    for part in parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        measured = measure_elsewhere(part, argv)
        raw[part] = measured["found"]
        raw["peak GiB"][part] = measured["GiB"]
        raw["matmul_gflops"].append(measured["gflops"])
        raw["wall_seconds"] = round(time.time() - began)
        raw["summary"] = summary(with_shares(raw))
        path.write_text(json.dumps(raw, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(raw))
    draw(raw, path.with_suffix(".png"))
    print(table(raw))
    return 0


if __name__ == "__main__":
    sys.exit(main())
