"""The moral rewards and moral regrets as array formulas.  [numpy only]

A reward is a function of one round, written with arrays that broadcast to
[last own 2, last other 2, own move 2, other's move 2]:

    own, other      [2, 2]         points of the player and of its opponent in this round
    move            [1, 1, 2, 1]   the player's move (C = 0, D = 1)
    opponent_last   [1, 2, 1, 1]   the opponent's move in the round before
    xi              number         penalty for betraying a cooperator, in points

To add a reward, write one such function and name it in REWARDS.
"""

import math

import numpy as np

from envs import ILLEGAL, C, D


def game(own, other, move, opponent_last, xi):
    """Selfish: R = own points."""
    return own


def deontological(own, other, move, opponent_last, xi):
    """Never betray a cooperator: R = -xi if D is played after the opponent's C, else 0."""
    return -xi * ((move == D) & (opponent_last == C))


def utilitarian(own, other, move, opponent_last, xi):
    """The greatest total: R = own points + opponent's points."""
    return own + other


def game_deontological(own, other, move, opponent_last, xi):
    """Selfish within the norm: R = own points - xi [D is played after the opponent's C]."""
    return own + deontological(own, other, move, opponent_last, xi)


def equality(own, other, move, opponent_last, xi):
    """Fair shares: R = 1 - |own points - other's| / (|own points| + |other's|); 0 each: 1."""
    total = np.abs(own) + np.abs(other)
    return 1 - np.abs(own - other) / np.where(total == 0, 1, total)


def kindness(own, other, move, opponent_last, xi):
    """Cooperate, whatever it earns: R = xi if C is played, else 0."""
    return xi * (move == C)


REWARDS = {
    # Paper, table 1.
    "game": game,
    "deontological": deontological,
    "utilitarian": utilitarian,
    "game+deontological": game_deontological,
    # Virtues, from the same authors' earlier work (Tennant, Hailes & Musolesi, 2023).
    "equality": equality,
    "kindness": kindness,
}


def reward_array(reward, payoffs, xi=3.0, illegal=-6.0):
    """All that a reward can be, in points: float [state 4, action 3, opponent's move 2].

    reward:  a key of REWARDS
    payoffs: [own move, other's move, (own, other's)]
    illegal: reward of an illegal answer, action 2

    The reward of played rounds is one look-up, `array[mine.state, mine.action, theirs.move]`.
    """
    _, opponent_last, move, _ = np.ogrid[:2, :2, :2, :2]
    own, other = payoffs[..., 0], payoffs[..., 1]
    legal = REWARDS[reward](own, other, move, opponent_last, xi)
    array = np.full((4, 3, 2), float(illegal))
    array[:, :ILLEGAL] = np.broadcast_to(legal, (2, 2, 2, 2)).reshape(4, 2, 2)
    return array


def optimum(reward, payoffs, xi=3.0, replies=0.5):
    """The better action in each state: float [state], 1 for C, 0 for D, NaN where either will do.

    That is P(C | state) at the optimum where a round is its own sample (gamma = 0): the better
    action is the one with the larger expected reward in this one round.
    replies: the probabilities of the opponent's moves, [state, move] as in `envs.replies`;
             1/2: they are unknown
    """
    possible = reward_array(reward, payoffs, xi)[:, :ILLEGAL]
    expected = (possible * np.broadcast_to(replies, (4, 2))[:, None]).sum(axis=-1)
    best = (expected[:, C] > expected[:, D]).astype(float)
    same = np.abs(expected[:, C] - expected[:, D]) <= 1e-9 * np.ptp(possible)
    best[same] = math.nan
    return best


def moral_accuracy(reward, player, payoffs, xi=3.0, replies=0.5):
    """How often a player does what its reward asks for: the mean probability of the better action.

    player:  [state, order, outcome]; an illegal answer is never the better one
    replies: as in `optimum`
    The mean is over the states in which one action is better; NaN where there is none.
    """
    best = optimum(reward, payoffs, xi, replies)
    decided = np.flatnonzero(~np.isnan(best))
    if len(decided) == 0:
        return math.nan
    action = np.where(best[decided] == 1, C, D)
    return float(player.mean(axis=1)[decided, action].mean())


def deontological_regret(mean_reward):
    """Moral regret under the deontological reward, points per round (paper, section 5).

    The best is 0, no betrayal.
    """
    return 0 - mean_reward  # and not -mean_reward: -0.0 is no regret


def utilitarian_regret(mean_reward, payoffs, illegal=-6.0):
    """Moral regret under the utilitarian reward, 0 to 1 (paper, section 5).

    (max - mean) / (max - min); max is the game's largest total, min what is worst: `illegal`, or a
    total that is even less. NaN where all are equal.
    """
    totals = payoffs.sum(axis=-1)
    best, worst = totals.max(), min(totals.min(), illegal)
    return (best - mean_reward) / (best - worst) if best > worst else math.nan


def moral_regrets(state, action, move, payoffs, xi=3.0, illegal=-6.0):
    """Both moral regrets of played rounds, as they are logged: dict of floats.

    state, action, move: int arrays [episode, round]; the move is the opponent's
    """
    means = []
    for norm in ("deontological", "utilitarian"):
        possible = reward_array(norm, payoffs, xi, illegal)
        means.append(float(possible[state, action, move].mean()))
    return {
        "deontological regret": deontological_regret(means[0]),
        "utilitarian regret": float(utilitarian_regret(means[1], payoffs, illegal)),
    }
