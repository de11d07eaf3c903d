"""How hard it is to lose a run, counted: each command adds a part to one results file.

    kills            SIGKILL at random moments, resumed until done: equals undisturbed
    mutants          damaged and forged checkpoints: refused in a line, older one used
    command-lines    settings that cannot be: one line, exit code 2, nothing written
    soak             resident memory of a long run, sampled
    cost             bytes and seconds of a checkpoint of the published size

`python reliability.py kills --count 200` and so on; results/reliability.json.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import checkpoint
import train
from config import ATARI100K, Config, find_bounds
from game import read_lines
from machine import commit, hardware, keep_compiled
from run import Run

ROOT = Path(__file__).parent
STEPS = 200
TINY = f"--preset tiny --steps {STEPS} --checkpoint-every 20 --log-every 10"
SMALL = "--model.channels --model.strides"
SCENARIOS = {
    "Pong": "--game Pong",
    "Breakout, flat, no no-ops": "--game Breakout --levels 1 --env.noops 0",
    "catch": f"--game catch {SMALL}",
    "recall, flat, GRU, balanced": f"--game recall --levels 1 --world-model rssm "
    f"--sampler balanced {SMALL}",
    "MinAtar, 2 levels, 2 seeds": "--game minatar/breakout --levels 2 --seeds 2 "
    f"{SMALL}",
}


def trainer(flags: str, folder: Path) -> subprocess.Popen:
    """train.py on this run folder, from its start or from where it is."""
    way = ["--resume", str(folder)]
    if not folder.exists():
        way = [*TINY.split(), *flags.split(), "--run-dir", str(folder)]
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *way], stdout=log, stderr=log
        )


def contents(folder: Path) -> dict[str, str]:
    """Hashes of what equal runs share: metrics, last checkpoint and its segments."""
    found = {}
    sha = lambda raw: hashlib.sha256(raw).hexdigest()
    for path in sorted(folder.rglob(f"step-{STEPS:09d}.ckpt")):
        seed = str(path.parent.relative_to(folder))
        arrays, meta = checkpoint.read(path)
        del meta["config"], meta["counts"]["seconds"]
        found[f"{seed} meta"] = str(meta)
        found |= {f"{seed} {key}": sha(x.tobytes()) for key, x in arrays.items()}
        for segment in (
            s["file"] for chain in meta["segments"].values() for s in chain
        ):
            found[f"{seed} {segment}"] = sha((path.parent / segment).read_bytes())
        metrics = path.parent.parent / "metrics.jsonl"
        found[f"{seed} metrics"] = sha(metrics.read_bytes())
    return found


def changed(folder: Path) -> float:
    """When something under the folder was last written."""
    times = [0.0]
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


def trained(folder: Path) -> bool:
    """Whether the last checkpoint, and only what belongs to it, is there."""
    last = list(folder.rglob(f"step-{STEPS:09d}.ckpt"))
    return bool(last) and len(last) == len(list(folder.rglob("checkpoint")))


def stop_when_trained(process: subprocess.Popen, folder: Path) -> None:
    """Lets a run train to its end, and spares it the evaluation."""
    while process.poll() is None and not trained(folder):
        time.sleep(0.05)
    process.kill()
    process.wait()
    if not trained(folder):
        raise RuntimeError(Path(f"{folder}.log").read_text()[-2000:])


def kill_until_done(name: str, folder: Path, kills: int, seed: str) -> int:
    """Kills one run up to so often, lets it train on; how often it was killed.

    Two kills of three wait for the first sign of life, then up to two seconds; the
    third may fall anywhere in the first ten.
    """
    chance, done = random.Random(seed), 0
    while done < kills and not trained(folder):
        began, process = time.time(), trainer(SCENARIOS[name], folder)
        wait = chance.uniform(0, 10)
        if chance.random() < 2 / 3:
            while process.poll() is None and changed(folder) < began:
                time.sleep(0.01)
            wait = chance.uniform(0, 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
        process.kill()
        if process.wait() != -9:
            raise RuntimeError(Path(f"{folder}.log").read_text()[-2000:])
        done += 1
    if not trained(folder):
        stop_when_trained(trainer(SCENARIOS[name], folder), folder)
    return done


def kills(count: int = 20) -> dict:
    """Runs killed with SIGKILL and resumed beside runs that were not; equal, or raises.

    Every run is killed ten times at most, so that many different moments are hit.
    """
    with tempfile.TemporaryDirectory() as temporary:
        whole = {}
        for name, flags in SCENARIOS.items():
            folder = Path(temporary, f"whole-{len(whole)}")
            stop_when_trained(trainer(flags, folder), folder)
            whole[name] = contents(folder)
        survived, rounds = dict.fromkeys(SCENARIOS, 0), 0

        def one(name):
            folder = Path(temporary, f"{list(SCENARIOS).index(name)}-{rounds}")
            killed = kill_until_done(name, folder, share, f"{rounds} {name}")
            if contents(folder) != whole[name]:
                found = contents(folder).items() ^ whole[name].items()
                raise RuntimeError(f"{name}, {killed} kills: another run, {found}")
            shutil.rmtree(folder)
            return name, killed

        while (missing := count - sum(survived.values())) > 0:
            share = min(10, -(-missing // len(SCENARIOS)))
            with ThreadPoolExecutor(2) as pool:
                for name, killed in pool.map(one, SCENARIOS):
                    survived[name] += killed
            rounds += 1
    return {"survived": sum(survived.values()), "by_scenario": survived}


def forge(path: Path, chance: random.Random) -> None:
    """Changes one thing in the header, and signs it anew."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[8:16], "little")
    content = json.loads(raw[checkpoint.PREAMBLE :][:length])
    node, values = content, [None, -1, 1 << 62, "x", [], {}, 0.5, "../../etc/passwd"]
    while True:
        key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        inside = isinstance(node[key], dict | list) and node[key]
        if not inside or chance.random() < 0.1:
            node[key] = chance.choice(values)
            break
        node = node[key]
    header = json.dumps(content).encode()
    digest = hashlib.sha256(header).digest()
    start = raw[:8] + len(header).to_bytes(8, "little") + digest
    path.write_bytes(start + header + raw[checkpoint.PREAMBLE + length :])


