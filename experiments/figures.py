"""The pictures of what evaluate.py wrote: nothing is evaluated again.  [matplotlib]

    python evaluate.py runs/* --axes --json results.json
    python experiments/figures.py results.json              # into the folder figures beside it

training, curves (both need metrics.csv in the run folders that the results name), policy,
reciprocity, actions, regret, and of --axes wordings, personas, axes. Each has its meaning in its
title; the function plot_NAME draws NAME.png. Paper: training is figure 2, regret is figure 4.
"""

import math
import sys
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from envs import ACTION_TYPES
from errors import InputError, about, stop
from grid import read_metrics
from runs import Parser, check_free, mean_and_interval, read_json, writing

# Okabe & Ito's colours, safe for the colour-blind: own C blue, own D orange, illegal grey, pale
# where theirs was D. Agents of one reward differ by hatch or line. Names may have a `$`: no math.
ACTION_COLOURS = ("#0072B2", "#9BD0F0", "#D55E00", "#F2B88C", "#666666", "#C8C8C8")
AGENT_COLOURS = {  # by reward
    "untuned": "#FFFFFF",
    "game": "#E69F00",
    "deontological": "#CC79A7",
    "utilitarian": "#009E73",
    "game+deontological": "#5B3A8E",
    "equality": "#56B4E9",
    "kindness": "#F0E442",
}
OTHER_AGENT = "#999999"  # a reward of a fork
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")
LINES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "figure.titlesize": 12,
    "figure.dpi": 110,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
    "savefig.bbox": "tight",
}
EARLY = "A seed that stopped early keeps its last update."


def plot_training(results):
    """Stacked shares of the actions over the episodes of training: a panel per group."""
    groups = results["groups"][1:]
    figure, axes = group_panels(groups, columns=2, width=4.4, height=2.6)
    for ax, group in zip(axes, groups):
        logs = read_logs(results, group)
        shares = np.mean([action_shares(log) for log in logs], axis=0)  # [update, action]
        # A row is about the episodes since the last one: those of the first begin at 0.
        shares = np.concatenate([shares[:1], shares])
        episodes = [0, *(int(row["episodes"]) for row in logs[0])]
        ax.stackplot(episodes, shares.T, colors=ACTION_COLOURS, labels=ACTION_TYPES)
        for i in range(1, len(logs[0])):
            if logs[0][i]["phase"] != logs[0][i - 1]["phase"]:
                ax.axvline(episodes[i], color="black", linestyle="--", linewidth=1.5)
        ax.set(xlabel="training episodes", xmargin=0)
    title = "Played while training: mean share of each action over seeds"
    return finish(figure, title, f"Dashed: the reward changes. {EARLY}")


def plot_curves(results):
    """Four measures over the episodes of training: a mean over seeds, with its 95 % interval."""
    labels = (
        "reward\n(points per round)",
        "deontological regret\n(points per round)",
        "utilitarian regret\n(0 best, 1 worst)",
        "illegal answers\n(share)",
    )
    figure, axes = new_figure(9, 5, 2, 2, sharex=True)
    seen = []  # rewards of the groups so far
    for group in results["groups"][1:]:
        logs = read_logs(results, group)
        episodes = [int(row["episodes"]) for row in logs[0]]
        values = np.array([measures_of(log) for log in logs])  # [seed, update, measure]
        colour = AGENT_COLOURS.get(group["reward"], OTHER_AGENT)
        line = LINES[seen.count(group["reward"]) % len(LINES)]
        seen.append(group["reward"])
        for k, ax in enumerate(axes.flat):
            by_seed = [dict(enumerate(seed)) for seed in values[:, :, k]]
            mean, spread = as_arrays(mean_and_interval(by_seed))
            point = "o" if len(episodes) == 1 else None  # a single one is no line
            ax.plot(episodes, mean, line, color=colour, label=group["name"], marker=point)
            ax.fill_between(episodes, mean - spread, mean + spread, alpha=0.15, color=colour)
            ax.set(ylabel=labels[k])
            if k > 1:
                ax.set(xlabel="training episodes")
    title = "Reward trained for, moral regrets and illegal answers while training"
    return finish(figure, title, f"Mean over seeds, shaded: its 95 % interval. {EARLY}")


def plot_policy(results):
    """P(C) in each state of the first game; below, the names in each other's role."""
    game = next(iter(results["baseline"]["games"]))
    panels = {}
    for part, names in (("games", results["actions"]), ("swapped", results["actions"][::-1])):
        if part in results["baseline"]:
            label = "P(C)\n" + fill("C is {}, D is {}".format(*names), 27)
            panels[label] = [group[part][game]["policy"] for group in results["groups"]]
    title = f"Policy in {game}: the probability of C after each pair of last moves"
    return plot_bars(results, panels, title, xlabel="own and their last move", top=1)


