"""What sweep.py needs of train.py, in a tenth of a second per step and without JAX.

Counts to --steps with a checkpoint after every second one. computed.txt has a line for
every step that any process ever computed, so that a test sees what was done twice.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
steps, stop = int(flags["--steps"]), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
folder = Path(flags.get("--resume") or flags["--run-dir"])
(folder / "checkpoint").mkdir(parents=True, exist_ok=bool(flags.get("--resume")))
(folder / "config.json").write_text("{}")
saved = sorted((folder / "checkpoint").glob("*.ckpt"))
state = json.loads(saved[-1].read_text()) if saved else {"step": 0, "sum": 0}


def save():
    path = folder / "checkpoint" / f"step-{state['step']:09d}.ckpt"
    path.with_suffix(".tmp").write_text(json.dumps(state))
    path.with_suffix(".tmp").replace(path)
    for old in sorted((folder / "checkpoint").glob("*.ckpt"))[:-2]:
        old.unlink()


while state["step"] < steps and not stop:
    time.sleep(0.1)
    state["step"] += 1
    state["sum"] += state["step"]
    with open(folder / "computed.txt", "a") as file:
        print(os.getpid(), state["step"], file=file)
    with open(folder / "metrics.jsonl", "a") as file:
        print(json.dumps({"step": state["step"], "episode_return": 1.0}), file=file)
    if state["step"] % 2 == 0:
        save()
    if flags["--game"] == "Breakout" and not saved and state["step"] == 5:
        os.abort()
if stop:
    save()
    sys.exit(130)
if flags["--game"] == "Boxing":
    sys.exit(3)
result = {"sum": state["sum"], "wall_seconds": 0.1 * steps, "eval_score": 7.0}
(folder / "result.json").write_text(json.dumps(result))
