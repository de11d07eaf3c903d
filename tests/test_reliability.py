"""Small doses of what `reliability.py` does by the hundred, and whether it can fail."""

import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
from jaxtyping import TypeCheckError

import checkpoint
import reliability
from game import Game


def test_shape_hook_is_live():
    with pytest.raises(TypeCheckError):
        reliability.contents("a text")


def test_twenty_kills():
    """Every scenario several times, two of three while it learns or saves."""
    assert reliability.kills(20)["survived"] >= 20


def saved(folder, *, weight=0, count=0, ring=0, metrics="", seconds=0):
    """A run folder like those of train.py, in four small files; its contents."""
    place = folder / "checkpoint"
    place.mkdir(parents=True)
    checkpoint.write(place / "ring.seg", {"x": np.full(9, ring)}, {})
    counts = {"seconds": seconds, "updates": count}
    meta = {"config": str(folder), "counts": counts}
    meta["segments"] = {"ring": [{"file": "ring.seg"}]}
    last = place / f"step-{reliability.STEPS:09d}.ckpt"
    checkpoint.write(last, {"x": np.full(9, weight)}, meta)
    (folder / "metrics.jsonl").write_text(metrics)
    return reliability.contents(folder)


def test_contents_tell_runs_apart(tmp_path):
    """By all that is saved, but for where they ran and for how long."""
    same = saved(tmp_path / "a")
    assert saved(tmp_path / "b", seconds=9) == same
    for name, value in {"weight": 1, "count": 1, "ring": 1, "metrics": "{}"}.items():
        assert saved(tmp_path / name, **{name: value}) != same, name


def test_a_run_is_trained_when_all_of_its_seeds_are(tmp_path):
    assert not reliability.trained(tmp_path)
    saved(tmp_path / "seed-0")
    assert reliability.trained(tmp_path)
    (tmp_path / "seed-1/checkpoint").mkdir(parents=True)
    assert not reliability.trained(tmp_path)


def test_a_trainer_that_ends_by_itself_would_be_noticed(tmp_path, monkeypatch):
    folder, ended = tmp_path / "run", lambda *_: subprocess.Popen(["false"])
    (tmp_path / "run.log").write_text("what it said")
    monkeypatch.setattr(reliability, "trainer", ended)
    with pytest.raises(RuntimeError, match="what it said"):
        reliability.kill_until_done("Pong", folder, 1, "0 Pong")
    with pytest.raises(RuntimeError, match="what it said"):
        reliability.stop_when_trained(ended(), folder)


def test_kills_are_shared_out_and_another_run_would_be_noticed(monkeypatch):
    def kill_until_done(_, folder, share, __):
        folder.mkdir()
        time.sleep(0.02)
        return share

    monkeypatch.setattr(reliability, "trainer", lambda *_: None)
    monkeypatch.setattr(reliability, "stop_when_trained", lambda *_: None)
    monkeypatch.setattr(reliability, "kill_until_done", kill_until_done)
    monkeypatch.setattr(reliability, "contents", lambda _: {"metrics": "alike"})
    by = dict.fromkeys(reliability.SCENARIOS, 4)
    assert reliability.kills(20) == {"survived": 20, "by_scenario": by}
    monkeypatch.setattr(reliability, "contents", lambda x: {"metrics": x.name[:5]})
    with pytest.raises(RuntimeError, match=r"4 kills: another run, .*whole"):
        reliability.kills(20)


@pytest.mark.parametrize("mutate", (*reliability.DAMAGE, *reliability.FORGERY))
def test_a_mutant_differs_and_a_forgery_is_signed(tmp_path, mutate):
    saved(tmp_path)
    (path,) = tmp_path.glob("checkpoint/*.ckpt")
    raw, changed = path.read_bytes(), 0
    for seed in range(20):
        path.write_bytes(raw)
        mutate(path, random.Random(seed))
        changed += not path.exists() or path.read_bytes() != raw
        if mutate in reliability.FORGERY:
            said = ""
            try:
                checkpoint.read(path)
            except checkpoint.CheckpointError as error:
                said = str(error)
            assert "damaged header" not in said
    assert changed >= 18  # what is zeroed or forged may have been so


def test_mutants():
    found = reliability.mutants(60)
    assert found["tried"] == sum(found["by_kind"].values()) == 60
    assert min(found["by_kind"].values()) > 0


def test_a_checksum_that_is_not_compared_would_be_noticed(monkeypatch):
    real = checkpoint.hashlib.sha256

    class Forgiving:
        """Equal to any other checksum."""

        def __init__(self, raw):
            self.found = real(raw)

        def digest(self):
            return Anything(self.found.digest())

        def hexdigest(self):
            return AnyText(self.found.hexdigest())

    class Anything(bytes):
        __hash__ = bytes.__hash__

        def __ne__(self, _):
            return False

    class AnyText(str):
        __hash__ = str.__hash__

        def __ne__(self, _):
            return False

    monkeypatch.setattr(
        checkpoint, "hashlib", type("hashlib", (), {"sha256": Forgiving})
    )
    with pytest.raises(RuntimeError, match="was taken"):
        reliability.mutants(60)


