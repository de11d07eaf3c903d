"""The sweep: its plan and table, and real Ray with workers killed on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from os import terminal_size as Size
from pathlib import Path
from types import SimpleNamespace

import pytest
from jaxtyping import TypeCheckError

pytest.importorskip("ray", reason="sweeps need Ray: pip install -e '.[sweep]'")

import ray
from ray.cluster_utils import Cluster

import checkpoint
import sweep
import train
from config import TINY
from sweep import Sweep, plan
from worker import Job

ROOT = Path(__file__).parent.parent
CPU = Sweep(games=("catch",), seeds=1, gpus_per_run=0.0)


def test_plan_is_games_by_seeds_by_arms():
    arms = ("flat=--levels 1", "deep=--levels 3 --tau 0.5")
    wanted = replace(CPU, games=("pong", "Pong", "minatar/breakout"), seeds=2, arm=arms)
    jobs = plan(wanted, ["--steps", "77", "--prefill", "0", "--levels", "2"])
    names = [job.name for job, _ in jobs]
    assert len(names) == len(set(names)) == 8
    assert {"flat/Pong-0", "deep/minatar-breakout-1"} <= set(names)
    for job, config in jobs:
        assert (job.steps, config.steps) == (77, 77)
        assert train.parse(list(job.flags)) == config
        assert config.seed == int(job.name[-1])
        assert config.levels == (1 if job.name.startswith("flat/") else 3)


def test_all_games_and_the_preset_that_suits_the_machine():
    jobs = plan(replace(CPU, games=("all",), seeds=2), [])
    assert len({job.name for job, _ in jobs}) == 52
    assert {config.preset for _, config in jobs} == {"cpu"}
    on_gpus = plan(replace(CPU, games=("Pong", "catch"), gpus_per_run=0.25), [])
    assert [config.preset for _, config in on_gpus] == ["atari100k", "probe"]
    assert all("--preset" in job.flags for job, _ in on_gpus)  # whatever machine it is


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--games Pogn", "--game Pogn is unknown: did you mean Pong"),
        ("--seeds 0", "--seeds 0 is not possible: give 1 or more"),
        ("--arm =x", "--arm: give NAME="),
        ("--arm a=x --arm a=y", "each NAME once"),
        ("--retries -1", "--retries -1 is not possible: give 0 or more"),
        ("--gpus-per-run -1", "--gpus-per-run -1.0 is not possible: give 0"),
        ("--tflops 0", "--tflops 0.0 is not possible: give more than 0"),
        ("--arm a='1", "--arm a='1: No closing quotation"),
        ("--games catch --out no://y", "--out no://y: Protocol not known: no"),
        ("-- --tau 2", "--tau 2.0 is not possible"),
        ("--arm a=--levels=9", "--levels 9 is not possible"),
        ("-- --seeds 2", "--seeds of train.py: give that of sweep.py, before --"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(argv, says, capsys):
    assert sweep.main(argv.split()) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not ray.is_initialized()


def test_a_cluster_that_does_not_answer_is_bad_input(tmp_path, monkeypatch, capsys):
    def absent(*_, **__):
        raise ConnectionError("Could not find any running Ray.")

    monkeypatch.setattr(ray, "init", absent)
    argv = ["--games", "catch", "--address", "auto", "--out", str(tmp_path)]
    assert sweep.main(argv) == 2
    error = capsys.readouterr().err
    assert error == "sweep.py: --address auto: Could not find any running Ray.\n"


def test_workers_in_other_folders_are_given_the_same_place():
    assert replace(CPU, out="runs/x").place == str(Path.cwd() / "runs/x")
    assert replace(CPU, out="s3://bucket/x").place == "s3://bucket/x"


def test_a_preset_is_recognised_in_every_form():
    on_gpus = plan(replace(CPU, games=("Pong",), gpus_per_run=1.0), ["--preset=cpu"])
    assert on_gpus[0][1].preset == "cpu" and "atari100k" not in on_gpus[0][0].flags


def test_runs_of_other_flags_are_not_taken_for_done(tmp_path, capsys):
    argv = f"--games catch --seeds 1 --gpus-per-run 0 --out {tmp_path} --dry-run"
    ((job, config),) = plan(CPU, ["--levels", "1"])
    folder = tmp_path / job.name
    folder.mkdir()
    may_differ = {"run_dir": str(folder), "eval_episodes": config.eval_episodes + 1}
    saved = json.dumps(asdict(replace(config, **may_differ)))
    (folder / "config.json").write_text(saved)
    (folder / "result.json").write_text('{"wall_seconds": 60}')
    assert sweep.main([*argv.split(), "--", "--levels", "1"]) == 0
    assert "0 of 1 runs to do" in capsys.readouterr().out
    assert sweep.main([*argv.split(), "--", "--levels", "3"]) == 2
    assert "trained with other flags: give another --out" in capsys.readouterr().err


def test_dry_run_says_what_is_missing_and_where_its_hours_come_from(
    tmp_path, capsys, monkeypatch
):
    """Of two arms one has a finished run of 36 s: its other runs are as long."""
    monkeypatch.setattr(sweep, "update_flops", lambda *_: [1e6, 1e6])
    argv = ["--games", "catch", "recall", "--seeds", "2", "--out", str(tmp_path)]
    argv += ["--dry-run"]
    argv += ["--arm", "a=--levels 1", "--arm", "b=--levels 2", "--tflops", "1e-6"]
    (tmp_path / "a/catch-0").mkdir(parents=True)
    (tmp_path / "a/catch-0/result.json").write_text('{"wall_seconds": 36}')
    assert sweep.main([*argv, "--", "--steps", "100", "--prefill", "0"]) == 0
    *lines, end = capsys.readouterr().out.splitlines()
    by = {line.split()[0]: line for line in lines}
    assert by["a/catch-0"].endswith("100 steps: done")
    for alike in ("a/catch-1", "a/recall-1"):
        assert by[alike].endswith("0.01 h, by a finished run: measured")
    other, same = (by[f"b/catch-{seed}"].split(": ")[1] for seed in (0, 1))
    assert other == same and other.endswith(" h, by --tflops 1e-06")
    total = 3 * 0.01 + 4 * float(other.split()[0])
    assert re.match(r"7 of 8 runs to do: .* hours on CPU", end)
    assert float(end.split(": ")[1].split()[0]) == pytest.approx(total, rel=0.05)
    assert not ray.is_initialized()


def test_gpu_hours_count_the_share_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "hours", lambda *_: (3.0, "hand"))
    half = replace(CPU, seeds=2, gpus_per_run=0.5)
    said = sweep.estimate(plan(half, []), sweep.Store(str(tmp_path)), half)
    assert said.endswith("\n2 of 2 runs to do: 3 GPU-hours at 0.5 GPU each")


def test_hours_are_flops_over_speed(monkeypatch):
    """10 + 8/4 FLOP each step, half as many updates: 6 · 96 at 576 per hour."""
    monkeypatch.setattr(sweep, "update_flops", lambda *_: [10.0, 8.0])
    config = replace(TINY, levels=2, updates_per_step=0.5)
    slow = replace(CPU, tflops=576 / 3600 / 1e12)
    assert sweep.hours(config, slow) == (pytest.approx(1.0), "--tflops 1.6e-13")
    full = replace(config, steps=100_000, updates_per_step=1.0)
    monkeypatch.setattr(sweep, "update_flops", lambda *_: [train.FULL_FLOPS])
    hours, why = sweep.hours(full, replace(CPU, gpus_per_run=1.0))
    assert hours == pytest.approx(14) and "the paper's 14 h" in why
    assert sweep.hours(full, replace(CPU, gpus_per_run=0.25))[0] == pytest.approx(56)
    assert sweep.hours(full, replace(CPU, gpus_per_run=2.0))[0] == pytest.approx(14)
    monkeypatch.setattr(sweep, "matmul_peak", lambda: train.FULL_FLOPS)
    hours, why = sweep.hours(full, CPU)
    assert hours == pytest.approx(100_000 / 3600) and "lower bound" in why


def test_table_by_hand():
    jobs = [Job(name, (), 1000) for name in ("a", "b", "c", "d")]
    rows = {
        "b": {"state": "training", "step": 400, "speed": 2.0, "score": -1.5},
        "c": {"state": "done", "step": 1000, "speed": 9.0, "score": 20.0},
        "d": {"state": "starting"},
    }
    head, *lines, end = sweep.table(jobs, rows).splitlines()
    assert head.split() == ["run", "state", "step", "steps/s", "left", "score"]
    cells = [line.split() for line in lines]
    assert cells[0] == ["b", "training", "400/1000", "2.0", "5.0", "min", "-1.5"]
    assert cells[1] == ["d", "starting", "0/1000"]
    assert cells[2] == ["c", "done", "1000/1000", "20"]
    counts = "4 runs: 1 waiting, 1 training, 1 done, 1 starting; about 21.7 min left"
    assert end == counts  # 2,600 steps at 2 per second


def test_a_terminal_shows_the_newest_table_alone(monkeypatch, capsys):
    """Eight lines on a screen of six: the first and the sum; then two over the four."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sweep.shutil, "get_terminal_size", lambda: Size((80, 6)))
    assert sweep.display("a\nb\nc\nd\ne\nf\ng\nsum", 0) == 4
    assert sweep.display("a\nsum", 4) == 2
    assert capsys.readouterr().out == "a\nb\nc\nsum\n\x1b[4F\x1b[Ja\nsum\n"


