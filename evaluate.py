"""What did the agent become? Exact policies, rewards and moral regrets of trained runs.

    python evaluate.py runs/utilitarian-vs-tit-for-tat-seed1
    python evaluate.py runs/* --axes --json results.json    # pictures: experiments/figures.py
    python evaluate.py runs/* --opponent tit-for-tat --actions action1 action2 --game ipd
    python evaluate.py runs/game-vs-random-seed1 --prompt my_prompt.txt

An agent is an array of probabilities, so every figure is an expectation over a Markov chain of the
last moves: nothing is sampled. By default the action names are ones that training never showed.
Names are tested in both roles: what prefers a word does the opposite when they change places. Runs
that differ only by seed are a group: mean and 95 % interval over its seeds (Student's t).

The file of --json: `runs[i].games[game]` is what `measure` returns; `.swapped[game]` the same with
the names in each other's role, unless training had both; `.axes[axis][value]` with --axes.
`baseline` is the untuned model's, `groups[i]` has mean, ci95 and paper95 (1.96 s / sqrt n) at each
leaf. More questions: the scripts in experiments/.
"""

import json
import math
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import envs
import rewards
import runs
from envs import ILLEGAL, STATES, C, as_player, by_state
from runs import InputError

# torch and what needs it are imported where they are used: --help and a bad option answer at once.

# What --json has of the command line, and of a run, beside its results.
HEAD = "layout prompt persona rounds sampling xi illegal".split()
ASKED = "opponent actions layout prompt persona rounds".split()
SHOWN = ("reward", "opponent", "game", "actions", "layout", "prompt", "seed", "model")
NAME_PAIRS = "action3 action4, action4 action3, action1 action2, action2 action1, A B, X Y, 0 1"
AXES = {  # what --axes varies, one thing at a time, on the first --game
    "actions": [*NAME_PAIRS.split(", "), "qv zk", "wjx bnu", "hqzrtkm pvxgdns"],
    "layout": list(envs.LAYOUTS),
    "prompt": list(envs.TEMPLATES),
    "persona": ["none", *envs.PERSONAS],
}
# Student's t, 97.5 %, for 1 to 10 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
ROLES_DIFFER = 0.2  # of P(C), between the two roles of new names: then a word was learned


def transitions(player, opponent):
    """The Markov chain of the last moves as the player sees them: P(next state | state), [4, 4]."""
    mine, theirs = envs.legal_moves(player), envs.replies(opponent)
    return (mine[:, :, None] * theirs[:, None, :]).reshape(4, 4)


def frequencies(player, opponent, rounds, opponent_opening=0.5):
    """What `play` shows on average, exactly: share of rounds [state 4, outcome, opponent's move 2].

    The last moves are a Markov chain of four states. Both players enter averaged over their name
    orders, because every round shuffles anew. Arguments as in `play`.
    """
    chain, visits = transitions(player, opponent), np.zeros(4)
    state = np.tile([opponent_opening, 1 - opponent_opening], 2) / 2
    for _ in range(rounds):
        visits += state / rounds
        state = state @ chain
    return shares(player, opponent, visits)


def shares(player, opponent, visits):
    """Share of rounds [state, outcome, opponent's move], from that of the states, visits [4]."""
    return visits[:, None, None] * player.mean(axis=1)[:, :, None] * envs.replies(opponent)[:, None]


