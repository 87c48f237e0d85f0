"""Runs that differ only by their seed are a group: means, 95 % intervals, and what is printed.

A figure of a group is a leaf {"mean", "ci95"}; figures of an agent come in nested dicts.
"""

import json
import math
import re

import numpy as np

from envs import STATES
from errors import InputError
from options import action_names, in_words

# Settings in which runs of one group may differ.
IGNORED = ("seed", "device", "save_every", "versions", "checkpointing")
ROLES_DIFFER = 0.2  # of P(C), between the two roles of new names: then a word was learned
# Student's t, 97.5 %, for 1 to 10 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def mean_and_interval(values):
    """Leaf by leaf over equally nested dicts: {"mean", "ci95"}, None where a leaf is None.

    ci95 = t s / sqrt(n), Student's t for n - 1 degrees of freedom; None for a single run. (The
    paper has 1.96 s / sqrt(n), which is too narrow for a few seeds.)
    """
    if isinstance(values[0], dict):
        leaves = {}
        for key in values[0]:
            leaves[key] = mean_and_interval([value[key] for value in values])
        return leaves
    if None in values:
        return {"mean": None, "ci95": None}
    n = len(values)
    mean = float(np.mean(values))
    if n == 1:
        return {"mean": mean, "ci95": None}
    t = 1.96 + 2.372 / (n - 1) + 2.82 / (n - 1) ** 2  # two terms of Fisher's expansion
    if n < 12:
        t = STUDENT[n - 2]
    return {"mean": mean, "ci95": t * float(np.std(values, ddof=1)) / math.sqrt(n)}


def group_by_seed(configs):
    """Runs that differ only by their seed, given the settings of each: a list of dicts.

    label, name: in words, the name with the number of seeds;  reward: of the last phase
    n: how many runs;  runs: their indices
    Raises InputError if a seed comes twice in a group.
    """
    members = {}  # settings as JSON -> indices of the runs that have them
    for i, config in enumerate(configs):
        kept = {key: value for key, value in config.items() if key not in IGNORED}
        if kept.get("init"):  # each seed may go on from a run of its own
            kept["init"] = re.sub(r"-seed\d+$", "-seedN", kept["init"])
        members.setdefault(json.dumps(kept, sort_keys=True), []).append(i)
    settings = [json.loads(key) for key in members]
    groups = []
    for group_settings, indices in zip(settings, members.values()):
        title = label(group_settings, settings)
        seeds = [configs[i]["seed"] for i in indices]
        if len(set(seeds)) < len(seeds):
            raise InputError(f"of {title} a seed comes twice: {' '.join(map(str, seeds))}")
        group = {
            "label": title,
            "name": f"{title} (n={len(seeds)})" if len(seeds) > 1 else title,
            "reward": group_settings["reward"][-1],
            "n": len(seeds),
            "runs": indices,
        }
        groups.append(group)
    return groups


def average_groups(groups, agents):
    """The groups of `group_by_seed`, with what was measured of their runs.

    agents: of each run, equally nested dicts of figures; a mean and an interval stand at each leaf
    """
    averaged = []
    for group in groups:
        averaged.append({**group, **mean_and_interval([agents[i] for i in group["runs"]])})
    return averaged


def label(settings, all_settings):
    """A group in words: its rewards, and what differs between it and the other groups."""
    title = " then ".join(settings["reward"])
    differing = []
    for key in dict.fromkeys(key for other in all_settings for key in other):
        values = {json.dumps(other.get(key)) for other in all_settings}
        if len(values) == 1 or key == "reward" or settings.get(key) is None:
            continue
        if key == "opponent":
            title += f" vs {in_brief(settings[key])}"
        else:
            differing.append(f"{key} {in_brief(settings[key])}")
    return ", ".join([title, *differing])


def in_brief(value):
    """A setting in words; if there are more than eight, the first eight of them."""
    words = in_words(value).split()
    if len(words) > 8:
        words = [*words[:8], "..."]
    return " ".join(words)


def show(leaf, digits=3):
    """0.123, or 0.123±0.004 where there is an interval; - where there is no figure."""
    if leaf["mean"] is None:
        return "-"
    shown = f"{round(leaf['mean'], digits) + 0.0:.{digits}f}"  # no -0.000
    return shown if leaf["ci95"] is None else f"{shown}±{leaf['ci95']:.{digits}f}"


