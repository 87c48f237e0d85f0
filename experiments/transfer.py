"""A word or a moral? How often an agent does what its reward asks for where something is new.

    python experiments/transfer.py                             # 54 runs: 80 minutes on two cores
    python experiments/transfer.py --model FOLDER --seeds 2    # any other model: some hours
    python experiments/transfer.py runs/*                      # tests these runs

Without runs of your own: 3 seeds of each kind in results/MODEL/transfer/runs, where finished ones
are skipped and interrupted ones resumed. It writes transfer.json, .md and .png (a heat map); of
runs of your own, with --results, learning.png, too: how they came to it, from their metrics.csv.

At test the answer is one of the two names (constrained sampling): 0.5 is a coin, 0 the opposite.
"""

import math
import re
import sys
from argparse import Namespace
from itertools import cycle
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from envs import LAYOUTS, first_condition, other_side, payoff_matrix, random_game
from evaluate import Players, group_by_seed, show
from figures import finish, new_figure, plot_heat_map, style
from grid import ROOT, grid_parser, markdown, read_metrics, train_all
from rewards import REWARDS, moral_accuracy
from runs import InputError, check_free, require_same, stop, write_json
from train import choices

MORALS = ("game", "utilitarian", "deontological", "game+deontological")
NAMES = ["--actions", "random"]
NAMES_LAYOUTS = [*NAMES, "--layout", "original", "rows", "columns"]
SHORT = ["--episodes", "35840"]
# Where games differ: smaller steps, and many of them, each with a condition of its own.
LONG = ["--game", "ipd", "random", "--episodes", "307200", "--lr", "1e-3", "--epochs", "1"]
VARIED = {  # in training; never NEW_LAYOUT, NEW_WORDING or NEW_NAMES
    "nothing": SHORT,
    "names": [*SHORT, *NAMES],
    "names, layout": [*SHORT, *NAMES_LAYOUTS],
    "names, layout, game": [*LONG, *NAMES_LAYOUTS],
}
# Any other model: a KL penalty that keeps it undecided until it can read; every layout is shown.
SOFT = "--sampling constrained --prompt brief --lr 1e-4 --kl-coef 0.4 --kl-target 0".split()
SOFT += ["--episodes", "128000", *NAMES, "--layout", *LAYOUTS]
VARIED_LARGE = {"nothing": ["--until", "1"], "names, layout": SOFT}
# What is new at test: the two names of training in each other's role; names not in envs.NAMES, in
# both roles; a layout; a wording; random games, always the same ones.
NEW_PAIRS = (("action3", "action4"), ("K", "X"), ("moon", "river"), ("A", "B"))
NEW_NAMES = [names for pair in NEW_PAIRS for names in (pair, pair[::-1])]
NEW_LAYOUT, NEW_WORDING, NEW_GAMES = "both", "unstructured", 8
WINDOW = 20  # updates


def training_grid(model, seeds, folder):
    """(run folder, options of train.py) of every run."""
    for kind, options in (VARIED if model == "tiny" else VARIED_LARGE).items():
        for seed in range(1, seeds + 1):
            for reward in REWARDS if "game" in kind else MORALS:
                out = folder / f"{reward}-varied-{kind.replace(', ', '-')}-seed{seed}"
                own = ["--reward", reward, "--opponent", "random", "--model", model]
                yield out, [*own, *options, "--seed", seed]


def training_condition(config):
    """The first Condition of a run's training."""
    return first_condition(*choices(Namespace(**config)))


def new_conditions(condition):
    """What is new -> the Conditions that are tested; else they are as in training."""
    rng = np.random.default_rng(0)
    games = [condition._replace(game=random_game(rng)) for _ in range(NEW_GAMES)]
    several = [g._replace(names=n, layout=NEW_LAYOUT) for g, n in zip(games, cycle(NEW_NAMES))]
    return {
        "nothing": [condition],
        "roles": [condition._replace(names=condition.names[::-1])],
        "names": [condition._replace(names=names) for names in NEW_NAMES],
        "layout": [condition._replace(layout=NEW_LAYOUT)],
        "wording": [condition._replace(wording=NEW_WORDING)],
        "game": games,
        "game, names, layout": several,
        "all": [new._replace(wording=NEW_WORDING) for new in several],
    }


def measure_runs(players, runs):
    """What transfer.json holds. Raises InputError where the runs do not fit each other."""
    configs = [players.configs[run] for run in runs]
    require_same("RUN", configs, "xi")
    if len({training_condition(config) for config in configs}) > 1:
        reason = "the first game, names, layout or wording of training differ: test them apart"
        raise InputError("RUN", reason)
    baseline, agents = {"transfer": accuracies(players, None, configs[0])}, []
    for run, config in zip(runs, configs):
        known = {*config["layout"], *config["prompt"], *config["actions"]}
        known &= {NEW_LAYOUT, NEW_WORDING, *sum(NEW_NAMES, ())}
        agents.append({"run": str(run), "not_new": sorted(known)})
        agents[-1]["transfer"] = accuracies(players, run, config)
    groups = group_by_seed(baseline, agents, configs)
    return {"baseline": baseline, "runs": agents, "groups": groups}