class ScriptedRay:
    """Each wait interrupts or lets tasks end; a task's end is its name or an error."""

    exceptions = ray.exceptions

    def __init__(self, *waits):
        self.waits, self.asked = iter(waits), []
        self.read = SimpleNamespace(remote=lambda go_on: self.asked.append(go_on) or {})

    def wait(self, *_, **__):
        if (ended := next(self.waits)) is None:
            raise KeyboardInterrupt
        return ended, []

    def get(self, found):
        if found == "lost":
            raise ray.exceptions.RayError("Traceback:\n  File\nDied: exit code 1\n")
        return found


def test_tasks_end_badly_or_are_asked_to(monkeypatch, capsys):
    board = ScriptedRay([], None, ["not finite: see x.log"], ["lost"])
    monkeypatch.setattr(sweep, "ray", board)
    waiting = {"not finite: see x.log": "a", "lost": "b"}
    ended = sweep.follow([Job("a", (), 9), Job("b", (), 9)], dict(waiting), board)
    assert ended == {"a": "not finite: see x.log", "b": "Died: exit code 1"}
    assert board.asked == [True, False, False]
    text = capsys.readouterr().out
    assert "stopping: every run saves a checkpoint first" in text
    assert text.endswith("2 runs: 1 not finite, 1 Died\n")
    twice = ScriptedRay(None, None)
    monkeypatch.setattr(sweep, "ray", twice)
    with pytest.raises(KeyboardInterrupt):
        sweep.follow([Job("a", (), 9)], {"lost": "a"}, twice)


