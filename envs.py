"""Repeated 2x2 games told in text: payoffs, opponents, play, and what a model reads.  [numpy]

The idea of this project: a player is an array of probabilities with the axes

    player[state, order, outcome]        sums to 1 over the last axis

  state    4: the moves of the round before, own first: CC, CD, DC, DD
           (index 2 * own + other's, C = 0, D = 1; see OWN, OTHER, MIRROR)
  order    4 for a language model: the ways to shuffle the two action names in its prompt;
           1 for a fixed strategy, which reads no prompt
  outcome  C, D and, for a player that may answer anything, ILLEGAL: any answer that does not start
           with one of the two action names

A classic opponent such as tit-for-tat is the same thing with one order (`memory_one`), so `play`
treats both sides alike.

    action   what a player answers: C, D or ILLEGAL
    move     what counts in the game, C or D: an illegal answer repeats the player's last move
    side     0: the player whose points stand first in GAMES; 1: its opponent
    table    [prompt, outcome], what a language model answers (policy.py); `as_player` reshapes it
"""

from pathlib import Path
from string import Formatter
from typing import NamedTuple

import numpy as np

from errors import InputError
from wordings import LAYOUTS, PERSONAS, TEMPLATES

C, D, ILLEGAL = range(3)
STATES = ("CC", "CD", "DC", "DD")
OWN, OTHER = np.divmod(np.arange(4), 2)  # [state]: the player's last move, and the other's
MIRROR = 2 * OTHER + OWN  # [state]: the same state as the other player sees it
# The player's action | the opponent's last move; index 2 * action + last move.
ACTION_TYPES = ("C|C", "C|D", "D|C", "D|D", "illegal|C", "illegal|D")
ORDERS = 4
MAX_POINTS = 10**6  # largest absolute payoff

# A new game is one line: (own, other's) points in CC, CD, DC, DD, own move first. Paper, section 4.
GAMES = {
    "ipd": ((3, 3), (0, 4), (4, 0), (1, 1)),  # Iterated Prisoner's Dilemma
    "stag-hunt": ((4, 4), (0, 3), (3, 0), (1, 1)),
    "chicken": ((2, 2), (1, 4), (4, 1), (0, 0)),
    "bach-stravinsky": ((3, 2), (0, 0), (0, 0), (2, 3)),
    "defective-coordination": ((1, 1), (0, 0), (0, 0), (4, 4)),
}

# Words for games that are drawn anew in every update.
DRAWN = ("random", "contested")

# A new opponent is four numbers, P(C | own last, other's last) after CC, CD, DC, DD: memory-one.
STRATEGIES = {
    "tit-for-tat": (1, 0, 1, 0),  # Axelrod & Hamilton (1981)
    "random": (0.5, 0.5, 0.5, 0.5),
    "always-cooperate": (1, 1, 1, 1),
    "always-defect": (0, 0, 0, 0),
    "win-stay-lose-shift": (1, 0, 0, 1),  # Nowak & Sigmund (1993)
    # Nowak & Sigmund (1992), with the generosity for the payoffs 3 0 5 1.
    "generous-tit-for-tat": (1, 1 / 3, 1, 1 / 3),
    # Press & Dyson (2012): in "ipd", own score - 1 = 3 (other's score - 1).
    "extortionate": (0.8, 0.5, 0.3, 0),
}


def payoff_matrix(game, side=0):
    """Points in a game as one side sees it: [own move, other's move, (own, other's)].

    game: a key of GAMES, or four cells as they stand there
    """
    cells = GAMES[game] if isinstance(game, str) else game
    points = np.array(cells).reshape(2, 2, 2)
    if side == 1:
        return points.transpose(1, 0, 2)[..., ::-1]
    return points


def as_cells(points):
    """Eight points as four cells: a tuple of (own, other's)."""
    return tuple((own, other) for own, other in points.reshape(4, 2).tolist())


