"""The paper's grid on one model: six kinds of training, a fixed and a learning opponent, five seeds, free sampling; then its figures.

    python benchmarks/reproduce.py                                   # the embedded model: a quarter of an hour on two cores
    python benchmarks/reproduce.py --model google/gemma-2-2b-it      # the real reproduction, for a GPU (not run here)

Runs go to results/MODEL/runs; what is finished is skipped and what was interrupted is resumed, so the command may be stopped and given again. The
evaluation (random opponent, names never shown in training, all five games) goes to results/MODEL/*.json, *.txt, *.md and to results/MODEL/figures.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
KINDS = {  # paper, sections 5.1 to 5.3
    "game": ["game"], "deontological": ["deontological"], "utilitarian": ["utilitarian"], "game+deontological": ["game+deontological"],
    "game-then-deontological": ["game", "--then", "deontological"], "game-then-utilitarian": ["game", "--then", "utilitarian"],
}
OPPONENTS = ("tit-for-tat", "learner")


def train(out, options, environment):
    """One run, resumed where it was interrupted."""
    if (out / "result.json").exists():
        return
    if (out / "state.safetensors").exists():
        options = ["--resume", out]
    else:
        options = ["--reward", *options, "--out", out, *(["--overwrite"] if out.exists() else [])]
    done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, options)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{out}: {done.stderr.strip().splitlines()[-1]}")


def evaluate(*options):
    """What evaluate.py prints."""
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", *map(str, options), "--overwrite"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def cell(leaf):
    """0.12, or 0.12 ± 0.03 where there is an interval."""
    return f"{leaf['mean']:.2f}" + ("" if leaf["ci95"] is None else f" ± {leaf['ci95']:.2f}")


def markdown(*rows):
    """A table; the first row is its head."""
    return "".join("| " + " | ".join(row) + " |\n" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def report(runs, folder, name, *options):
    """evaluate.py on several runs: its JSON, its figures, its tables as text, and both regrets of all games in markdown."""
    told = evaluate(*runs, *options, "--json", folder / f"{name}.json", "--plot", folder / "figures" / name)
    (folder / f"{name}.txt").write_text(told)
    groups = json.loads((folder / f"{name}.json").read_text())["groups"]
    tables = [markdown([f"{norm} regret", *groups[0]["games"]],
                       *([one["label"], *(cell(measures["regret"][norm]) for measures in one["games"].values())] for one in groups))
              for norm in ("deontological", "utilitarian")]
    (folder / f"{name}.md").write_text("\n".join(tables))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, help="runs at a time [the embedded model: one per core, else 1]")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    embedded = args.model == "tiny"
    folder = args.results / Path(args.model).name
    jobs = args.jobs or (os.cpu_count() if embedded else 1)
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if embedded else {})}
    rounds = [] if embedded else ["--rounds", "3"]  # the paper's, against a learner on its GPU
    grid = [(folder / "runs" / f"{kind}-vs-{opponent}-seed{seed}",
             [*options, "--opponent", opponent, "--seed", seed, "--sampling", "free", "--model", args.model,
              *(rounds if opponent == "learner" else [])])
            for seed in range(1, args.seeds + 1) for opponent in OPPONENTS for kind, options in KINDS.items()]
    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(lambda job: train(*job, environment), grid), total=len(grid), unit="run"))
    for opponent in OPPONENTS:
        runs = [out for kind in KINDS for out, _ in grid if out.name.startswith(f"{kind}-vs-{opponent}-")]
        report(runs, folder, f"new-names-vs-{opponent}", "--axes")
        report(runs, folder, f"new-names-constrained-vs-{opponent}", "--sampling", "constrained")
        report(runs, folder, f"training-names-vs-{opponent}", "--actions", "action1", "action2")
    print(f"Tables and figures are in {folder}")


if __name__ == "__main__":
    main()
