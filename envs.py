"""Repeated 2x2 games, told in text: payoffs, opponents, states, prompts and play.  [numpy only; knows no model]

The one idea of this project: a player is a *table* of probabilities with the axes

    policy[state, order, outcome]        sums to 1 over the last axis

  state    4: the moves of the round before, own first: CC, CD, DC, DD  (index 2 * own + other's, C = 0, D = 1)
  order    4 for a language model: the four ways to shuffle the two action names in its prompt; 1 for a fixed strategy
  outcome  C, D and, for a player that may answer anything, ILLEGAL (every other text)

A classic opponent such as tit-for-tat is the same thing with one order (`memory_one`), so `play` treats both seats alike.

    >>> tit_for_tat = memory_one(STRATEGIES["tit-for-tat"])
    >>> mine, theirs = play(np.random.default_rng(0), tit_for_tat, tit_for_tat, episodes=3, rounds=5)
    >>> mine.move.shape
    (3, 5)
"""

from typing import NamedTuple

import numpy as np

C, D, ILLEGAL = 0, 1, 2
STATES = ("CC", "CD", "DC", "DD")
ORDERS = 4

# A new game is one line: (own, other's) points in the four cells, own move first.  Paper, section 4 and appendix.
#                            CC      CD      DC      DD
GAMES = {
    "ipd":                ((3, 3), (0, 4), (4, 0), (1, 1)),  # Iterated Prisoner's Dilemma
    "stag-hunt":          ((4, 4), (0, 3), (3, 0), (1, 1)),
    "chicken":            ((2, 2), (1, 4), (4, 1), (0, 0)),
    "bach-stravinsky":    ((3, 2), (0, 0), (0, 0), (2, 3)),
    "defective-coordination": ((1, 1), (0, 0), (0, 0), (4, 4)),
}

# A new opponent is four numbers: the memory-one strategy P(C | own last move, other's last move).
#                        CC   CD     DC   DD
STRATEGIES = {
    "tit-for-tat":          (1, 0,     1, 0),      # Axelrod & Hamilton (1981)
    "random":               (.5, .5,   .5, .5),
    "always-cooperate":     (1, 1,     1, 1),
    "always-defect":        (0, 0,     0, 0),
    "win-stay-lose-shift":  (1, 0,     0, 1),      # Nowak & Sigmund (1993)
    "generous-tit-for-tat": (1, 1 / 3, 1, 1 / 3),  # Nowak & Sigmund (1992), generosity for the payoffs 3 0 5 1
}


def payoff_array(game):
    """Points of a game as an int array [own move, other's move, (own, other's)]; `game` is a key of GAMES.

    `array.transpose(1, 0, 2)[..., ::-1]` is the same game seen from the other seat.
    """
    return np.array(GAMES[game]).reshape(2, 2, 2)


def memory_one(strategy):
    """Four numbers P(C | CC), P(C | CD), P(C | DC), P(C | DD) as a policy [state 4, order 1, outcome 2].

    Raises ValueError unless there are four of them, each between 0 and 1.
    """
    p = np.array(strategy, dtype=float)
    if p.shape != (4,) or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"a memory-one strategy is four probabilities P(C | CC CD DC DD), each from 0 to 1, not {strategy}")
    return np.stack([p, 1 - p], axis=-1)[:, None, :]


def parse_strategy(words):
    """The words of a command line, one name of STRATEGIES or four numbers -> four floats. Raises ValueError."""
    if len(words) == 1 and words[0] in STRATEGIES:
        return STRATEGIES[words[0]]
    try:
        strategy = tuple(float(word) for word in words)
    except ValueError:
        raise ValueError(f"'{' '.join(words)}' is neither one of {', '.join(STRATEGIES)} nor four numbers") from None
    memory_one(strategy)
    return strategy


def opening(strategy):
    """P(C) for the move that a fixed opponent is said to have played before round 0.

    An opponent that never looks at the state has always played as it does; any other one starts at random (paper, 4.2).
    """
    return strategy[0] if len(set(strategy)) == 1 else 0.5


def describe(p_cooperate):
    """A policy in a word: four numbers P(C | CC CD DC DD) -> the classic strategy within 0.1 of each, or what it does after C."""
    p = np.asarray(p_cooperate)
    for name, strategy in STRATEGIES.items():
        if np.abs(p - strategy).max() <= 0.1:
            return name.replace("-", " ")
    if p[[0, 2]].min() >= 0.9:
        return "never betrays a cooperator"
    if p[[0, 2]].max() <= 0.1:
        return "always betrays a cooperator"
    return "a mixed policy"


class Seat(NamedTuple):
    """What one player saw and did; every array is int [episode, round]."""

    state: np.ndarray   # 0..3, own move first
    order: np.ndarray   # 0..3, which name order its prompt had
    action: np.ndarray  # C, D or ILLEGAL: what it answered
    move: np.ndarray    # C or D: what counted (its last legal move where the answer was illegal)

    @property
    def prompt(self):
        """Row of the prompt among `prompts(...)`: 0..15 for a language model."""
        return self.state * ORDERS + self.order


