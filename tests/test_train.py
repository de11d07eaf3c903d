"""The command line: bad input in one line, and one whole run, killed and resumed."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

import checkpoint
import game
import train
from config import PRESETS, Config
from run import Diverged, Recording, Run, load_config

ROOT = Path(__file__).parent.parent
TINY = ["--preset", "tiny", "--steps", "72", "--checkpoint-every", "24"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--game Pogn", "--game Pogn is unknown: did you mean Pong"),
        ("--game minatar/brakeout", "minatar/breakout"),
        ("--preset huge", "--preset huge is unknown: choose atari100k, cpu"),
        ("--levels 0", "--levels 0 is not possible: give 1 to 4"),
        ("--levels 5", "--levels 5"),
        ("--levels three", "--levels"),
        ("--tau 1.5", "--tau 1.5 is not possible: give 0 to 1"),
        ("--tau nan", "--tau nan"),
        ("--length 200 --steps 100", "--length 200 is more than --steps 100"),
        (
            "--prefill 100 --steps 100",
            "--prefill 100 is not less than --steps 100: lower it or train longer",
        ),
        ("--steps 0", "--steps 0"),
        ("--seed -1", "--seed -1"),
        ("--batch 0", "--batch 0"),
        ("--period 1", "--period 1"),
        ("--updates-per-step -1", "--updates-per-step -1"),
        ("--updates-per-step nan", "--updates-per-step nan"),
        ("--eval-episodes -2", "--eval-episodes -2"),
        ("--capacity 3", "--capacity 3 is not more than --length 4"),
        ("--log-every 0", "--log-every 0"),
        ("--env.size 2", "--env.size 2"),
        ("--model.features 0", "--model.features 0"),
        ("--model.strides 2 2 2", "--model.channels and --model.strides differ"),
        ("--model.states 9 --model.blocks 2", "--model.blocks 2"),
        ("--trainer.horizon 1", "--trainer.horizon 1"),
        ("--trainer.world-model-lr -1", "--trainer.world-model-lr -1"),
        ("--trainer.discount 1.5", "--trainer.discount 1.5"),
        ("--sampler newest", "--sampler"),
        ("--world-model transformer", "--world-model"),
        ("--levelz 3", "Perhaps you meant: --levels"),
        ("--steps", "--steps"),
        ("--resume nowhere", "--resume nowhere is not a run folder"),
        ("--game catch --preset cpu", "--model.strides"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, says, capsys, tmp_path):
    argv = flags.split()
    if "--preset" not in argv and "--resume" not in argv:
        argv += ["--preset", "tiny"]
    assert train.main([*argv, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_configuration_survives_json(preset, tmp_path):
    config = replace(PRESETS[preset], seed=3)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    assert load_config(tmp_path) == config


def test_published_configuration():
    config = train.parse(["--preset", "atari100k"])
    assert config == replace(Config(), precision="float32")
    assert (config.levels, config.batch, config.length) == (3, 16, 64)
    assert (config.env.size, config.env.gray) == (64, False)
    assert config.updates_per_step == 1
    assert config.steps == 100_000


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in ("--trainer.discount", "--model.blocks", "--env.delay", "--resume"):
        assert name in text
    assert "official: discount_lambda" in text


def test_default_preset_follows_game_and_accelerator(monkeypatch):
    assert train.parse(["--game", "catch"]).preset == "probe"
    assert train.parse(["--game", "minatar/freeway"]).preset == "minatar"
    assert train.parse(["--game", "pong"]).game == "Pong"
    monkeypatch.setattr(train.jax, "default_backend", lambda: "cpu")
    assert train.parse([]).preset == "cpu"
    monkeypatch.setattr(train.jax, "default_backend", lambda: "gpu")
    assert train.parse([]).preset == "atari100k"
    assert train.parse(["--game=catch"]).preset == "probe"


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ("--game Pong --seed 3", "runs/Pong-cpu-3"),
        ("--game minatar/freeway", "runs/minatar-freeway-minatar-0"),
        ("--game catch --seed 2 --seeds 3", "runs/catch-probe-2-to-4"),
    ],
)
def test_default_folder(flags, folder):
    assert train.default_folder(train.parse(flags.split())) == folder


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], True),
        (["--game", "Pong", "--preset", "atari100k"], False),
        (["--preset=atari100k"], False),
        (["--game", "catch"], False),
        (["--game=minatar/freeway"], False),
        (["--resume", "nowhere"], False),
    ],
)
def test_only_small_runs_of_atari_keep_the_heap(flags, wanted):
    assert train.wants_one_heap(flags) == wanted


def test_a_resumed_run_keeps_the_heap_as_it_did_before(tmp_path):
    for preset, name in (("tiny", "Pong"), ("probe", "catch"), ("atari100k", "Pong")):
        train.write_config(tmp_path, replace(PRESETS[preset], game=name))
        assert train.wants_one_heap(["--resume", str(tmp_path)]) == (preset == "tiny")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*TINY, "--run-dir", str(folder)]) == 0
    return folder


def test_a_run_leaves_what_it_promises(whole):
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [m["step"] for m in metrics] == sorted(m["step"] for m in metrics)
    names = set().union(*metrics)
    for level, rewards in enumerate((["extrinsic", "subgoal", "novelty"],) * 2):
        for reward in rewards:
            assert {f"level{level}/{k}_{reward}" for k in ("real", "imagined")} <= names
    assert {"level0/code_kl_per_row", "level0/code_reward_random"} <= names
    assert {"level1/grad_norm_world_model", "level0/kl"} <= names
    result = json.loads((whole / "result.json").read_text())
    assert (result["game"], result["steps"]) == ("Pong", 72)
    assert result["eval_score"] == np.mean(result["eval_returns"])
    assert result["hns"] == (result["eval_score"] + 20.7) / (14.6 + 20.7)
    assert len(result["parameters"]) == 3
    assert list((whole / "tensorboard").glob("events*"))
    assert list((whole / "pictures").glob("*.png"))


def bare(kind, **values):
    """An object that has these fields and nothing else."""
    made = object.__new__(kind)
    made.__dict__ |= values
    return made


@pytest.mark.parametrize(
    ("returns", "train_score"),
    [
        ([(40, -20.0), (90, 9.0), (91, -3.0), (100, -5.0)], -4),
        ([(40, -20.0), (90, 9.0)], 9),  # none ended in the last tenth: the newest
        ([], None),
    ],
)
def test_scores_of_a_finished_run_by_hand(tmp_path, monkeypatch, returns, train_score):
    """The train score is that of episodes that ended in the last tenth of 100 steps."""
    config = replace(PRESETS["tiny"], game="Pong", steps=100, eval_episodes=2)
    agent, games = SimpleNamespace(subactors=()), [bare(game.Game, returns=returns)]
    run = bare(Run, config=config, agent=agent, games=games, folder=tmp_path, step=100)
    run.seconds, run.updates = 61.04, [9]
    stop = bare(train.Stop, asked=False)
    played = iter([Recording(x, {}, []) for x in (-20.7, 14.6, 99.0)])
    monkeypatch.setattr(train, "evaluation", lambda *_: played)
    monkeypatch.setattr(train.report, "draw", lambda run: [])
    result = train.finish(run, stop)
    assert result["eval_returns"] == [-20.7, 14.6]
    assert (result["train_score"], result["wall_seconds"]) == (train_score, 61)
    assert result["hns"] == pytest.approx(0.5)
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_an_existing_folder_is_left_alone(whole, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    assert train.main([*TINY, "--run-dir", str(whole)]) == 2
    assert f"continue it with --resume {whole}" in capsys.readouterr().err
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_resuming_with_other_settings_names_each(whole, capsys):
    argv = ["--resume", str(whole), "--tau", "0.5", "--model.layers", "3"]
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert "--tau is 0.3, not 0.5" in error
    assert "--model.layers is 2, not 3" in error


def test_resuming_as_the_shell_completes_it_within_bounds(whole, capsys):
    assert train.parse(["--resume", f"{whole}/"]).game == "Pong"
    assert train.main(["--resume", str(whole), "--checkpoint-every", "0"]) == 2
    assert "--checkpoint-every 0 is not possible" in capsys.readouterr().err


def state_of(folder: Path) -> tuple:
    """Everything that two equal runs share: bytes of metrics, arrays, counters."""
    arrays, meta = checkpoint.read(checkpoint.checkpoints(folder)[0])
    del meta["counts"]["seconds"], meta["config"]
    segments = sorted((folder / "checkpoint").glob("*.seg"))
    data = {path.name: path.read_bytes() for path in segments}
    metrics = (folder / "metrics.jsonl").read_bytes()
    digest = {k: (x.dtype, x.shape, x.tobytes()) for k, x in arrays.items()}
    return metrics, data, digest, meta


def test_killed_and_resumed_equals_undisturbed(whole, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--run-dir", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    awaited = folder / "checkpoint" / "step-000000048.ckpt"
    while not awaited.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder / "metrics.jsonl").open("a").write('{"step": 71, "torn')
    assert train.main(["--resume", str(folder)]) == 0
    assert state_of(folder) == state_of(whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, tmp_path, capsys):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(whole), str(folder)], check=True)
    newest = checkpoint.checkpoints(folder)[0]
    newest.write_bytes(newest.read_bytes()[:-5])
    assert train.main(["--resume", str(folder), "--eval-episodes", "0"]) == 0
    assert "trying the one before" in capsys.readouterr().err
    assert state_of(folder) == state_of(whole)


def test_a_run_is_not_started_over_where_checkpoints_are(whole, tmp_path, capsys):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(whole), str(folder)], check=True)
    for path in (folder / "checkpoint").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert train.main(["--resume", str(folder)]) == 2
    assert "move the folder away to start over" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_a_full_disk_ends_in_a_line(tmp_path, capsys, monkeypatch):
    """Metrics do not fit: what was saved before is named."""
    folder = tmp_path / "run"

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(game.Game, "write", full)
    assert train.main([*TINY, "--run-dir", str(folder)]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: ")
    assert "No space left on device; last good checkpoint: " in error
    (tmp_path / "file").write_text("")
    argv = [*TINY, "--run-dir", str(tmp_path / "file" / "run")]
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: --run-dir: ") and error.count("\n") == 1


def test_interrupt_saves_and_names_the_way_on(tmp_path, capsys):
    config = train.parse([*TINY, "--run-dir", str(tmp_path / "run")])
    run = train.open_run(config)
    stop = train.Stop()
    stop._ask(signal.SIGINT, None)
    with pytest.raises(train.Interrupted):
        train.train(run, stop)
    assert checkpoint.checkpoints(tmp_path / "run")
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)


def test_asked_twice_it_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(train.os, "_exit", left.append)
    stop = train.Stop()
    for name in (signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(name) == stop._ask
        signal.signal(name, signal.SIG_DFL)
    stop._ask(signal.SIGTERM, None)
    assert stop.asked and not left
    stop._ask(signal.SIGINT, None)
    assert left == [130]


def test_an_interrupted_evaluation_leaves_no_result(tmp_path, monkeypatch):
    config = replace(PRESETS["tiny"], eval_episodes=2)
    agent, games = SimpleNamespace(subactors=()), [bare(game.Game, returns=[])]
    run = bare(Run, config=config, folder=tmp_path, agent=agent, games=games)
    stop = bare(train.Stop, asked=True)
    played = [Recording(1.0, {}, [])] * 2
    monkeypatch.setattr(train, "evaluation", lambda *_: iter(played))
    with pytest.raises(train.Interrupted):
        train.finish(run, stop)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_a_checkpoint_does_not_end_the_run(tmp_path, capsys):
    def full():
        raise OSError("No space left on device")

    train.save(bare(Run, save=full, step=24), bare(tqdm, write=print, disable=True))
    says = "WARNING: no checkpoint at step 24: No space left on device; training goes"
    assert says in capsys.readouterr().out


def test_a_game_that_fails_ends_in_a_line(tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise game.GameError("the emulator is gone")

    monkeypatch.setattr(train, "train", fails)
    assert train.main([*TINY, "--run-dir", str(tmp_path / "run")]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    end = "the emulator is gone; last good checkpoint: none"
    assert error == f"train.py: {end}"


def test_dead_codes_are_named_once_per_tenth(capsys):
    """Steps of 1,000, a line of metrics every 25: from step 100 on, on the tenth."""
    config = replace(PRESETS["tiny"], steps=1000, log_every=25)
    bar = bare(tqdm, write=print, disable=True)
    values = {"level0/code_kl_per_row": 0.01, "level1/code_kl_per_row": 0.06}
    warned = []
    for step in range(25, 301, 25):
        train.warn_of_dead_codes(bare(Run, step=step, config=config), values, bar)
        if text := capsys.readouterr().out:
            warned.append(step)
            assert text.startswith("WARNING: level0/code_kl_per_row 0.01: this goal")
    assert warned == [100, 200, 300]


def test_returns_so_far_are_means_over_seeds():
    seeds = [[(5, 1.0), (9, 3.0)], [(7, 8.0), (8, 0.0)], []]
    run = bare(Run, games=[bare(game.Game, returns=x) for x in seeds])
    assert train.returns_so_far(run) == "return last 1.5 best 5.5"
    run.games = run.games[2:]
    assert train.returns_so_far(run) == "return last nan best nan"


def test_how_long_the_published_size_would_take(capsys):
    """A tenth of a published step's FLOPs a second: 10⁶ seconds for 100,000 steps."""
    run = bare(Run, measure_update=lambda: (0.5, 0.05 * train.FULL_FLOPS))
    train.describe(PRESETS["cpu"], run)
    text = capsys.readouterr().out
    assert text.startswith("preset cpu on ")
    assert "level 0 takes 500 ms" in text and "would take about 11.6 days here" in text
    train.describe(PRESETS["probe"], run)
    assert "days" not in capsys.readouterr().out