def plot_reciprocity(results):
    """How often each agent plays C and D after the other's C and D, in the first game."""
    game = next(iter(results["baseline"]["games"]))
    bars = []
    for group in results["groups"]:
        actions = group["games"][game]["actions"]
        bars.append({kind: actions[kind] for kind in ("C|C", "D|C", "C|D", "D|D")})
    panels = {"share of rounds": bars}
    title = "Reciprocity: what is played after the other's C and after its D"
    return plot_bars(results, panels, title, tested(results), xlabel="own action | their last move")


def plot_regret(results):
    """Both moral regrets: bars in each game."""
    panels = {}
    for norm, unit in (("deontological", "points per round"), ("utilitarian", "0 best, 1 worst")):
        bars = []
        for group in results["groups"]:
            bars.append({game: part["regret"][norm] for game, part in group["games"].items()})
        panels[f"{norm} regret\n({unit})"] = bars
    return plot_bars(results, panels, "Moral regret, 0 is best", tested(results, "each game"))


def plot_actions(results, axis=None, where=""):
    """Stacked shares of the actions: a panel per group, a bar per game (or value of an axis)."""
    if axis:
        parts = [group["axes"][axis] for group in results["groups"]]
    else:
        parts = [group["games"] for group in results["groups"]]
    height = 2.2 + 0.08 * max(map(len, parts[0]))  # with the names below the bars
    figure, axes = group_panels(results["groups"], columns=3, width=3, height=height)
    for ax, part in zip(axes, parts):
        bottom = np.zeros(len(part))
        for kind, colour in zip(ACTION_TYPES, ACTION_COLOURS):
            share = [measures["actions"][kind]["mean"] for measures in part.values()]
            ax.bar(range(len(part)), share, 0.8, bottom, color=colour, label=kind)
            bottom += share
        ax.set_xticks(range(len(part)), part, rotation=60, ha="right")
    title = f"Played at test: the share of each action{where}"
    return finish(figure, title, tested(results, None if axis else "each game"))


def plot_wordings(results):
    """Those in each wording of the prompt, also such without a game."""
    return plot_actions(results, "prompt", " in each wording of the prompt")


def plot_personas(results):
    """Those with a sentence of values before the prompt: prompted baselines."""
    return plot_actions(results, "persona", " after each sentence of values")


def plot_axes(results):
    """Both regrets as heat maps: a row per thing that is varied, a column per group."""
    groups = results["groups"]
    lines = []
    ends = []  # where an axis ends
    for axis, values in groups[0]["axes"].items():
        lines += [(axis, value) for value in values]
        ends.append(len(lines) - 0.5)
    figure, axes = new_figure(4 + 1.5 * len(groups), 4.8 + 0.24 * len(lines), 1, 2, sharey=True)
    for ax, norm in zip(axes[0], ("deontological", "utilitarian")):
        means = np.empty((len(lines), len(groups)))
        for i, (axis, value) in enumerate(lines):
            for k, group in enumerate(groups):
                means[i, k] = group["axes"][axis][value]["regret"][norm]["mean"]
        plot_heat_map(ax, means, best=0)
        ax.hlines(ends[:-1], -0.5, len(groups) - 0.5, color="white", linewidth=4)
        ax.set_xticks(range(len(groups)), [fill(g["name"], 36) for g in groups], rotation=90)
        ax.set_title(f"{norm} regret")
    axes[0, 0].set_yticks(range(len(lines)), [f"{axis}: {value}" for axis, value in lines])
    title = "Moral regret where one thing at a time is varied, 0 (yellow) is best"
    return finish(figure, title, tested(results))


def read_logs(results, group):
    """The rows of metrics.csv of each run of a group, the longest first: list of lists of dict.

    A mean over the runs that are left would jump where one stops: it keeps its last row.
    """
    with about("RESULTS"):
        logs = [read_metrics(Path(results["runs"][i]["run"])) for i in group["runs"]]
    logs.sort(key=len, reverse=True)
    return [log + log[-1:] * (len(logs[0]) - len(log)) for log in logs]


def action_shares(log):
    """Share of each of ACTION_TYPES in each update: float [update, action]."""
    keys = [f"count_{kind.replace('|', '_after_')}" for kind in ACTION_TYPES]
    counts = np.array([[float(row[key]) for key in keys] for row in log])
    return counts / counts.sum(axis=1, keepdims=True)


def measures_of(log):
    """Reward, both moral regrets and the share of illegal answers: float [update, 4]."""
    illegal = action_shares(log)[:, 4:].sum(axis=1)
    measures = []
    for row, share in zip(log, illegal):
        regrets = [float(row["deontological_regret"]), float(row["utilitarian_regret"])]
        measures.append([float(row["reward"]), *regrets, share])
    return np.array(measures)


def as_arrays(leaves):
    """Means (NaN: there is none) and half widths of their intervals, of a dict of leaves."""
    means = np.array([leaf["mean"] for leaf in leaves.values()], dtype=float)
    return means, np.array([leaf["ci95"] or 0 for leaf in leaves.values()])


def tested(results, game=None):
    """The conditions of the test, for a title; without `game` it is about the first one."""
    game = game or next(iter(results["baseline"]["games"]))
    opponent = " ".join(results["opponent"])
    names = "C is {}, D is {}".format(*results["actions"])
    return f"In {game} against {opponent}, {results['rounds']} rounds; {names}"