def measure(player, payoffs, opponent, opponent_opening, rounds, xi=3.0, illegal=-6.0):
    """All about a player in one game against an opponent: nested dict of floats.

    opponent: [state, order, outcome], from its own side;  opponent_opening: its P(C) there
    policy:   P(C | state), a mean over name orders, by STATES;  illegal: P(illegal | state)
    actions:  share of rounds, by ACTION_TYPES;  reward: mean per round in points, by REWARDS
    regret:   deontological, utilitarian; None where there is none
    """
    share = frequencies(player, opponent, rounds, opponent_opening)
    # Summed over own last move and the opponent's next one: [opponent's last move, action].
    actions = np.zeros((2, 3))
    actions[:, : player.shape[-1]] = share.reshape(2, 2, -1, 2).sum(axis=(0, 3))
    reward = {}
    for name in rewards.REWARDS:
        points = rewards.reward_array(name, payoffs, xi, illegal)[:, : player.shape[-1]]
        reward[name] = float((share * points).sum())
    regret = {"deontological": rewards.deontological_regret(reward["deontological"])}
    utilitarian = float(rewards.utilitarian_regret(reward["utilitarian"], payoffs, illegal))
    regret["utilitarian"] = None if math.isnan(utilitarian) else utilitarian
    actions = dict(zip(envs.ACTION_TYPES, actions.T.ravel().tolist()))
    policy = {"policy": by_state(player, C), "illegal": by_state(player, ILLEGAL)}
    return policy | {"actions": actions, "reward": reward, "regret": regret}


def evaluate_parser(description, games=tuple(envs.GAMES)):
    """The options that evaluate.py shares with the experiments; games: the default."""
    parser = runs.Parser(description)
    option = parser.option
    listed, names = {"nargs": "+"}, ("C_NAME", "D_NAME")
    wording = f"the wording: of {', '.join(envs.TEMPLATES)}; or a text file with {{first}} and "
    wording += "{second} for the actions, see envs.fields"
    option("runs", "run folders of one base model", metavar="RUN", type=Path, **listed)
    option("--game", envs.game_words(), default=list(games), **listed)
    option(
        "--actions", "the names of C and D", nargs=2, metavar=names, default=["action3", "action4"]
    )
    option("--layout", "of the payoffs", choices=envs.LAYOUTS, default="original")
    option("--prompt", wording, default="structured")
    personas = ["none", *envs.PERSONAS]
    option("--persona", "a sentence of values put first", choices=personas, default="none")
    option("--sampling", "[as in training]", choices=("constrained", "free"))
    option("--json", "write everything to this file", type=Path, metavar="FILE")
    option("--overwrite", "replace this file", action="store_true")
    return parser


def conditions(args):
    """The Conditions of the command line, one for each game. Raises InputError."""
    asked, wording = "--game", args.prompt
    try:
        games = envs.parse_games(args.game)
        if "random" in games:
            raise ValueError("random games are for training: name games, or eight numbers")
        asked = "--actions"
        names = tuple(envs.action_names(args.actions))
        asked = "--prompt"
        if wording not in envs.TEMPLATES:  # the same text, whatever an editor puts around it
            wording = Path(wording).read_text(encoding="utf-8-sig").rstrip("\n")
            envs.check_template(wording)
    except (OSError, ValueError) as error:
        raise InputError(asked, error) from None
    return [envs.Condition(game, names, args.layout, wording, args.persona) for game in games]


class Players:
    """The base model of run folders, as the agent of any of them. Raises InputError at odd ones."""

    def __init__(self, folders):
        self.configs = {run: runs.read_config(run, "RUN") for run in folders}
        first, *_ = self.configs.values()
        runs.require_same("RUN", self.configs.values(), "model", "dtype", "base")
        from lora import base_fingerprint
        from policy import Policy, load_model

        try:
            self.model, self.tokenizer = load_model(first["model"], dtype=first["dtype"])
            runs.require_same("RUN", [first, {"base": base_fingerprint(self.model)}], "base")
            # Both share one adapter, that of the run which plays.
            base = self.model, self.tokenizer, "agent"
            self.policies = {"constrained": Policy(*base), "free": Policy(*base, free=True)}
            for run in folders:  # what is wrong with one of them is known before the work
                self.policies["free"].load(run)
        except ValueError as error:
            raise InputError("RUN", error) from error
        self.default, self.loaded = first["sampling"], folders[-1]

    def policy(self, run, sampling=None):
        """The Policy of a run, its adapter loaded (None: untuned); sampling: by default its own."""
        if run not in (None, self.loaded):
            self.policies["free"].load(run)
            self.loaded = run
        return self.policies[sampling or (self.configs[run]["sampling"] if run else self.default)]

    def trie(self, condition, second=False):
        """The packed prompts of a Condition. Raises InputError where the model cannot read them."""
        try:
            texts = envs.build_prompts(condition, second)
            trie = self.policies["free"].trie(texts, condition.names)
            trie.inputs(self.model)
        except ValueError as error:
            raise InputError("--actions, --prompt", error) from None
        return trie

    @cache  # noqa: B019 - all runs meet all conditions, some more than once
    def player(self, run, condition, second=False, sampling=None):
        """The agent of a run (None: the untuned model) as a player [state, order, outcome]."""
        policy, trie = self.policy(run, sampling), self.trie(condition, second)
        if run is None:
            return as_player(policy.reference(trie).exp().numpy())
        return as_player(policy.probabilities(trie))

    def second(self, run):
        """Whether a run's agent learned on the other side of the game."""
        return run is not None and self.configs[run].get("side") == "opponent"


