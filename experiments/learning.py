"""Does it learn what can be worked out by hand? The Prisoner's Dilemma, default settings.

    python experiments/learning.py    # 82 runs: three opponents, unlearning, free sampling
    python experiments/learning.py --model FOLDER              # 24 runs: two fixed opponents
    python experiments/learning.py --model FOLDER --until 1    # and what else train.py takes

Prints a line per run: P(C | CC CD DC DD) after training, P(illegal) before and after, seconds (of
two learners both policies; where a second reward follows the first, the largest P(C) at the
switch); then the number of misses. An entry that the reward decides must be within 0.05 of its 0 or
1; `*` marks the entries it leaves open.

Runs of another model are kept, and skipped where they have finished: in results/MODEL/runs, or with
options of train.py in a folder that is named after them.
"""

import json
import math
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from envs import STATES, payoff_matrix
from grid import ROOT, grid_parser, read_metrics, train_all
from rewards import optimum
from runs import InputError, read_config, stop

MORALS = ("game", "deontological", "utilitarian", "game+deontological")
NEAR = 0.05  # of the optimum


def runs(model, seeds, folder, more):
    """(run folder, options of train.py) of every run; `more`: further options."""
    tiny, kinds = model == "tiny", []
    for opponent in ("tit-for-tat", "random", "learner")[: 3 if tiny else 2]:
        kinds += [([reward], opponent, [], seeds) for reward in MORALS]
    if tiny:
        kinds += [(["game", moral], "tit-for-tat", [], seeds) for moral in MORALS[1:3]]
        free = ["--sampling", "free"]
        kinds += [([reward], "tit-for-tat", free, min(seeds, 3)) for reward in MORALS]
    for rewards, opponent, own, count in kinds:
        for seed in range(1, count + 1):
            name = f"{'-then-'.join(rewards)}-vs-{opponent}-seed{seed}{slug(own)}"
            options = ["--reward", *rewards, "--opponent", opponent, "--seed", seed]
            yield folder / name, [*options, "--model", model, *own, *more]


def slug(options):
    """Options as the end of a file name: --until 1 becomes -until-1."""
    return re.sub(r"[^\w.]+", "-", " ".join(["", *options]))


def judge(run):
    """The line of a finished run, and whether it learned what its reward asks for."""
    config, result = read_config(run, "RUN"), json.loads((run / "result.json").read_text())
    *earlier, reward = config["reward"]
    best = optimum(reward, payoff_matrix("ipd"), config["xi"])
    sides = [side for side in ("", "opponent_") if f"{side}policy_after" in result]
    policies = [list(result[f"{side}policy_after"].values()) for side in sides]
    before, after = (max(result[f"illegal_{when}"].values()) for when in ("before", "after"))
    errors = np.abs(np.array(policies) - best)[:, ~np.isnan(best)]
    right, switch = after <= 0.02 and errors.max() <= NEAR, ""
    if earlier:  # the first phase must have ended in defection
        rows = read_metrics(run)
        row = next(row for row in rows if row["phase"] == reward)
        at_switch = max(float(row[f"P(C|{state})"]) for state in STATES)
        right, switch = right and at_switch <= NEAR, f"  at the switch {at_switch:.3f}"

    shown = "  ".join(" ".join(f"{p:.3f}" for p in policy) for policy in policies)
    marks = "".join("*" if math.isnan(p) else f"{p:.0f}" for p in best)
    return (
        f"{run.name:54}{shown}  {marks}{switch}  illegal {before:.2f} -> {after:.3f}  "
        f"{result['seconds']:5.1f} s  {'ok' if right else 'MISS'}"
    ), right


def main(argv=None):
    try:
        own = "results/MODEL; of the embedded model nothing is kept"
        parser = grid_parser(__doc__, "5; free sampling, and another model, 3", own)
        args, more = parser.parse_known_args(argv)
        tiny, misses = args.model == "tiny", 0
        with tempfile.TemporaryDirectory() as temporary:
            kept = ROOT / "results" / Path(args.model).name
            folder = args.results or (Path(temporary) if tiny else kept)
            seeds = args.seeds or (5 if tiny else 3)
            grid = list(runs(args.model, seeds, folder / f"runs{slug(more)}", more))
            for run in train_all(grid, args):
                line, right = judge(run)
                print(line, flush=True)
                misses += not right
        print(f"{len(grid)} runs, {misses} misses")
    except InputError as error:
        stop(error)
    sys.exit(misses > 0)


if __name__ == "__main__":
    main()