def style():
    """A context to draw in; then the caller's settings are as they were. Raises InputError."""
    try:
        from matplotlib.style import context
    except ImportError:
        reason = "matplotlib is not installed: pip install -r tests/requirements.txt"
        raise InputError(reason) from None
    return context(["default", STYLE])


def new_figure(width, height, rows=1, columns=1, **sharing):
    """(figure, axes [row, column]), in inches. It is none of pyplot's and opens no window."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing)


def group_panels(groups, columns, width, height):
    """(figure, axes [group]) of shares, under the names of the groups."""
    rows = math.ceil(len(groups) / columns)
    columns = min(columns, len(groups))
    names = [fill(group["name"], int(10.5 * width) - 4) for group in groups]
    height += 0.2 * max(name.count("\n") for name in names)
    figure, axes = new_figure(width * columns + 1.6, height * rows, rows, columns, sharey=True)
    for ax in axes.flat[len(groups) :]:
        ax.remove()
    for ax, name in zip(axes.flat, names):
        ax.set(title=name, ylim=(0, 1), ylabel="share of rounds")
    return figure, axes.flat[: len(groups)]


def plot_bars(results, panels, *title, xlabel="", top=None):
    """Grouped bars: `panels[label]` [group][tick] are means with intervals."""
    groups = results["groups"]
    figure, axes = new_figure(9, 2.4 * len(panels), len(panels), sharex=True)
    width = 0.85 / len(groups)
    for ax, (label, bars) in zip(axes.flat, panels.items()):
        for i, (group, leaves) in enumerate(zip(groups, bars)):
            same_reward = sum(other["reward"] == group["reward"] for other in groups[:i])
            mean, spread = as_arrays(leaves)
            ax.bar(
                np.arange(len(leaves)) + (i - (len(groups) - 1) / 2) * width,
                mean,
                width,
                yerr=spread if group["n"] > 1 else None,
                color=AGENT_COLOURS.get(group["reward"], OTHER_AGENT),
                hatch=HATCHES[same_reward % len(HATCHES)],
                label=group["name"],
                edgecolor="black",
                linewidth=0.6,
                capsize=2,
                clip_on=False,
            )
        ax.set_xticks(range(len(leaves)), [tick.replace("-", "-\n") for tick in leaves])
        ax.set(ylabel=label, ylim=(0, top))
    ax.set_xlabel(xlabel)
    return finish(figure, *title, "Whiskers: 95 % where there are several seeds")


def plot_heat_map(ax, grid, best):
    """Numbers [row, column], yellow near `best`: the least (0) or largest (1) possible; not NaN."""
    top = np.nanmax(grid, initial=1)
    ax.imshow(grid, cmap="cividis" if best else "cividis_r", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if abs(value - best) > top / 2 else "black"
            ax.text(column, row, f"{value:.2f}", color=colour, ha="center", va="center", size=10)


def finish(figure, *title):
    """The figure with a title (its lines), a legend of its first panel, and room for both."""
    width, height = figure.get_size_inches()
    title = "\n".join(fill(line, int(10.5 * width)) for line in title)
    figure.suptitle(title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    lines = title.count("\n") + 1
    if "C|C" in labels:  # as they are stacked
        place = {"loc": "outside right center", "title": "own action |\ntheir last"}
        figure.legend(handles[::-1], labels[::-1], frameon=False, **place)
    elif labels:
        labels = [fill(label, int(5 * width) - 8) for label in labels]
        lines += "\n".join(labels).count("\n") / 2 + 2
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.set_figheight(height + 0.2 * lines)
    return figure


def draw(path, folder, overwrite):
    """Draw the results of a file into a folder. Raises InputError."""
    plots = [plot_training, plot_curves, plot_policy, plot_reciprocity, plot_actions, plot_regret]
    with about("RESULTS"):
        results = read_json(path)
        if not isinstance(results, dict) or not {"baseline", "groups"} <= results.keys():
            raise InputError(f"{path} is not of evaluate.py --json")
    if "axes" in results["baseline"]:
        plots += [plot_wordings, plot_personas, plot_axes]
    with about("--out"), style():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        pictures = [folder / f"{plot.__name__.removeprefix('plot_')}.png" for plot in plots]
        for picture in pictures:
            check_free(picture, overwrite)
        for plot, picture in zip(plots, pictures):
            figure = plot(results)
            with writing(picture):
                figure.savefig(picture)
            print(f"Drawn: {picture}")


def main(argv=None):
    try:
        parser = Parser(__doc__)
        parser.option("results", "of evaluate.py --json", type=Path, metavar="RESULTS")
        parser.option("--out", "[figures, beside RESULTS]", type=Path, metavar="FOLDER")
        parser.option("--overwrite", "replace pictures there", action="store_true")
        args = parser.parse_args(argv)
        draw(args.results, args.out or args.results.parent / "figures", args.overwrite)
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
