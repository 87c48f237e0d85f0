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
`baseline` is the untuned model's, `groups[i]` has mean and ci95 at each leaf. More questions: the
scripts in experiments/.
"""

import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import envs
import rewards
import runs
from envs import ILLEGAL, C, as_player, by_state
from errors import InputError, about, stop
from groups import average_groups, group_by_seed, mean_and_interval, print_results
from options import (
    Parser,
    action_names,
    game_words,
    number,
    opponent_words,
    parse_games,
    parse_opponent,
    read_wording,
    train_parser,
)
from wordings import LAYOUTS, PERSONAS, TEMPLATES

# torch and what needs it are imported where they are used: --help and a bad option answer at once.

# What --json holds besides its results: of the command line, and of each run.
ASKED = ("game", "opponent", "actions", "layout", "prompt", "persona", "rounds")
SHOWN = ("reward", "opponent", "game", "actions", "layout", "prompt", "seed", "model")
# What --axes varies, one thing at a time, on the first --game: fields of a Condition.
AXES = {
    "actions": (
        ("action3", "action4"),
        ("action4", "action3"),
        ("action1", "action2"),
        ("action2", "action1"),
        ("A", "B"),
        ("X", "Y"),
        ("0", "1"),
        ("qv", "zk"),
        ("wjx", "bnu"),
        ("hqzrtkm", "pvxgdns"),
    ),
    "layout": tuple(LAYOUTS),
    "prompt": tuple(TEMPLATES),
    "persona": ("none", *PERSONAS),
}


def transitions(player, opponent):
    """The Markov chain of the last moves as the player sees them: P(next state | state), [4, 4]."""
    mine = envs.legal_moves(player)
    theirs = envs.replies(opponent)
    return (mine[:, :, None] * theirs[:, None, :]).reshape(4, 4)


def first_state(opponent_opening):
    """P(state) in round 0: the player's move before it is drawn, 1/2. Float [4]."""
    return np.tile([opponent_opening, 1 - opponent_opening], 2) / 2


def frequencies(player, opponent, rounds, opponent_opening=0.5):
    """What `play` shows on average, exactly: share of rounds [state 4, outcome, opponent's move 2].

    The last moves are a Markov chain of four states. Both players enter averaged over their name
    orders, because every round shuffles anew. Arguments as in `play`.
    """
    chain = transitions(player, opponent)
    visits = np.zeros(4)
    state = first_state(opponent_opening)
    for _ in range(rounds):
        visits += state / rounds
        state = state @ chain
    return shares(player, opponent, visits)


def shares(player, opponent, visits):
    """Share of rounds by state, outcome and the opponent's move: float [4, outcome, 2].

    visits: how often each state is visited, [4]
    """
    answers = player.mean(axis=1)
    return visits[:, None, None] * answers[:, :, None] * envs.replies(opponent)[:, None]


def measure(player, payoffs, opponent, opponent_opening, rounds, settings, reward=None):
    """All about a player in one game against an opponent: nested dict of floats.

    opponent: [state, order, outcome], from its own side
    opponent_opening: P(C) of its move before round 0
    settings: of the player's run, for the rewards
    reward: what the player was trained for; None: nothing

    policy:   P(C | state), a mean over name orders, by STATES;  illegal: P(illegal | state)
    actions:  share of rounds, by ACTION_TYPES;  reward: mean per round in points, by REWARDS
    regret:   deontological, utilitarian; None where there is none
    right:    how often it does what its reward asks for (`rewards.share_right`); None likewise
    """
    share = frequencies(player, opponent, rounds, opponent_opening)
    outcomes = player.shape[-1]
    # Summed over own last move and the opponent's next one: [action, opponent's last move].
    actions = np.zeros((3, 2))
    actions[:outcomes] = share.reshape(2, 2, outcomes, 2).sum(axis=(0, 3)).T
    means = {}
    for name in rewards.REWARDS:
        points = rewards.reward_array(name, payoffs, settings)[:, :outcomes]
        means[name] = float((share * points).sum())
    utilitarian = rewards.utilitarian_regret(means["utilitarian"], payoffs, settings["illegal"])
    right = math.nan
    if reward:
        replies = envs.replies(opponent)
        right = rewards.share_right(reward, player, payoffs, settings, replies)
    return {
        "policy": by_state(player, C),
        "illegal": by_state(player, ILLEGAL),
        "actions": dict(zip(envs.ACTION_TYPES, actions.ravel().tolist())),
        "reward": means,
        "regret": {
            "deontological": rewards.deontological_regret(means["deontological"]),
            "utilitarian": None if math.isnan(utilitarian) else float(utilitarian),
        },
        "right": None if math.isnan(right) else right,
    }