def accuracies(players, run, config):
    """`moral_accuracy` of an agent by each reward where something is new: {reward: {new: mean}}.

    The mean is over the Conditions in which the reward prefers an action; None: there is none.
    """
    means, second = {reward: {} for reward in REWARDS}, players.second(run)
    for new, conditions in new_conditions(training_condition(config)).items():
        known = []  # [condition, reward]
        for condition in conditions:
            player = players.player(run, condition, second, "constrained")
            points = payoff_matrix(condition.game)
            points = other_side(points) if second else points
            known.append([moral_accuracy(r, player, points, config["xi"]) for r in REWARDS])
        for reward, column in zip(REWARDS, zip(*known)):
            decided = [accuracy for accuracy in column if not math.isnan(accuracy)]
            means[reward][new] = float(np.mean(decided)) if decided else None
    return means


def rows(results):
    """For each reward the untuned model and the agents trained on it: (name, {new: leaf})."""
    untuned, *trained = results["groups"]
    for reward in dict.fromkeys(group["reward"] for group in trained):
        yield f"untuned, by the {reward} reward", untuned["transfer"][reward]
        for group in trained:
            if group["reward"] == reward:
                yield group["name"], group["transfer"][reward]


def print_results(results):
    named = list(rows(results))
    width = max(len(name) for name, _ in named)
    print("Probability of the action that the reward asks for, the other's move being unknown;")
    print("what is new at test:\n" + " " * width + "".join(f"{new:>21}" for new in named[0][1]))
    for name, leaves in named:
        print(f"{name:{width}}" + "".join(f"{show(leaf):>21}" for leaf in leaves.values()))
    for agent in results["runs"]:
        if agent["not_new"]:
            print(f"Not new to {agent['run']}: {' '.join(agent['not_new'])}")


def write(results, folder, learning):
    write_json(folder / "transfer.json", results)
    named = [(re.sub(r", (episodes|epochs|lr) [^ ,]+", "", n), leaf) for n, leaf in rows(results)]
    names, new = [name for name, _ in named], list(named[0][1])
    table = markdown(["agent", *new], [[name, *leaves.values()] for name, leaves in named])
    (folder / "transfer.md").write_text(table, encoding="utf-8")
    # A heat map: a row per agent, a column per thing that is new; empty where there is no figure.
    means = [[leaf["mean"] for leaf in leaves.values()] for _, leaves in named]
    size = 1 + 0.1 * max(map(len, names)) + 0.8 * len(new), 1.6 + 0.36 * len(named)
    with style():
        figure, [[ax]] = new_figure(*size)
        plot_heat_map(ax, np.array(means, dtype=float), best=1)
        ax.set_xticks(range(len(new)), new, rotation=40, ha="right")
        ax.set_yticks(range(len(named)), names)
        ax.set(xlabel="what is new at test", title="1: as the reward asks; 0: its opposite")
        figure.savefig(folder / "transfer.png")
        if learning:
            plot_learning(results).savefig(folder / "learning.png")


def plot_learning(results):
    """Accuracy in each layout, entropy and KL while training: a column per agent."""
    groups = results["groups"][1:]
    figure, axes = new_figure(1 + 3 * len(groups), 6, 3, len(groups), sharex="col", sharey="row")
    for panels, group in zip(axes.T, groups):
        logs = [read_metrics(Path(results["runs"][i]["run"])) for i in group["runs"]]
        rows = [(i // WINDOW, row) for log in logs for i, row in enumerate(log)]
        for ax, key in zip(panels, ("accuracy", "entropy", "kl")):
            for layout in LAYOUTS if key == "accuracy" else [""]:
                means = {}
                for window, row in rows:
                    if layout in ["", *row["condition"].split("; ")] and row[key] != "nan":
                        means.setdefault((window + 0.5) * WINDOW, []).append(float(row[key]))
                line = sorted(means), [np.mean(means[x]) for x in sorted(means)]
                ax.plot(*line, label=layout, color=None if layout else "black")
            ax.set(ylabel=key if key == "accuracy" else f"{key}, nats", xlabel="update")
            ax.label_outer()
        panels[0].set(title=fill(group["name"], 30), ylim=(0, 1))
    return finish(figure, f"While training, in each layout: means over seeds and {WINDOW} updates")


def main(argv=None):
    parser = grid_parser(__doc__, "3", "results/MODEL/transfer; of RUNs nothing is written")
    parser.option("runs", "instead of the grid", nargs="*", type=Path, metavar="RUN")
    parser.option("--overwrite", "replace what is written", action="store_true")
    args = parser.parse_args(argv)
    runs, folder = args.runs, args.results
    try:
        if folder or not runs:
            style("--results")  # without matplotlib it ends here, not after the work
            folder = folder or ROOT / "results" / Path(args.model).name / "transfer"
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("transfer.json", "transfer.md", "transfer.png", "learning.png"):
                check_free("--results", folder / name, args.overwrite or not runs)
        if not runs:
            grid = list(training_grid(args.model, args.seeds or 3, folder / "runs"))
            runs = list(tqdm(train_all(grid, args), total=len(grid), unit="run"))
        results = measure_runs(Players(runs), runs)
        print_results(results)
        if folder:
            write(results, folder, learning=args.runs)
    except (InputError, OSError) as error:
        stop(InputError("--results", error))  # an InputError stays as it is


if __name__ == "__main__":
    main()
