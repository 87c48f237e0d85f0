"""What carries over? Four rewards, more and more things varied in training, tested where everything is new; the figures of docs/TRANSFER.md.

    python benchmarks/transfer.py                # 5 seeds of each on the embedded model
    python benchmarks/transfer.py --seeds 1      # a quick look

Runs go to results/transfer/runs; what is finished is skipped and what was interrupted is resumed. Then evaluate.py --transfer gives the probability
of the action that the reward asks for, in results/transfer: tables as text and markdown, JSON, and one heat map for each reward. For the agents
that only saw other names, a line each says how many entries of the policy, in pairs of names never seen, are within 0.05 of the optimum.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from learning import OPTIMA
from reproduce import ROOT, train

VARIED = {  # what training varies; never the layout "both", the wording "unstructured" or the names that evaluate.py tests
    "nothing": [],
    "names": ["--actions", "random"],
    "names, layout": ["--actions", "random", "--layout", "original", "rows", "columns"],
    "names, layout, game": ["--actions", "random", "--layout", "original", "rows", "columns", "--game", "random"],
}


def evaluate(*options):
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", *map(str, options), "--overwrite"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def entries(folder, runs):
    """For each reward: of the policy entries that it decides, in the pairs of new names, how many are within 0.05 of the optimum."""
    sys.path.insert(0, str(ROOT))
    from evaluate import NEW_NAMES

    near, total = dict.fromkeys(OPTIMA, 0), dict.fromkeys(OPTIMA, 0)
    for names in NEW_NAMES:
        evaluate(*runs, "--game", "ipd", "--actions", *names, "--json", folder / "names.json")
        for run in json.loads((folder / "names.json").read_text())["runs"]:
            for p, best in zip(run["games"]["ipd"]["policy"].values(), OPTIMA[run["reward"]]):
                total[run["reward"]] += best != "*"
                near[run["reward"]] += best != "*" and abs(p - int(best)) <= 0.05
    return [f"{reward}: {near[reward]} of {total[reward]}" for reward in OPTIMA]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, help="of each run [train.py's default]")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    folder = args.results / "transfer"
    length = ["--episodes", args.episodes] if args.episodes else []
    grid = [(folder / "runs" / f"{reward}-varied-{kind.replace(', ', '-')}-seed{seed}",
             [reward, *options, "--opponent", "random", "--seed", seed, *(length if kind != "nothing" else [])])
            for seed in range(1, args.seeds + 1) for reward in OPTIMA for kind, options in VARIED.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(tqdm(pool.map(lambda job: train(*job, environment), grid), total=len(grid), unit="run"))
    for reward in OPTIMA:
        runs = [out for kind in VARIED for out, _ in grid if out.name.startswith(f"{reward}-varied-{kind.replace(', ', '-')}-seed")]
        text = evaluate(*runs, "--game", "ipd", "--transfer", "--json", folder / f"{reward}.json", "--plot", folder / "figures" / reward)
        (folder / f"{reward}.txt").write_text(text)
    groups = [(reward, one) for reward in OPTIMA for one in json.loads((folder / f"{reward}.json").read_text())["groups"]]
    new = list(groups[0][1]["transfer"]["game"])
    lines = ["| reward | varied in training | " + " | ".join(new) + " |", "|---" * (2 + len(new)) + "|"]
    for i, (reward, one) in enumerate(groups):
        leaves = one["transfer"][reward].values()
        cells = [f"{leaf['mean']:.2f}" + (f" ± {leaf['ci95']:.2f}" if one["n"] > 1 else "") for leaf in leaves]
        lines.append(f"| {reward} | {['untuned', *VARIED][i % (1 + len(VARIED))]} | " + " | ".join(cells) + " |")
    (folder / "transfer.md").write_text("\n".join(lines) + "\n")
    told = entries(folder, [out for out, _ in grid if "-varied-names-seed" in out.name])
    (folder / "names.txt").write_text("\n".join(told) + "\n")
    print("\n".join([*lines, "", "Entries within 0.05 of the optimum in pairs of names never seen (varied in training: names):", *told]))


if __name__ == "__main__":
    main()