def test_the_table_of_scores_has_a_row_per_seed(capsys):
    known = {"game": "Pong", "train_score": -20.5, "random": -20.7, "human": 14.6}
    rows = [known | {"seed": 0, "eval_score": -3.05, "hns": 0.5}]
    rows.append(known | {"seed": 1, "eval_score": None, "hns": None})
    train.show(rows)
    lines = [" ".join(x.split()) for x in capsys.readouterr().out.splitlines()]
    assert lines == [
        "game seed train_score eval_score random human hns",
        "Pong 0 -20.5 -3.05 -20.7 14.6 0.5",
        "Pong 1 -20.5 - -20.7 14.6 -",
    ]


def test_same_seed_same_run_other_seed_other_run(whole, tmp_path):
    runs = []
    for name, seed in (("same", 0), ("other", 1)):
        config = train.parse([*TINY, "--seed", str(seed)])
        run = Run.start(config, tmp_path / name)
        runs.append([run.act([True]) for _ in range(8)])
    again = Run.start(train.parse(TINY), tmp_path / "again")
    assert [again.act([True]) for _ in range(8)] == runs[0] != runs[1]


def test_a_value_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    """Also before a checkpoint that falls between two lines of metrics."""
    folder, open_run = tmp_path / "run", train.open_run

    def with_nan(config):
        run = open_run(config)
        run.agent = eqx.tree_at(
            lambda agent: agent.learners[0].subactor.actor.last.bias,
            run.agent,
            replace_fn=lambda bias: bias * jnp.nan,
        )
        return run

    monkeypatch.setattr(train, "open_run", with_nan)
    flags = ["--run-dir", str(folder), "--log-every", "50"]
    assert train.main([*TINY, *flags]) == 3
    error = capsys.readouterr().err
    assert "level0/loss_actor" in error
    assert "not finite" in error and "last good checkpoint: none" in error
    arrays, meta = checkpoint.read(folder / "diverged.ckpt")
    assert (meta["level"], meta["losses"]["loss_actor"]) == (0, "nan")
    assert arrays[".reward"].shape == (2, 4)
    assert arrays[".obs"].all()
    assert not checkpoint.checkpoints(folder)


def test_saves_come_by_minutes_too(tmp_path, monkeypatch):
    flags = ["--checkpoint-minutes", "0", "--checkpoint-every", "1000", "--steps", "4"]
    run = train.open_run(train.parse([*TINY, *flags, "--run-dir", str(tmp_path / "r")]))
    saved = []
    monkeypatch.setattr(run, "save", lambda: saved.append(run.step))
    train.train(run, train.Stop())
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    assert saved == [1, 2, 3, 4]


def test_a_diverged_run_says_so_on_a_full_disk_too(tmp_path, monkeypatch):
    run = train.open_run(train.parse([*TINY, "--run-dir", str(tmp_path / "run")]))
    run.pending[0] = (1, {"loss_actor": np.array(np.nan)})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(run, "dump", full)
    with pytest.raises(Diverged, match="could not be written, No space"):
        run.save()