def evaluate_parser(description, games=tuple(envs.GAMES)):
    """The options that evaluate.py shares with the experiments; games: the default."""
    parser = Parser(description)
    option = parser.option
    wording = f"the wording: {', '.join(TEMPLATES)}; or a text file with {{first}} and "
    wording += "{second} for the actions, see envs.fields"
    names = {"nargs": 2, "metavar": ("C_NAME", "D_NAME"), "default": ["action3", "action4"]}
    personas = ["none", *PERSONAS]
    option("runs", "run folders of one base model", metavar="RUN", type=Path, nargs="+")
    option("--game", game_words(), default=list(games), nargs="+")
    option("--actions", "the names of C and D", **names)
    option("--layout", "of the payoffs", choices=LAYOUTS, default="original")
    option("--prompt", wording, default="structured")
    option("--persona", "a sentence of values put first", choices=personas, default="none")
    option("--sampling", "[as in training]", choices=("constrained", "free"))
    runs.json_options(parser)
    return parser


def parse(argv=None):
    """The settings of this program; argv: a list of words, by default the command line."""
    axes = "vary names, layout, wording and persona, one at a time, on the first --game"
    parser = evaluate_parser(__doc__)
    parser.option("--opponent", opponent_words(), default=["random"], nargs="+")
    parser.option("--rounds", "per episode", type=number(int, 1, 10**6), default=5)
    parser.option("--axes", axes, action="store_true")
    return parser.parse_args(argv)


def read_conditions(args):
    """The Conditions of the command line, one for each game. Raises InputError."""
    with about("--game"):
        games = parse_games(args.game)
        if set(games) & set(envs.DRAWN):
            raise InputError("drawn games are for training: name games, or eight numbers")
    with about("--actions"):
        names = tuple(action_names(args.actions))
    with about("--prompt"):
        wording = read_wording(args.prompt)
    return [envs.Condition(game, names, args.layout, wording, args.persona) for game in games]


class Players:
    """The base model of run folders, as the agent of any of them.

    Raises InputError if a folder is no finished run, or if they do not share one base model.
    """

    def __init__(self, folders):
        self.configs = {}
        from ppo import constants

        # Of options and constants that came after a run.
        usual = {**constants(), **vars(train_parser("").parse_args([]))}
        with about("RUN"):
            for run in folders:
                self.configs[run] = {**usual, **runs.read_config(run)}
            runs.require_same(self.configs.values(), "dtype", "base")
        from lora import base_fingerprint
        from policy import Policy, load_model

        first = self.configs[folders[0]]
        with about("RUN"):
            self.model, self.tokenizer = load_model(first["model"], dtype=first["dtype"])
            runs.require_same([first, {"base": base_fingerprint(self.model)}], "base")
            # Both use the adapter "agent": what is loaded by one of them is loaded for both.
            self.policies = {
                "constrained": Policy(self.model, self.tokenizer, "agent"),
                "free": Policy(self.model, self.tokenizer, "agent", free=True),
            }
            for run in folders:  # what is wrong with one of them is known before the work
                self.policies["free"].load(run)
        self.loaded = folders[-1]
        self.default_sampling = first["sampling"]
        self.known = {}  # (run, condition, side, sampling) -> player

    def policy(self, run, sampling=None):
        """The Policy of a run, until another run is asked for: they share one adapter.

        It is loaded here. Of None, the untuned model, only `reference` counts.
        sampling: by default the run's own
        """
        if run is not None and run != self.loaded:
            self.policies["free"].load(run)
            self.loaded = run
        if sampling is None:
            sampling = self.configs[run]["sampling"] if run else self.default_sampling
        return self.policies[sampling]

    def trie(self, condition, side=0):
        """The packed prompts of a Condition. Raises InputError if the model cannot read them."""
        with about("--actions, --prompt"):
            texts = envs.build_prompts(condition, side)
            trie = self.policies["free"].trie(texts, condition.actions)
            trie.inputs(self.model)
        return trie

    def player(self, run, condition, side=0, sampling=None):
        """The agent of a run (None: the untuned model) as a player [state, order, outcome]."""
        key = (run, condition, side, sampling)
        if key not in self.known:
            policy = self.policy(run, sampling)
            trie = self.trie(condition, side)
            if run is None:
                table = policy.reference(trie).exp().numpy()
            else:
                table = policy.probabilities(trie)
            self.known[key] = as_player(table)
        return self.known[key]

    def side(self, run):
        """The side of the game on which a run's agent has learned: 0 the player, 1 its opponent."""
        if run is None:
            return 0
        return 1 if self.configs[run].get("side") == "opponent" else 0


