"""The pictures of what evaluate.py wrote: nothing is evaluated again.  [matplotlib]

    python evaluate.py runs/* --axes --json results.json
    python experiments/figures.py results.json              # into the folder figures beside it

training, curves (both need metrics.csv in the run folders that the results name), policy,
reciprocity, actions, regret, and of --axes wordings, personas, axes. Each has its meaning in its
title; the function plot_NAME draws NAME.png. Paper: training is figure 2, regret is figure 4.
"""

import json
import sys
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from envs import ACTION_TYPES
from evaluate import mean_and_interval
from grid import read_metrics
from runs import InputError, Parser, check_free, stop

# Okabe & Ito's colours, safe for the colour-blind: own C blue, own D orange, illegal grey, pale
# where theirs was D. Agents of one reward differ by hatch or line. Names may have a `$`: no math.
ACTION_COLOURS = "#0072B2 #9BD0F0 #D55E00 #F2B88C #666666 #C8C8C8".split()
AGENTS = "untuned game deontological utilitarian game+deontological equality kindness"
AGENT_COLOURS = "#FFFFFF #E69F00 #CC79A7 #009E73 #5B3A8E #56B4E9 #F0E442"
AGENT_COLOURS = dict(zip(AGENTS.split(), AGENT_COLOURS.split()))  # by reward
OTHER_AGENT = "#999999"  # a reward of a fork's own
HATCHES, LINES = ["", "///", "...", "xx", "\\\\\\", "++"], ["-", "--", ":", "-."]
STYLE = {"font.size": 11, "axes.titlesize": 11, "figure.titlesize": 12, "figure.dpi": 110}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
STYLE |= {"savefig.bbox": "tight"}
LOGGED = (*ACTION_TYPES, "reward", "deontological regret", "utilitarian regret")
EARLY = "A seed that stopped early keeps its last update."


def plot_training(results):
    """Stacked shares of the actions over the episodes of training: a panel per group."""
    groups = results["groups"][1:]
    figure, axes = group_panels(groups, 2, 4.4, 2.6)
    for ax, group in zip(axes, groups):
        rows, shares, _ = read_logs(results, group)
        # A row is about the episodes since the last one: those of the first begin at 0.
        episodes = [0, *(int(row["episodes"]) for row in rows)]
        shares = np.concatenate([shares[:, :1], shares], axis=1).mean(axis=0)  # [update, action]
        ax.stackplot(episodes, shares.T, colors=ACTION_COLOURS, labels=ACTION_TYPES)
        for i in range(1, len(rows)):
            if rows[i]["phase"] != rows[i - 1]["phase"]:
                ax.axvline(episodes[i], color="black", linestyle="--", linewidth=1.5)
        ax.set(xlabel="training episodes", xmargin=0)
    title = "Played while training: mean share of each action over seeds"
    return finish(figure, title, f"Dashed: the reward changes. {EARLY}")


def plot_curves(results):
    """Four measures over the episodes of training: a mean over seeds, with its 95 % interval."""
    labels = ("reward\n(points per round)", "deontological regret\n(points per round)")
    labels += ("utilitarian regret\n(0 best, 1 worst)", "illegal answers\n(share)")
    (figure, axes), seen = new_figure(9, 5, 2, 2, sharex=True), []
    for group in results["groups"][1:]:
        rows, _, values = read_logs(results, group)
        episodes = [int(row["episodes"]) for row in rows]
        colour = AGENT_COLOURS.get(group["reward"], OTHER_AGENT)
        line = LINES[seen.count(group["reward"]) % len(LINES)]
        seen.append(group["reward"])
        for k, ax in enumerate(axes.flat):
            by_seed = [dict(enumerate(seed)) for seed in values[:, :, k]]
            mean, spread = arrays(mean_and_interval(by_seed))
            point = None if rows[1:] else "o"  # a single one is no line
            ax.plot(episodes, mean, line, color=colour, label=group["name"], marker=point)
            ax.fill_between(episodes, mean - spread, mean + spread, alpha=0.15, color=colour)
            ax.set(ylabel=labels[k], xlabel="training episodes" if k > 1 else "")
    title = "Reward trained for, moral regrets and illegal answers while training"
    return finish(figure, title, f"Mean over seeds, shaded: its 95 % interval. {EARLY}")


