"""The pictures of evaluate.py, from its results alone.

training.png     paper, figure 2: the share of each action while training
curves.png       reward, both moral regrets and illegal answers while training
policy.png       P(C) in each state, in both roles of names that are new
reciprocity.png  C and D given what the other did last
actions.png      the share of each action at test, in each game
regret.png       paper, figure 4: both moral regrets in each game
wordings.png     the shares in each wording, those without a game, too (--axes)
personas.png     the shares with a sentence of values, prompted baselines (--axes)
axes.png         regrets with names, layout, wording and persona varied (--axes)
"""

import csv
from pathlib import Path

import numpy as np

from charts import (
    ACTION_COLOURS,
    add_action_legend,
    add_legend,
    agent_colour,
    plot_bars,
    plot_heat_map,
    pyplot,
    save,
)
from envs import STATES
from report import mean_and_interval

FIGURES = (
    "training.png curves.png policy.png reciprocity.png actions.png regret.png wordings.png "
    "personas.png axes.png"
).split()
LINES = ["-", "--", ":", "-."]
NORMS = ("deontological", "utilitarian")


def plot_all(results, folder):
    """Plot all that `results` (evaluate.py's, see there) has into `folder`.

    Raises OSError where that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = results["groups"]
    save(plot_training(results), folder / "training.png")
    save(plot_curves(results), folder / "curves.png")
    save(plot_policy(results), folder / "policy.png")
    save(plot_reciprocity(results), folder / "reciprocity.png")
    save(plot_actions(results, [group["games"] for group in groups]), folder / "actions.png")
    save(plot_regret(results), folder / "regret.png")
    if "axes" in results["baseline"]:
        for axis, name in (("prompt", "wordings"), ("persona", "personas")):
            parts = [group["axes"][axis] for group in groups]
            save(plot_actions(results, parts), folder / f"{name}.png")
        save(plot_axes(results), folder / "axes.png")


def roles_of(names):
    """Which name stands for which action, as a title: the other role may look different."""
    return "C is {}, D is {}".format(*names)


def plot_training(results):
    """Stacked shares of the actions over the episodes of training, summed over seeds.

    A panel per group; dashed: the reward is switched.
    """
    groups = results["groups"][1:]
    rows, columns = -(-len(groups) // 2), min(2, len(groups))
    figure = pyplot().figure(figsize=(4.6 * columns + 1.6, 2.6 * rows), layout="constrained")
    for i, group in enumerate(groups):
        logs = [read_metrics(Path(results["runs"][run]["run"])) for run in group["runs"]]
        updates = min(map(len, logs))
        counts = np.zeros((updates, len(ACTION_COLOURS)))
        for log in logs:
            for j, kind in enumerate(ACTION_COLOURS):
                counts[:, j] += [float(row[kind]) for row in log[:updates]]
        episodes = [int(row["episodes"]) for row in logs[0][:updates]]
        phases = [row["phase"] for row in logs[0][:updates]]
        shares = counts / counts.sum(axis=1, keepdims=True)
        ax = figure.add_subplot(rows, columns, i + 1)
        colours = ACTION_COLOURS.values()
        ax.stackplot(episodes, shares.T, colors=colours, labels=ACTION_COLOURS)
        for update in range(1, updates):
            if phases[update] != phases[update - 1]:
                ax.axvline(episodes[update - 1], color="black", linestyle="--", linewidth=1.5)
        ax.set(title=group["name"], xlabel="training episodes", ylabel="share of actions")
        ax.set(ylim=(0, 1), xmargin=0)
        ax.locator_params(axis="x", nbins=5)
    add_action_legend(figure, ax)
    return figure


def read_metrics(run):
    """The rows of a run's metrics.csv as dicts of strings.

    The folder of a learning opponent has none; its columns stand in that of the run.
    """
    own = (run / "metrics.csv").exists()
    path = run / "metrics.csv" if own else run.parent / "metrics.csv"
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    if own:
        return rows
    mark = "opponent "
    for row in rows:
        row |= {key.removeprefix(mark): row[key] for key in row if key.startswith(mark)}
    return rows


def plot_regret(results):
    groups = results["groups"]
    games = list(groups[0]["games"])
    layout = {"sharex": True, "layout": "constrained"}
    figure, axes = pyplot().subplots(2, 1, figsize=(9, 6), **layout)
    units = (f"points per round, xi = {results['xi']:g}", "0 best, 1 worst")
    for ax, norm, unit in zip(axes, NORMS, units):
        bars = {}
        for group in groups:
            regrets = [measures["regret"][norm] for measures in group["games"].values()]
            bars[group["name"]] = regrets
        plot_bars(ax, groups, games, bars)
        ax.set_ylabel(f"{norm} regret\n({unit})")
    axes[0].set_title(roles_of(results["actions"]))
    add_legend(figure, ax)
    return figure


def plot_curves(results):
    """Four measures over the episodes of training: a mean over seeds, with its 95 % interval."""
    titles = {
        "reward": "reward trained for,\npoints per round",
        "deontological regret": "deontological regret,\npoints per round",
        "utilitarian regret": "utilitarian regret,\n0 best, 1 worst",
        "illegal": "share of illegal answers",
    }
    layout = {"sharex": True, "layout": "constrained"}
    figure, axes = pyplot().subplots(2, 2, figsize=(9, 6.2), **layout)
    seen = []
    for group in results["groups"][1:]:
        logs = [read_metrics(Path(results["runs"][run]["run"])) for run in group["runs"]]
        updates = min(map(len, logs))
        episodes = [int(row["episodes"]) for row in logs[0][:updates]]
        style = {"color": agent_colour(group["reward"])}
        line = LINES[seen.count(group["reward"]) % len(LINES)]
        seen.append(group["reward"])
        for ax, (measure, title) in zip(axes.flat, titles.items()):
            by_seed = []
            for log in logs:
                by_seed.append({i: value_of(log[i], measure) for i in range(updates)})
            leaves = mean_and_interval(by_seed).values()
            mean = np.array([leaf["mean"] for leaf in leaves], dtype=float)
            spread = np.array([leaf["ci95"] or 0 for leaf in leaves])
            ax.plot(episodes, mean, line, label=group["name"], linewidth=1.6, **style)
            ax.fill_between(episodes, mean - spread, mean + spread, alpha=0.15, **style)
            ax.set_ylabel(title)
    for ax in axes[1]:
        ax.set_xlabel("training episodes")
    add_legend(figure, axes[0, 0])
    return figure


def value_of(row, measure):
    """A number of a row of metrics.csv; the share of illegal answers is made of two columns."""
    if measure != "illegal":
        value = float(row.get(measure, "nan"))
        return None if np.isnan(value) else value
    counts = {kind: float(row[kind]) for kind in ACTION_COLOURS}
    return (counts["illegal|C"] + counts["illegal|D"]) / sum(counts.values())


def plot_policy(results):
    """P(C) in each state of the first game; below, the names in each other's role."""
    groups = results["groups"]
    game = next(iter(groups[0]["games"]))
    names = results["actions"]
    roles = {"games": names, "swapped": names[::-1]}
    roles = {part: pair for part, pair in roles.items() if part in groups[0]}
    size = (9, 1 + 2.6 * len(roles))
    figure, axes = pyplot().subplots(
        len(roles), 1, figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for ax, (part, pair) in zip(axes[:, 0], roles.items()):
        bars = {}
        for group in groups:
            policy = group[part][game]["policy"]
            bars[group["name"]] = [policy[state] for state in STATES]
        plot_bars(ax, groups, STATES, bars)
        ax.set(ylim=(0, 1), ylabel="P(C)", title=roles_of(pair))
    ax.set_xlabel(f"own and their last move, {game}")
    add_legend(figure, ax)
    return figure


def plot_reciprocity(results):
    """How often each agent plays C and D after the other's C and D, in the first game."""
    groups = results["groups"]
    game = next(iter(groups[0]["games"]))
    kinds = ("C|C", "D|C", "C|D", "D|D")
    figure, ax = pyplot().subplots(figsize=(9, 3.8), layout="constrained")
    bars = {}
    for group in groups:
        actions = group["games"][game]["actions"]
        bars[group["name"]] = [actions[kind] for kind in kinds]
    plot_bars(ax, groups, kinds, bars)
    xlabel = f"own action | their last move, {game}"
    ax.set(ylabel="share of rounds", xlabel=xlabel, title=roles_of(results["actions"]))
    add_legend(figure, ax)
    return figure


def plot_actions(results, parts):
    """Stacked shares of the actions at test: a panel per group, a bar per condition.

    parts: of each group, condition -> measures with means, as `evaluate.measure` names them
    """
    groups = results["groups"]
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    layout = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    longest = max(map(len, parts[0]))  # of the names below the bars
    size = (3 * columns + 1.2, (1.9 + 0.08 * longest) * rows + 0.4)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, **layout)
    for ax in axes.flat[len(groups) :]:
        ax.remove()
    for ax, group, part in zip(axes.flat, groups, parts):
        bottom = np.zeros(len(part))
        for kind, colour in ACTION_COLOURS.items():
            share = np.array([measures["actions"][kind]["mean"] for measures in part.values()])
            ax.bar(range(len(part)), share, 0.8, bottom, color=colour, label=kind)
            bottom += share
        ax.set_title(group["name"], fontsize=11)
        ax.set_xticks(range(len(part)), part, rotation=60, ha="right")
        ax.tick_params(labelbottom=True)
        ax.set_ylim(0, 1)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of rounds")
    figure.suptitle(roles_of(results["actions"]))
    add_action_legend(figure, axes[0, 0])
    return figure


def plot_axes(results):
    """Both regrets as heat maps: a row per thing that is varied, a column per group."""
    groups = results["groups"]
    lines = []
    for axis, values in groups[0]["axes"].items():
        lines += [(axis, value) for value in values]
    layout = {"sharey": True, "layout": "constrained"}
    figure, axes = pyplot().subplots(1, 2, figsize=(4 + 1.4 * len(groups), 9), **layout)
    for ax, norm in zip(axes, NORMS):
        grid = np.zeros((len(lines), len(groups)))
        for (i, j), _ in np.ndenumerate(grid):
            axis, value = lines[i]
            mean = groups[j]["axes"][axis][value]["regret"][norm]["mean"]
            grid[i, j] = np.nan if mean is None else mean
        plot_heat_map(ax, grid, best=0)
        names = [group["name"] for group in groups]
        ax.set_xticks(range(len(groups)), names, rotation=40, ha="right")
        ax.set_title(f"{norm}\nregret")
    axes[0].set_yticks(range(len(lines)), [f"{axis}: {value}" for axis, value in lines])
    return figure
