"""Repeated 2x2 games: payoffs, opponents, states, play and the exact chain.  [numpy only]

The idea of this project: a player is an array of probabilities with the axes

    player[state, order, outcome]        sums to 1 over the last axis

  state    4: the moves of the round before, own first: CC, CD, DC, DD
           (index 2 * own + other's, C = 0, D = 1)
  order    4 for a language model: the ways to shuffle the two action names in its prompt;
           1 for a fixed strategy, which reads no prompt
  outcome  C, D and, for a player that may answer anything, ILLEGAL (every other text)

A classic opponent such as tit-for-tat is the same thing with one order (`memory_one`), so `play`
treats both sides alike.

    action   what a player answers: C, D or ILLEGAL
    move     what counts in the game, C or D: an illegal answer repeats the own last move
    outcome  what an answer can be: a column of an array of probabilities
    table    [prompt, outcome], what a language model says (policy.py); `as_player` reshapes it

    >>> tit_for_tat = memory_one(STRATEGIES["tit-for-tat"])
    >>> mine, theirs = play(np.random.default_rng(0), tit_for_tat, tit_for_tat, 3, rounds=5)
    >>> mine.move.shape
    (3, 5)
"""

from typing import NamedTuple

import numpy as np

C, D, ILLEGAL = 0, 1, 2
STATES = ("CC", "CD", "DC", "DD")
# Own action | opponent's last move.
ACTION_TYPES = ("C|C", "C|D", "D|C", "D|D", "illegal|C", "illegal|D")
ORDERS = 4

# A new game is one line: (own, other's) points in the cells CC, CD, DC, DD, own move first.
# Paper, section 4 and appendix.
GAMES = {
    "ipd": ((3, 3), (0, 4), (4, 0), (1, 1)),  # Iterated Prisoner's Dilemma
    "stag-hunt": ((4, 4), (0, 3), (3, 0), (1, 1)),
    "chicken": ((2, 2), (1, 4), (4, 1), (0, 0)),
    "bach-stravinsky": ((3, 2), (0, 0), (0, 0), (2, 3)),
    "defective-coordination": ((1, 1), (0, 0), (0, 0), (4, 4)),
}

# A new opponent is four numbers, P(C | own last move, other's last move) after CC, CD, DC, DD:
# a memory-one strategy.
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


def payoff_matrix(game):
    """Points as an int array [own move, other's move, (own, other's)].

    game: a key of GAMES, or four cells as they stand there
    """
    return np.array(GAMES[game] if isinstance(game, str) else game).reshape(2, 2, 2)


def own_game(points):
    """Eight numbers, (own, other's) points in CC CD DC DD, as four cells."""
    return tuple(zip(points[::2], points[1::2]))


def game_name(game):
    """A key of GAMES as it is, four cells as one string."""
    return game if isinstance(game, str) else " ".join(f"{own},{other}" for own, other in game)


def random_game(rng):
    """Four cells of points, each from 0 to 9."""
    return tuple(map(tuple, rng.integers(10, size=(4, 2)).tolist()))


def other_side(payoffs):
    """The same game as the other player sees it: the same axes, own move first."""
    return payoffs.transpose(1, 0, 2)[..., ::-1]


def memory_one(strategy):
    """Four numbers P(C | CC), P(C | CD), P(C | DC), P(C | DD) as a player [state, order 1, C or D].

    Raises ValueError unless there are four of them, each from 0 to 1.
    """
    p = np.array(strategy, dtype=float)
    if p.shape != (4,) or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            "a memory-one strategy is four probabilities P(C | CC CD DC DD), each from 0 to 1, "
            f"not {strategy}"
        )
    return np.stack([p, 1 - p], axis=-1)[:, None, :]


def opening(strategy):
    """P(C) for the move that a fixed opponent is said to have played before round 0.

    An opponent that never looks at the state has always played as it does; any other one starts at
    random (paper, section 4.2).
    """
    return strategy[0] if len(set(strategy)) == 1 else 0.5


def as_player(table):
    """A language model's table [prompt 16, outcome] as a player [state, order, outcome]."""
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
    def prompt(self):
        """Row of the prompt in a language model's table, 0..15: see `prompts.build_prompts`."""
        return self.state * ORDERS + self.order


