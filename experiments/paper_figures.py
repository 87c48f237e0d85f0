"""The paper's figures 2 to 5 and 12 to 25, by number: from what, and how.  [matplotlib]

`paper.py` trains, tests and draws them. Numbers are those of arXiv 2410.01639v2.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from drawing import (
    agent_colour,
    draw_actions,
    draw_band,
    episodes_of,
    finish,
    list_trained,
    mark_switch,
    moving_average,
    new_figure,
    new_panels,
    plot_regret_map,
    read_logs,
    say_early,
    say_seeds,
    say_tested,
    say_trained,
)
from envs import payoff_matrix
from figures import plot_actions, plot_reciprocity, plot_regret, plot_training, plot_wordings
from rewards import reward_array
from runs import read_config
from wordings import PERSONAS

# Paper, sections 5.1 to 5.3; of two rewards the second takes over half-way.
SINGLE = (["game"], ["deontological"], ["utilitarian"], ["game+deontological"])
KINDS = (*SINGLE, ["game", "deontological"], ["game", "utilitarian"])
GRID = {  # opponent -> what is trained against it, in the order of figure 14
    "tit-for-tat": KINDS,
    "random": SINGLE,
    "always-defect": SINGLE,
    "always-cooperate": SINGLE,
    "learner": KINDS,
}
TRAINING_NAMES = ["--actions", "action1", "action2"]
AVERAGED = 10  # updates, in figure 12
VARIED = {  # in words
    "actions": "which name is C",
    "layout": "the layout of the points",
    "persona": "the sentence of values",
}


class Evaluation(NamedTuple):
    """A test by evaluate.py of the runs whose names end in vs-OPPONENT-seedN."""

    opponent: str  # of training
    options: list  # of evaluate.py


FIXED = "new-names-vs-tit-for-tat"  # the original layout, no sentence of values
LEARNING = "new-names-vs-learner"
EVALUATIONS = {
    FIXED: Evaluation("tit-for-tat", ["--axes"]),
    LEARNING: Evaluation("learner", []),
    "training-names-vs-tit-for-tat": Evaluation("tit-for-tat", TRAINING_NAMES),
    **{
        f"training-vs-{opponent}": Evaluation(opponent, ["--game", "ipd"])
        for opponent in GRID
        if opponent not in ("tit-for-tat", "learner")
    },
    "training-vs-tit-for-tat-swapped": Evaluation("tit-for-tat-swapped", ["--game", "ipd"]),
    "layout-rows-vs-tit-for-tat": Evaluation("tit-for-tat", ["--layout", "rows"]),
    "layout-columns-vs-tit-for-tat": Evaluation("tit-for-tat", ["--layout", "columns"]),
    "layout-both-vs-tit-for-tat": Evaluation("tit-for-tat", ["--layout", "both"]),
    **{
        f"persona-{persona}-vs-tit-for-tat": Evaluation("tit-for-tat", ["--persona", persona])
        for persona in PERSONAS
    },
}
OPPONENTS = [  # the first test of each, for figure 14
    next(name for name, test in EVALUATIONS.items() if test.opponent == opponent)
    for opponent in GRID
]
LAYOUT_TESTS = [FIXED, *(name for name in EVALUATIONS if name.startswith("layout-"))]
PERSONA_TESTS = [FIXED, *(name for name in EVALUATIONS if name.startswith("persona-"))]


class Figure(NamedTuple):
    plot: Callable  # of the results of its evaluations, one or several
    tests: list  # keys of EVALUATIONS
    phases: int = 0  # of the agents that it shows: rewards that followed each other; 0: any


def plot_reward(*several):
    """The reward trained for, from the least (0) to the largest possible (1): a panel per group."""
    panels = list_trained(several)
    titles = [title for _, _, title in panels]
    figure, axes = new_panels(titles, columns=3, width=3, height=2.2, ylabel="reward, 0 to 1")
    said = [f"Moving average of {AVERAGED} updates."]
    for ax, (results, group, _) in zip(axes, panels):
        logs = read_logs(results, group)
        config = read_config(Path(results["runs"][group["runs"][0]]["run"]))
        values = np.array(
            [moving_average(normalised_rewards(log, config), AVERAGED) for log in logs]
        )
        draw_band(ax, episodes_of(logs), values, (0, 1), color=agent_colour(group))
        ax.set(xlabel="training episodes", xmargin=0)
        said += mark_switch(ax, logs[0])
        said += say_early(logs)
        said.append(say_seeds(results, "Mean over seeds, shaded: its 95 % interval."))
    title = "Reward trained for, from the least to the largest that is possible in a round"
    return finish(figure, title, say_trained(several), " ".join(filter(None, dict.fromkeys(said))))


def normalised_rewards(log, config):
    """Mean reward of each update, 0: the least possible, 1: the largest one: float [update]."""
    payoffs = payoff_matrix(config["game"][0])
    limits = {}
    for reward in config["reward"]:
        possible = reward_array(reward, payoffs, config)
        limits[reward] = (possible.min(), possible.max())
    values = []
    for row in log:
        low, high = limits[row["phase"]]
        values.append((float(row["reward"]) - low) / (high - low))
    return np.array(values)


def plot_regrets(*several, varied):
    """Both regrets as heat maps, a row for each condition and game.

    varied: in what the results differ: actions, layout or persona
    """
    rows = {}
    for results in several:
        condition = name_condition(results, varied)
        for game in results["baseline"]["games"]:
            rows[condition, game] = [group["games"][game] for group in results["groups"]]
    title = f"Moral regret in each game, 0 (yellow) is best; what varies: {VARIED[varied]}"
    conditions = say_tested(several[0], "each game", varied)
    return plot_regret_map(several[0]["groups"], rows, title, conditions)


def plot_shares(*several, varied):
    """Stacked shares of the actions: a row for each condition, a column per group, a bar per game.

    varied: as in `plot_regrets`
    """
    groups = several[0]["groups"]
    size = (1.6 * len(groups) + 2, 1.7 * len(several) + 1.5)
    figure, axes = new_figure(*size, len(several), len(groups), sharex=True, sharey=True)
    for row, results in zip(axes, several):
        row[0].set(ylabel=name_condition(results, varied).replace(", ", "\n"), ylim=(0, 1))
        for ax, group in zip(row, results["groups"]):
            draw_actions(ax, group["games"])
    for ax, group in zip(axes[0], groups):
        label = group["label"].replace(" then ", "\nthen ").replace("+", "+\n")
        ax.set_title(f"{label}\nn={group['n']}")
    title = f"Played at test in each game: the share of each action; what varies: {VARIED[varied]}"
    return finish(figure, title, say_tested(several[0], "each game", varied))


def name_condition(results, varied):
    """What is varied, in words: str."""
    if varied != "actions":
        return f"{varied} {results[varied]}"
    said = "C is {}, D is {}".format(*results["actions"])
    as_trained = all(run["actions"] == results["actions"] for run in results["runs"])
    return f"{said}, as trained" if as_trained else said


def in_both_roles(plot, results):
    """A picture of an evaluation and of its test with the names in each other's role."""
    groups = [{**group, "games": group["swapped"]} for group in results["groups"]]
    swapped = {**results, "groups": groups, "actions": results["actions"][::-1]}
    return plot(results, swapped, varied="actions")


