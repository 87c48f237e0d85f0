"""What carries over? Four rewards, more and more things varied in training, tested where something is new; the figures of docs/TRANSFER.md.

    python benchmarks/transfer.py                # 5 seeds on the embedded model, 3 where layouts or games vary: half an hour on two cores
    python benchmarks/transfer.py --seeds 1      # a quick look

Runs go to results/transfer/runs; what is finished is skipped and what was interrupted is resumed. Then evaluate.py --transfer gives the probability
of the action that the reward asks for, in results/transfer: transfer.txt, .md and .json, and one heat map in figures/. For the agents that saw many
names and nothing else new, a line per reward says how many entries of the policy, in pairs of names never seen, are within 0.05 of the optimum
(names.txt); and a line per kind how long training took, on one core with another run beside it.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from learning import OPTIMA
from reproduce import ROOT, cell, evaluate, markdown, train

SHORT, LONG = ["--episodes", "35840"], ["--episodes", "76800", "--lr", "1e-3"]  # where games differ: smaller steps, and more of them
NAMES = ["--actions", "random"]
LAYOUTS = [*NAMES, "--layout", "original", "rows", "columns"]
VARIED = {  # what training varies; never the layout "both", the wording "unstructured" or the names that evaluate.py tests
    "nothing": SHORT, "names": [*SHORT, *NAMES], "names, layout": [*SHORT, *LAYOUTS], "names, layout, game": [*LONG, *LAYOUTS, "--game", "random"],
}


def entries(folder, runs):
    """For each reward: of the policy entries that it decides, in the pairs of new names, how many are within 0.05 of the optimum, and the worst."""
    sys.path.insert(0, str(ROOT))
    from evaluate import NEW_NAMES

    misses = {reward: [] for reward in OPTIMA}
    for names in NEW_NAMES:
        evaluate(*runs, "--game", "ipd", "--actions", *names, "--json", folder / "names.json")
        for run in json.loads((folder / "names.json").read_text())["runs"]:
            for p, best in zip(run["games"]["ipd"]["policy"].values(), OPTIMA[run["reward"]]):
                if best != "*":
                    misses[run["reward"]].append(abs(p - int(best)))
    return [f"{reward}: {sum(miss <= 0.05 for miss in found)} of {len(found)}; mean {sum(found) / len(found):.3f}, largest {max(found):.3f}"
            for reward, found in misses.items()]


def slug(kind):
    return kind.replace(", ", "-")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (where layouts or games vary: at most 3) [5]")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    folder = args.results / "transfer"
    grid = [(folder / "runs" / f"{reward}-varied-{slug(kind)}-seed{seed}",
             [reward, "--opponent", "random", *options, "--seed", seed])
            for reward in OPTIMA for kind, options in VARIED.items()
            for seed in range(1, 1 + (args.seeds if kind in ("nothing", "names") else min(args.seeds, 3)))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(tqdm(pool.map(lambda job: train(*job, environment), grid), total=len(grid), unit="run"))
    runs = [out for out, _ in grid]
    (folder / "transfer.txt").write_text(evaluate(*runs, "--game", "ipd", "--transfer", "--json", folder / "transfer.json",
                                                  "--plot", folder / "figures"))
    untuned, *trained = json.loads((folder / "transfer.json").read_text())["groups"]
    new = list(untuned["transfer"]["game"])
    rows = []
    for reward in OPTIMA:
        agents = [one for one in trained if one["reward"] == reward]
        rows += [[reward, kind, *map(cell, one["transfer"][reward].values())] for kind, one in zip(["untuned", *VARIED], [untuned, *agents], strict=True)]
    table = markdown(["reward", "varied in training", *new], *rows)
    (folder / "transfer.md").write_text(table)
    told = entries(folder, [out for out in runs if "-varied-names-seed" in out.name])
    (folder / "names.txt").write_text("\n".join(told) + "\n")
    print("\n".join([table, "Entries within 0.05 of the optimum in pairs of names never seen (varied in training: names):", *told]))
    for kind in VARIED:
        seconds = [json.loads((out / "result.json").read_text())["seconds"] for out in runs if f"-varied-{slug(kind)}-seed" in out.name]
        print(f"Training where {kind} varies: {min(seconds):.0f} to {max(seconds):.0f} s")


if __name__ == "__main__":
    main()
