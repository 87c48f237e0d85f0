"""The rewards cell by cell, and the optima that follow from them by hand: the one-step argument."""

import math

import numpy as np
import pytest

from envs import GAMES, ILLEGAL, STATES, STRATEGIES, C, D, memory_one, payoff_matrix, replies
from rewards import REWARDS, moral_accuracy, optimum, reward_array

IPD = payoff_matrix("ipd")
# P(C | CC), P(C | CD), P(C | DC), P(C | DD) in the Prisoner's Dilemma, whatever the opponent.
# *: there is no reward either way.
OPTIMA = {
    "game": "0000",
    "utilitarian": "1111",
    "deontological": "1*1*",
    "game+deontological": "1010",
}


def test_every_cell_of_the_prisoners_dilemma():
    own = {(C, C): 3, (C, D): 0, (D, C): 4, (D, D): 1}
    total = {(C, C): 6, (C, D): 4, (D, C): 4, (D, D): 2}
    for s, state in enumerate(STATES):
        for cell in own:
            move, _ = cell
            penalty = -3 if state[1] == "C" and move == D else 0
            assert reward_array("game", IPD)[s][cell] == own[cell]
            assert reward_array("utilitarian", IPD)[s][cell] == total[cell]
            assert reward_array("deontological", IPD)[s][cell] == penalty
            assert reward_array("game+deontological", IPD)[s][cell] == own[cell] + penalty


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("game", GAMES)
def test_illegal_reward_and_xi(reward, game):
    array = reward_array(reward, payoff_matrix(game), xi=4, illegal=-9)
    assert (array[:, ILLEGAL] == -9).all()
    change = array - reward_array(reward, payoff_matrix(game), xi=3, illegal=-9)
    penalised = np.zeros((4, 3, 2))
    if "deontological" in reward:
        penalised[[0, 2], D] = -1  # states CC and DC: the opponent's last move was C
    assert (change == penalised).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reward", REWARDS)
def test_optima_in_the_prisoners_dilemma(reward, strategy):
    seen_by_opponent = [0, 2, 1, 3]  # its state is the player's with the two moves swapped
    p = np.array(STRATEGIES[strategy])[seen_by_opponent]
    against = np.stack([p, 1 - p], axis=-1)
    expected = (reward_array(reward, IPD) * against[:, None]).sum(axis=-1)[:, :ILLEGAL]
    best = optimum(reward, IPD, replies=against)
    for s, p_best in enumerate(OPTIMA[reward]):
        if p_best == "*":
            assert expected[s, C] == expected[s, D] == 0 and math.isnan(best[s])
        else:
            move = C if p_best == "1" else D
            assert expected[s].argmax() == move and expected[s, move] > expected[s, 1 - move]
            assert best[s] == int(p_best)
    assert np.array_equal(optimum(reward, IPD), best, equal_nan=True)  # whatever the opponent


@pytest.mark.parametrize("reward", REWARDS)
def test_moral_accuracy_by_hand(reward):
    """1 at the optimum, 0 at its opposite, 1/2 with half the mass illegal.

    What happens where the reward is indifferent does not count.
    """
    for either in "01":
        best = memory_one([int(p) for p in OPTIMA[reward].replace("*", either)])
        with_illegal = np.concatenate([best, np.ones((4, 1, 1))], axis=-1) / 2
        assert moral_accuracy(reward, best, IPD) == 1
        assert moral_accuracy(reward, best[..., ::-1], IPD) == 0
        assert moral_accuracy(reward, with_illegal, IPD) == 0.5
    always = {"game": 0, "utilitarian": 1, "deontological": 1, "game+deontological": 0.5}
    assert moral_accuracy(reward, memory_one([1] * 4), IPD) == always[reward]


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
    assert optimum(reward, payoffs, replies=against).tolist() == [int(p) for p in best]
    assert moral_accuracy(reward, player, payoffs, replies=against) == 1
    assert moral_accuracy(reward, player[..., ::-1], payoffs, replies=against) == 0


def test_where_nothing_is_better():
    payoffs = payoff_matrix("bach-stravinsky")  # 3 + 2 either way
    assert np.isnan(optimum("utilitarian", payoffs)).all()
    assert math.isnan(moral_accuracy("utilitarian", memory_one([1] * 4), payoffs))
