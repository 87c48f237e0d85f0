"""Does it learn what can be worked out by hand? Each reward, opponent and seed, default settings.

    python benchmarks/learning.py             # 40 runs against fixed opponents, 20 of two learners,
                                              # 10 that unlearn, 12 with free sampling, 2 for the
                                              # shadow of the future
    python benchmarks/learning.py --seeds 1   # a quick look
    python benchmarks/learning.py --model FOLDER    # any other model: four rewards against
                                                    # tit-for-tat and random, three seeds

Prints a line per run: P(C | CC CD DC DD) after training, P(illegal) before and after, seconds (of
two learners both policies; where a second reward follows the first, the largest P(C) at the
switch); then the number of misses. An entry that the reward decides must be within 0.05 of its 0 or
1; `*` marks the entries it leaves open.

Runs of the embedded model: two at a time, one thread each. Those of another one go one by one to
results/MODEL/runs, where studies/paper.py has its own; what is finished is skipped, so the command
may be stopped and given again.
"""

import argparse
import csv
import json
import math
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "studies")]

import numpy as np

from envs import STATES, payoff_matrix
from grid import ROOT, train
from rewards import optimum

MORALS = ("game", "deontological", "utilitarian", "game+deontological")
BEST = {reward: optimum(reward, payoff_matrix("ipd")) for reward in MORALS}
# With a long shadow of the future (--gamma) it pays to go on cooperating; the rest is open here.
BEST_OF_THE_FUTURE = np.array([1, math.nan, math.nan, math.nan])


def measure(out, environment, reward, best, *options):
    """One run of train.py in a process of its own: prints its line, returns whether it is right.

    best: P(C | state) as it should be, [state]; NaN: open
    """
    words = [str(option) for option in options]
    train(out, ["--reward", reward, *words], environment)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    policies = [list(result["policy_after"].values())]
    if "opponent_policy_after" in result:
        policies.append(list(result["opponent_policy_after"].values()))
    before = max(result["illegal_before"].values())
    after = max(result["illegal_after"].values())
    decided = ~np.isnan(best)
    errors = np.abs(np.array(policies) - best)[:, decided]
    right = after <= 0.02 and errors.max() <= 0.05
    switch = ""
    if "then" in result:  # the first phase must have ended in defection
        at_switch = cooperation_at_switch(out, reward)
        right = right and at_switch <= 0.05
        switch = f"  at the switch {at_switch:.3f}"

    marks = ["*" if math.isnan(p) else f"{p:.0f}" for p in best]
    shown = []
    for policy in policies:
        shown.append(" ".join(f"{p:.3f}" for p in policy))
    verdict = "ok" if right else "MISS"
    print(
        f"{reward:20}{' '.join(words):52}{'  '.join(shown)}  {''.join(marks)}{switch}  "
        f"illegal {before:.2f} -> {after:.3f}  {result['seconds']:5.1f} s  {verdict}",
        flush=True,
    )
    return right


def cooperation_at_switch(out, reward):
    """The largest P(C | state) when the second phase starts."""
    with open(out / "metrics.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["phase"] != reward:
                return max(float(row[f"P(C|{state})"]) for state in STATES)


def jobs_of_model(model, seeds):
    """(run folder, reward, best, options of train.py) of each run of a model not embedded here."""
    folder = ROOT / "results" / Path(model).name / "runs"
    jobs = []
    for opponent in ("tit-for-tat", "random"):
        for seed in seeds:
            for reward in MORALS:
                options = ["--opponent", opponent, "--seed", seed, "--model", model]
                out = folder / f"{reward}-vs-{opponent}-seed{seed}"
                jobs.append((out, reward, BEST[reward], *options))
    return jobs


def list_jobs(seeds):
    """(reward, best, options of train.py) of each run of the embedded model."""
    jobs = []
    for opponent in ("tit-for-tat", "random", "learner"):
        for reward in MORALS:
            for seed in seeds:
                jobs.append((reward, BEST[reward], "--opponent", opponent, "--seed", seed))
    for moral in ("utilitarian", "deontological"):
        for seed in seeds:
            jobs.append(("game", BEST[moral], "--then", moral, "--seed", seed))
    for reward in MORALS:
        for seed in seeds[:3]:
            jobs.append((reward, BEST[reward], "--sampling", "free", "--seed", seed))
    jobs.append(("game", BEST_OF_THE_FUTURE, "--gamma", 0.9))
    jobs.append(("game", BEST["game"], "--gamma", 0.0))
    return jobs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help = "runs of each kind [5; free sampling 3; of another model 3]"
    parser.add_argument("--seeds", type=int, help=help)
    parser.add_argument("--model", default="tiny", help="a folder or a name on the hub [tiny]")
    args = parser.parse_args()
    environment = dict(os.environ)
    if args.model == "tiny":
        jobs = list_jobs(range(1, (args.seeds or 5) + 1))
        environment["OMP_NUM_THREADS"] = "1"
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            running = []
            for i, job in enumerate(jobs):
                running.append(pool.submit(measure, Path(folder) / str(i), environment, *job))
            misses = sum(not run.result() for run in running)
    else:
        jobs, misses = jobs_of_model(args.model, range(1, (args.seeds or 3) + 1)), 0
        for out, *job in jobs:
            misses += not measure(out, environment, *job)
    print(f"{len(jobs)} runs, {misses} misses")
    sys.exit(misses > 0)


if __name__ == "__main__":
    main()