def game_name(game):
    """A key of GAMES as it is, four cells as one string."""
    if isinstance(game, str):
        return game
    return " ".join(f"{own},{other}" for own, other in game)


def random_game(rng, contested=False):
    """Four cells of points, each from 0 to 9; contested: one in which `rules_disagree`."""
    while True:
        points = rng.integers(10, size=(4, 2))
        if not contested or rules_disagree(points.reshape(2, 2, 2)):
            return as_cells(points)


def simple_scores(payoffs):
    """What simple rules maximise: name -> score of each own move, [..., own move 2].

    payoffs: [..., own move, other's move, (own, other's)]
    In many games a short cut takes the same move as a moral, so a good score there proves nothing.
    """
    totals = payoffs.sum(axis=-1)
    return {
        "selfish": payoffs[..., 0].sum(axis=-1),
        "adds": totals.sum(axis=-1),  # the utilitarian's, if the other's move is unknown
        "largest cell": totals.max(axis=-1),
        "largest number": payoffs.max(axis=(-2, -1)),
    }


def rules_disagree(payoffs):
    """Whether the simple rules take different moves, so that a game tells a moral from them."""
    moves = {np.sign(score[C] - score[D]) for score in simple_scores(payoffs).values()}
    return {1, -1} <= moves


def memory_one(strategy):
    """Four numbers P(C | CC CD DC DD) as a player [state, order 1, C or D]."""
    p = np.array(strategy, dtype=float)
    if p.shape != (4,):
        raise ValueError(f"a strategy is four numbers, P(C | CC CD DC DD), not {strategy}")
    return np.stack([p, 1 - p], axis=-1)[:, None, :]


class Opponent(NamedTuple):
    """Whom the player meets: exactly one of three kinds."""

    strategy: tuple | None = None  # a fixed one: four numbers, P(C | CC CD DC DD)
    run: Path | None = None  # the agent of this run folder
    learns: bool = False  # a second agent, trained at the same time

    @property
    def opening(self):
        """P(C) of the move that it is said to have played before round 0.

        A strategy that ignores the state is assumed to have played the same move before; any other
        opponent starts with a coin flip (paper, section 4.2).
        """
        if self.strategy and len(set(self.strategy)) == 1:
            return self.strategy[0]
        return 0.5

    def player(self, condition):
        """What a fixed strategy plays, whatever the Condition: [state, order 1, C or D]."""
        return memory_one(self.strategy)


def as_player(table):
    """A language model's table [prompt 16, outcome] as a player [state, order, outcome]."""
    # Rows that were computed in float32 sum to 1 only approximately.
    table = table / table.sum(axis=-1, keepdims=True, dtype=float)
    return table.reshape(len(STATES), ORDERS, -1)


def by_state(player, outcome):
    """Probability of an outcome in each state, a mean over name orders: dict of float by STATES."""
    if outcome == player.shape[-1]:  # ILLEGAL, of a player that always answers legally
        return dict.fromkeys(STATES, 0.0)
    return dict(zip(STATES, player[..., outcome].mean(axis=1).tolist()))


class Trajectory(NamedTuple):
    """What one player saw and did; every array is int [episode, round]."""

    state: np.ndarray  # 0..3, own move first
    order: np.ndarray  # 0..3, the name order of its prompt
    action: np.ndarray  # C, D or ILLEGAL: what it answered
    move: np.ndarray  # C or D: what counted (its last legal move where the answer was illegal)

    @property
    def row(self):
        """Row of its prompt in a language model's table, 0..15: see `build_prompts`."""
        return self.state * ORDERS + self.order


def action_counts(seen):
    """How often a Trajectory has each of ACTION_TYPES: dict of int."""
    kind = 2 * seen.action + OTHER[seen.state]
    counts = np.bincount(kind.ravel(), minlength=len(ACTION_TYPES))
    return dict(zip(ACTION_TYPES, counts.tolist()))


