"""What is printed, and what stands for several seeds: groups of runs, means and intervals.

print_policies   train.py: the policy before and after training
group_by_seed    evaluate.py: runs that differ only by seed together, with labels
print_results    a block per game and a line per group
"""

import json
import math

import numpy as np

from envs import ILLEGAL, STATES, STRATEGIES, C, by_state
from prompts import action_names


def describe(player):
    """A player in a word: the classic strategy within 0.1 of it, or what it does after C."""
    mean = player.mean(axis=1)
    if mean[:, ILLEGAL:].sum() > 2:  # of the four states
        return "mostly illegal"
    p = mean[:, C] / mean[:, :ILLEGAL].sum(axis=1)
    for name, strategy in STRATEGIES.items():
        if np.abs(p - strategy).max() <= 0.1:
            return name.replace("-", " ")
    after_cooperation = p[[0, 2]]
    if after_cooperation.min() >= 0.9:
        return "never betrays a cooperator"
    if after_cooperation.max() <= 0.1:
        return "always betrays a cooperator"
    return "no classic strategy"


def print_policies(before, after):
    """Print the players [state, order, outcome] before and after training."""
    for title, *players in zip(("P(C | own last, their last)", "The opponent's"), before, after):
        print(f"\n{title:30}{'before':>7} {'after':>7}")
        for state in STATES:
            shown = [f"{by_state(player, C)[state]:7.3f}" for player in players]
            print(f"  P(C | {state})".ljust(30) + " ".join(shown))
        illegal = [f"{player[..., ILLEGAL:].sum(-1).mean():7.3f}" for player in players]
        print("  P(illegal), mean".ljust(30) + " ".join(illegal))
        print("In a word: " + " -> ".join(map(describe, players)))


def mean_and_interval(values):
    """Leaf by leaf over equally nested dicts: {"mean", "ci95"}, None where the leaves are None.

    ci95 = 1.96 s / sqrt(n), as in the paper (section 5); None for a single run.
    """
    if isinstance(values[0], dict):
        means = {}
        for key in values[0]:
            means[key] = mean_and_interval([value[key] for value in values])
        return means
    if values[0] is None:
        return {"mean": None, "ci95": None}
    interval = None
    if len(values) > 1:
        interval = float(1.96 * np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"mean": float(np.mean(values)), "ci95": interval}


def group_by_seed(baseline, agents, configs):
    """The untuned model, then the agents, those together that differ only by seed.

    Returns a list of {label, name, reward, n, runs (their indices)} and what `baseline` has, with
    means and intervals.
    """
    ignored = {"seed", "merge", "device", "save_every", "versions"}
    members = {}  # settings as JSON -> indices of the runs that have them
    for i, config in enumerate(configs):
        kept = {key: value for key, value in config.items() if key not in ignored}
        members.setdefault(json.dumps(kept, sort_keys=True), []).append(i)
    settings = [json.loads(key) for key in members]
    groups = [summary("untuned", "untuned", [], [baseline])]
    for own, indices in zip(settings, members.values()):
        last_reward = [own["reward"], *own["then"]][-1]
        chosen = [agents[i] for i in indices]
        groups.append(summary(label(own, settings), last_reward, indices, chosen))
    return groups


def summary(title, reward, indices, agents):
    name = f"{title} (n={len(agents)})" if len(agents) > 1 else title
    group = {"label": title, "name": name, "reward": reward, "n": len(agents), "runs": indices}
    for part in agents[0]:
        if isinstance(agents[0][part], dict):
            group[part] = mean_and_interval([agent[part] for agent in agents])
    return group


def label(own, settings):
    """A group in words: its rewards, and what differs between it and the other `settings`."""
    *earlier, last = own["reward"], *own["then"]
    words = [f"{reward} until {episode}, then" for reward, episode in zip(earlier, own["switch"])]
    words.append(last)
    others = []
    for key in dict.fromkeys(key for other in settings for key in other):
        values = {json.dumps(other.get(key)) for other in settings}
        if len(values) == 1 or key in ("reward", "then", "switch") or own.get(key) is None:
            continue
        if key == "opponent":
            words += ["vs", *own["opponent"]]
        else:
            others.append(f"{key} {in_brief(own[key])}")
    return ", ".join([" ".join(words), *others])


def in_brief(value):
    """A setting for a label: of a list its words, the first four if there are more."""
    if not isinstance(value, list):
        return str(value)
    dots = " ..." if len(value) > 4 else ""
    return " ".join(map(str, value[:4])) + dots


def show(leaf, digits=3):
    """0.123, or 0.123±0.004 where there is an interval; - where there is no figure."""
    if leaf["mean"] is None:
        return "-"
    shown = f"{leaf['mean']:.{digits}f}"
    return shown if leaf["ci95"] is None else f"{shown}±{leaf['ci95']:.{digits}f}"


def line(label, width, measures):
    """A line of a report: policy, share of illegal answers, points and both regrets of a group."""
    illegal = sum(measures["actions"][f"illegal|{last}"]["mean"] for last in "CD")
    leaves = [measures["policy"][state] for state in STATES]
    leaves += [{"mean": illegal, "ci95": None}, measures["reward"]["game"]]
    leaves += [measures["regret"]["deontological"], measures["regret"]["utilitarian"]]
    return f"{label:{width}}" + "".join(f"{show(leaf):>14}" for leaf in leaves)


def print_results(results):
    """Print the results: a block per game and a line per group; then the axes."""
    groups, names = results["groups"], " ".join(results["actions"])
    samples = f"{results['samples']} episodes sampled" if results["samples"] else "exact"
    print(
        f"Against {' '.join(results['opponent'])}, actions {names}, {results['rounds']} rounds, "
        f"{results['sampling']} sampling, xi {results['xi']:g}; {samples}."
    )
    if any(group["n"] > 1 for group in groups):
        print("±: 95 % over seeds.")
    strangers = set()
    for run in results["runs"]:
        if not {*results["actions"]} <= {*action_names(run["actions"])}:
            strangers.add(in_brief(run["actions"]))
    if strangers:
        agents = " and ".join(sorted(strangers))
        print(f"These are not the names of training for the agents of {agents} (--actions).")
    width = max(map(len, results["baseline"]["games"]))
    width = max([width, *(len(group["name"]) for group in groups)])
    titles = [f"P(C|{state})" for state in STATES]
    titles += ["illegal", "points", "deont. regret", "util. regret"]
    head = "".join(f"{title:>14}" for title in titles)
    for game in results["baseline"]["games"]:
        print(f"\n{game:{width}}{head}")
        for group in groups:
            print(line(group["name"], width, group["games"][game]))
    print("\nBeside the game:")
    for group in groups[1:]:
        drift = {key: show(leaf) for key, leaf in group["drift"].items()}
        print(
            f"{group['name']:{width}}  KL(base || tuned) on prose {drift['kl']} nats per token, "
            f"perplexity x {drift['perplexity']}; answers with a name to unrelated prompts "
            f"{drift['names']} (untuned {drift['names_untuned']})"
        )
    for group in groups:
        if "axes" in group:
            print(f"\n{group['name']}, one thing varied at a time, {next(iter(group['games']))}")
            print(f"{'':26}{head}")
        for axis, values in group.get("axes", {}).items():
            for value, measures in values.items():
                print(line(f"  {axis} {value}", 26, measures))