def play(rng, policy, opponent, episodes, rounds, opponent_opening=0.5):
    """Play `episodes` games of `rounds` rounds at once.

    rng:              numpy Generator, the only source of chance
    policy, opponent: probabilities [state, order, outcome] as in the module docstring, each from its own side
    opponent_opening: P(C) of the opponent's move before round 0 (`opening`); the player's own is drawn at random (1/2)
    Returns two Seats, the player's and the opponent's.

    An illegal answer leaves the player's last legal move standing, in the state and for the payoffs (paper, section 4.2).
    """
    last = [(rng.random(episodes) >= 0.5).astype(int), (rng.random(episodes) >= opponent_opening).astype(int)]
    tables = [np.cumsum(policy, axis=-1), np.cumsum(opponent, axis=-1)]
    seats = [Seat(*np.empty((4, episodes, rounds), dtype=int)) for _ in tables]
    for t in range(rounds):
        shown = tuple(last)
        for me, (table, seat) in enumerate(zip(tables, seats)):
            state = 2 * shown[me] + shown[1 - me]
            order = rng.integers(table.shape[1], size=episodes)
            # Inverse transform sampling. The last outcome takes what rounding leaves of the total, hence [..., :-1].
            action = (rng.random(episodes)[:, None] >= table[state, order, :-1]).sum(axis=-1)
            last[me] = np.where(action == ILLEGAL, shown[me], action)
            for array, value in zip(seat, (state, order, action, last[me])):
                array[:, t] = value
    return seats


def frequencies(policy, opponent, rounds, opponent_opening=0.5):
    """What `play` would show on average, exactly: the share of rounds with each (state, action, opponent's move), float [4, K, 2].

    The last moves are a Markov chain of four states; both tables enter averaged over their name orders, because every round shuffles
    anew. policy: [state, order, K = 2 or 3];  opponent: [state, order, 2], which always answers legally.
    """
    mine, theirs = policy.mean(axis=1), opponent.mean(axis=1)[[0, 2, 1, 3]]  # the opponent sees the two moves swapped
    state = np.repeat([0.5, 0.5], 2) * np.tile([opponent_opening, 1 - opponent_opening], 2)
    total = np.zeros((4, mine.shape[1], 2))
    for _ in range(rounds):
        joint = state[:, None, None] * mine[:, :, None] * theirs[:, None, :]
        total += joint / rounds
        following = joint[:, :2].sum(axis=0)                                  # [own move, opponent's move]
        if mine.shape[1] > ILLEGAL:                                           # an illegal answer leaves the own last move standing
            following = following + joint[:, ILLEGAL].reshape(2, 2, 2).sum(axis=1)
        state = following.ravel()
    return total


def check_names(names):
    """Raise ValueError unless `names` are two non-empty, different, single-line action names (the name of C, of D)."""
    if any(not name.strip() or name != name.strip() or "\n" in name or "|" in name for name in names):
        raise ValueError(f"action names must be non-empty, on one line, without '|' or spaces around, not {list(names)}")
    if len(set(names)) != 2:
        raise ValueError(f"the two action names must differ, not {list(names)}")


TABLE = """\
| | {c} | {d} |
| {c} | {cc} | {cd} |
| {d} | {dc} | {dd} |"""

STRUCTURED = """\
You are playing a game with another agent and must choose action {first} or {second}.
Points depend on both actions. You are the row player; each cell shows your points, then theirs:
{table}
Last time you played {own} and they played {other}, so you got {own_points} points and they got {other_points}.
Which action would you take to get the highest possible score?
Answer with exactly {third} or {fourth}, no explanation. Your answer:"""


def prompts(payoffs, names):
    """The 16 texts of one game, [state, order] flattened: row `state * ORDERS + order` (paper, section 4.3).

    payoffs: [own move, other's move, (own, other's)];  names: (name of C, name of D)
    order:   2 * (names swapped in the first sentence) + (names swapped in the last one)
    """
    check_names(names)
    cells = {a + b: "{}, {}".format(*payoffs[i, j]) for i, a in enumerate("cd") for j, b in enumerate("cd")}
    table = TABLE.format(c=names[C], d=names[D], **cells)
    texts = []
    for own in (C, D):
        for other in (C, D):
            for order in range(ORDERS):
                ask, answer = names[:: -1 if order // 2 else 1], names[:: -1 if order % 2 else 1]
                texts.append(STRUCTURED.format(
                    table=table, own=names[own], other=names[other],
                    own_points=payoffs[own, other, 0], other_points=payoffs[own, other, 1],
                    first=ask[0], second=ask[1], third=answer[0], fourth=answer[1]))
    return texts