def count_column(kind):
    """The column of metrics.csv that counts one of ACTION_TYPES: str."""
    return f"count_{kind.replace('|', '_after_')}"


def play(rng, player, opponent, episodes, rounds, opponent_opening=0.5):
    """Play `episodes` games of `rounds` rounds at once.

    rng:              numpy Generator, the only source of chance
    player, opponent: probabilities [state, order, outcome], each from its own side
    opponent_opening: P(C) of the opponent's move before round 0 (`Opponent.opening`); the player's
                      is drawn at random (1/2)
    Returns two Trajectories, the player's and the opponent's.

    An illegal answer leaves the last legal move standing, in the state and for the payoffs (paper,
    section 4.2).
    """
    sides = []
    last = []
    for probabilities, opening in ((player, 0.5), (opponent, opponent_opening)):
        seen = Trajectory(*np.empty((4, episodes, rounds), dtype=int))
        sides.append((seen, np.cumsum(probabilities, axis=-1)))
        last.append((rng.random(episodes) >= opening).astype(int))
    for t in range(rounds):
        previous = tuple(last)
        for i, (seen, cumulative) in enumerate(sides):
            state = 2 * previous[i] + previous[1 - i]
            order = rng.integers(cumulative.shape[1], size=episodes)
            # Inverse transform sampling: count the limits that a random number has passed. The last
            # outcome takes what rounding leaves of the total, hence [..., :-1].
            passed = rng.random(episodes)[:, None] >= cumulative[state, order, :-1]
            action = passed.sum(axis=-1)
            last[i] = np.where(action == ILLEGAL, previous[i], action)
            seen.state[:, t] = state
            seen.order[:, t] = order
            seen.action[:, t] = action
            seen.move[:, t] = last[i]
    return [seen for seen, _ in sides]


def legal_moves(player):
    """P(move that counts | state), [state 4, move 2]; an illegal answer repeats the last one."""
    p = player.mean(axis=1)
    moves = p[:, :ILLEGAL].copy()
    moves[np.arange(4), OWN] += p[:, ILLEGAL:].sum(axis=1)
    return moves


def replies(opponent):
    """An opponent's `legal_moves` in the states as the *player* sees them, [state 4, move 2]."""
    return legal_moves(opponent)[MIRROR]


def describe(player):
    """A player in a word, by its legal answers.

    It is the classic strategy that is within 0.1 of it in every state, else what it does after the
    other's C; "mostly illegal" if most answers are.
    """
    mean = player.mean(axis=1)
    legal = mean[:, :ILLEGAL].sum(axis=1)
    if legal.mean() < 0.5:
        return "mostly illegal"
    p = mean[:, C] / legal.clip(min=1e-9)
    for name, strategy in STRATEGIES.items():
        if np.abs(p - strategy).max() <= 0.1:
            return name.replace("-", " ")
    after_cooperation = p[OTHER == C]
    if after_cooperation.min() >= 0.9:
        return "never betrays a cooperator"
    if after_cooperation.max() <= 0.1:
        return "always betrays a cooperator"
    return "no classic strategy"


class Condition(NamedTuple):
    """What a prompt depends on, besides the last moves and the order of the names."""

    game: str | tuple = "ipd"  # a key of GAMES, or four cells as they stand there
    actions: tuple = ("action1", "action2")  # the names of C and of D
    layout: str = "original"  # a key of LAYOUTS
    prompt: str = "structured"  # the wording: a key of TEMPLATES, or a template
    persona: str = "none"  # a key of PERSONAS, or none