def prepare(args, others=(), one=False):
    """(Conditions, Players) of a command line and other runs, checked before any work.

    one: of a single game
    """
    conditions = read_conditions(args)
    if one and len(conditions) > 1:
        raise InputError("one at a time", "--game")
    runs.check_json(args)
    players = Players([*args.runs, *others])
    if not args.sampling:
        with about("--sampling"):
            runs.require_same([players.configs[run] for run in args.runs], "sampling")
    return conditions, players


def asked_of(args, condition, players):
    """What of a command line is told beside its results: dict."""
    asked = {key: getattr(args, key) for key in ASKED if key in args}
    asked["prompt"] = condition.prompt  # of a file its text, as the runs have it
    asked["sampling"] = args.sampling or players.configs[args.runs[0]]["sampling"]
    return asked


def list_tests(args, conditions, players):
    """Where every agent is tested: a list of (path in its results, Condition).

    Names that an agent does not know in both roles are tested in both. What the model cannot read
    is left out of --axes, with a line that says so.
    """
    in_both_roles = all(knows_both_roles(players.configs[run], args.actions) for run in args.runs)
    tests = []
    for condition in conditions:
        game = envs.game_name(condition.game)
        tests.append((("games", game), condition))
        if not in_both_roles:
            swapped = condition._replace(actions=condition.actions[::-1])
            tests.append((("swapped", game), swapped))
    if not args.axes:
        return tests
    for axis, values in AXES.items():
        for value in values:
            varied = conditions[0]._replace(**{axis: value})
            name = " ".join(value) if axis == "actions" else value
            try:
                players.trie(varied)
            except InputError as error:
                print(f"warning: --axes: {axis} {name} left out: {error}", file=sys.stderr)
            else:
                tests.append((("axes", axis, name), varied))
    return tests


def knows_both_roles(config, names):
    """Whether a run was trained with these names, either of them for C."""
    known = action_names(config["actions"])
    return len(known) > 2 and {*names} <= {*known}


def evaluate(args):
    """What --json holds, a dict: see the module docstring. args: as `parse` returns them.

    Raises InputError.
    """
    with about("--opponent"):
        opponent = parse_opponent(args.opponent)
        if opponent.learns:
            raise InputError("learner is for training: name its run folder, RUN/opponent")
        if opponent.run:
            runs.read_config(opponent.run)
    if len({run.resolve() for run in args.runs}) < len(args.runs):
        raise InputError("a run is given twice: it would count as two seeds", "RUN")
    conditions, players = prepare(args, [opponent.run] if opponent.run else [])
    configs = [players.configs[run] for run in args.runs]
    with about("RUN"):
        runs.require_same(configs, "xi", "illegal")  # one table: one scale
        groups = group_by_seed(configs)
    tests = list_tests(args, conditions, players)
    results = asked_of(args, conditions[0], players)
    results["xi"] = configs[0]["xi"]
    results["illegal"] = configs[0]["illegal"]

    with tqdm(total=(1 + len(args.runs)) * len(tests), unit="condition", disable=None) as bar:
        baseline = examine_agent(None, args, opponent, tests, players, bar)
        measured = [examine_agent(run, args, opponent, tests, players, bar) for run in args.runs]
    results["baseline"] = baseline
    results["runs"] = []
    for run, config, measures in zip(args.runs, configs, measured):
        shown = {key: config[key] for key in SHOWN}
        results["runs"].append({"run": str(run), **shown, **measures})
    untuned = {"label": "untuned", "name": "untuned", "reward": "untuned", "n": 1, "runs": []}
    untuned.update(mean_and_interval([baseline]))
    results["groups"] = [untuned, *average_groups(groups, measured)]
    return results


def examine_agent(run, args, opponent, tests, players, bar):
    """What `measure` returns of the agent of a run (None: untuned) in each test: nested dicts."""
    # The untuned model has no settings and no side of its own: those of the first run.
    settings = players.configs[run or args.runs[0]]
    side = players.side(run or args.runs[0])
    result = {}
    for path, condition in tests:
        if opponent.run:
            other = players.player(opponent.run, condition, 1 - side)
        else:
            other = opponent.player(condition)
        measures = measure(
            player=players.player(run, condition, side, args.sampling),
            payoffs=envs.payoff_matrix(condition.game, side),
            opponent=other,
            opponent_opening=opponent.opening,
            rounds=args.rounds,
            settings=settings,
            reward=settings["reward"][-1] if run else None,
        )
        place = result
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = measures
        bar.update()
    return result


def main(argv=None):
    try:
        args = parse(argv)
        results = evaluate(args)
        runs.save_json(args, results)
        print_results(results)
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
