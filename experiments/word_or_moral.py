"""One picture of what transfer.py found: does an agent do what its reward asks for?  [matplotlib]

    python experiments/transfer.py FIXED/* VARIED/* --json right.json
    python experiments/word_or_moral.py right.json --out right.png

A row for each reward, a mean over its runs, which may differ by nothing but their seed. First come
the agents that were trained with one pair of names, then those that had more. At last comes the
simple rule that does best in all new games; rules that are the reward itself are left out, and so
are results of --final in a new wording.
"""

import sys
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from drawing import AGENT_COLOURS, new_figure, style
from errors import InputError, about, stop
from groups import group_by_seed
from options import Parser, action_names
from runs import check_free, read_json, writing

TITLE = "Does an agent do what its reward asks for? Probability of the right action"
HOME = ("names of\ntraining", "the same,\nexchanged")
NEW = ("200 new\ngames", "selfish and\nmoral differ")
COLOURS = ("#D55E00", "#FFFFFF", "#0072B2")  # the opposite, a coin, right


def right_in(result):
    """P(right action) of a run in HOME and NEW; None where the reward asks for nothing."""
    return [*result["home"], result["agent"]["all"]["p"], result["agent"]["costs"]["p"]]


def best_rule_in(result):
    """P(right action) in NEW of the rule that is best in all games, but for the reward's own."""
    scores = []
    for name, rule in result["rules"].items():
        if name not in result["own_rules"] and rule["all"]["p"] is not None:
            scores.append([rule["all"]["p"], rule["costs"]["p"]])
    return max(scores, default=[None, None])


def read_results(path):
    """What `transfer.py --json` wrote, a list of dict. Raises InputError if it is anything else."""
    results = read_json(path)
    known = {"reward", "settings", "home", "agent", "rules", "own_rules"}
    for result in results:
        if not isinstance(result, dict) or not known <= result.keys():
            raise InputError(f"{path} is not of today's transfer.py --json")
    at_home = [result for result in results if result["home"]]
    if not at_home:
        raise InputError(f"{path} has no results in the wording of training")
    return at_home


def has_one_pair(result):
    """Whether a run was trained with one pair of names."""
    return len(action_names(result["settings"]["actions"])) == 2


def check_groups(results, rewards):
    """Raise InputError unless the runs of a reward differ by nothing but their seed."""
    for reward in rewards:
        chosen = [result["settings"] for result in results if result["reward"] == reward]
        labels = [group["label"] for group in group_by_seed(chosen)]
        if len(labels) > 1:
            raise InputError(f"runs of one reward differ, draw them apart: {' and '.join(labels)}")


def mean_of(results, rewards, shown, columns):
    """The mean over runs of what `shown` returns for each: float [reward, column]; NaN: no run."""
    grid = np.full((len(rewards), len(columns)), np.nan)
    for row, reward in enumerate(rewards):
        chosen = [shown(result) for result in results if result["reward"] == reward]
        if chosen:
            grid[row] = np.mean(np.array(chosen, dtype=float), axis=0)
    return grid


def plot(results, title=TITLE):
    """The picture of these results."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("right", COLOURS)
    trained = list(dict.fromkeys(result["reward"] for result in results))
    rewards = [reward for reward in AGENT_COLOURS if reward in trained]
    rewards += [reward for reward in trained if reward not in rewards]  # of a fork
    fixed = [result for result in results if has_one_pair(result)]
    varied = [result for result in results if not has_one_pair(result)]
    panels = []  # (title, columns, float [reward, column])
    for name, chosen in (("one pair of names", fixed), ("more names", varied)):
        if chosen:
            check_groups(chosen, rewards)
            name = f"trained with {name} (runs: {len(chosen)})"
            panels.append((name, HOME + NEW, mean_of(chosen, rewards, right_in, HOME + NEW)))
    panels.append(("best simple rule", NEW, mean_of(results, rewards, best_rule_in, NEW)))
    widths = [len(columns) for _, columns, _ in panels]
    size = (1.25 * sum(widths) + 1, 1.9 + 0.55 * len(rewards))
    ratios = {"width_ratios": widths}
    figure, axes = new_figure(*size, 1, len(panels), sharey=True, gridspec_kw=ratios)
    for ax, (name, columns, grid) in zip(axes[0], panels):
        ax.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
        for (row, column), p in np.ndenumerate(grid):
            text = "-" if np.isnan(p) else f"{p:.2f}"
            colour = "white" if abs(p - 0.5) > 0.35 else "black"
            ax.text(column, row, text, color=colour, ha="center", va="center", size=13)
        ax.set_title(name)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rewards)), rewards)
        ax.tick_params(length=0)
    figure.suptitle(fill(title, 100), size=14)
    legend = (
        "probability of what the reward asks for; blue: right, white: a coin, orange: the opposite"
    )
    figure.supxlabel(legend, size=11)
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
            with about("RESULTS"):
                figure = plot(results, args.title)
            with about("--out"), writing(args.out):
                figure.savefig(args.out)
        print(f"Drawn: {args.out}")
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
