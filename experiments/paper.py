"""The paper's grid and its figures: up to six kinds of training against each of five opponents.

    python experiments/paper.py                     # trains, tests and draws with --recipe paper
    python experiments/paper.py --draw              # no training: what is there by now
    python experiments/paper.py --draw 3 21         # these figures only
    python experiments/paper.py --model FOLDER --recipe quick

Each kind of training has five seeds; two learners have two where the model is not the embedded one.

Free sampling. Runs go to results/MODEL/runs, seed after seed; what is finished is skipped, what was
interrupted is resumed: the command may be stopped and given again. The tests (random opponent, all
five games; for figures 13 and 14 the Prisoner's Dilemma alone) go to *.json, *.txt and *.md beside
them, figure 2a of the paper to figures/figure-2a.png, and so on. Another recipe needs other
--results.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from drawing import in_order, style
from errors import InputError, about, stop
from grid import ROOT, grid_parser, markdown, run_script, train_all
from paper_figures import EVALUATIONS, FIGURES, GRID, select
from runs import read_json, run_name, writing

SWAPPED = ["--actions", "action2", "action1"]  # figure 13


def list_runs(model, recipe, count, folder):
    """(run folder, options of train.py) of every run, seed after seed; `count` of each kind."""
    usual = ["--recipe", recipe, "--sampling", "free", "--model", model]
    for seed in range(1, count + 1):
        for opponent, kinds in GRID.items():
            if opponent == "learner" and model != "tiny" and seed > 2:
                continue
            for rewards in kinds:
                options = ["--reward", *rewards, "--opponent", opponent, "--seed", seed, *usual]
                yield folder / run_name(rewards, opponent, seed), options
        options = ["--reward", "game", "--opponent", "tit-for-tat", "--seed", seed, *usual]
        yield folder / run_name(["game"], "tit-for-tat-swapped", seed), [*options, *SWAPPED]


def report(outs, folder, name):
    """evaluate.py on several runs: JSON, tables as text, regrets in markdown. Returns the JSON."""
    path = folder / f"{name}.json"
    options = EVALUATIONS[name].options
    printed = run_script("evaluate.py", *outs, *options, "--json", path, "--overwrite")
    results = in_order(read_json(path))
    groups = results["groups"]
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
    return results


def draw_figures(outs, folder, numbers):
    """Test the runs that have finished, each test once, and draw the figures that they allow.

    numbers: keys of FIGURES
    """
    finished = [out for out in outs if (out / "result.json").exists()]
    if not finished:
        raise InputError(f"there is no finished run in {folder / 'runs'}", "--results")
    needed = {name for number in numbers for name in FIGURES[number].tests}
    results = {}  # by the names of EVALUATIONS
    for name in tqdm([name for name in EVALUATIONS if name in needed], unit="test"):
        opponent = EVALUATIONS[name].opponent
        chosen = [out for out in finished if f"-vs-{opponent}-seed" in out.name]
        if chosen:
            results[name] = report(chosen, folder, name)
    pictures = folder / "figures"
    with about("--results"), writing(pictures):
        pictures.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        figure = FIGURES[number]
        parts = [select(results[name], figure.phases) for name in figure.tests if name in results]
        parts = [part for part in parts if len(part["groups"]) > 1]  # not only the untuned model
        if len(parts) < len(figure.tests):
            print(f"Figure {number}: {len(parts)} of {len(figure.tests)} parts have finished runs")
        if parts:
            path = pictures / f"figure-{number}.png"
            with style():
                picture = figure.plot(*parts)
                with about("--results"), writing(path):
                    picture.savefig(path)


def main(argv=None):
    try:
        parser = grid_parser(__doc__, "5", "results/MODEL")
        parser.option("--recipe", "of train.py", choices=("quick", "paper"), default="paper")
        draw = "train nothing: test what is there and draw these figures, or all"
        parser.option("--draw", draw, nargs="*", metavar="NUMBER", choices=FIGURES)
        args = parser.parse_args(argv)
        style()  # without matplotlib it ends here, not after the work
        folder = args.results or ROOT / "results" / Path(args.model).name
        grid = list(list_runs(args.model, args.recipe, args.seeds or 5, folder / "runs"))
        if args.draw is None:
            list(tqdm(train_all(grid, args), total=len(grid), unit="run"))
        draw_figures([out for out, _ in grid], folder, args.draw or list(FIGURES))
        print(f"Tables and figures are in {folder}")
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
