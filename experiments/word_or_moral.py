"""One picture of what transfer.py found: does an agent do what its reward asks for?  [matplotlib]

    python experiments/transfer.py FIXED/* VARIED/* --json right.json
    python experiments/word_or_moral.py right.json --out right.png

A row for each reward, a mean over its runs. On the left are agents that were trained with one pair
of names, on the right those that had more. Results of --final in a new wording are left out.
"""

import sys
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from drawing import AGENT_COLOURS, new_figure, style
from errors import InputError, about, stop
from runs import Parser, check_free, read_json, writing

TITLE = "Does an agent do what its reward asks for? Probability of the right action"
COLUMNS = (
    "names of\ntraining",
    "names in each\nother's role",
    "200 new\ngames",
    "those where\nit costs",
)
PANELS = {False: "trained with one pair of names", True: "trained with many names"}
COLOURS = ("#D55E00", "#FFFFFF", "#0072B2")  # the opposite, a coin, right


def right_in(result):
    """P(right action) of a run in each of COLUMNS; NaN where the reward asks for nothing."""
    return [*result["home"], result["agent"]["all"]["p"], result["agent"]["costs"]["p"]]


def read_results(path):
    """What `transfer.py --json` wrote, a list of dict. Raises InputError if it is anything else."""
    results = read_json(path)
    for result in results if isinstance(results, list) else [results]:
        if not isinstance(result, dict) or not {"reward", "names", "home", "agent"} <= {*result}:
            raise InputError(f"{path} is not of today's transfer.py --json")
    return [result for result in results if result["home"]]


def plot(results, title=TITLE):
    """The picture of these results."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("right", COLOURS)
    trained = list(dict.fromkeys(result["reward"] for result in results))
    rewards = [reward for reward in AGENT_COLOURS if reward in trained]
    rewards += [reward for reward in trained if reward not in rewards]  # of a fork
    figure, axes = new_figure(10.5, 1.9 + 0.55 * len(rewards), 1, 2, sharey=True)
    for ax, (varied, name) in zip(axes[0], PANELS.items()):
        grid = np.full((len(rewards), len(COLUMNS)), np.nan)
        runs = 0
        for row, reward in enumerate(rewards):
            chosen = []
            for result in results:
                if (result["reward"], result["names"] > 2) == (reward, varied):
                    chosen.append(right_in(result))
            if chosen:
                grid[row] = np.mean(np.array(chosen, dtype=float), axis=0)
                runs += len(chosen)
        ax.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
        for (row, column), p in np.ndenumerate(grid):
            text = "-" if np.isnan(p) else f"{p:.2f}"
            colour = "white" if abs(p - 0.5) > 0.35 else "black"
            ax.text(column, row, text, color=colour, ha="center", va="center", size=13)
        ax.set_title(f"{name} (runs: {runs})")
        ax.set_xticks(range(len(COLUMNS)), COLUMNS)
        ax.set_yticks(range(len(rewards)), rewards)
        ax.tick_params(length=0)
    figure.suptitle(fill(title, 100), size=14)
    figure.supxlabel("blue: what the reward asks for; white: a coin; orange: the opposite", size=11)
    return figure


def main(argv=None):
    try:
        parser = Parser(__doc__)
        parser.option("results", "of transfer.py --json", type=Path, metavar="RESULTS")
        parser.option("--out", "", type=Path, metavar="FILE", default=Path("word-or-moral.png"))
        parser.option("--title", "[a question]", default=TITLE)
        parser.option("--overwrite", "replace this file", action="store_true")
        args = parser.parse_args(argv)
        with about("RESULTS"):
            results = read_results(args.results)
        with about("--out"):
            check_free(args.out, args.overwrite)
        with style():
            figure = plot(results, args.title)
            with about("--out"), writing(args.out):
                figure.savefig(args.out)
        print(f"Drawn: {args.out}")
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