@pytest.mark.parametrize(
    ("end", "code"),
    [("done", 0), ("stopped", 130), ("not finite: see x.log", 1), (None, 130)],
)
def test_exit_codes_of_a_sweep(tmp_path, monkeypatch, capsys, end, code):
    def run_all(jobs, _):
        if end is None:
            raise KeyboardInterrupt
        return {jobs[0].name: "done", jobs[1].name: end}

    monkeypatch.setattr(sweep, "run_all", run_all)
    argv = ["--games", "catch", "--seeds", "2", "--out", str(tmp_path)]
    assert sweep.main(argv) == code
    found = capsys.readouterr()
    failed = f"sweep.py: catch-1: {end}\n" if code == 1 else ""
    assert found.err == failed
    remedy = "the same command goes on with what is missing" in found.out
    assert remedy == (end in ("stopped", "not finite: see x.log"))


def test_type_checks_are_live():
    with pytest.raises(TypeCheckError):
        sweep.table([], "no rows")


def command(tmp_path: Path, steps: int, out: str, *flags: str) -> list[str]:
    """sweep.py with the stand-in for train.py, from anywhere."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    stand_in = (ROOT / "tests/stand_in_train.py").read_text()
    (source / "train.py").write_text(stand_in)
    # A shell's background jobs, and all that they start, are born deaf to Ctrl-C.
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script += f"import sweep, sys; sweep.ROOT = sweep.Path({str(source)!r}); "
    script += "sys.exit(sweep.main(sys.argv[1:]))"
    flags = ("--games", "Pong", "Krull", "--seeds", "2", "--out", out, *flags)
    words = ["--gpus-per-run", "0", "--", "--preset", "tiny", "--steps", str(steps)]
    return [sys.executable, "-c", script, *flags, *words]


def wait_for(what, seconds=300):
    """The first true value that `what` returns."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def begun(folder: Path) -> list[dict]:
    """What the log of a run says of each worker that had it."""
    log = folder.parent / f"{folder.name}.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(x[10:]) for x in lines if x.startswith("sweep.py: {")]


def computed(folder: Path) -> list[tuple[int, int]]:
    """(process, step) of every step that was ever computed."""
    path = folder / "computed.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(x.split()[0]), int(x.split()[1])) for x in lines if len(x.split()) > 1]


def kill_worker_of(folder: Path) -> None:
    """SIGKILL to the worker of a run that has a checkpoint; waits for the next one."""
    wait_for(lambda: list(folder.glob("checkpoint/*.ckpt")))
    os.kill(begun(folder)[-1]["worker"], signal.SIGKILL)
    wait_for(lambda: len(begun(folder)) > 1)


def check(out: Path, steps: int, killed: set[str], lost: int):
    """Every run is whole; only what no checkpoint held was computed twice."""
    for name in ("Pong-0", "Pong-1", "Krull-0", "Krull-1"):
        folder = out / name
        result = json.loads((folder / "result.json").read_text())
        assert result["sum"] == steps * (steps + 1) // 2
        counts = Counter(step for _, step in computed(folder))
        assert set(counts) == set(range(1, steps + 1))
        again = sum(counts.values()) - steps
        assert again <= (lost if name in killed else 0), name
        processes = [process for process, _ in computed(folder)]
        order = list(dict.fromkeys(processes))
        assert processes == sorted(processes, key=order.index)  # never two at once
        if name in killed:
            assert len(order) > 1 and begun(folder)[1]["from"] is not None


ENV = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def test_killed_stopped_and_continued(tmp_path):
    """Nothing is lost and no run done twice, whatever ends a worker or the sweep."""
    out = tmp_path / "out"
    words = command(tmp_path, 40, str(out), "--cpus-per-run", "0.5")
    quiet = {"env": ENV, "cwd": tmp_path, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **quiet) as process:
        kill_worker_of(out / "Pong-0")
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=300)[0]
    assert process.returncode == 130, text
    assert "the same command goes on" in text
    *_, last = (line for line in text.splitlines() if line.startswith("Pong-0"))
    assert last.split()[1] == "stopped"
    finished = subprocess.run(words, **quiet, timeout=300, check=False)
    assert finished.returncode == 0, finished.stdout
    assert re.fullmatch(r"(\d) runs: \1 done", finished.stdout.splitlines()[-1])
    check(out, 40, {"Pong-0"}, lost=2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = subprocess.run(words, **quiet, timeout=300, check=False)
    assert again.stdout == "4 of 4 runs are done already\n" and again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.slow
def test_two_machines_one_of_which_dies(tmp_path, monkeypatch):
    """Two raylets and a store behind a URL, as on a cluster without a shared path."""
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        second = cluster.add_node(num_cpus=2)
        out = tmp_path / "shared"
        flags = ("--address", cluster.address)
        words = command(tmp_path, 300, f"file://{out}", *flags)
        with subprocess.Popen(words, cwd=tmp_path) as process:
            kill_worker_of(out / "Krull-1")
            wait_for(lambda: list(out.glob("Pong-1/checkpoint/*.ckpt")))
            cluster.remove_node(second, allow_graceful=False)
            assert process.wait(timeout=300) == 0
        names = ("Pong-0", "Pong-1", "Krull-0", "Krull-1")
        moved = {name for name in names if len(begun(out / name)) > 1}
        assert len(moved) >= 2
        check(out, 300, moved, lost=100)  # uploads are seconds apart, steps tenths
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_runs_that_fail_are_named_and_not_repeated(tmp_path):
    """Boxing always diverges; Breakout crashes once and is given to another worker."""
    out = tmp_path / "out"
    words = command(tmp_path, 10, str(out))
    words[words.index("Krull")] = "Boxing"
    words[words.index("Pong")] = "Breakout"
    words[words.index("--seeds") + 1] = "1"
    quiet = {"env": ENV, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(words, **quiet, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert f"Boxing-0: not finite: see {out}/Boxing-0.log" in done.stderr
    assert len(begun(out / "Boxing-0")) == 1
    assert len(begun(out / "Breakout-0")) == 2
    assert (out / "Breakout-0/result.json").exists()


@pytest.mark.slow
def test_a_real_run_killed_equals_an_undisturbed_one(tmp_path):
    """The same metrics, byte for byte, and the same arrays in the last checkpoint."""
    flags = ["--preset", "tiny", "--steps", "400", "--eval-episodes", "1"]
    words = ["--games", "Pong", "--seeds", "1", "--out", str(tmp_path / "out")]
    words = [sys.executable, str(ROOT / "sweep.py"), *words, "--gpus-per-run", "0"]
    with subprocess.Popen([*words, "--", *flags], cwd=tmp_path) as process:
        folder = tmp_path / "out/Pong-0"
        wait_for(lambda: list(folder.glob("checkpoint/*.ckpt")), 500)
        os.kill(begun(folder)[-1]["worker"], signal.SIGKILL)
        assert process.wait() == 0
    assert len(begun(folder)) == 2 and begun(folder)[1]["from"]
    whole = tmp_path / "whole"
    argv = ["--game", "Pong", "--seed", "0", *flags, "--run-dir", str(whole)]
    assert train.main(argv) == 0
    same = lambda top: (top / "metrics.jsonl").read_bytes()
    assert same(folder) == same(whole)
    last = lambda top: checkpoint.read(checkpoint.checkpoints(top)[0])[0]
    one, other = last(folder), last(whole)
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