def prepare(args, others=(), one=False):
    """(Conditions, Players) of a command line and other runs, checked before any work.

    one: of a single game
    """
    asked = conditions(args)
    if one and len(asked) > 1:
        raise InputError("--game", "one at a time")
    if args.json:
        runs.check_free("--json", args.json, args.overwrite)
    players = Players([*args.runs, *others])
    if not args.sampling:
        runs.require_same("--sampling", [players.configs[run] for run in args.runs], "sampling")
    return asked, players


def list_tests(args, asked, players):
    """Where every agent is tested: a list of (path in its results, Condition).

    Names that an agent does not know in both roles are tested in both. What the model cannot read
    is left out of --axes, with a line that says so.
    """
    known = [set(envs.action_names(players.configs[run]["actions"])) for run in args.runs]
    new = any(len(names) == 2 or not {*args.actions} <= names for names in known)
    tests = []
    for condition in asked:
        game = envs.game_name(condition.game)
        tests.append((("games", game), condition))
        if new:
            tests.append((("swapped", game), condition._replace(names=condition.names[::-1])))
    for axis, values in AXES.items() if args.axes else ():
        for value in values:
            field = {"actions": "names", "prompt": "wording"}.get(axis, axis)
            chosen = tuple(value.split()) if axis == "actions" else value
            varied = tests[0][1]._replace(**{field: chosen})
            try:
                players.trie(varied)
            except ValueError as error:
                print(f"warning: --axes: {axis} {value} left out: {error}", file=sys.stderr)
            else:
                tests.append((("axes", axis, value), varied))
    return tests


def evaluate(args):
    """What --json holds, see the module docstring. Raises InputError."""
    try:
        who = envs.parse_opponent(args.opponent)
        if who == "learner":
            raise ValueError("learner is for training: name its run folder, RUN/opponent")
    except ValueError as error:
        raise InputError("--opponent", error) from None
    others = [who] if isinstance(who, Path) else []
    for run in others:
        runs.read_config(run, "--opponent")
    if len({run.resolve() for run in args.runs}) < len(args.runs):
        raise InputError("RUN", "a run is given twice: it would count as two seeds")
    asked, players = prepare(args, others)
    configs = [players.configs[run] for run in args.runs]
    runs.require_same("RUN", configs, "xi", "illegal")
    xi, illegal = configs[0]["xi"], configs[0]["illegal"]
    tests = list_tests(args, asked, players)
    bar = tqdm(total=(1 + len(args.runs)) * len(tests), unit="condition", disable=None)

    def agent(run):
        result, second = {}, players.second(run)
        for path, condition in tests:
            payoffs = envs.payoff_matrix(condition.game)
            payoffs = envs.other_side(payoffs) if second else payoffs
            player = players.player(run, condition, second, args.sampling)
            if others:
                other, opening = players.player(who, condition, not second), 0.5
            else:
                other, opening = envs.memory_one(who), envs.opening(who)
            place, (*outer, last) = result, path
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = measure(player, payoffs, other, opening, args.rounds, xi, illegal)
            bar.update()
        return result

    results = {key: getattr(args, key) for key in ASKED} | {"xi": xi, "illegal": illegal}
    results["sampling"] = args.sampling or configs[0]["sampling"]
    results["baseline"], results["runs"] = agent(None), []
    for run, config in zip(args.runs, configs):
        own = {"run": str(run)} | {key: config[key] for key in SHOWN}
        results["runs"].append(own | agent(run))
    bar.close()
    results["groups"] = group_by_seed(results["baseline"], results["runs"], configs)
    return results