def action_counts(seen):
    """How often a Trajectory has each of ACTION_TYPES: dict of int."""
    opponent_last = seen.state % 2
    counts = np.bincount((2 * seen.action + opponent_last).ravel(), minlength=len(ACTION_TYPES))
    return dict(zip(ACTION_TYPES, counts.tolist()))


def play(rng, player, opponent, episodes, rounds, opponent_opening=0.5):
    """Play `episodes` games of `rounds` rounds at once.

    rng:              numpy Generator, the only source of chance
    player, opponent: probabilities [state, order, outcome], each from its own side
    opponent_opening: P(C) of the opponent's move before round 0 (`opening`); the player's own is
                      drawn at random (1/2)
    Returns two Trajectories, the player's and the opponent's.

    An illegal answer leaves the player's last legal move standing, in the state and for the
    payoffs (paper, section 4.2).
    """
    cumulative = [np.cumsum(player, axis=-1), np.cumsum(opponent, axis=-1)]
    trajectories = [Trajectory(*np.empty((4, episodes, rounds), dtype=int)) for _ in cumulative]
    last = [
        (rng.random(episodes) >= 0.5).astype(int),
        (rng.random(episodes) >= opponent_opening).astype(int),
    ]
    for t in range(rounds):
        previous = tuple(last)
        for i, (limits, seen) in enumerate(zip(cumulative, trajectories)):
            state = 2 * previous[i] + previous[1 - i]
            order = rng.integers(limits.shape[1], size=episodes)
            # Inverse transform sampling: count the limits that a random number has passed. The last
            # outcome takes what rounding leaves of the total, hence [..., :-1].
            passed = rng.random(episodes)[:, None] >= limits[state, order, :-1]
            action = passed.sum(axis=-1)
            last[i] = np.where(action == ILLEGAL, previous[i], action)
            seen.state[:, t], seen.order[:, t] = state, order
            seen.action[:, t], seen.move[:, t] = action, last[i]
    return trajectories


def legal_moves(player):
    """P(move that counts | state), float [state 4, move 2]: a mean over name orders.

    An illegal answer repeats the own last move.
    """
    p = player.mean(axis=1)
    moves = p[:, :ILLEGAL].copy()
    if p.shape[1] > ILLEGAL:
        own_last = [C, C, D, D]
        moves[range(4), own_last] += p[:, ILLEGAL]
    return moves


def replies(opponent):
    """An opponent's `legal_moves` in the states as the *player* sees them: both moves swapped."""
    return legal_moves(opponent)[[0, 2, 1, 3]]


def transitions(player, opponent):
    """The Markov chain of the last moves, as the player sees them: P(next state | state), [4, 4].

    Arguments as in `play`.
    """
    mine, theirs = legal_moves(player), replies(opponent)
    return (mine[:, :, None] * theirs[:, None, :]).reshape(4, 4)


def long_run(chain):
    """Share of time in each state in the limit of many steps, by first state: [4, 4] -> [4, 4].

    Rows are equal where the long run does not depend on the start. The limit of the average over
    time always exists, also for a chain that alternates: that is why half a step is mixed in, which
    changes no average.
    """
    power = (chain + np.eye(len(chain))) / 2
    for _ in range(64):  # 2^64 steps
        power = power @ power
        power /= power.sum(axis=1, keepdims=True)
    return power


def frequencies(player, opponent, rounds, opponent_opening=0.5, own_opening=0.5):
    """What `play` shows on average, exactly: share of rounds [state 4, outcome, opponent's move 2].

    The last moves are a Markov chain of four states. Both players enter averaged over their name
    orders, because every round shuffles anew. Arguments as in `play`; `rounds` may be infinite
    (`math.inf`): the long run.
    """
    chain = transitions(player, opponent)
    state = np.repeat([own_opening, 1 - own_opening], 2)
    state = state * np.tile([opponent_opening, 1 - opponent_opening], 2)
    if np.isinf(rounds):
        visits = state @ long_run(chain)
    else:
        visits = np.zeros(4)
        for _ in range(rounds):
            visits += state / rounds
            state = state @ chain
    answers = player.mean(axis=1)
    return visits[:, None, None] * answers[:, :, None] * replies(opponent)[:, None, :]