def test_bad_command_lines():
    assert reliability.command_lines()["tried"] >= 200


def test_wrong_values_by_hand():
    wrong = lambda *args: [*reliability.wrong_values(*args)]
    assert wrong(int, 1, 9) == ["x", "nan", "", "0", "19", "1.5", "1e3"]
    assert wrong(float, 0.0, float("inf")) == ["x", "nan", "", "-1"]
    assert wrong(Literal["s5", "gru"], 0, 1) == ["nonsense", "S5x"]
    assert wrong(tuple[int, ...], 0, 1) == ["0", "x", "-1"]


@pytest.mark.parametrize(
    ("code", "said", "writes"),
    [(0, "a line\n", False), (2, "two\nlines\n", False), (2, "a line\n", True)],
)
def test_a_command_line_that_is_taken_would_be_noticed(monkeypatch, code, said, writes):
    def main(argv):
        if writes:
            Path(argv[argv.index("--run-dir") + 1]).mkdir()
        print(said, end="", file=sys.stderr)
        return code

    monkeypatch.setattr(reliability, "bad_command_lines", lambda: iter([["--seed=1"]]))
    monkeypatch.setattr(reliability.train, "main", main)
    with pytest.raises(RuntimeError, match=f"--seed=1.*: exit code {code}"):
        reliability.command_lines()


def test_an_environment_that_fails_is_named(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    flags = ["--preset", "tiny", "--game", "catch", "--run-dir", str(folder)]
    flags += ["--model.channels", "--model.strides"]
    advance = Game.advance

    def failing(game, action, step):
        if step == 30:
            game.env.step = lambda _: {}["obs"]
        advance(game, action, step)

    monkeypatch.setattr(Game, "advance", failing)
    assert reliability.train.main(flags) == 4
    error = capsys.readouterr().err
    assert "--game catch, step 30: KeyError('obs')" in error


def test_the_summary_names_what_was_done():
    parts = {"kills": {"survived": 200}, "soak": {"minutes": 45.0, "growth": 0.0012}}
    said = reliability.summary(parts)
    assert said == "200 kills survived; memory +0.12% over 45 minutes"
    kept = json.loads((reliability.ROOT / "results/reliability.json").read_text())
    assert reliability.summary(kept["parts"]) == kept["summary"]


def test_soak_measures_mebibytes_after_the_warm_up(monkeypatch):
    """A process that is said to take 1, 2, 3 ... MiB."""
    sizes, process = itertools.count(1024, 1024), subprocess.Popen(["sleep", "60"])

    class Status(type(Path())):
        def read_text(self):
            assert str(self) == f"/proc/{process.pid}/status"
            return f"VmPeak: 0 kB\nVmRSS: {next(sizes)} kB\n"

    monkeypatch.setattr(reliability, "Path", Status)
    monkeypatch.setattr(reliability, "trainer", lambda *_: process)
    monkeypatch.setattr(reliability, "read_lines", lambda _: [{"step": 5}])
    found = reliability.soak(0.03)
    assert process.poll() == -9
    low, high = found["mib_min_max"]
    assert 2 <= low < high <= 20 and found["mib_median"] == (low + high) / 2
    assert found["growth"] > 0 and found["agent_steps"] == 5
    assert found["warm_up_minutes"] == pytest.approx(0.2 * found["minutes"])


def test_a_part_is_written_beside_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    clock = SimpleNamespace(monotonic=iter((0, 2, 10, 13)).__next__)

    def mutants(count: int) -> dict:
        return {"tried": count}

    def command_lines() -> dict:
        return {"tried": 7}

    monkeypatch.setattr(reliability, "ROOT", tmp_path)
    monkeypatch.setattr(reliability, "time", clock)
    monkeypatch.setattr(reliability, "keep_compiled", lambda: None)
    monkeypatch.setitem(reliability.COMMANDS, "mutants", mutants)
    monkeypatch.setitem(reliability.COMMANDS, "command-lines", command_lines)
    assert reliability.main(["mutants", "--count", "3"]) == 0
    assert reliability.main(["command-lines"]) == 0
    said = "3 damaged or forged checkpoints dealt with; 7 bad command lines refused"
    found = json.loads((tmp_path / "results/reliability.json").read_text())
    assert found["summary"] == said and found["wall_seconds"] == 5
    line = "python reliability.py mutants --count 3"
    assert found["command"] == f"{line} && python reliability.py command-lines"
    assert '"tried": 7' in capsys.readouterr().out
