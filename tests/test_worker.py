"""One run of a sweep: uploads, locks, what a dead worker takes with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

pytest.importorskip("ray", reason="sweeps need Ray: pip install -e '.[sweep]'")

import worker
from worker import Job, Store

TESTS = Path(__file__).parent


@pytest.fixture
def source(tmp_path):
    """A folder whose train.py is the stand-in."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "train.py").write_text((TESTS / "stand_in_train.py").read_text())
    return folder


class OnBoard:
    """A board without Ray: notes what it is told, says stop after `patience` times."""

    def __init__(self, patience=10**6):
        self.told, self.patience = [], patience

    def __call__(self, **status):
        self.told.append(status)
        return len(self.told) <= self.patience


def train(folder: Path, source: Path, store: Store, board, steps=6, game="Pong"):
    job = Job(folder.name, ("--steps", str(steps), "--game", game), steps)
    with worker.lock(folder) as held:
        trainer = worker.start(job, folder, 0.0, held, str(source))
        return worker.watch(trainer, job, folder, store, board)


def test_a_run_is_watched_to_its_end(tmp_path, source):
    board, store = OnBoard(), Store(str(tmp_path))
    assert train(tmp_path / "run", source, store, board, steps=15) == 0
    assert store.result("run") == {"sum": 120, "wall_seconds": 1.5, "eval_score": 7.0}
    steps = [status["step"] for status in board.told]
    assert steps == sorted(steps) and steps[-1] > 0
    assert {status["state"] for status in board.told} <= {"training", "evaluating"}


def test_a_wish_to_stop_reaches_the_trainer_which_saves(tmp_path, source):
    store = Store(str(tmp_path))
    assert train(tmp_path / "run", source, store, OnBoard(1), steps=10**4) == 130
    (newest,) = sorted((tmp_path / "run/checkpoint").glob("*"))[-1:]
    last = (tmp_path / "run/computed.txt").read_text().split()[-1]
    assert json.loads(newest.read_text())["step"] == int(last)
    assert store.result("run") is None


def test_uploads_are_enough_to_go_on_elsewhere(tmp_path, source, monkeypatch):
    """A first machine trains and stops, a second one without its files ends the run."""
    url, homes, newest = f"file://{tmp_path}/shared", [], ""
    for machine, (patience, code) in {"one": (2, 130), "two": (99, 0)}.items():
        (tmp_path / machine).mkdir()
        monkeypatch.setattr(
            worker.tempfile, "gettempdir", lambda at=machine: tmp_path / at
        )
        store = Store(url)
        homes.append(store.home)
        assert store.home.is_relative_to(tmp_path / machine)
        store.fetch("a/run")
        folder = store.home / "a/run"
        job = Job("a/run", ("--steps", "30", "--game", "Pong"), 30)
        with worker.lock(folder) as held:
            trainer = worker.start(job, folder, 0.0, held, str(source))
            assert worker.watch(trainer, job, folder, store, OnBoard(patience)) == code
        store.push("a/run")
        newest = max((folder / "checkpoint").iterdir()).name if code else newest
        names = lambda top: {p.name for p in (top / "a/run").rglob("*")}
        assert names(store.home) == names(tmp_path / "shared")
    lines = (homes[1] / "a/run/computed.txt").read_text().split()
    assert lines[1::2] == [str(step) for step in range(1, 31)]
    assert len(set(lines[::2])) == 2
    assert Store(url).result("a/run")["sum"] == 465
    log = (tmp_path / "shared/a/run.log").read_text().splitlines()
    begun = [json.loads(x.partition(" ")[2]) for x in log if x]
    assert [x["from"] for x in begun] == [None, newest]


def test_checkpoints_go_up_after_what_they_refer_to(tmp_path, monkeypatch):
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: tmp_path)
    store, sent = Store("memory://order"), []
    folder = store.home / "run"
    (folder / "checkpoint").mkdir(parents=True)
    for name in ("result.json", "checkpoint/1.ckpt", "checkpoint/1.seg", "metrics"):
        (folder / name).write_text(name)
    (folder / "checkpoint/half.tmp").write_text("not yet")
    put = store.files.put_file
    monkeypatch.setattr(
        store.files, "put_file", lambda a, b: (sent.append(Path(b).name), put(a, b))
    )
    store.push("run")
    assert set(sent[:2]) == {"1.seg", "metrics"}
    assert sent[2:] == ["1.ckpt", "result.json"]
    store.push("run")
    assert len(sent) == 4  # nothing has changed
    (folder / "checkpoint/1.ckpt").unlink()
    store.push("run")
    found = {Path(path).name for path in store.files.find("/order")}
    assert found == {"1.seg", "metrics", "result.json"}


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_trainer_dies_with_its_worker_and_only_then_is_its_folder_free(
    tmp_path, source
):
    script = f"""if True:
        import sys
        sys.path.insert(0, {str(TESTS.parent)!r})
        from pathlib import Path
        import worker
        folder = Path({str(tmp_path / "run")!r})
        job = worker.Job("run", ("--steps", "600", "--game", "Pong"), 600)
        with worker.lock(folder) as held:
            trainer = worker.start(job, folder, 0.0, held, {str(source)!r})
        print(trainer.pid, flush=True)
        trainer.wait()"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        trainer = int(process.stdout.readline())
        lock = os.open(tmp_path / ".run.lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):  # the worker has left its block
            worker.fcntl.flock(lock, worker.fcntl.LOCK_EX | worker.fcntl.LOCK_NB)
        assert is_alive(trainer)
        process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    worker.fcntl.flock(lock, worker.fcntl.LOCK_EX)
    os.close(lock)
    while is_alive(trainer):  # a process closes its files shortly before it is gone
        assert time.monotonic() - began < 20
        time.sleep(0.01)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("gpus", "says"), [(0.0, ",unset"), (0.25, "3,0.225"), (1.0, "3,unset")]
)
def test_a_run_sees_the_gpus_that_it_was_given(
    tmp_path, source, monkeypatch, gpus, says
):
    """None, or those that Ray named; of a fraction that fraction of its memory."""
    names = ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    monkeypatch.setenv(names[0], "3")
    monkeypatch.delenv(names[1], raising=False)
    echo = f"import os; print(*(os.getenv(x, 'unset') for x in {names}), sep=',')"
    (source / "train.py").write_text(echo)
    folder = tmp_path / "run"
    with worker.lock(folder) as held:
        trainer = worker.start(Job("run", (), 1), folder, gpus, held, str(source))
        assert trainer.wait() == 0
    assert (tmp_path / "run.log").read_text().splitlines()[-1] == says


def test_progress_of_a_torn_file(tmp_path):
    assert worker.progress(tmp_path) == {"step": 0, "score": None}
    lines = [{"step": n, "episode_return": float(n)} for n in range(1, 21)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 25}])
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 26, "to')
    assert worker.progress(tmp_path) == {"step": 25, "score": 15.5}


def test_type_checks_are_live():
    with pytest.raises(TypeCheckError):
        worker.progress("a string")