def share_of_illegal(measures):
    """Share of rounds with an illegal answer, a mean over seeds."""
    return sum(measures["actions"][f"illegal|{last}"]["mean"] for last in "CD")


def print_line(title, width, measures):
    """Policy, share of illegal answers, points, both regrets, and P(right) of a group."""
    leaves = [measures["policy"][state] for state in STATES]
    leaves.append({"mean": share_of_illegal(measures), "ci95": None})
    leaves.append(measures["reward"]["game"])
    leaves.append(measures["regret"]["deontological"])
    leaves.append(measures["regret"]["utilitarian"])
    leaves.append(measures["right"])
    print(f"{title:{width}}" + "".join(f"{show(leaf):>14}" for leaf in leaves))


def print_results(results):
    """Print what `evaluate.evaluate` returns."""
    groups = results["groups"]
    games = results["baseline"]["games"]
    print_head(results)
    width = max(map(len, [*games, *(group["name"] for group in groups)]))
    titles = [f"P(C|{state})" for state in STATES]
    titles += ["illegal", "points", "deont. regret", "util. regret", "right"]
    head = "".join(f"{title:>14}" for title in titles)
    for game in games:
        print(f"\n{game:{width}}{head}")
        for group in groups:
            print_line(group["name"], width, group["games"][game])
        if "swapped" in groups[0]:
            swapped = " ".join(results["actions"][::-1])
            print(f"with the names in each other's role, {swapped}")
            for group in groups:
                print_line(group["name"], width, group["swapped"][game])
    for group in groups[1:]:
        print_roles(group, results["actions"])
    for group in groups:
        if "axes" in group:
            print(f"\n{group['name']}, one thing varied at a time, {next(iter(games))}")
            print(f"{'':26}{head}")
        for axis, values in group.get("axes", {}).items():
            for value, measures in values.items():
                print_line(f"  {axis} {value}", 26, measures)


def print_head(results):
    """Print what was asked, and what of it training did not show."""
    asked = []
    for key in ("layout", "prompt", "persona", "rounds", "sampling", "xi", "illegal"):
        asked.append(f"{key} {in_brief(results[key])}")
    opponent = " ".join(results["opponent"])
    names = " ".join(results["actions"])
    print(f"Against {opponent}, actions {names}, exact; {', '.join(asked)}")
    print("right: P(the action that its own reward asks for), a mean over states; - with --gamma")
    if any(group["n"] > 1 for group in results["groups"]):
        print("±: 95 % over seeds (Student's t), conditional on the one base model.")
    tested = {
        "actions": set(results["actions"]),
        "layout": {results["layout"]},
        "prompt": {results["prompt"]},
    }
    for key, values in tested.items():
        others = set()
        for run in results["runs"]:
            trained = action_names(run[key]) if key == "actions" else run[key]
            if not values <= {*trained}:
                others.add(in_brief(run[key]))
        if others:
            print(f"In training --{key} was {', '.join(sorted(others))}.")


def print_roles(group, names):
    """Warn of an agent whose policy depends on which name stands for which action."""
    changes = {}  # of P(C) in favour of the first name, when the names change places
    for game, swapped in group.get("swapped", {}).items():
        changes[game] = legal_cooperation(group["games"][game]) - legal_cooperation(swapped)
    for name, sign in ((names[0], 1), (names[1], -1)):
        leaning = [game for game, change in changes.items() if sign * change > ROLES_DIFFER]
        if leaning:
            most = max(sign * changes[game] for game in leaning)
            print(
                f"\nwarning: {group['name']}: when the names change places, P(C) of legal answers "
                f"changes by up to {most:.2f} ({', '.join(leaning)}): it leans to "
                f"the word {name}, whatever that stands for"
            )


def legal_cooperation(measures):
    """P(C) of legal answers, a mean over the states."""
    ratios = []
    for state in STATES:
        legal = 1 - measures["illegal"][state]["mean"]
        ratios.append(measures["policy"][state]["mean"] / (legal + 1e-9))
    return np.mean(ratios)
