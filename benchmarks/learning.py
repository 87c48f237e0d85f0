"""Does it learn what can be worked out by hand? Every reward, opponent and seed with the default settings, on the embedded model.

    python benchmarks/learning.py                 # 40 runs against fixed opponents, 20 of two learners, 10 that unlearn, 12 with free sampling, 2
                                                  # for the shadow of the future
    python benchmarks/learning.py --seeds 1       # a quick look

Prints one line per run: P(C | CC CD DC DD) after training, P(illegal) before and after, seconds (of two learners both policies; where a
second reward follows the first, the largest P(C) at the switch); then the number of misses. An entry that
the reward decides must be within 0.05 of its 0 or 1; `*` marks the entries it leaves open. Two runs at a time, one thread each.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIMA = {"game": "0000", "utilitarian": "1111", "deontological": "1*1*", "game+deontological": "1010"}


def measure(out, reward, optimum, *options):
    """One run of train.py in a process of its own; prints its line and returns whether it met the optimum."""
    subprocess.run([sys.executable, ROOT / "train.py", "--reward", reward, "--out", out, *map(str, options)], check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    result = json.loads((out / "result.json").read_text())
    policies = [list(result[key].values()) for key in ("policy_after", "opponent_policy_after") if key in result]
    before, after = (max(result[key].values()) for key in ("illegal_before", "illegal_after"))
    met = after <= 0.02 and all(best == "*" or abs(p - int(best)) <= 0.05 for policy in policies for p, best in zip(policy, optimum))
    switch = ""
    if "then" in result:  # a second phase: the first must have ended in defection
        rows = list(csv.DictReader(open(out / "metrics.csv")))
        at_switch = next(max(float(row[f"P(C|{state})"]) for state in result["policy_after"]) for row in rows if row["phase"] != reward)
        met, switch = met and at_switch <= 0.05, f"  at the switch {at_switch:.3f}"
    shown = "  ".join(" ".join(f"{p:.3f}" for p in policy) for policy in policies)
    print(f"{reward:20}{' '.join(map(str, options)):52}{shown}  {optimum}{switch}  illegal {before:.2f} -> {after:.3f}  "
          f"{result['seconds']:5.1f} s  {'ok' if met else 'MISS'}", flush=True)
    return met


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (free sampling: at most 3)")
    seeds = range(1, parser.parse_args().seeds + 1)
    jobs = [(reward, OPTIMA[reward], "--opponent", opponent, "--seed", seed)
            for opponent in ("tit-for-tat", "random", "learner") for reward in OPTIMA for seed in seeds]
    jobs += [("game", OPTIMA[moral], "--then", moral, "--seed", seed) for moral in ("utilitarian", "deontological") for seed in seeds]
    jobs += [(reward, OPTIMA[reward], "--sampling", "free", "--seed", seed) for reward in OPTIMA for seed in seeds[:3]]
    jobs += [("game", "1***", "--gamma", 0.9), ("game", "0000", "--gamma", 0.0)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        misses = list(pool.map(lambda i: measure(Path(folder) / str(i), *jobs[i]), range(len(jobs)))).count(False)
    print(f"{len(jobs)} runs, {misses} misses")
    sys.exit(misses > 0)


if __name__ == "__main__":
    main()
