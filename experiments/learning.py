"""Does it learn what can be worked out by hand? The Prisoner's Dilemma, default settings.

    python experiments/learning.py    # 82 runs: three opponents, unlearning, free sampling
    python experiments/learning.py --model FOLDER              # 24 runs: two fixed opponents
    python experiments/learning.py --model FOLDER --until 1    # and what else train.py takes

Further options go to train.py; those that the grid sets or judges by are refused.

Prints a line per run: P(C | CC CD DC DD) after training, P(illegal) before and after, seconds (of
two learners both policies; where a second reward follows the first, the largest P(C) at the
switch); then the number of misses. An entry that the reward decides, in this one round, must be
within 0.05 of its 0 or 1; `*` marks the entries it leaves open. P(illegal) must be at most 0.02.

Runs of another model are kept, and skipped where they have finished: in results/MODEL/runs, or with
options of train.py in a folder that is named after them.
"""

import math
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from envs import STATES, payoff_matrix
from errors import InputError, stop
from grid import ROOT, grid_parser, read_metrics, train_all
from rewards import optimum
from runs import read_config, read_json, run_name

MORALS = ("game", "deontological", "utilitarian", "game+deontological")
TOLERANCE = 0.05  # of the optimum
# What the grid sets itself, or what it is judged by.
OWN_OPTIONS = "--reward --opponent --seed --sampling --game --gamma --init --resume --out".split()


def list_runs(model, seeds, folder, more):
    """(run folder, options of train.py) of every run; `more`: further options."""
    kinds = []  # (rewards, opponent, options, seeds)
    for opponent in ("tit-for-tat", "random"):
        kinds += [([reward], opponent, [], seeds) for reward in MORALS]
    if model == "tiny":
        kinds += [([reward], "learner", [], seeds) for reward in MORALS]
        kinds.append((["game", "deontological"], "tit-for-tat", [], seeds))
        kinds.append((["game", "utilitarian"], "tit-for-tat", [], seeds))
        free = ["--sampling", "free"]
        kinds += [([reward], "tit-for-tat", free, min(seeds, 3)) for reward in MORALS]
    for rewards, opponent, own_options, count in kinds:
        for seed in range(1, count + 1):
            name = run_name(rewards, opponent, seed) + slug(own_options)
            options = ["--reward", *rewards, "--opponent", opponent, "--seed", seed]
            yield folder / name, [*options, "--model", model, *own_options, *more]


def slug(options):
    """Options as the end of a file name: --until 1 becomes -until-1."""
    return re.sub(r"[^\w.]+", "-", " ".join(["", *options]))


def check_run(run):
    """(the line of a finished run, whether it learned what its reward asks for)."""
    config = read_config(run)
    result = read_json(run / "result.json")
    reward = config["reward"][-1]
    best = optimum(reward, payoff_matrix("ipd"), config)
    policies = [list(result["policy_after"].values())]
    if "opponent_policy_after" in result:
        policies.append(list(result["opponent_policy_after"].values()))
    before = max(result["illegal_before"].values())
    after = max(result["illegal_after"].values())
    if "opponent_illegal_after" in result:
        after = max(after, *result["opponent_illegal_after"].values())
    errors = np.abs(np.array(policies) - best)[:, ~np.isnan(best)]
    right = after <= 0.02 and errors.max(initial=0) <= TOLERANCE
    switch = ""
    if len(config["reward"]) > 1:  # the first phase must have ended in defection
        first = next(row for row in read_metrics(run) if row["phase"] == reward)
        at_switch = max(float(first[f"p_C_after_{state}"]) for state in STATES)
        right = right and at_switch <= TOLERANCE
        switch = f"  at the switch {at_switch:.3f}"

    shown = "  ".join(" ".join(f"{p:.3f}" for p in policy) for policy in policies)
    marks = "".join("*" if math.isnan(p) else f"{p:.0f}" for p in best)
    line = f"{run.name:54}{shown}  {marks}{switch}  illegal {before:.2f} -> {after:.3f}  "
    line += f"{result['seconds']:5.1f} s  {'ok' if right else 'MISS'}"
    return line, right


def main(argv=None):
    misses = 0
    try:
        kept = "results/MODEL; of the embedded model nothing is kept"
        parser = grid_parser(__doc__, "5; free sampling, and another model, 3", kept)
        args, more = parser.parse_known_args(argv)
        for word in more:
            if word.partition("=")[0] in OWN_OPTIONS:
                raise InputError("the grid sets it, or judges by it", word)
        with tempfile.TemporaryDirectory() as temporary:
            if args.model == "tiny":
                folder = args.results or Path(temporary)
                seeds = args.seeds or 5
            else:
                folder = args.results or ROOT / "results" / Path(args.model).name
                seeds = args.seeds or 3
            grid = list(list_runs(args.model, seeds, folder / f"runs{slug(more)}", more))
            for run in train_all(grid, args):
                line, right = check_run(run)
                print(line, flush=True)
                misses += not right
        print(f"{len(grid)} runs, {misses} misses")
    except InputError as error:
        stop(error)
    sys.exit(misses > 0)


if __name__ == "__main__":
    main()
