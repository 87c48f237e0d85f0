"""How a picture is drawn, whatever it shows: style, colours, bars, heat maps.  [matplotlib]

Okabe & Ito's colours, safe for the colour-blind. The same thing has the same colour in every
figure: own C blue, own D orange, illegal grey (pale where the opponent's last move was D); agents
have colours of their own, and a hatch where two share a reward.
"""

import numpy as np

from program import user_error

ACTION_COLOURS = {
    "C|C": "#0072B2",
    "C|D": "#9BD0F0",
    "D|C": "#D55E00",
    "D|D": "#F2B88C",
    "illegal|C": "#666666",
    "illegal|D": "#C8C8C8",
}
AGENT_COLOURS = {  # by reward; one of a fork's own: OTHER_AGENT
    "untuned": "#FFFFFF",
    "game": "#E69F00",
    "deontological": "#CC79A7",
    "utilitarian": "#009E73",
    "game+deontological": "#5B3A8E",
    "equality": "#56B4E9",
    "kindness": "#F0E442",
}
OTHER_AGENT = "#999999"
HATCHES = ["", "///", "...", "xx", "\\\\\\", "++"]


def pyplot():
    """matplotlib.pyplot with the project's style, for pictures in files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 11, "figure.dpi": 110})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return plt


def check_matplotlib(option):
    """Refuse an option that needs matplotlib where it is not installed."""
    with user_error(option, ImportError, hint="pip install -r tests/requirements.txt"):
        import matplotlib  # noqa: F401


def save(figure, path):
    """Write a figure to a file and close it."""
    figure.savefig(path, bbox_inches="tight")
    pyplot().close(figure)


def agent_colour(reward):
    return AGENT_COLOURS.get(reward, OTHER_AGENT)


def plot_bars(ax, groups, ticks, bars):
    """Grouped bars: `bars[name of the group]` is a mean with its interval for each tick."""
    width = 0.85 / len(groups)
    for i, group in enumerate(groups):
        leaves = bars[group["name"]]
        place = np.arange(len(ticks)) + (i - (len(groups) - 1) / 2) * width
        same_reward = sum(other["reward"] == group["reward"] for other in groups[:i])
        ax.bar(
            place,
            [np.nan if leaf["mean"] is None else leaf["mean"] for leaf in leaves],
            width,
            yerr=[leaf["ci95"] or 0 for leaf in leaves] if group["n"] > 1 else None,
            capsize=2,
            hatch=HATCHES[same_reward % len(HATCHES)],
            edgecolor="black",
            linewidth=0.6,
            color=agent_colour(group["reward"]),
            label=group["name"],
            clip_on=False,
        )
    ax.set_xticks(np.arange(len(ticks)), [tick.replace("-", "-\n") for tick in ticks])


def plot_heat_map(ax, grid, best):
    """A grid of numbers [row, column], yellow where they are near `best`; NaN: left empty.

    best: the least number (0) or the largest one (1) that is possible
    """
    top = max(1, np.nanmax(grid))
    ax.imshow(grid, cmap="cividis" if best else "cividis_r", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if abs(value - best) > top / 2 else "black"
            place = {"ha": "center", "va": "center", "fontsize": 10}
            ax.text(column, row, f"{value:.2f}", color=colour, **place)


def add_legend(figure, ax):
    """Below the panels."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def add_action_legend(figure, ax):
    """Right of the panels, in the order in which the actions are stacked."""
    handles, labels = ax.get_legend_handles_labels()
    title = "own action |\ntheir last"
    place = {"loc": "outside right center", "frameon": False}
    figure.legend(handles[::-1], labels[::-1], title=title, **place)