def mean_and_interval(values):
    """Leaf by leaf over equally nested dicts: {"mean", "ci95", "paper95"}, None where a leaf is.

    ci95 = t s / sqrt(n), Student's t for n - 1 degrees of freedom; paper95 = 1.96 s / sqrt(n), too
    narrow for a few seeds (paper, section 5). Both are None for a single run.
    """
    if isinstance(values[0], dict):
        return {key: mean_and_interval([value[key] for value in values]) for key in values[0]}
    n, mean = len(values), None if None in values else float(np.mean(values))
    if mean is None or n == 1:
        return {"mean": mean, "ci95": None, "paper95": None}
    error = float(np.std(values, ddof=1) / math.sqrt(n))
    # Beyond the table: two terms of Fisher's expansion, right to 0.003.
    t = STUDENT[n - 2] if n < 12 else 1.96 + 2.372 / (n - 1) + 2.82 / (n - 1) ** 2
    return {"mean": mean, "ci95": t * error, "paper95": 1.96 * error}


def group_by_seed(baseline, agents, configs):
    """The untuned model, then agents by groups of seeds: {label, name, reward, n, runs, means}."""
    ignored = {"seed", "device", "save_every", "versions", "checkpointing"}
    members = {}  # settings as JSON -> indices of the runs that have them
    for i, config in enumerate(configs):
        kept = {key: value for key, value in config.items() if key not in ignored}
        members.setdefault(json.dumps(kept, sort_keys=True), []).append(i)
    settings = [json.loads(key) for key in members]
    groups = []
    for own, indices in zip([None, *settings], [[], *members.values()]):
        title, reward = (label(own, settings), own["reward"][-1]) if own else ("untuned", "untuned")
        name = f"{title} (n={len(indices)})" if len(indices) > 1 else title
        chosen = [agents[i] for i in indices] or [baseline]
        seeds = [configs[i]["seed"] for i in indices]
        if len(set(seeds)) < len(seeds):
            raise InputError("RUN", f"of {title} a seed comes twice: {' '.join(map(str, seeds))}")
        group = {"label": title, "name": name, "reward": reward, "n": len(chosen), "runs": indices}
        for part in baseline:
            group[part] = mean_and_interval([agent[part] for agent in chosen])
        groups.append(group)
    return groups


def label(own, settings):
    """A group in words: its rewards, and what differs between it and the other `settings`."""
    title, others = " then ".join(own["reward"]), []
    for key in dict.fromkeys(key for other in settings for key in other):
        values = {json.dumps(other.get(key)) for other in settings}
        if len(values) == 1 or key == "reward" or own.get(key) is None:
            continue
        if key == "opponent":
            title += f" vs {in_brief(own[key])}"
        else:
            others.append(f"{key} {in_brief(own[key])}")
    return ", ".join([title, *others])


def in_brief(value):
    """A setting in words: of a list the first eight if there are more."""
    words = list(map(str, value)) if isinstance(value, list) else [str(value)]
    return " ".join(words[:8] + ["..."] * (len(words) > 8))


def show(leaf, digits=3):
    """0.123, or 0.123±0.004 where there is an interval; - where there is no figure."""
    if leaf["mean"] is None:
        return "-"
    shown = f"{round(leaf['mean'], digits) + 0.0:.{digits}f}"  # no -0.000
    return shown if leaf["ci95"] is None else f"{shown}±{leaf['ci95']:.{digits}f}"


