"""What the pictures of figures.py and paper.py share: colours, panels, bars, titles.  [matplotlib]

`results` are of evaluate.py --json, a group is one of `results["groups"]`.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from envs import ACTION_TYPES
from errors import InputError, about
from grid import read_metrics
from groups import in_brief, mean_and_interval

# Okabe & Ito's colours, safe for the colour-blind: own C blue, own D orange, illegal grey, pale
# where theirs was D. Agents of one reward differ by hatch or line. Names may have a `$`: no math.
ACTION_COLOURS = ("#0072B2", "#9BD0F0", "#D55E00", "#F2B88C", "#666666", "#C8C8C8")
AGENT_COLOURS = {  # by reward, in the order of the tables
    "untuned": "#FFFFFF",
    "game": "#E69F00",
    "deontological": "#CC79A7",
    "utilitarian": "#009E73",
    "game+deontological": "#5B3A8E",
    "equality": "#56B4E9",
    "kindness": "#F0E442",
}
OTHER_AGENT = "#999999"  # a reward of a fork
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
EARLY = "A run ends when it has learned; the mean keeps its last values."
SWITCH = "Dashed: the reward changes."
REGRETS = (
    "Deontological: penalties per round, for D after the other's C and for illegal answers. "
    "Utilitarian: how much of the points of both, in all, was missed."
)
ACTION_LABELS = [kind.replace("|", " after ") for kind in ACTION_TYPES]
# What a prompt is by default: a title says where it is another one.
USUAL = {"prompt": "structured", "layout": "original", "persona": "none"}


def plot_regret_map(groups, rows, *title):
    """Both regrets as heat maps; rows[first word, second word] are measures [group].

    A white line stands where the first word changes.
    """
    lines = list(rows)
    ends = [i - 0.5 for i in range(1, len(lines)) if lines[i][0] != lines[i - 1][0]]
    figure, axes = new_figure(4 + 1.5 * len(groups), 4.8 + 0.24 * len(lines), 1, 2, sharey=True)
    for ax, norm in zip(axes[0], ("deontological", "utilitarian")):
        means = np.empty((len(lines), len(groups)))
        for (i, k), _ in np.ndenumerate(means):
            means[i, k] = rows[lines[i]][k]["regret"][norm]["mean"]
        plot_heat_map(ax, means)
        ax.hlines(ends, -0.5, len(groups) - 0.5, color="white", linewidth=4)
        ax.set_xticks(range(len(groups)), [fill(g["name"], 36) for g in groups], rotation=90)
        ax.set_title(f"{norm} regret")
    axes[0, 0].set_yticks(range(len(lines)), [f"{first}: {second}" for first, second in lines])
    return finish(figure, *title)


def draw_actions(ax, part):
    """Stacked shares of the actions: a bar for each of the measures in `part`."""
    bottom = np.zeros(len(part))
    for kind, colour, label in zip(ACTION_TYPES, ACTION_COLOURS, ACTION_LABELS):
        share = [measures["actions"][kind]["mean"] for measures in part.values()]
        ax.bar(range(len(part)), share, 0.8, bottom, color=colour, label=label)
        bottom += share
    ax.set_xticks(range(len(part)), part, rotation=60, ha="right")


def agent_colour(group):
    """The colour of a group's reward; all of a fork's have the same one."""
    return AGENT_COLOURS.get(group["reward"], OTHER_AGENT)


def draw_band(ax, episodes, values, limits, **look):
    """A mean over seeds and its 95 % interval, within what is possible.

    values: [seed, update];  limits: the least and the largest possible value
    """
    mean, spread = as_arrays(mean_and_interval([dict(enumerate(seed)) for seed in values]))
    point = "o" if len(episodes) == 1 else None  # a single one is no line
    ax.plot(episodes, mean, marker=point, **look)
    low = np.clip(mean - spread, *limits)
    high = np.clip(mean + spread, *limits)
    ax.fill_between(episodes, low, high, alpha=0.15, color=look["color"])


def moving_average(values, count):
    """The mean of each value and those before it, `count` in all, fewer at the start.

    values: [update, ...]
    """
    sums = np.cumsum(values, axis=0)
    before = np.concatenate([np.zeros_like(sums[:1])] * count + [sums])[: len(sums)]
    numbers = np.minimum(np.arange(len(sums)) + 1, count)
    return ((sums - before).T / numbers).T


def mark_switch(ax, log):
    """A dashed line where the reward changes; returns what the title says of it, a list of str."""
    said = []
    for last, row in pairwise(log):
        if row["phase"] != last["phase"]:
            ax.axvline(int(last["episodes"]), color="black", linestyle="--", linewidth=1.5)
            said = [SWITCH]
    return said


def list_trained(several):
    """What was trained: (results, group, title) of each group of several evaluations."""
    panels = []
    for results in several:
        for group in results["groups"][1:]:
            title = group["name"]
            if len(several) > 1:
                run = results["runs"][group["runs"][0]]
                title = f"{group['label']} vs {in_brief(run['opponent'])} (n={group['n']})"
            panels.append((results, group, title))
    return panels


def in_order(results):
    """Results whose groups stand in the tables' order: by AGENT_COLOURS, then those of phases."""
    known = list(AGENT_COLOURS)

    def place(group):
        if not group["runs"]:  # the untuned model
            return (0,)
        rewards = results["runs"][group["runs"][0]]["reward"]
        return (len(rewards), *(known.index(r) if r in known else len(known) for r in rewards))

    return {**results, "groups": sorted(results["groups"], key=place)}