def plot_policy(results):
    """P(C) in each state of the first game; below, the names in each other's role."""
    game, panels = next(iter(results["baseline"]["games"])), {}
    for part, names in (("games", results["actions"]), ("swapped", results["actions"][::-1])):
        if part in results["baseline"]:
            label = "P(C)\n" + fill("C is {}, D is {}".format(*names), 27)
            panels[label] = [group[part][game]["policy"] for group in results["groups"]]
    title = f"Policy in {game}: the probability of C after each pair of last moves"
    return plot_bars(results, panels, title, xlabel="own and their last move", top=1)


def plot_reciprocity(results):
    """How often each agent plays C and D after the other's C and D, in the first game."""
    game, kinds = next(iter(results["baseline"]["games"])), ("C|C", "D|C", "C|D", "D|D")
    actions = [group["games"][game]["actions"] for group in results["groups"]]
    panels = {"share of rounds": [{kind: shares[kind] for kind in kinds} for shares in actions]}
    title = "Reciprocity: what is played after the other's C and after its D"
    return plot_bars(results, panels, title, tested(results), xlabel="own action | their last move")


def plot_regret(results):
    """Both moral regrets: bars in each game."""
    panels, units = {}, {"deontological": "points per round", "utilitarian": "0 best, 1 worst"}
    for norm, unit in units.items():
        bars = panels[f"{norm} regret\n({unit})"] = []
        for group in results["groups"]:
            bars.append({game: part["regret"][norm] for game, part in group["games"].items()})
    return plot_bars(results, panels, "Moral regret, 0 is best", tested(results, "each game"))


def plot_actions(results, axis=None, where=""):
    """Stacked shares of the actions: a panel per group, a bar per game (or value of an axis)."""
    parts = [group["axes"][axis] if axis else group["games"] for group in results["groups"]]
    height = 2.2 + 0.08 * max(map(len, parts[0]))  # with the names below the bars
    figure, axes = group_panels(results["groups"], 3, 3, height)
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
    lines = [(axis, value) for axis, values in groups[0]["axes"].items() for value in values]
    figure, axes = new_figure(4 + 1.5 * len(groups), 4.8 + 0.24 * len(lines), 1, 2, sharey=True)
    ends = np.cumsum([len(values) for values in groups[0]["axes"].values()])[:-1] - 0.5
    for ax, norm in zip(axes[0], ("deontological", "utilitarian")):
        means = [[g["axes"][a][v]["regret"][norm]["mean"] for g in groups] for a, v in lines]
        plot_heat_map(ax, np.array(means, dtype=float), best=0)
        ax.hlines(ends, -0.5, len(groups) - 0.5, color="white", linewidth=4)
        ax.set_xticks(range(len(groups)), [fill(g["name"], 36) for g in groups], rotation=90)
        ax.set_title(f"{norm} regret")
    axes[0, 0].set_yticks(range(len(lines)), [f"{axis}: {value}" for axis, value in lines])
    title = "Moral regret where one thing at a time is varied, 0 (yellow) is best"
    return finish(figure, title, tested(results))


def read_logs(results, group):
    """Rows of the longest metrics.csv; shares [run, update, action], measures [run, update, 4].

    A mean over the runs that are left would jump where one stops: it keeps its last row.
    """
    runs = [results["runs"][i]["run"] for i in group["runs"]]
    try:
        logs = sorted((read_metrics(Path(run)) for run in runs), key=len, reverse=True)
    except OSError:
        reason = f"no metrics.csv in {' or '.join(runs)}: moved, or another working folder?"
        raise InputError("RESULTS", reason) from None
    filled = [log + log[-1:] * (len(logs[0]) - len(log)) for log in logs]
    values = [[[float(row.get(key, "nan")) for key in LOGGED] for row in log] for log in filled]
    counts, measures = np.split(np.array(values), [len(ACTION_TYPES)], axis=2)
    shares = counts / counts.sum(axis=2, keepdims=True)
    return logs[0], shares, np.dstack([measures, shares[:, :, 4:].sum(axis=2)])  # illegal: 4, 5


