"""What did the agent become? Exact policies, rewards and moral regrets of trained runs.

    python evaluate.py runs/utilitarian-vs-tit-for-tat-seed1
    python evaluate.py runs/* --axes --plot figures --json results.json
    python evaluate.py runs/* --opponent tit-for-tat --actions action1 action2 --game ipd
    python evaluate.py runs/game-vs-random-seed1 --prompt-file my_prompt.txt

An agent is an array of probabilities, 4 states x 4 name orders and its opponent is four numbers,
so every figure is an expectation over a Markov chain of the last moves: nothing is sampled (unless
--samples asks for it). By default the action names are ones that training never showed. Names are
tested in both roles: what prefers a word does the opposite when they change places. Runs that
differ only by seed are a group: mean and 95 % confidence interval over its seeds (Student's t).

The file of --json: `runs[i].games[game]` has policy {CC CD DC DD}, illegal {CC ...}, actions {C|C
C|D D|C D|D illegal|C illegal|D}, reward and regret {by name}; `.swapped[game]` the same with the
names in each other's role, unless training had both; `.axes[axis][value]` with --axes; `.answers`
the most probable answers. `baseline` has the same for the untuned model, `groups[i]` the same with
mean, ci95 and paper95 (1.96 s / sqrt n) at each leaf. More questions: the scripts in studies/.
"""

import math
import sys
from pathlib import Path

import numpy as np

from envs import (
    ACTION_TYPES,
    ILLEGAL,
    STRATEGIES,
    C,
    by_state,
    frequencies,
    game_name,
    memory_one,
    opening,
    payoff_matrix,
    play,
)
from options import is_run, parse_strategy
from program import check_free, number, printing, user_error
from prompts import LAYOUTS, PERSONAS, TEMPLATES, action_names
from report import group_by_seed, print_results
from rewards import REWARDS, deontological_regret, reward_array, utilitarian_regret
from runs import write_json
from tested import (
    add_match_options,
    condition_from,
    condition_parser,
    games_from,
    read_configs,
    read_runs,
)

# torch and what needs it are imported where they are used: --help and a bad option answer at once.

# Settings of a run that --json has beside its results.
SHOWN = ("reward", "opponent", "game", "actions", "layout", "prompt", "seed", "model")
NAME_PAIRS = "action3 action4, action4 action3, action1 action2, action2 action1, A B, X Y, 0 1"
AXES = {  # what --axes varies, one thing at a time, on the first --game
    "actions": [*NAME_PAIRS.split(", "), "qv zk", "wjx bnu", "hqzrtkm pvxgdns"],
    "layout": list(LAYOUTS),
    "prompt": list(TEMPLATES),
    "persona": ["none", *PERSONAS],
}


def evaluate_parser():
    parser = condition_parser("evaluate.py", __doc__)
    add_match_options(parser)
    option = parser.add_argument
    help = (
        f"{', '.join(STRATEGIES)}; four numbers P(C | CC CD DC DD); or a run folder, whose agent "
        "plays on the other side [random]"
    )
    option("--opponent", nargs="+", default=["random"], help=help)
    help = "play N episodes instead of the exact calculation (the paper: 10)"
    option("--samples", type=number(int, 1, 10**7), metavar="N", help=help)
    help = "penalty for betraying a cooperator, points; the authors' tests have 4 [3]"
    option("--xi", type=number(float, 0), default=3.0, help=help)
    help = "vary names, layout, wording and persona, one at a time, on the first --game"
    option("--axes", action="store_true", help=help)
    help = "how many of the most probable answers to show [5 with free sampling, else 0]"
    option("--answers", type=number(int, 0, 1000), metavar="N", help=help)
    help = "write the figures into this folder (needs matplotlib)"
    option("--plot", type=Path, metavar="DIR", help=help)
    return parser


def sampled_frequencies(player, opponent, rounds, opponent_opening, episodes):
    """`frequencies`, estimated from `episodes` played games (always the same ones: seed 0)."""
    rng = np.random.default_rng(0)
    mine, theirs = play(rng, player, opponent, episodes, rounds, opponent_opening)
    share = np.zeros((4, player.shape[-1], 2))
    np.add.at(share, (mine.state, mine.action, theirs.move), 1 / mine.state.size)
    return share


def measure(
    player, payoffs, opponent, opponent_opening, rounds, xi=3.0, illegal=-6.0, samples=None
):
    """All about a player in one game against an opponent: nested dict of floats.

    opponent: [state, order, outcome], from its own side;  opponent_opening: its P(C) there
    policy:   P(C | state), a mean over name orders, by STATES;  illegal: P(illegal | state)
    actions:  share of rounds, by ACTION_TYPES;  reward: mean per round in points, by REWARDS
    regret:   deontological, utilitarian; None where there is none
    All are expectations over a Markov chain, or with `samples` means over so many played episodes
    (the policy itself is what it is).
    """
    if samples:
        share = sampled_frequencies(player, opponent, rounds, opponent_opening, samples)
    else:
        share = frequencies(player, opponent, rounds, opponent_opening)
    # Summed over own last move and the opponent's next one: [opponent's last move, action].
    actions = np.zeros((2, 3))
    actions[:, : player.shape[-1]] = share.reshape(2, 2, -1, 2).sum(axis=(0, 3))
    reward = {}
    for name in REWARDS:
        points = reward_array(name, payoffs, xi, illegal)[:, : player.shape[-1]]
        reward[name] = float((share * points).sum())
    regret = float(utilitarian_regret(reward["utilitarian"], payoffs, illegal))
    return {
        "policy": by_state(player, C),
        "illegal": by_state(player, ILLEGAL),
        "actions": dict(zip(ACTION_TYPES, actions.T.ravel().tolist())),
        "reward": reward,
        "regret": {
            "deontological": deontological_regret(reward["deontological"]),
            "utilitarian": None if math.isnan(regret) else regret,
        },
    }