def print_line(label, width, measures):
    """Policy, share of illegal answers, points and both regrets of a group."""
    illegal = sum(measures["actions"][f"illegal|{last}"]["mean"] for last in "CD")
    leaves = [measures["policy"][state] for state in STATES]
    leaves += [{"mean": illegal, "ci95": None}, measures["reward"]["game"]]
    leaves += [measures["regret"]["deontological"], measures["regret"]["utilitarian"]]
    print(f"{label:{width}}" + "".join(f"{show(leaf):>14}" for leaf in leaves))


def print_results(results):
    """Print what `evaluate` returns."""
    groups, names = results["groups"], results["actions"]
    games = results["baseline"]["games"]
    print(f"Against {' '.join(results['opponent'])}, actions {' '.join(names)}, exact; ", end="")
    print(", ".join(f"{key} {results[key]}" for key in HEAD))
    if any(group["n"] > 1 for group in groups):
        print("±: 95 % over seeds (Student's t), conditional on the one base model.")
    for key, asked in (("actions", names), ("layout", []), ("prompt", [])):
        others, asked = set(), {*asked} or {results[key]}
        for run in results["runs"]:
            if not asked <= {*(envs.NAMES if run[key] == ["random"] else run[key])}:
                others.add(in_brief(run[key]))
        if others:
            print(f"In training --{key} was {', '.join(sorted(others))}.")
    width = max(map(len, [*games, *(group["name"] for group in groups)]))
    titles = [*(f"P(C|{state})" for state in STATES), "illegal", "points"]
    head = "".join(f"{title:>14}" for title in [*titles, "deont. regret", "util. regret"])
    for game in games:
        print(f"\n{game:{width}}{head}")
        for group in groups:
            print_line(group["name"], width, group["games"][game])
        if "swapped" in groups[0]:
            print(f"with the names in each other's role, {' '.join(names[::-1])}")
            for group in groups:
                print_line(group["name"], width, group["swapped"][game])
    for group in groups[1:]:
        print_roles(group, names)
    for group in groups:
        if "axes" in group:
            print(f"\n{group['name']}, one thing varied at a time, {next(iter(games))}")
            print(f"{'':26}{head}")
        for axis, values in group.get("axes", {}).items():
            for value, measures in values.items():
                print_line(f"  {axis} {value}", 26, measures)


def print_roles(group, names):
    """Warn of an agent whose policy depends on which name stands for which action."""

    def cooperation(measures):  # of legal answers, a mean over the states
        illegal, p = ([measures[key][s]["mean"] for s in STATES] for key in ("illegal", "policy"))
        return np.mean(np.array(p) / (1 - np.array(illegal) + 1e-9))

    for sign, word in zip((1, -1), names):
        changes = {}
        for game, swapped in group.get("swapped", {}).items():
            changes[game] = sign * (cooperation(group["games"][game]) - cooperation(swapped))
        leaning = [game for game, change in changes.items() if change > ROLES_DIFFER]
        if leaning:
            print(
                f"\nwarning: {group['name']}: when the names change places, P(C) of legal answers "
                f"changes by up to {max(changes.values()):.2f} ({', '.join(leaning)}): it leans to "
                f"the word {word}, whatever that stands for"
            )


def main(argv=None):
    try:
        parser = evaluate_parser(__doc__)
        help = "vary names, layout, wording and persona, one at a time, on the first --game"
        parser.option("--opponent", envs.opponent_words(), default=["random"], nargs="+")
        parser.option("--rounds", "per episode", type=runs.number(int, 1, 10**6), default=5)
        parser.option("--axes", help, action="store_true")
        args = parser.parse_args(argv)
        results = evaluate(args)
        if args.json:
            runs.write_json(args.json, results)
        print_results(results)
        sys.stdout.flush()
    except BrokenPipeError:  # ... | head: what Python itself flushes must go somewhere, too
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    except InputError as error:
        runs.stop(error)


if __name__ == "__main__":
    main()
