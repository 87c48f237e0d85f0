"""The pictures of evaluate.py, from its results alone.  [matplotlib, which is needed nowhere else; knows no model]

    training.png   paper, figure 2: the share of each action while training
    policy.png     P(C) in each state
    regret.png     paper, figure 4: both moral regrets in each game
    axes.png       regrets with names, layout, wording and persona varied, one at a time (--axes)
    transfer.png   accuracy of the moral choice where something is new (--transfer)

Okabe & Ito's colours, safe for the colour-blind. The same thing has the same colour in every figure: own C blue, own D orange, illegal grey (pale
where the opponent's last move was D); the agents have colours of their own, and a hatch where two share a reward.
"""

import csv
from pathlib import Path

import numpy as np

from envs import STATES

FIGURES = ("training.png", "policy.png", "regret.png")  # whatever was asked for
ACTION_COLOURS = {"C|C": "#0072B2", "C|D": "#9BD0F0", "D|C": "#D55E00", "D|D": "#F2B88C", "illegal|C": "#666666", "illegal|D": "#C8C8C8"}
AGENT_COLOURS = {"untuned": "#FFFFFF", "game": "#F0E442", "deontological": "#CC79A7", "utilitarian": "#009E73",
                 "game+deontological": "#5B3A8E"}
HATCHES = ["", "///", "...", "xx", "\\\\\\", "++"]


def transfer_rows(agents):
    """For each reward that an agent was trained for, the untuned model and then these agents: list of (name, {what is new: leaf})."""
    rows = []
    for reward in dict.fromkeys(one["reward"] for one in agents[1:]):
        rows.append((f"untuned, by the {reward} reward", agents[0]["transfer"][reward]))
        rows += [(one["name"], one["transfer"][reward]) for one in agents[1:] if one["reward"] == reward]
    return rows


def draw(results, folder):
    """Draw everything that `results` (evaluate.py's, see there) has into `folder`. Raises OSError where that cannot be written."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
    agents = results["groups"]
    folder.mkdir(parents=True, exist_ok=True)

    def finish(figure, name):
        figure.savefig(folder / name, bbox_inches="tight")
        plt.close(figure)

    finish(training(plt, results), "training.png")

    games = list(agents[0]["games"])
    figure, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for ax, norm, unit in zip(axes, ("deontological", "utilitarian"), (f"points per round, xi = {results['xi']:g}", "0 best, 1 worst")):
        legend = bars(ax, agents, games, lambda one, game: one["games"][game]["regret"][norm])
        ax.set_ylabel(f"{norm} regret\n({unit})")
    figure.legend(*legend, loc="outside lower center", ncols=2, frameon=False)
    finish(figure, "regret.png")

    figure, ax = plt.subplots(figsize=(9, 3.8), layout="constrained")
    legend = bars(ax, agents, STATES, lambda one, state: one["games"][games[0]]["policy"][state])
    ax.set(ylim=(0, 1), ylabel="P(C)", xlabel=f"own and their last move, {games[0]}, actions {' '.join(results['actions'])}")
    figure.legend(*legend, loc="outside lower center", ncols=2, frameon=False)
    finish(figure, "policy.png")

    if "axes" in agents[0]:
        lines = [(axis, value) for axis, values in agents[0]["axes"].items() for value in values]
        figure, axes = plt.subplots(1, 2, figsize=(4 + 1.4 * len(agents), 9), sharey=True, layout="constrained")
        for ax, norm in zip(axes, ("deontological", "utilitarian")):
            heat_map(ax, [[one["axes"][axis][value]["regret"][norm]["mean"] for one in agents] for axis, value in lines], best=0)
            ax.set_xticks(range(len(agents)), [one["name"] for one in agents], rotation=40, ha="right")
            ax.set_title(f"{norm} regret (yellow: little)")
        axes[0].set_yticks(range(len(lines)), [f"{axis}: {value}" for axis, value in lines])
        finish(figure, "axes.png")

    if "transfer" in agents[0]:
        rows = transfer_rows(agents)
        new = list(rows[0][1])
        longest = max(len(name) for name, _ in rows)
        figure, ax = plt.subplots(figsize=(1 + 0.1 * longest + 0.8 * len(new), 1.6 + 0.36 * len(rows)), layout="constrained")
        heat_map(ax, [[leaves[title]["mean"] for title in new] for _, leaves in rows], best=1)
        ax.set_xticks(range(len(new)), new, rotation=40, ha="right")
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.set(xlabel="what is new at test", title="probability of the action that the reward asks for")
        finish(figure, "transfer.png")


def training(plt, results):
    """Stacked shares of the actions over the episodes of training, summed over seeds, a panel per group; dashed: the reward is switched."""
    agents = results["groups"][1:]
    rows, columns = -(-len(agents) // 2), min(2, len(agents))
    figure = plt.figure(figsize=(4.6 * columns + 1.6, 2.6 * rows), layout="constrained")
    for i, one in enumerate(agents):
        logs = [list(csv.DictReader((Path(results["runs"][run]["run"]) / "metrics.csv").read_text().splitlines())) for run in one["runs"]]
        updates = min(map(len, logs))
        counts = np.array([[[float(line[kind]) for kind in ACTION_COLOURS] for line in log[:updates]] for log in logs]).sum(axis=0)
        ax = figure.add_subplot(rows, columns, i + 1)
        ax.stackplot([int(line["episodes"]) for line in logs[0][:updates]], (counts / counts.sum(axis=1, keepdims=True)).T,
                     colors=ACTION_COLOURS.values(), labels=ACTION_COLOURS)
        for line, following in zip(logs[0], logs[0][1:updates]):
            if line["phase"] != following["phase"]:
                ax.axvline(int(line["episodes"]), color="black", linestyle="--", linewidth=1.5)
        ax.set(title=one["name"], xlabel="training episodes", ylabel="share of actions", ylim=(0, 1), xmargin=0)
        ax.locator_params(axis="x", nbins=5)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", title="own action |\ntheir last", frameon=False)
    return figure


def bars(ax, agents, ticks, leaves):
    """Grouped bars: `leaves(agent, tick)` gives a mean with its interval. Returns the legend's handles and labels."""
    width = 0.85 / len(agents)
    for i, one in enumerate(agents):
        found = [leaves(one, tick) for tick in ticks]
        hatch = HATCHES[sum(other["reward"] == one["reward"] for other in agents[:i]) % len(HATCHES)]
        ax.bar(np.arange(len(ticks)) + (i - (len(agents) - 1) / 2) * width, [leaf["mean"] for leaf in found], width,
               yerr=[leaf["ci95"] or 0 for leaf in found] if one["n"] > 1 else None, capsize=2, hatch=hatch, edgecolor="black",
               linewidth=0.6, color=AGENT_COLOURS.get(one["reward"], "#999999"), label=one["name"], clip_on=False)
    ax.set_xticks(np.arange(len(ticks)), [tick.replace("-", "-\n") for tick in ticks])
    return ax.get_legend_handles_labels()


def heat_map(ax, values, best):
    """A grid of numbers [row, column], yellow where they are near `best`, the least (0) or the largest (1) possible; None: left empty."""
    values = np.array(values, dtype=float)
    top = max(1, np.nanmax(values))
    ax.imshow(values, cmap="cividis" if best else "cividis_r", vmin=0, vmax=top, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        ax.text(j, i, "" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=10,
                color="white" if abs(value - best) > top / 2 else "black")