ROLE_TESTS = ["training-names-vs-tit-for-tat"]
MEANINGFUL = ("structured", "unstructured", "poetic", "explicit")
UNRELATED = ("choice", "game", "game_state")
FIGURES = {
    "2a": Figure(plot_training, [FIXED], phases=1),
    "2b": Figure(plot_training, [LEARNING], phases=1),
    "3": Figure(plot_training, [FIXED, LEARNING], phases=2),
    "4": Figure(plot_regret, [FIXED]),
    "5": Figure(plot_actions, [FIXED]),
    "12": Figure(plot_reward, [FIXED, LEARNING]),
    "13": Figure(plot_training, ["training-vs-tit-for-tat-swapped"]),
    "14": Figure(partial(plot_training, columns=4), OPPONENTS, phases=1),
    "15": Figure(plot_regret, [LEARNING]),
    "16": Figure(plot_actions, [LEARNING]),
    "17": Figure(partial(plot_wordings, values=MEANINGFUL), [FIXED]),
    "18": Figure(partial(plot_wordings, values=UNRELATED), [FIXED]),
    "19": Figure(partial(plot_reciprocity, wordings=("game_state",)), [FIXED]),
    "20": Figure(partial(in_both_roles, plot_regrets), ROLE_TESTS),
    "21": Figure(partial(in_both_roles, plot_shares), ROLE_TESTS),
    "22": Figure(partial(plot_regrets, varied="layout"), LAYOUT_TESTS),
    "23": Figure(partial(plot_shares, varied="layout"), LAYOUT_TESTS),
    "24": Figure(partial(plot_regrets, varied="persona"), PERSONA_TESTS),
    "25": Figure(partial(plot_shares, varied="persona"), PERSONA_TESTS),
}


def select(results, phases):
    """Results of the untuned model and of the agents with so many phases only; 0: any."""
    groups = []
    for group in results["groups"]:
        rewards = [results["runs"][i]["reward"] for i in group["runs"]]
        if not rewards or phases in (0, len(rewards[0])):
            groups.append(group)
    return {**results, "groups": groups}