def resign(path: Path, chance: random.Random) -> None:
    """Other data in one array, under a valid checksum."""
    arrays, meta = checkpoint.read(path)
    name = chance.choice(list(arrays))
    data = np.frombuffer(chance.randbytes(arrays[name].nbytes), arrays[name].dtype)
    checkpoint.write(path, arrays | {name: data.reshape(arrays[name].shape)}, meta)


def flip(path: Path, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 8, 100])):
        # Half of the flips near the beginning, where the structure is.
        end = chance.choice([len(raw), min(len(raw), 4096)])
        raw[chance.randrange(end)] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def extend(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 99)))


def zero(path: Path, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    start = chance.randrange(len(raw))
    stop = min(len(raw), start + 512)
    raw[start:stop] = bytes(stop - start)
    path.write_bytes(raw)


def empty(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def later_version(path: Path, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[7] = chance.randrange(checkpoint.VERSION + 1, 256)
    path.write_bytes(raw)


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


DAMAGE = (flip, cut, extend, zero, empty, later_version, remove)
FORGERY = (forge, resign)


def digest(run: Run) -> str:
    """Of all that a checkpoint holds; a ring's last row swallows what nobody reads."""
    rings = [r.steps for r in run.agent.replays]
    kept = jax.tree.map(lambda x: np.asarray(x)[:-1], rings)
    leaves = jax.tree.leaves((run.device_state(), kept, run.game.seen))
    leaves = [np.asarray(x).tobytes() for x in leaves]
    numbers = str((run.meta(0)["counts"], run.step, run.game.returns))
    return hashlib.sha256(b"".join(leaves) + numbers.encode()).hexdigest()


def mutants(count: int = 50) -> dict:
    """Mutated checkpoints, and segments, restored; raises unless each is dealt with.

    Damage must lead to one of the two states that were saved. A forgery is a valid file
    of other contents: it may be refused or taken, and nothing else may happen.
    """
    chance, tried = random.Random(0), dict.fromkeys((*DAMAGE, *FORGERY), 0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "run")
        flags = [*TINY.split(), "--game", "Pong", "--run-dir", str(folder)]
        run, good = train.open_run(train.parse(flags)), []
        for _ in range(2):
            for _ in range(20):
                run.advance()
            run.save()
            good.append(digest(run))
        before = {path: path.read_bytes() for path in (folder / "checkpoint").iterdir()}
        newest = checkpoint.checkpoints(folder)[0]
        while sum(tried.values()) < count:
            mutate = chance.choice(list(tried))
            mutate(
                newest if chance.random() < 0.7 else chance.choice(list(before)), chance
            )
            complaints = io.StringIO()
            with contextlib.redirect_stderr(complaints):
                restored = run.restore_newest()
            lines = complaints.getvalue().splitlines()
            sound = digest(run) in good if mutate in DAMAGE and restored else True
            if not sound or len(lines) > 2 or not (restored or len(lines) == 2):
                raise RuntimeError(f"{mutate.__name__} was taken: {lines}")
            tried[mutate] += 1
            for path, raw in before.items():
                path.write_bytes(raw)
    return {
        "tried": sum(tried.values()),
        "by_kind": {mutate.__name__: n for mutate, n in tried.items()},
    }


def wrong_values(hint, low: float | int, high: float | int) -> Iterator[str]:
    """Texts that a setting of this type must refuse."""
    kind = get_origin(hint) or hint
    if kind is Literal:
        yield from ("nonsense", str(get_args(hint)[0]).upper() + "x")
    elif kind is tuple:
        yield from ("0", "x", "-1")
    elif kind in (int, float):
        yield from ("x", "nan", "", f"{low - 1:g}")
        if high < float("inf"):
            yield f"{high * 2 + 1:.0f}"
    if kind is int:
        yield from ("1.5", "1e3")


def bad_command_lines(config_type=Config, prefix: str = "--") -> Iterator[list[str]]:
    """From the types and bounds of the settings: wrong values, names and numbers."""
    hints = get_type_hints(config_type, include_extras=True)
    plain = get_type_hints(config_type)
    for f in fields(config_type):
        flag = prefix + f.name.replace("_", "-")
        if is_dataclass(plain[f.name]):
            yield from bad_command_lines(plain[f.name], flag + ".")
            continue
        bounds = next(iter(find_bounds(hints[f.name])), None)
        low, high = (bounds.low, bounds.high) if bounds else (0.0, float("inf"))
        for text in wrong_values(plain[f.name], low, high):
            yield [f"{flag}={text}"]
        yield [flag + "s-of-nothing", "1"]
        if plain[f.name] is not bool:
            yield [*(["--game", "catch"] if f.name != "game" else []), flag]


def command_lines() -> dict:
    """Every generated command line gets one line of complaint and exit code 2."""
    tried = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "run")
        for line in bad_command_lines():
            argv = ["--preset", "tiny", "--run-dir", str(folder), *line]
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                code = train.main(argv)
            if code != 2 or said.getvalue().count("\n") != 1 or folder.exists():
                raise RuntimeError(f"{line}: exit code {code}, {said.getvalue()!r}")
            tried += 1
    return {"tried": tried}


def soak(minutes: float = 60) -> dict:
    """Resident memory of one process that trains on Pong all the time, replay full.

    `growth` is that of the second half's mean over the first's, after the warm-up.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, samples = Path(temporary, "run"), []
        flags = "--game Pong --steps 100000000 --capacity 1000 --checkpoint-every 2000"
        process, end = trainer(flags, folder), time.time() + 60 * minutes
        while time.time() < end and process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            samples.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
            time.sleep(min(10, 6 * minutes))
        process.kill()
        if process.wait() != -9:
            raise RuntimeError(Path(f"{folder}.log").read_text()[-2000:])
        steps = read_lines(folder)[-1]["step"]
    warm_up = 0.2  # of the samples
    flat = np.array(samples[int(warm_up * len(samples)) :])
    middle = len(flat) // 2
    growth = flat[middle:].mean() / flat[:middle].mean() - 1
    return {
        "minutes": minutes,
        "agent_steps": steps,
        "warm_up_minutes": warm_up * minutes,
        "mib_median": float(np.median(flat)),
        "mib_min_max": [float(flat.min()), float(flat.max())],
        "growth": float(growth),
    }


def cost() -> dict:
    """Saves of a run of the published size whose replays hold real Pong frames.

    The frames of 10,000 steps of random play, ten times over; networks untrained.
    """
    with tempfile.TemporaryDirectory() as temporary:
        run = Run.start(ATARI100K, Path(temporary))
        (Path(temporary) / "checkpoint").mkdir()
        env, rng, frames = run.game.env, np.random.default_rng(0), []
        for _ in range(10_000):
            obs, _, terminated, truncated, _ = env.step(
                int(rng.integers(env.action_space.n))
            )
            frames.append(obs)
            if terminated or truncated:
                env.reset()
        rows = -(-run.agent.replays[0].capacity // len(frames))
        ring = np.concatenate([np.stack(frames)] * rows)
        ring = jnp.asarray(ring[: run.agent.replays[0].capacity + 1])
        object.__setattr__(run.agent.replays[0].steps, "obs", ring)
        seconds = []
        for run.step in range(10_000, 100_001, 10_000):
            period = ATARI100K.period
            run.game.entries = [run.step // period**i for i in range(3)]
            began = time.perf_counter()
            run.save()
            seconds.append(time.perf_counter() - began)
        files = list((Path(temporary) / "checkpoint").iterdir())
        size = lambda end: (
            sum(p.stat().st_size for p in files if p.suffix == end) / 2**20
        )
        return {
            "seconds_per_save": seconds,
            "median_seconds_per_save": float(np.median(seconds)),
            "mib_segments_of_the_run": size(".seg"),
            "mib_two_checkpoints": size(".ckpt"),
        }


COMMANDS: dict[str, Callable[..., dict]] = {
    "kills": kills,
    "mutants": mutants,
    "command-lines": command_lines,
    "soak": soak,
    "cost": cost,
}


def summary(parts: dict[str, dict]) -> str:
    """What was found, in a line."""
    phrases = {
        "kills": "{survived} kills survived",
        "mutants": "{tried} damaged or forged checkpoints dealt with",
        "command-lines": "{tried} bad command lines refused",
        "soak": "memory {growth:+.2%} over {minutes:.0f} minutes",
        "cost": "{median_seconds_per_save:.1f} s per save of the published size",
    }
    return "; ".join(phrases[name].format(**parts[name]) for name in parts)


def main(argv: list[str] | None = None) -> int:
    """Runs one of them and writes what it found beside what the others found."""
    argv = sys.argv[1:] if argv is None else argv
    keep_compiled()
    began = time.monotonic()
    found = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=argv)
    path = ROOT / "results" / "reliability.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts[argv[0]] = {
        "command": f"python reliability.py {' '.join(argv)}",
        "commit": commit(),
        "wall_seconds": round(time.monotonic() - began, 1),
        **found,
    }
    everything = {
        "command": " && ".join(part["command"] for part in parts.values()),
        "commit": ", ".join(sorted({part["commit"] for part in parts.values()})),
        "hardware": hardware(),
        "cores": os.cpu_count(),
        "seeds": [0],
        "wall_seconds": sum(part["wall_seconds"] for part in parts.values()),
        "summary": summary(parts),
        "parts": parts,
    }
    path.write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(parts[argv[0]], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