def arrays(leaves):
    """Means (NaN: there is none) and half widths of their intervals, of a dict of leaves."""
    means = np.array([leaf["mean"] for leaf in leaves.values()], dtype=float)
    return means, np.array([leaf["ci95"] or 0 for leaf in leaves.values()])


def tested(results, game=None):
    """The conditions of the test, for a title; without `game` it is about the first one."""
    game, opponent = game or next(iter(results["baseline"]["games"])), " ".join(results["opponent"])
    names = "C is {}, D is {}".format(*results["actions"])
    return f"In {game} against {opponent}, {results['rounds']} rounds; {names}"


def style(option="--out"):
    """A context to draw in; then the caller's settings are as they were. Raises InputError."""
    try:
        from matplotlib.style import context
    except ImportError:
        reason = "matplotlib is not installed: pip install -r tests/requirements.txt"
        raise InputError(option, reason) from None
    return context(["default", STYLE])


def new_figure(width, height, rows=1, columns=1, **sharing):
    """(figure, axes [row, column]), in inches. It is none of pyplot's and opens no window."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing)


def group_panels(groups, columns, width, height):
    """(figure, axes [group]) of shares, under the names of the groups."""
    rows, columns = -(-len(groups) // columns), min(columns, len(groups))
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
    width, edge = 0.85 / len(groups), {"edgecolor": "black", "linewidth": 0.6, "capsize": 2}
    for ax, (label, bars) in zip(axes.flat, panels.items()):
        for i, (group, leaves) in enumerate(zip(groups, bars)):
            same_reward = sum(other["reward"] == group["reward"] for other in groups[:i])
            look = {"color": AGENT_COLOURS.get(group["reward"], OTHER_AGENT), "clip_on": False}
            look |= {"hatch": HATCHES[same_reward % len(HATCHES)], "label": group["name"]}
            place = np.arange(len(leaves)) + (i - (len(groups) - 1) / 2) * width
            mean, spread = arrays(leaves)
            ax.bar(place, mean, width, yerr=spread if group["n"] > 1 else None, **edge, **look)
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
    """Draw the results of a file into a folder. Raises InputError or OSError."""
    plots = [plot_training, plot_curves, plot_policy, plot_reciprocity, plot_actions, plot_regret]
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if "axes" in results["baseline"]:
            plots += [plot_wordings, plot_personas, plot_axes]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError("RESULTS", f"{path} is not of evaluate.py --json ({error})") from None
    paths = [folder / f"{plot.__name__.removeprefix('plot_')}.png" for plot in plots]
    with style():
        folder.mkdir(parents=True, exist_ok=True)
        for picture in paths:
            check_free("--out", picture, overwrite)
        for figure, picture in zip([plot(results) for plot in plots], paths):
            figure.savefig(picture)
            print(f"Drawn: {picture}")


def main(argv=None):
    try:
        parser = Parser(__doc__)
        parser.add_argument("results", type=Path, metavar="RESULTS", help="of evaluate.py --json")
        parser.add_argument("--out", type=Path, metavar="FOLDER", help="[figures, beside RESULTS]")
        parser.add_argument("--overwrite", action="store_true", help="replace pictures there")
        args = parser.parse_args(argv)
        draw(args.results, args.out or args.results.parent / "figures", args.overwrite)
    except (InputError, OSError) as error:
        stop(InputError("--out", error))  # an InputError stays as it is


if __name__ == "__main__":
    main()
