"""The paper's grid: six kinds of training, a fixed and a learning opponent, five seeds.

    python experiments/paper.py                     # the embedded model: 23 minutes
    python experiments/paper.py --model FOLDER      # any other one, two learners with two seeds

Free sampling. Runs go to results/MODEL/runs; what is finished is skipped, what was interrupted is
resumed: the command may be stopped and given again. The evaluation (random opponent, all five
games) goes to *.json, *.txt, *.md and figures/ beside them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from errors import InputError, about, stop
from figures import style
from grid import ROOT, grid_parser, markdown, run_script, train_all
from runs import read_json, writing

# Paper, sections 5.1 to 5.3; of two rewards the second takes over half-way.
KINDS = (
    ["game"],
    ["deontological"],
    ["utilitarian"],
    ["game+deontological"],
    ["game", "deontological"],
    ["game", "utilitarian"],
)
TESTS = {
    "new-names": ["--axes"],
    "new-names-constrained": ["--sampling", "constrained"],
    "training-names": ["--actions", "action1", "action2"],
}


def list_runs(model, seeds, folder):
    """(run folder, options of train.py) of every run; `seeds`: opponent -> how many."""
    for opponent, count in seeds.items():
        for seed in range(1, count + 1):
            for rewards in KINDS:
                options = ["--reward", *rewards, "--opponent", opponent, "--seed", seed]
                options += ["--sampling", "free", "--model", model]
                yield folder / f"{'-then-'.join(rewards)}-vs-{opponent}-seed{seed}", options


def report(outs, folder, name, options):
    """evaluate.py on several runs: its JSON, figures, tables as text, and regrets in markdown."""
    path = folder / f"{name}.json"
    pictures = folder / "figures" / name
    printed = run_script("evaluate.py", *outs, *options, "--json", path, "--overwrite")
    run_script("experiments/figures.py", path, "--out", pictures, "--overwrite")
    groups = read_json(path)["groups"]
    tables = []
    for norm in ("deontological", "utilitarian"):
        rows = []
        for group in groups:
            regrets = [measures["regret"][norm] for measures in group["games"].values()]
            rows.append([group["label"], *regrets])
        tables.append(markdown([f"{norm} regret", *groups[0]["games"]], rows))
    with about("--results"), writing(folder):
        (folder / f"{name}.txt").write_text(printed, encoding="utf-8")
        (folder / f"{name}.md").write_text("\n".join(tables), encoding="utf-8")


def main(argv=None):
    try:
        args = grid_parser(__doc__, "5", "results/MODEL").parse_args(argv)
        with about("--results"):
            style()  # without matplotlib it ends here, not after the work
        folder = args.results or ROOT / "results" / Path(args.model).name
        count = args.seeds or 5
        seeds = {"tit-for-tat": count, "learner": count}
        if args.model != "tiny":
            seeds["learner"] = min(count, 2)
        grid = list(list_runs(args.model, seeds, folder / "runs"))
        outs = list(tqdm(train_all(grid, args), total=len(grid), unit="run"))
        for opponent in seeds:
            tested = [out for out in outs if f"-vs-{opponent}-" in out.name]
            for name, options in TESTS.items():
                report(tested, folder, f"{name}-vs-{opponent}", options)
        print(f"Tables and figures are in {folder}")
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
