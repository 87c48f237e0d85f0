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

# Student's t, 97.5 %, for 1 to 30 degrees of freedom.
STUDENT = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
]
ROLES_DIFFER = 0.2  # of P(C), between the two roles of new names: then a word was learned


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
    """Leaf by leaf over equally nested dicts: {"mean", "ci95", "paper95"}, None where a leaf is.

    ci95 = t s / sqrt(n), Student's t for n - 1 degrees of freedom; paper95 = 1.96 s / sqrt(n), too
    narrow for a few seeds (paper, section 5). Both are None for a single run.
    """
    if isinstance(values[0], dict):
        means = {}
        for key in values[0]:
            means[key] = mean_and_interval([value[key] for value in values])
        return means
    if None in values:
        return {"mean": None, "ci95": None, "paper95": None}
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return {"mean": mean, "ci95": None, "paper95": None}
    error = float(np.std(values, ddof=1) / math.sqrt(n))
    # Beyond the table: the first term of Fisher's expansion, right to 0.003.
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96 + 2.37 / (n - 1)
    return {"mean": mean, "ci95": t * error, "paper95": 1.96 * error}


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
    if "answers" in agents[0]:
        group["answers"] = agents[0]["answers"]  # those of the first seed: texts have no mean
    return group


def label(own, settings):
    """A group in words: its rewards, and what differs between it and the other `settings`."""
    *earlier, last = own["reward"], *own["then"]
    words = [f"{reward} until {episode}, then" for reward, episode in zip(earlier, own["switch"])]
    words.append(last)
    others, keys = [], {}
    for other in settings:
        keys |= other
    for key in keys:
        values = {json.dumps(other.get(key)) for other in settings}
        if len(values) == 1 or key in ("reward", "then", "switch") or own.get(key) is None:
            continue
        if key == "opponent":
            words += ["vs", *own["opponent"]]
        else:
            others.append(f"{key} {in_brief(own[key])}")
    return ", ".join([" ".join(words), *others])


def in_brief(value):
    """A setting for a label: of a list its words, the first eight if there are more."""
    if not isinstance(value, list):
        return str(value)
    dots = " ..." if len(value) > 8 else ""
    return " ".join(map(str, value[:8])) + dots


def show(leaf, digits=3):
    """0.123, or 0.123±0.004 where there is an interval; - where there is no figure."""
    if leaf["mean"] is None:
        return "-"
    shown = f"{round(leaf['mean'], digits) + 0.0:.{digits}f}"  # no -0.000
    return shown if leaf["ci95"] is None else f"{shown}±{leaf['ci95']:.{digits}f}"


def line(label, width, measures):
    """A line of a report: policy, share of illegal answers, points and both regrets of a group."""
    illegal = sum(measures["actions"][f"illegal|{last}"]["mean"] for last in "CD")
    leaves = [measures["policy"][state] for state in STATES]
    leaves += [{"mean": illegal, "ci95": None}, measures["reward"]["game"]]
    leaves += [measures["regret"]["deontological"], measures["regret"]["utilitarian"]]
    return f"{label:{width}}" + "".join(f"{show(leaf):>14}" for leaf in leaves)


def print_results(results):
    """Print what `evaluate.evaluate` returns."""
    print_conditions(results)
    groups = results["groups"]
    width = max(map(len, results["baseline"]["games"]))
    width = max([width, *(len(group["name"]) for group in groups)])
    titles = [f"P(C|{state})" for state in STATES]
    titles += ["illegal", "points", "deont. regret", "util. regret"]
    head = "".join(f"{title:>14}" for title in titles)
    swapped = " ".join(results["actions"][::-1])
    for game in results["baseline"]["games"]:
        print(f"\n{game:{width}}{head}")
        for group in groups:
            print(line(group["name"], width, group["games"][game]))
        if "swapped" in groups[0]:
            print(f"with the names in each other's role, {swapped}")
            for group in groups:
                print(line(group["name"], width, group["swapped"][game]))
    for group in groups[1:]:
        print_roles(group, results["actions"])
    print_answers(groups)
    print_drift(groups, width, results["runs"][0]["model"])
    for group in groups:
        if "axes" in group:
            print(f"\n{group['name']}, one thing varied at a time, {next(iter(group['games']))}")
            print(f"{'':26}{head}")
        for axis, values in group.get("axes", {}).items():
            for value, measures in values.items():
                print(line(f"  {axis} {value}", 26, measures))


def print_conditions(results):
    """What was asked of whom."""
    samples = f"{results['samples']} episodes sampled" if results["samples"] else "exact"
    legal = ", strictly legal" if results["legal"] == "strict" else ""
    print(
        f"Against {' '.join(results['opponent'])}, actions {' '.join(results['actions'])}, "
        f"{results['rounds']} rounds, {results['sampling']} sampling{legal}, "
        f"xi {results['xi']:g}; {samples}."
    )
    if any(group["n"] > 1 for group in results["groups"]):
        print("±: 95 % over seeds (Student's t), conditional on the one base model.")
    others = set()
    for run in results["runs"]:
        if not {*results["actions"]} <= {*action_names(run["actions"])}:
            others.add(in_brief(run["actions"]))
    if others:
        print(f"The action names of training were others: {', '.join(sorted(others))} (--actions).")


def print_roles(group, names):
    """Warn of an agent whose policy depends on which name stands for which action."""

    def legal(measures, state):
        return measures["policy"][state]["mean"] / (1 - measures["illegal"][state]["mean"] + 1e-9)

    changes = {}  # preferred word -> game -> change
    for game, swapped in group.get("swapped", {}).items():
        own = group["games"][game]
        mean = sum(legal(own, state) - legal(swapped, state) for state in STATES) / len(STATES)
        if abs(mean) > ROLES_DIFFER:
            word = names[0] if mean > 0 else names[1]
            changes.setdefault(word, {})[game] = abs(mean)
    for word, by_game in changes.items():
        print(
            f"\nwarning: {group['name']}: when the names change places, P(C) of legal answers, a "
            f"mean over the states, changes by up to {max(by_game.values()):.2f} "
            f"({', '.join(by_game)}): it leans to the word {word}, whatever that stands for"
        )


def print_answers(groups):
    """The most probable answers of each agent, whatever they are."""
    for group in groups:
        if "answers" in group:
            print(f"\n{group['name']}: most probable answers, names in their first order")
            print(f"  {'':34}  mean   {'     '.join(STATES)}")
        for answer in group.get("answers", []):
            states = "  ".join(f"{answer['states'][state]:.3f}" for state in STATES)
            print(f"  {answer['text']!r:34}{answer['mean']:6.3f}   {states}")


def print_drift(groups, width, model):
    """What training did to the model beside the game."""
    print("\nBeside the game (a model that is as it was: KL 0, perplexity x 1):")
    if model == "tiny":
        print("(the embedded model knows no prose: of it only the last figure tells something)")
    for group in groups[1:]:
        drift = {key: show(leaf) for key, leaf in group["drift"].items()}
        print(
            f"{group['name']:{width}}  KL(base || tuned) on prose {drift['kl']} nats per token, "
            f"perplexity x {drift['perplexity']}; answers with a name to unrelated prompts "
            f"{drift['names']} (untuned {drift['names_untuned']})"
        )
