"""One run of a sweep, on whichever machine Ray gives it to.

A run that has a checkpoint continues from it, whatever ended it; result.json says that
it is done. A trainer dies with its worker, at once (Linux). A lock on the run's folder
is held as long as its trainer lives, so that two never write to one folder. If the runs
live behind a URL, a worker trains in a local copy that it uploads after every
checkpoint, which comes after all files that it refers to.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fsspec
    import ray
except ImportError as error:
    raise ImportError(f"{error}: pip install -e '.[sweep]'") from None

GIVE_UP = {2: "bad input", 3: "not finite"}  # exit codes that a retry would repeat


class Job(NamedTuple):
    """One run: its name below OUT, its flags of train.py, its steps."""

    name: str
    flags: tuple[str, ...]
    steps: int


class Died(Exception):
    """A trainer ended without an exit code of its own: worth a retry."""


class Store:
    """Run folders below OUT; for a URL, their copies in a scratch folder."""

    def __init__(self, out: str):
        self.home, self.remote = Path(out), ""
        self.sent: dict[Path, int] = {}
        if "://" in out:
            self.files, self.remote = fsspec.url_to_fs(out)
            digest = hashlib.sha256(out.encode()).hexdigest()[:16]
            self.home = Path(tempfile.gettempdir(), f"hieros-sweep-{digest}")

    def result(self, name: str) -> dict[str, Any] | None:
        """What a finished run found."""
        return self.read(name, "result.json")

    def read(self, name: str, file: str) -> dict[str, Any] | None:
        """JSON of a run's folder, None if it is not there."""
        try:
            if self.remote:
                self.files.invalidate_cache()
                return json.loads(self.files.cat(f"{self.remote}/{name}/{file}"))
            return json.loads((self.home / name / file).read_text())
        except FileNotFoundError:
            return None

    def fetch(self, name: str) -> None:
        """The run as the shared place has it, instead of any older copy here."""
        if not self.remote:
            return
        shutil.rmtree(self.home / name, ignore_errors=True)
        there = f"{self.remote}/{name}"
        log = [f"{there}.log"] if self.files.exists(f"{there}.log") else []
        for path in [*self.files.find(there), *log]:
            local = self.home / path.split(f"{self.remote}/")[-1]
            local.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(path, str(local))
            self.sent[local] = local.stat().st_mtime_ns

    def push(self, name: str) -> None:
        """Uploads what is new, a checkpoint after all that it refers to."""
        if not self.remote:
            return
        last = lambda path: (path.name == "result.json", path.suffix == ".ckpt")
        found = [self.home / f"{name}.log", *(self.home / name).rglob("*")]
        paths = sorted((p for p in found if p.suffix != ".tmp"), key=last)
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile: next time
            for path in (p for p in paths if p.is_file()):
                changed = path.stat().st_mtime_ns
                if self.sent.get(path) != changed:
                    there = f"{self.remote}/{path.relative_to(self.home)}"
                    self.files.makedirs(there.rpartition("/")[0], exist_ok=True)
                    self.files.put_file(str(path), there)
                    self.sent[path] = changed
            for path in self.sent.keys() - set(paths):
                self.files.rm_file(f"{self.remote}/{path.relative_to(self.home)}")
                del self.sent[path]


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[int]:
    """Waits until no trainer has the folder; one that inherits the lock keeps it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder.parent / f".{folder.name}.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def die_with_parent() -> None:
    """SIGKILL when the worker goes, however it goes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def progress(folder: Path) -> dict[str, Any]:
    """Last step of metrics.jsonl, and the mean return of the last ten episodes."""
    found: dict[str, Any] = {"step": 0, "score": None}
    with contextlib.suppress(OSError), (folder / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 100_000))
        returns = []
        for text in file.read().splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                line = json.loads(text)
                found["step"] = line.get("step", 0)
                returns += [line["episode_return"]] if "episode_return" in line else []
        if returns:
            found["score"] = sum(returns[-10:]) / len(returns[-10:])
    return found


def start(job: Job, folder: Path, gpus: float, held: int, source: str | None):
    """The trainer of a run, new or continued, as a process."""
    command = [sys.executable, "train.py", *job.flags]
    if (folder / "config.json").exists():
        command += ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        command += ["--run-dir", str(folder)]
    env = os.environ | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    if 0 < gpus < 1:  # JAX would take three quarters of the whole GPU
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus:.3f}"
    checkpoints = sorted(folder.glob("checkpoint/*.ckpt"))
    begun = {
        "host": socket.gethostname(),
        "worker": os.getpid(),
        "from": checkpoints[-1].name if checkpoints else None,
    }
    with open(folder.parent / f"{folder.name}.log", "a") as log:
        if log.tell():  # a killed trainer leaves its progress bar's line unfinished
            print(file=log)
        print(f"sweep.py: {json.dumps(begun)}", file=log, flush=True)
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=source,
            env=env,
            pass_fds=[held],
            start_new_session=True,  # Ctrl-C in a terminal is the sweep's, not theirs
            preexec_fn=die_with_parent,  # noqa: PLW1509, nothing else forks here
        )


def train_one(job: Job, out: str, gpus: float, source: str | None, board) -> str:
    """A task of Ray: one run to its end, or until `board` says stop.

    Returns "done", "stopped" or what a retry would not mend. Raises Died.
    """
    tell = lambda **status: ray.get(board.tell.remote(job.name, status))
    store = Store(out)
    folder = store.home / job.name
    tell(state="waiting")
    with lock(folder) as held:
        if store.result(job.name):
            return "done"
        store.fetch(job.name)
        if not tell(state="starting"):
            return "stopped"
        trainer = start(job, folder, gpus, held, source)
        try:
            code = watch(trainer, job, folder, store, tell)
        finally:
            trainer.kill()
            trainer.wait()
        store.push(job.name)
        if found := store.result(job.name):
            tell(step=job.steps, score=found.get("eval_score"))
    if code in GIVE_UP:
        return f"{GIVE_UP[code]}: see {out}/{job.name}.log"
    if code not in (0, 130):
        raise Died(f"exit code {code}: see {out}/{job.name}.log")
    return "stopped" if code else "done"


def watch(trainer, job: Job, folder: Path, store: Store, tell) -> int:
    """Reports, uploads and hands on the wish to stop; returns the exit code."""
    began, first, newest, asked = time.monotonic(), None, [], False
    while trainer.poll() is None:
        now = progress(folder)
        first = now["step"] if first is None else first
        speed = (now["step"] - first) / max(time.monotonic() - began, 1e-9)
        state = "training" if now["step"] < job.steps else "evaluating"
        if not tell(state=state, speed=speed, **now) and not asked:
            trainer.send_signal(signal.SIGTERM)
            asked = True
        checkpoints = sorted(folder.glob("checkpoint/*.ckpt"))
        if checkpoints != newest:
            store.push(job.name)
            newest = checkpoints
        with contextlib.suppress(subprocess.TimeoutExpired):
            trainer.wait(1)
    return trainer.returncode


class Board:
    """An actor of Ray: what every run last told, and whether they are to go on."""

    def __init__(self):
        self.rows: dict[str, dict[str, Any]] = {}
        self.go_on = True

    def tell(self, name: str, status: dict[str, Any]) -> bool:
        self.rows[name] = self.rows.get(name, {}) | status
        return self.go_on

    def read(self, go_on: bool) -> dict[str, dict[str, Any]]:
        self.go_on = go_on
        return self.rows
