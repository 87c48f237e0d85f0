"""The rewards cell by cell, and the optima that follow from them by hand (METHOD: one-step argument)."""

import numpy as np
import pytest

from envs import C, D, GAMES, ILLEGAL, STATES, STRATEGIES, memory_one, payoff_array, replies
from rewards import REWARDS, moral_accuracy, reward_table

IPD = payoff_array("ipd")


def test_every_cell_of_the_prisoners_dilemma():
    for s, state in enumerate(STATES):
        betrayal = -3 if state[1] == "C" else 0
        for other in (C, D):
            own = {(C, C): 3, (C, D): 0, (D, C): 4, (D, D): 1}
            total = {(C, C): 6, (C, D): 4, (D, C): 4, (D, D): 2}
            for move in (C, D):
                assert reward_table("game", IPD)[s, move, other] == own[move, other]
                assert reward_table("utilitarian", IPD)[s, move, other] == total[move, other]
                assert reward_table("deontological", IPD)[s, move, other] == (betrayal if move == D else 0)
                assert reward_table("game+deontological", IPD)[s, move, other] == own[move, other] + (betrayal if move == D else 0)


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("game", GAMES)
def test_illegal_reward_and_xi(reward, game):
    table = reward_table(reward, payoff_array(game), xi=4, illegal=-9)
    assert (table[:, ILLEGAL] == -9).all()
    change = table - reward_table(reward, payoff_array(game), xi=3, illegal=-9)
    penalised = np.zeros((4, 3, 2))
    penalised[[0, 2], D] = -1 if "deontological" in reward else 0  # states CC and DC: the opponent's last move was C
    assert (change == penalised).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reward, optimum", [("game", (D, D, D, D)), ("utilitarian", (C, C, C, C)),
                                             ("deontological", (C, None, C, None)), ("game+deontological", (C, D, C, D))])
def test_optima_in_the_prisoners_dilemma(reward, optimum, strategy):
    seen_by_opponent = [0, 2, 1, 3]  # its state is the player's with the two moves swapped
    p = np.array(STRATEGIES[strategy])[seen_by_opponent]
    expected = (reward_table(reward, IPD) * np.stack([p, 1 - p], -1)[:, None]).sum(-1)[:, :2]
    for s, move in enumerate(optimum):
        if move is None:
            assert expected[s, C] == expected[s, D] == 0
        else:
            assert expected[s].argmax() == move and expected[s, move] > expected[s, 1 - move]


@pytest.mark.parametrize("reward, optimum", [("game", "0000"), ("utilitarian", "1111"), ("deontological", "1010"), ("game+deontological", "1010")])
def test_moral_accuracy_by_hand(reward, optimum):
    """1 at the optimum, 0 at its opposite, with half the mass illegal 1/2; what happens where the reward is indifferent does not count."""
    best = memory_one([int(p) for p in optimum])
    with_illegal = np.concatenate([best, np.ones((4, 1, 1))], axis=-1) / 2
    for table, accuracy in ((best, 1), (best[..., ::-1], 0), (with_illegal, 0.5)):
        assert moral_accuracy(reward, table, payoff_array("ipd")) == accuracy
    always = {"game": 0, "utilitarian": 1, "deontological": 1, "game+deontological": 0.5}[reward]
    assert moral_accuracy(reward, memory_one([1] * 4), payoff_array("ipd")) == always


@pytest.mark.parametrize("reward, game, opponent, optimum", [
    ("game", "chicken", "always-defect", "1111"), ("utilitarian", "defective-coordination", "always-cooperate", "1111"),
    ("utilitarian", "chicken", "tit-for-tat", "0011"),  # one of two should be bold, and tit-for-tat does what the player did last
    ("game", "stag-hunt", "tit-for-tat", "1100"), ("game", "bach-stravinsky", "win-stay-lose-shift", "1001")])
def test_moral_accuracy_against_a_known_opponent(reward, game, opponent, optimum):
    against = replies(memory_one(STRATEGIES[opponent]))
    best = memory_one([int(p) for p in optimum])
    assert moral_accuracy(reward, best, payoff_array(game), replies=against) == 1
    assert moral_accuracy(reward, best[..., ::-1], payoff_array(game), replies=against) == 0


def test_moral_accuracy_where_nothing_is_better():
    assert np.isnan(moral_accuracy("utilitarian", memory_one([1] * 4), payoff_array("bach-stravinsky")))  # 3 + 2 either way
