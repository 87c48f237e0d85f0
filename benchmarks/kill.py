"""Does a run survive anything? Kills it at random moments, resumes it, and compares the result with that of a run left alone.

    python benchmarks/kill.py             # 20 kills, about five minutes
    python benchmarks/kill.py --kills 3

Each trial is one run, killed with SIGKILL once at a moment drawn between its first saved state and its end (it saves after every update, so that
many moments fall into a save), then continued with --resume. metrics.csv and adapters must be byte-identical, result.json but for its seconds.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ["--reward", "game", "--then", "utilitarian", "--opponent", "learner", "--episodes", "320", "--batch", "8", "--save-every", "1"]


def start(*options):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outcome(out):
    result = json.loads((out / "result.json").read_text())
    del result["seconds"]
    names = ["metrics.csv", "adapter_model.safetensors", "value_head.safetensors"]
    return result, [(out / folder / name).read_bytes() for folder in ("", "opponent") for name in names if (out / folder / name).exists()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    kills, rng, failures = parser.parse_args().kills, random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        process, first = start(*OPTIONS, "--out", whole), None
        while process.poll() is None:
            if first is None and (whole / "state.safetensors").exists():
                first = time.perf_counter()
            time.sleep(0.01)
        length = time.perf_counter() - first
        for trial in range(kills):
            out = Path(folder) / str(trial)
            process = start(*OPTIONS, "--out", out)
            while not (out / "state.safetensors").exists():
                time.sleep(0.01)
            time.sleep(rng.random() * length)
            process.kill()
            process.wait()
            finished = (out / "result.json").exists()  # the kill came after the end
            rows = len((out / "metrics.csv").read_text().splitlines()) - 1
            if not finished and start("--resume", out).wait() != 0:
                same = False
            else:
                same = outcome(out) == outcome(whole)
            failures += not same
            during = " during a save" if os.path.exists(out / "state.tmp") else ""
            print(f"kill {trial + 1}: after {rows} updates{during}{', finished' if finished else ''}: {'same bytes' if same else 'DIFFERENT'}", flush=True)
    print(f"{kills} kills, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
