"""The rewards cell by cell, and the optima that follow from them by hand: the one-step argument."""

import math

import numpy as np
import pytest

import rewards
from envs import (
    GAMES,
    ILLEGAL,
    STATES,
    STRATEGIES,
    C,
    D,
    Trajectory,
    memory_one,
    payoff_matrix,
    replies,
)
from errors import InputError
from options import parse_games, train_parser
from rewards import REWARDS, optimum, reward_array, share_right

IPD = payoff_matrix("ipd")
SETTINGS = vars(train_parser("").parse_args([]))  # also those that a fork's rewards read
# P(C | CC), P(C | CD), P(C | DC), P(C | DD) in the Prisoner's Dilemma, whatever the opponent.
# *: there is no reward either way.
OPTIMA = {
    "game": "0000",
    "utilitarian": "1111",
    "deontological": "1*1*",
    "game+deontological": "1010",
    "kindness": "1111",
}


def test_every_cell_of_the_prisoners_dilemma():
    own = {(C, C): 3, (C, D): 0, (D, C): 4, (D, D): 1}
    total = {(C, C): 6, (C, D): 4, (D, C): 4, (D, D): 2}
    for s, state in enumerate(STATES):
        for cell in own:
            penalty = -3 if state[1] == "C" and cell[0] == D else 0
            assert reward_array("game", IPD, SETTINGS)[s][cell] == own[cell]
            assert reward_array("utilitarian", IPD, SETTINGS)[s][cell] == total[cell]
            assert reward_array("deontological", IPD, SETTINGS)[s][cell] == penalty
            assert reward_array("game+deontological", IPD, SETTINGS)[s][cell] == own[cell] + penalty


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("game", GAMES)
def test_illegal_reward_and_xi(reward, game):
    array = reward_array(reward, payoff_matrix(game), {**SETTINGS, "xi": 4, "illegal": -9})
    assert (array[:, ILLEGAL] == -9).all()
    change = array - reward_array(reward, payoff_matrix(game), {**SETTINGS, "xi": 3, "illegal": -9})
    by_xi = np.zeros((4, 3, 2))
    if "deontological" in reward:
        by_xi[[0, 2], D] = -1  # states CC and DC: the opponent's last move was C
    if reward == "kindness":
        by_xi[:, C] = 1
    assert (change == by_xi).all()


def test_virtues_cell_by_cell():
    """Equality: 1 - |r1 - r2| / (r1 + r2), 1 where both are 0; kindness: xi for C, whatever."""
    for payoffs, expected in (
        (IPD, [[1, 0], [0, 1]]),
        (payoff_matrix("chicken"), [[1, 1 - 3 / 5], [1 - 3 / 5, 1]]),
        (payoff_matrix("bach-stravinsky"), [[1 - 1 / 5, 1], [1, 1 - 1 / 5]]),
    ):
        array = reward_array("equality", payoffs, SETTINGS)
        assert array[:, :ILLEGAL] == pytest.approx(np.tile(expected, (4, 1, 1)))
        assert (
            reward_array("kindness", payoffs, {**SETTINGS, "xi": 2})[:, :ILLEGAL]
            == [[2, 2], [0, 0]]
        ).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equality_asks_to_do_what_the_other_does(strategy):
    """In the Prisoner's Dilemma shares are fair where both do the same."""
    against = replies(memory_one(STRATEGIES[strategy]))
    best = optimum("equality", IPD, SETTINGS, replies=against)
    for p, action in zip(against[:, C], best):
        assert math.isnan(action) if p == 0.5 else action == (p > 0.5)
    assert np.isnan(optimum("equality", IPD, SETTINGS)).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reward", OPTIMA)
def test_optima_in_the_prisoners_dilemma(reward, strategy):
    p = np.array(STRATEGIES[strategy])[[0, 2, 1, 3]]  # its state has the two moves swapped
    against = np.stack([p, 1 - p], axis=-1)
    gain = -np.diff((reward_array(reward, IPD, SETTINGS)[:, :ILLEGAL] * against[:, None]).sum(-1))[
        :, 0
    ]
    best = np.array([math.nan if p == "*" else int(p) for p in OPTIMA[reward]])
    assert np.array_equal(np.sign(gain), np.nan_to_num(2 * best - 1))
    for replied in (against, 0.5):  # whatever the opponent
        assert np.array_equal(optimum(reward, IPD, SETTINGS, replies=replied), best, equal_nan=True)