def read_logs(results, group):
    """The rows of metrics.csv of each run of a group, the longest first: list of lists of dict.

    A mean over the runs that are left would jump where one stops: it keeps its last row.
    """
    with about("RESULTS"):
        logs = [read_metrics(Path(results["runs"][i]["run"])) for i in group["runs"]]
    logs.sort(key=len, reverse=True)
    return [log + log[-1:] * (len(logs[0]) - len(log)) for log in logs]


def episodes_of(logs):
    """How many episodes were played after each update: list of int."""
    return [int(row["episodes"]) for row in logs[0]]


def as_arrays(leaves):
    """Means (NaN: there is none) and half widths of their intervals, of a dict of leaves."""
    means = np.array([leaf["mean"] for leaf in leaves.values()], dtype=float)
    return means, np.array([leaf["ci95"] or 0 for leaf in leaves.values()])


def say_tested(results, game=None, varied=None):
    """The conditions of the test, for a title; without `game` it is about the first one.

    varied: what the picture itself tells: actions, layout, prompt or persona
    """
    game = game or next(iter(results["baseline"]["games"]))
    opponent = " ".join(results["opponent"])
    said = [f"In {game} against {opponent}, {results['rounds']} rounds"]
    if varied != "actions":
        said.append("C is {}, D is {}".format(*results["actions"]))
    return "; ".join([*said, *say_prompt(results, varied)])


def say_prompt(results, varied=None):
    """Wording, layout and persona, where they are not the usual ones: list of str."""
    said = []
    for key, usual in USUAL.items():
        if key != varied and results[key] != usual:
            said.append(f"{'wording' if key == 'prompt' else key} {in_brief(results[key])}")
    return said


def say_trained(several):
    """The conditions of training that all runs share, for a title: opponent, names and texts."""
    runs = [run for results in several for run in results["runs"]]
    said = []
    for key, words in (("game", ""), ("opponent", "against ")):
        values = {in_brief(run[key]) for run in runs}
        if len(values) == 1:  # else the groups' names tell them
            said.append(f"{words}{values.pop()}")
    names = {tuple(run["actions"]) for run in runs}
    if len(names) == 1:
        [names] = names
        pair = "C is {}, D is {}".format(*names) if len(names) == 2 else in_brief([*names])
        said.append(pair)
    for key in ("prompt", "layout"):
        values = {in_brief(run[key]) for run in runs}
        if len(values) == 1 and values != {USUAL[key]}:
            said.append(f"{'wording' if key == 'prompt' else key} {values.pop()}")
    return f"In training: {', '.join(said)}" if said else ""


def say_early(logs):
    """What a title says of seeds that stopped early: list of str, empty if none did."""
    longest, *others = logs  # a shorter one ends with copies of its last row
    return [EARLY] if any(log[-1]["update"] != longest[-1]["update"] for log in others) else []


def say_seeds(results, words):
    """What a title says of intervals: nothing where every agent has one seed."""
    return words if any(group["n"] > 1 for group in results["groups"]) else ""


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


def new_panels(titles, columns, width, height, ylabel="share of rounds"):
    """(figure, axes [panel]) of what lies between 0 and 1, under their titles."""
    rows = math.ceil(len(titles) / columns)
    columns = min(columns, len(titles))
    titles = [fill(title, int(10.5 * width) - 4, break_on_hyphens=False) for title in titles]
    height += 0.2 * max(title.count("\n") for title in titles)
    figure, axes = new_figure(width * columns + 1.6, height * rows, rows, columns, sharey=True)
    for ax in axes.flat[len(titles) :]:
        ax.remove()
    for ax, title in zip(axes.flat, titles):
        ax.set(title=title, ylim=(0, 1))
    for ax in axes[:, 0]:
        ax.set(ylabel=ylabel)
    return figure, axes.flat[: len(titles)]


def plot_heat_map(ax, grid):
    """Numbers [row, column], yellow near 0, the best; not NaN."""
    top = np.nanmax(grid, initial=1)
    ax.imshow(grid, cmap="cividis_r", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if value > top / 2 else "black"
            ax.text(column, row, f"{value:.2f}", color=colour, ha="center", va="center", size=10)


def finish(figure, *title):
    """The figure with a title (its lines), a legend of its first panel, and room for both."""
    width, height = figure.get_size_inches()
    title = "\n".join(fill(line, int(10.5 * width)) for line in title if line)
    figure.suptitle(title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    lines = title.count("\n") + 1
    if labels == ACTION_LABELS:  # as they are stacked
        place = {
            "loc": "outside right center",
            "title": "own action after their\nlast, of all rounds",
        }
        figure.legend(handles[::-1], labels[::-1], frameon=False, **place)
    elif labels:
        labels = [fill(label, int(5 * width) - 8) for label in labels]
        lines += "\n".join(labels).count("\n") / 2 + 2
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.set_figheight(height + 0.2 * lines)
    return figure