def evaluate(args, configs):
    """What --json holds, see the module docstring. Raises ValueError or OSError.

    Ctrl-C ends it early: then with the runs that were evaluated so far.
    """
    from tqdm import tqdm

    from evaluator import Evaluator

    evaluator = Evaluator(configs[0], args.sampling, args.legal, args.runs)
    answers = args.answers if args.answers is not None else 5 * evaluator.free
    tests = conditions_of(args, configs, evaluator)
    bar = tqdm(total=(1 + len(args.runs)) * len(tests), unit="condition", disable=None)

    def agent(run):
        result = {}
        for path, condition in tests:
            other = opponent_of(args.opponent, evaluator, condition)
            player, payoffs = evaluator.player(run, condition), payoff_matrix(condition.game)
            settings = args.rounds, args.xi, args.illegal, args.samples
            place = result
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = measure(player, payoffs, *other, *settings)
            bar.update()
        if answers:
            result["answers"] = evaluator.answers(run, tests[0][1], answers)
        return result

    results = asked(args, configs)
    results["baseline"], results["runs"] = agent(None), []
    try:
        for run, config in zip(args.runs, configs):
            own = {"run": str(run)} | {key: config[key] for key in SHOWN}
            drift = evaluator.drift(run, action_names(config["actions"])[:2])
            results["runs"].append(own | agent(run) | {"drift": drift})
    except KeyboardInterrupt:
        done = len(results["runs"])
        print(f"\nstopped: {done} of {len(args.runs)} runs are evaluated", file=sys.stderr)
        if done == 0:
            raise SystemExit(130) from None
    bar.close()
    known = configs[: len(results["runs"])]
    results["groups"] = group_by_seed(results["baseline"], results["runs"], known)
    return results


def asked(args, configs):
    """The settings of the test, as --json has them."""
    settings = "opponent actions layout prompt persona rounds samples xi illegal legal payoffs"
    asked = {key: getattr(args, key) for key in settings.split()}
    asked["sampling"] = args.sampling or configs[0]["sampling"]
    asked["prompt_file"] = str(args.prompt_file) if args.prompt_file else None
    return asked


def opponent_of(words, evaluator, condition):
    """(its probabilities [state, order, outcome], P(C) of its opening) in a Condition."""
    if is_run(words):
        return evaluator.player(Path(words[0]), condition, second=True), 0.5
    strategy = parse_strategy(words)
    return memory_one(strategy), opening(strategy)


def conditions_of(args, configs, evaluator):
    """Where every agent is tested: a list of (path in its results, Condition).

    Names that an agent does not know in both roles are tested in both. What the model cannot be put
    into is left out of --axes, with a line that says so.
    """
    known = [set(action_names(config["actions"])) for config in configs]  # more than two: both
    new = any(len(names) == 2 or not {*args.actions} <= names for names in known)
    tests = []
    for game in games_from(args):
        condition = condition_from(args, game)
        tests.append((("games", game_name(game)), condition))
        if new:
            swapped = condition._replace(names=condition.names[::-1])
            tests.append((("swapped", game_name(game)), swapped))
    if args.axes:
        for axis, value, condition in axis_conditions(tests[0][1]):
            try:
                evaluator.policy(condition)
            except ValueError as error:
                print(f"warning: --axes: {axis} {value} left out: {error}", file=sys.stderr)
            else:
                tests.append((("axes", axis, value), condition))
    return tests


def axis_conditions(condition):
    """Every Condition that differs from this one in one of AXES: (axis, value, Condition)."""
    for axis, values in AXES.items():
        for value in values:
            field = {"actions": "names", "prompt": "wording"}.get(axis, axis)
            chosen = tuple(value.split()) if axis == "actions" else value
            yield axis, value, condition._replace(**{field: chosen})


def main(argv=None):
    args = evaluate_parser().parse_args(argv)
    configs = read_runs(args)
    with user_error("--opponent"):
        if is_run(args.opponent):
            read_configs([*args.runs, Path(args.opponent[0])], again=True)
        else:
            parse_strategy(args.opponent)
    if args.plot:
        from charts import check_matplotlib
        from figures import FIGURES, plot_all

        check_matplotlib("--plot")
        check_free("--plot", args.plot, args.overwrite, folder=True)
        for name in FIGURES:
            check_free("--plot", args.plot / name, args.overwrite)
    with (
        user_error("RUN", ValueError, OSError),
        user_error("--samples", MemoryError, hint="lower it or --rounds"),
    ):
        results = evaluate(args, configs)
    with user_error("--json", OSError):
        if args.json:
            write_json(args.json, results)
    with user_error("--plot", OSError):
        if args.plot:
            plot_all(results, args.plot)
    with printing():
        print_results(results)


if __name__ == "__main__":
    main()