@pytest.mark.parametrize("reward", OPTIMA)
def test_share_right_by_hand(reward):
    """1 at the optimum, 0 at its opposite, 1/2 with half the mass illegal.

    What happens where the reward is indifferent does not count.
    """
    for either in "01":
        best = memory_one([int(p) for p in OPTIMA[reward].replace("*", either)])
        with_illegal = np.concatenate([best, np.ones((4, 1, 1))], axis=-1) / 2
        assert share_right(reward, best, IPD, SETTINGS) == 1
        assert share_right(reward, best[..., ::-1], IPD, SETTINGS) == 0
        assert share_right(reward, with_illegal, IPD, SETTINGS) == 0.5
    always = {"game": 0, "game+deontological": 0.5}
    assert share_right(reward, memory_one([1] * 4), IPD, SETTINGS) == always.get(reward, 1)


@pytest.mark.parametrize(
    "reward, game, opponent, best",
    [
        ("game", "chicken", "always-defect", "1111"),
        ("utilitarian", "defective-coordination", "always-cooperate", "1111"),
        # Only one of two should be bold, and tit-for-tat does what the player did last.
        ("utilitarian", "chicken", "tit-for-tat", "0011"),
        ("game", "stag-hunt", "tit-for-tat", "1100"),
        ("game", "bach-stravinsky", "win-stay-lose-shift", "1001"),
    ],
)
def test_against_a_known_opponent(reward, game, opponent, best):
    payoffs, against = payoff_matrix(game), replies(memory_one(STRATEGIES[opponent]))
    player = memory_one([int(p) for p in best])
    assert optimum(reward, payoffs, SETTINGS, replies=against).tolist() == [int(p) for p in best]
    assert share_right(reward, player, payoffs, SETTINGS, replies=against) == 1
    assert share_right(reward, player[..., ::-1], payoffs, SETTINGS, replies=against) == 0


@pytest.mark.parametrize("reward", ["game", "utilitarian", "game+deontological"])
def test_what_is_added_to_all_points_changes_no_optimum(reward):
    for least in (-(10.0**6), -100_000, 100_000, 10.0**6):
        for best in (
            optimum(reward, IPD + least, SETTINGS),
            optimum(reward, IPD / 1e6, {**SETTINGS, "xi": 3e-6}),
        ):
            assert best.tolist() == [int(p) for p in OPTIMA[reward]]
    most = "1000000 -1000000 0 4 4 0 1".split()
    assert parse_games([*most, "1"])[0][0] == (10**6, -(10**6))
    for point in ("1000001", "-1000001"):
        with pytest.raises(InputError, match="up to 1000000"):
            parse_games([*most, point])


def test_where_nothing_is_better():
    payoffs = payoff_matrix("bach-stravinsky")  # 3 + 2 either way
    assert np.isnan(optimum("utilitarian", payoffs, SETTINGS)).all()
    assert math.isnan(share_right("utilitarian", memory_one([1] * 4), payoffs, SETTINGS))


def test_regrets_of_played_rounds():
    """Two rounds in the Prisoner's Dilemma: a betrayal of a cooperator, then mutual defection."""
    state, action = np.array([[0, 2]]), np.array([[D, D]])
    seen = Trajectory(state=state, order=0 * state, action=action, move=action)
    regrets = rewards.moral_regrets(seen, np.array([[C, D]]), IPD, {**SETTINGS, "xi": 4})
    assert regrets["deontological_regret"] == 4  # the other had played C before both rounds
    assert regrets["utilitarian_regret"] == pytest.approx((6 - (4 + 2) / 2) / 12)
    # A payoff below the illegal reward is the worst; where all totals are equal there is none.
    payoffs = np.array([[[3, 3], [-20, 0]], [[0, -20], [1, 1]]])
    regrets = [rewards.utilitarian_regret(mean, payoffs, illegal=-6) for mean in (6, -20)]
    assert regrets == [0, 1]
    assert math.isnan(rewards.utilitarian_regret(0, 0 * payoffs, illegal=0))


BAD_FORMULAS = {
    "[2]": lambda own, other, *_: own[:, 0],  # read as the other's moves, or as own ones?
    "object": lambda *_: None,  # a return was forgotten
    "[3, 2]": lambda own, *_: np.zeros((3, 2)),
    "not finite": lambda own, *_: own / np.zeros((2, 2)),
}


@pytest.mark.parametrize("word", BAD_FORMULAS)
def test_a_formula_with_a_bug_is_named(word, monkeypatch):
    monkeypatch.setitem(REWARDS, "mine", BAD_FORMULAS[word])
    with pytest.raises(ValueError) as error, np.errstate(all="ignore"):
        reward_array("mine", IPD, SETTINGS)
    assert "'mine'" in str(error.value) and word in str(error.value)


def test_a_formula_reads_any_setting_and_any_axes(monkeypatch):
    monkeypatch.setitem(REWARDS, "mine", lambda *args: args[-1]["weight"])
    array = reward_array("mine", IPD, {**SETTINGS, "weight": 0.25})
    assert (array[:, :ILLEGAL] == 0.25).all() and array.shape == (4, 3, 2)
