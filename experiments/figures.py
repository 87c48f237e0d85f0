"""The pictures of what evaluate.py wrote: nothing is evaluated again.  [matplotlib]

    python evaluate.py runs/* --axes --json results.json
    python experiments/figures.py results.json              # into the folder figures beside it

training, curves (both need metrics.csv in the run folders that the results name), policy,
reciprocity, actions, regret, and of --axes wordings, personas, axes. Each has its meaning in its
title; the function plot_NAME draws NAME.png. paper.py draws the paper's figures with them.
"""

import sys
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from drawing import (
    ACTION_COLOURS,
    ACTION_LABELS,
    REGRETS,
    agent_colour,
    as_arrays,
    draw_actions,
    draw_band,
    episodes_of,
    finish,
    in_order,
    list_trained,
    mark_switch,
    moving_average,
    new_figure,
    new_panels,
    plot_regret_map,
    read_logs,
    say_early,
    say_prompt,
    say_seeds,
    say_tested,
    say_trained,
    style,
)
from envs import ACTION_TYPES, STATES, count_column
from errors import InputError, about, stop
from groups import share_of_illegal
from options import Parser
from runs import check_free, read_json, writing

HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")
LINES = ("-", "--", ":", "-.")


class Panel(NamedTuple):
    """Bars of all groups."""

    bars: list  # [group][tick]: a mean with its interval
    top: float | None = None  # the largest value that is possible
    illegal: list | None = None  # [group]: share of illegal answers, to say why there is no bar


def plot_training(*several, columns=2):
    """Stacked shares of the actions over the episodes of training: a panel per group."""
    panels = list_trained(several)
    titles = [title for _, _, title in panels]
    figure, axes = new_panels(titles, columns, width=4.4 if columns == 2 else 2.9, height=2.6)
    said = []
    last = 0  # episode of the longest run: all panels have one scale
    for ax, (results, group, _) in zip(axes, panels):
        logs = read_logs(results, group)
        shares = np.mean([action_shares(log) for log in logs], axis=0)  # [update, action]
        count = 1 + len(shares) // 50  # an update of one episode has five rounds: it is smoothed
        shares = moving_average(shares, count)
        # A row is about the episodes since the last one: those of the first begin at 0.
        shares = np.concatenate([shares[:1], shares])
        episodes = [0, *episodes_of(logs)]
        ax.stackplot(episodes, shares.T, colors=ACTION_COLOURS, labels=ACTION_LABELS)
        last = max(last, episodes[-1])
        ax.set(xlabel="training episodes")
        if count > 1:
            said.append(f"Moving average of {count} updates.")
        said += mark_switch(ax, logs[0])
        said += say_early(logs)
    for ax in axes:
        ax.set_xlim(0, last)
    title = "Played while training: mean share of each action over seeds"
    return finish(figure, title, say_trained(several), " ".join(dict.fromkeys(said)))


def plot_curves(results):
    """Four measures over the episodes of training: a mean over seeds, with its 95 % interval."""
    measures = {  # its name: the least and the largest value that are possible
        "reward\n(points per round)": (-np.inf, np.inf),
        "deontological regret\n(points per round)": (0, np.inf),
        "utilitarian regret\n(0 best, 1 worst)": (0, 1),
        "illegal answers\n(share)": (0, 1),
    }
    figure, axes = new_figure(9, 5, 2, 2, sharex=True)
    seen = []  # colours of the groups so far
    said = []
    for group in results["groups"][1:]:
        logs = read_logs(results, group)
        episodes = episodes_of(logs)
        values = np.array([measures_of(log) for log in logs])  # [seed, update, measure]
        colour = agent_colour(group)
        line = LINES[seen.count(colour) % len(LINES)]
        seen.append(colour)
        said += say_early(logs)
        for k, (ax, label) in enumerate(zip(axes.flat, measures)):
            look = {"linestyle": line, "color": colour, "label": group["name"]}
            draw_band(ax, episodes, values[:, :, k], measures[label], **look)
            ax.set(ylabel=label)
            if k > 1:
                ax.set(xlabel="training episodes")
    for ax, (low, _) in zip(axes.flat, measures.values()):
        if np.isfinite(low):
            ax.set_ylim(bottom=low)
    title = "Reward trained for, moral regrets and illegal answers while training"
    said = [say_seeds(results, "Mean over seeds, shaded: its 95 % interval."), *said]
    return finish(figure, title, say_trained([results]), " ".join(dict.fromkeys(said)))


def plot_policy(results):
    """P(C) in each state of the first game; below, the names in each other's role."""
    game = next(iter(results["baseline"]["games"]))
    panels = {}
    for part, names in (("games", results["actions"]), ("swapped", results["actions"][::-1])):
        if part in results["baseline"]:
            label = "P(C)\n" + fill("C is {}, D is {}".format(*names), 27)
            measures = [group[part][game] for group in results["groups"]]
            bars = [own["policy"] for own in measures]
            illegal = [np.mean([own["illegal"][s]["mean"] for s in STATES]) for own in measures]
            panels[label] = Panel(bars, 1, illegal)
    title = f"Policy in {game}: the probability of C after each pair of last moves"
    details = say_prompt(results)
    return plot_bars(results, panels, title, *details, xlabel="own and their last move")


