"""The paper's grid: six kinds of training, a fixed and a learning opponent, five seeds.

    python studies/paper.py                     # the embedded model: 23 minutes
    python studies/paper.py --model FOLDER      # any other one, two learners with two seeds

Free sampling. Runs go to results/MODEL/runs; what is finished is skipped and what was interrupted
is resumed, so the command may be stopped and given again. The evaluation (random opponent, names
never shown in training, all five games) goes to results/MODEL/*.json, *.txt, *.md and
results/MODEL/figures.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from charts import check_matplotlib
from grid import ROOT, grid_parser, markdown, run_script, train_all
from program import number

KINDS = {  # paper, sections 5.1 to 5.3
    "game": ["game"],
    "deontological": ["deontological"],
    "utilitarian": ["utilitarian"],
    "game+deontological": ["game+deontological"],
    "game-then-deontological": ["game", "--then", "deontological"],
    "game-then-utilitarian": ["game", "--then", "utilitarian"],
}


def main():
    parser = grid_parser("paper.py", __doc__, "results/MODEL")
    help = "'tiny' (embedded), a folder, or a name on the hub [tiny]"
    parser.add_argument("--model", default="tiny", help=help)
    help = "runs at a time [the embedded model: one per core, else 1]"
    parser.add_argument("--jobs", type=number(int, 1, 1000), help=help)
    args = parser.parse_args()
    check_matplotlib("--results")
    embedded = args.model == "tiny"
    folder = args.results or ROOT / "results" / Path(args.model).name
    seeds = {"tit-for-tat": args.seeds, "learner": args.seeds if embedded else min(args.seeds, 2)}
    grid = list(runs(args.model, seeds, folder / "runs"))
    jobs = args.jobs or (os.cpu_count() if embedded else 1)
    train_all(grid, jobs, threads=1 if embedded else None)
    for opponent in seeds:
        outs = []
        for kind in KINDS:
            outs += [out for out, _ in grid if out.name.startswith(f"{kind}-vs-{opponent}-")]
        report(outs, folder, f"new-names-vs-{opponent}", "--axes")
        constrained = ["--sampling", "constrained"]
        report(outs, folder, f"new-names-constrained-vs-{opponent}", *constrained)
        names = ["--actions", "action1", "action2"]
        report(outs, folder, f"training-names-vs-{opponent}", *names)
    print(f"Tables and figures are in {folder}")


def runs(model, seeds, folder):
    """(run folder, options of train.py) of every run; `seeds`: opponent -> how many."""
    for opponent, count in seeds.items():
        for seed in range(1, count + 1):
            for kind, rewards in KINDS.items():
                options = ["--reward", *rewards, "--opponent", opponent, "--seed", seed]
                options += ["--sampling", "free", "--model", model]
                yield folder / f"{kind}-vs-{opponent}-seed{seed}", options


def report(outs, folder, name, *options):
    """evaluate.py on several runs: its JSON, figures, tables as text, and regrets in markdown."""
    path = folder / f"{name}.json"
    options = [*options, "--json", path, "--plot", folder / "figures" / name, "--overwrite"]
    printed = run_script("evaluate.py", *outs, *options)
    (folder / f"{name}.txt").write_text(printed, encoding="utf-8")
    groups = json.loads(path.read_text(encoding="utf-8"))["groups"]
    tables = []
    for norm in ("deontological", "utilitarian"):
        rows = []
        for group in groups:
            regrets = [measures["regret"][norm] for measures in group["games"].values()]
            rows.append([group["label"], *regrets])
        tables.append(markdown([f"{norm} regret", *groups[0]["games"]], rows))
    (folder / f"{name}.md").write_text("\n".join(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