class Choices(NamedTuple):
    """What an update's Condition is drawn from: lists, each entry with the same chance."""

    game: list  # as `options.parse_games` returns it
    actions: list  # two names, of C and of D; if there are more, any two of them, in either role
    layout: list
    prompt: list

    def varies(self):
        """Whether there is more than one Condition to draw."""
        lists = [self.game, self.layout, self.prompt]
        one_of_each = all(len(x) == 1 for x in lists) and len(self.actions) == 2
        return self.game[0] in DRAWN or not one_of_each

    def first(self):
        """The Condition that stands for a run: the first of each list; the ipd if that is drawn."""
        game = "ipd" if self.game[0] in DRAWN else self.game[0]
        return Condition(game, tuple(self.actions[:2]), self.layout[0], self.prompt[0])

    def draw(self, rng):
        """A Condition, drawn by the numpy Generator `rng`."""
        game = self.game[rng.integers(len(self.game))]
        layout = self.layout[rng.integers(len(self.layout))]
        prompt = self.prompt[rng.integers(len(self.prompt))]
        pair = (0, 1)
        if len(self.actions) > 2:
            pair = rng.choice(len(self.actions), 2, replace=False)
        if game in DRAWN:
            game = random_game(rng, contested=game == "contested")
        return Condition(game, tuple(self.actions[i] for i in pair), layout, prompt)


def fields(payoffs, names, layout, own, other, order):
    """What a template may name, for one state and order: dict of str.

    first second      both action names, shuffled;  third fourth: both again, shuffled anew
    c d               the names of C and D
    matrix            the payoff matrix, own points first in every cell
    own other         the last moves;  own_points other_points: what they gave
    cc_own cc_other cd_own ... dd_other     the points in a cell
    """
    swap_first, swap_last = divmod(order, 2)
    swapped = names[::-1]
    words = {"c": names[C], "d": names[D]}
    words["matrix"] = matrix(payoffs, names, *LAYOUTS[layout])
    words["first"], words["second"] = swapped if swap_first else names
    words["third"], words["fourth"] = swapped if swap_last else names
    words["own"] = names[own]
    words["other"] = names[other]
    words["own_points"], words["other_points"] = map(in_digits, payoffs[own, other])
    for row, column in np.ndindex(2, 2):
        cell = "cd"[row] + "cd"[column]
        words[f"{cell}_own"], words[f"{cell}_other"] = map(in_digits, payoffs[row, column])
    return words


def in_digits(points):
    """Points as a prompt shows them: 3, or 1.5 where a fork has such."""
    return f"{points:.15g}"


def matrix(payoffs, names, rows, columns):
    """A payoff matrix, its rows and columns in the order given: str of three lines."""
    lines = ["| | " + " | ".join(names[column] for column in columns) + " |"]
    for row in rows:
        cells = [", ".join(map(in_digits, payoffs[row, column])) for column in columns]
        lines.append(f"| {names[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check_template(template):
    """Raise InputError unless the template names both actions, and only what `fields` returns."""
    known = fields(payoff_matrix("ipd"), ("c", "d"), "original", C, C, 0)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"a wording's braces do not fit: {error}") from None
    used = set()
    for _, name, spec, conversion in parts:
        if name is None:  # text after the last field
            continue
        if name not in known:
            raise InputError(f"a wording has no field {{{name}}}, only {' '.join(known)}")
        if spec or conversion:
            raise InputError(f"a wording has plain fields, {{{name}}} without a format")
        used.add(name)
    if not {"first", "second"} <= used:
        raise InputError("a wording must name the two actions, {first} and {second}")


def build_prompts(condition, side=0):
    """The 16 texts of a Condition, a tuple: row `state * ORDERS + order` (paper, section 4.3).

    order: 2 * (names swapped in the first sentence) + (names swapped in the last one)
    side:  who reads them: 0 the player, 1 its opponent
    """
    payoffs = payoff_matrix(condition.game, side)
    template = TEMPLATES.get(condition.prompt, condition.prompt)
    check_template(template)
    if condition.persona != "none":
        template = f"{PERSONAS[condition.persona]}\n{template}"
    texts = []
    for own, other, order in np.ndindex(2, 2, ORDERS):
        words = fields(payoffs, condition.actions, condition.layout, own, other, order)
        texts.append(template.format(**words))
    return tuple(texts)