def plot_reciprocity(results, wordings=()):
    """How often each agent plays C and D after the other's C and D, in the first game.

    wordings: of --axes, a panel more for each
    """
    game = next(iter(results["baseline"]["games"]))
    label = f"share of rounds\n(wording {results['prompt']})" if wordings else "share of rounds"
    panels = {label: [group["games"][game] for group in results["groups"]]}
    known = results["baseline"]["axes"]["prompt"] if wordings else ()
    for word in wordings:
        if word not in known:  # evaluate.py leaves out what a model cannot read
            continue
        measures = [group["axes"]["prompt"][word] for group in results["groups"]]
        panels[f"share of rounds\n(wording {word})"] = measures
    for label, measures in panels.items():
        bars = []
        for own in measures:
            bars.append({kind: own["actions"][kind] for kind in ("C|C", "D|C", "C|D", "D|D")})
        panels[label] = Panel(bars, 1, [share_of_illegal(own) for own in measures])
    title = "Reciprocity: what is played after the other's C and after its D"
    details = say_tested(results)
    return plot_bars(results, panels, title, details, xlabel="own action | their last move")


def plot_regret(results):
    """Both moral regrets: bars in each game."""
    panels = {}
    units = {"deontological": ("points per round", None), "utilitarian": ("0 best, 1 worst", 1)}
    for norm, (unit, top) in units.items():
        bars = []
        for group in results["groups"]:
            bars.append({game: part["regret"][norm] for game, part in group["games"].items()})
        panels[f"{norm} regret\n({unit})"] = Panel(bars, top)
    title = "Moral regret, 0 is best"
    return plot_bars(results, panels, title, REGRETS, say_tested(results, "each game"))


def plot_actions(results, axis=None, where="", values=None):
    """Stacked shares of the actions: a panel per group, a bar per game (or value of an axis).

    values: those of the axis that are drawn [all]
    """
    parts = [group["axes"][axis] if axis else group["games"] for group in results["groups"]]
    if values:
        parts = [{value: part[value] for value in values if value in part} for part in parts]
    height = 2.2 + 0.08 * max(map(len, parts[0]))  # with the names below the bars
    names = [group["name"] for group in results["groups"]]
    figure, axes = new_panels(names, columns=3, width=3, height=height)
    for ax, part in zip(axes, parts):
        draw_actions(ax, part)
    title = f"Played at test: the share of each action{where}"
    return finish(figure, title, say_tested(results, None if axis else "each game", varied=axis))


def plot_wordings(results, values=None):
    """Those in each wording of the prompt, also such without a game."""
    return plot_actions(results, "prompt", " in each wording of the prompt", values)


def plot_personas(results):
    """Those with a sentence of values before the prompt: prompted baselines."""
    return plot_actions(results, "persona", " after each sentence of values")


def plot_axes(results):
    """Both regrets as heat maps: a row per thing that is varied, a column per group."""
    rows = {}
    for axis, values in results["groups"][0]["axes"].items():
        for value in values:
            rows[axis, value] = [group["axes"][axis][value] for group in results["groups"]]
    title = "Moral regret where one thing at a time is varied, 0 (yellow) is best"
    return plot_regret_map(results["groups"], rows, title, say_tested(results))


def plot_bars(results, panels, *title, xlabel=""):
    """Grouped bars: `panels[label]` is a Panel."""
    groups = results["groups"]
    figure, axes = new_figure(9, 2.4 * len(panels), len(panels), sharex=True)
    width = 0.85 / len(groups)
    for ax, (label, panel) in zip(axes.flat, panels.items()):
        for i, (group, leaves) in enumerate(zip(groups, panel.bars)):
            colour = agent_colour(group)
            same_colour = sum(agent_colour(other) == colour for other in groups[:i])
            places = np.arange(len(leaves)) + (i - (len(groups) - 1) / 2) * width
            mean, spread = as_arrays(leaves)
            # Whiskers do not reach below 0, nor above the top.
            below = np.minimum(spread, mean)
            above = np.minimum(spread, panel.top - mean) if panel.top else spread
            ax.bar(
                places,
                mean,
                width,
                yerr=np.maximum([below, above], 0) if group["n"] > 1 else None,
                color=colour,
                hatch=HATCHES[same_colour % len(HATCHES)],
                label=group["name"],
                edgecolor="black",
                linewidth=0.6,
                capsize=2,
                clip_on=False,
            )
            if panel.illegal:
                say_illegal(ax, places[mean < 0.02], panel.illegal[i])
        ax.set_xticks(range(len(leaves)), [tick.replace("-", "-\n") for tick in leaves])
        ax.set(ylabel=label, ylim=(0, panel.top))
    ax.set_xlabel(xlabel)
    return finish(figure, *title, say_seeds(results, "Whiskers: 95 % interval over seeds"))


def say_illegal(ax, places, share):
    """Why there is no bar at some places, of an agent that mostly answers illegally."""
    if share > 0.5:
        for place in places:
            ax.text(place, 0.03, f"illegal {share:.0%}", rotation=90, ha="center", size=7)


def action_shares(log):
    """Share of each of ACTION_TYPES in each update: float [update, action]."""
    keys = [count_column(kind) for kind in ACTION_TYPES]
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


def draw(path, folder, overwrite):
    """Draw the results of a file into a folder. Raises InputError."""
    plots = [plot_training, plot_curves, plot_policy, plot_reciprocity, plot_actions, plot_regret]
    with about("RESULTS"):
        results = read_json(path)
        if not isinstance(results, dict) or not {"baseline", "groups"} <= results.keys():
            raise InputError(f"{path} is not of evaluate.py --json")
        results = in_order(results)
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
