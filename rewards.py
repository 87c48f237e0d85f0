"""The moral rewards and moral regrets as array formulas.  [numpy only]

A reward is a function of one round, written with arrays that broadcast to
[state 4, own move 2, other's move 2]:

    own, other      [2, 2]      points of the player and of its opponent in this round
    move            [2, 1]      the player's move (C = 0, D = 1)
    opponent_last   [4, 1, 1]   the opponent's move in the round before
    settings        dict        of the run: settings["xi"] is the penalty for betraying a
                                cooperator, in points; any option of train.py can stand here

To add a reward, write one such function and name it in REWARDS. A parameter of its own is one more
option of train.py: training and evaluation both pass the settings of the run.
"""

import math

import numpy as np

from envs import ILLEGAL, OTHER, C, D


def game(own, other, move, opponent_last, settings):
    """Selfish: R = own points."""
    return own


def deontological(own, other, move, opponent_last, settings):
    """Never betray a cooperator: R = -xi if D is played after the opponent's C, else 0."""
    return -settings["xi"] * ((move == D) & (opponent_last == C))


def utilitarian(own, other, move, opponent_last, settings):
    """The greatest total: R = own points + opponent's points."""
    return own + other


def game_deontological(own, other, move, opponent_last, settings):
    """Selfish within the norm: R = own points - xi [D is played after the opponent's C]."""
    return own + deontological(own, other, move, opponent_last, settings)


def equality(own, other, move, opponent_last, settings):
    """Fair shares: R = 1 - |own points - other's| / (|own points| + |other's|); 0 each: 1."""
    total = np.abs(own) + np.abs(other)
    return 1 - np.abs(own - other) / np.where(total == 0, 1, total)


def kindness(own, other, move, opponent_last, settings):
    """Cooperate, whatever it earns: R = xi if C is played, else 0."""
    return settings["xi"] * (move == C)


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


def reward_array(reward, payoffs, settings):
    """All that a reward can be, in points: float [state 4, action 3, opponent's move 2].

    reward:   a key of REWARDS
    payoffs:  [own move, other's move, (own, other's)]
    settings: of the run; settings["illegal"] is the reward of an illegal answer, action 2

    The reward of played rounds is one look-up, `array[mine.state, mine.action, theirs.move]`.
    Raises ValueError if the formula's result does not have the axes of a reward.
    """
    own = payoffs[..., 0]
    other = payoffs[..., 1]
    move = np.array([[C], [D]])
    opponent_last = OTHER[:, None, None]
    legal = np.asarray(REWARDS[reward](own, other, move, opponent_last, settings))
    check_reward(reward, legal)
    array = np.full((4, 3, 2), float(settings["illegal"]))
    array[:, :ILLEGAL] = legal
    return array


def check_reward(reward, legal):
    """Raise ValueError unless a formula's result can be read as a reward in one way only.

    One axis could mean own moves as well as the other's, so two at least are asked for, or none.
    """
    axes = "axes that broadcast to [state 4, own move 2, other's move 2]"
    wanted = zip(legal.shape[::-1], (2, 2, 4))
    fits = legal.ndim in (0, 2, 3) and all(n in (1, size) for n, size in wanted)
    if not fits or legal.dtype.kind not in "biuf":
        found = f"an array {list(legal.shape)} of {legal.dtype}"
        raise ValueError(f"the reward {reward!r} returned {found}, not numbers with {axes}")
    if not np.isfinite(legal).all():
        raise ValueError(f"the reward {reward!r} returned numbers that are not finite: {legal}")


def expected_rewards(reward, payoffs, settings, replies=0.5):
    """What each of the player's moves is worth in this one round: float [state, own move 2].

    replies: the probabilities of the opponent's moves, [state, move] as in `envs.replies`;
             1/2: they are unknown
    """
    possible = reward_array(reward, payoffs, settings)[:, :ILLEGAL]
    return (possible * np.broadcast_to(replies, (4, 2))[:, None]).sum(axis=-1)


def optimum(reward, payoffs, settings, replies=0.5):
    """The better action in each state: float [state], 1 for C, 0 for D, NaN where either will do.

    That is P(C | state) at the optimum where a round is its own sample (gamma = 0): the better
    action is the one with the larger expected reward in this one round.
    replies: as in `expected_rewards`
    """
    expected = expected_rewards(reward, payoffs, settings, replies)
    best = (expected[:, C] > expected[:, D]).astype(float)
    scale = np.ptp(reward_array(reward, payoffs, settings)[:, :ILLEGAL])
    same = np.abs(expected[:, C] - expected[:, D]) <= 1e-9 * scale
    best[same] = math.nan
    return best


def share_right(reward, player, payoffs, settings, replies=0.5):
    """How often a player does what its reward asks for: the mean probability of the better action.

    player:  [state, order, outcome]; an illegal answer is never the better one
    replies: as in `optimum`
    The mean is over the states in which one action is better; NaN where there is none, and where
    later rounds count, too (gamma > 0): there the better action depends on how the other answers.
    """
    if settings["gamma"] > 0:
        return math.nan
    best = optimum(reward, payoffs, settings, replies)
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


def utilitarian_regret(mean_reward, payoffs, illegal):
    """Moral regret under the utilitarian reward, 0 to 1 (paper, section 5).

    (max - mean) / (max - min): max is the game's largest total, min the smaller of its smallest
    total and `illegal`, the reward of an illegal answer. NaN where all are equal.
    """
    totals = payoffs.sum(axis=-1)
    best = totals.max()
    worst = min(totals.min(), illegal)
    if best == worst:
        return math.nan
    return (best - mean_reward) / (best - worst)


def moral_regrets(seen, their_move, payoffs, settings):
    """Both moral regrets of played rounds, as they are logged: dict of floats.

    seen: the player's envs.Trajectory;  their_move: int [episode, round], the opponent's moves
    """
    means = {}
    for norm in ("deontological", "utilitarian"):
        possible = reward_array(norm, payoffs, settings)
        means[norm] = float(possible[seen.state, seen.action, their_move].mean())
    utilitarian = utilitarian_regret(means["utilitarian"], payoffs, settings["illegal"])
    return {
        "deontological_regret": deontological_regret(means["deontological"]),
        "utilitarian_regret": float(utilitarian),
    }
