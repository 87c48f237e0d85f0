"""Does a run survive anything? Kills it at random moments, resumes it, compares the results.

    python benchmarks/kill.py             # 20 kills, about five minutes
    python benchmarks/kill.py --kills 3

Each trial is one run, killed with SIGKILL once at a moment drawn between its first saved state and
its end (it saves after every update, so that many moments fall into a save), then continued with
--resume. metrics.csv and adapters must be byte-identical with those of a run left alone,
result.json but for its seconds.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = (
    "--reward game --then utilitarian --opponent learner --episodes 320 --batch 8 --save-every 1"
).split()


def start(*options):
    command = [sys.executable, ROOT / "train.py", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_and_wait_for_state(out):
    """Start a run in the folder `out`; returns its process once a state is saved."""
    process = start(*OPTIONS, "--out", out)
    while not (out / "state.safetensors").exists():
        if process.poll() is not None:
            sys.exit("train.py ended without a saved state")
        time.sleep(0.01)
    return process


def outcome(out):
    """What must be the same: result.json without the seconds, and the bytes of the other files."""
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    del result["seconds"]
    contents = {}
    for folder in (out, out / "opponent"):
        for name in ("metrics.csv", "adapter_model.safetensors", "value_head.safetensors"):
            path = folder / name
            if path.exists():
                contents[path.relative_to(out)] = path.read_bytes()
    return result, contents


def kill_and_resume(out, delay):
    """One trial in the folder `out`, killed `delay` seconds after its first saved state.

    Returns what to say of it, and whether it finished in the end.
    """
    process = start_and_wait_for_state(out)
    time.sleep(delay)
    process.kill()
    process.wait()
    updates = (
        len((out / "metrics.csv").read_text(encoding="utf-8").splitlines()) - 1
    )  # without the header
    moment = f"after {updates} updates"
    if (out / "state.safetensors.tmp").exists():
        moment += " during a save"
    if (out / "result.json").exists():  # the kill came after the end
        return f"{moment}, finished", True
    return moment, start("--resume", out).wait() == 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    rng = random.Random(0)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        process = start_and_wait_for_state(whole)
        first = time.perf_counter()
        process.wait()
        length = time.perf_counter() - first
        for trial in range(1, kills + 1):
            out = Path(folder) / str(trial)
            moment, finished = kill_and_resume(out, rng.random() * length)
            same = finished and outcome(out) == outcome(whole)
            failures += not same
            verdict = "same bytes" if same else "DIFFERENT"
            print(f"kill {trial}: {moment}: {verdict}", flush=True)
    print(f"{kills} kills, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
