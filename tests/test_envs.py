"""Games, strategies and play, against rules and expectations worked out by hand."""

import numpy as np
import pytest

from envs import (
    GAMES,
    ILLEGAL,
    STRATEGIES,
    C,
    D,
    action_counts,
    memory_one,
    opening,
    other_side,
    payoff_matrix,
    play,
)
from report import describe

ALWAYS = {}
for move in (C, D, ILLEGAL):
    ALWAYS[move] = np.zeros((4, 4, 3))
    ALWAYS[move][..., move] = 1


def rng():
    return np.random.default_rng(0)


def play_strategy(player, name):
    """2000 episodes of 5 rounds against one of STRATEGIES."""
    strategy = STRATEGIES[name]
    return play(rng(), player, memory_one(strategy), 2000, 5, opening(strategy))


def test_payoffs_are_own_first():
    ipd = payoff_matrix("ipd")
    assert ipd[D, C].tolist() == [4, 0] and ipd[C, D].tolist() == [0, 4]
    game = payoff_matrix("bach-stravinsky")
    assert game[C, C].tolist() == [3, 2] and other_side(game)[C, C].tolist() == [2, 3]


def test_games_are_complete():
    assert all(np.shape(cells) == (4, 2) for cells in GAMES.values())


def test_tit_for_tat_answers_the_move_in_the_state():
    player = np.full((4, 4, 2), 0.5)
    mine, theirs = play_strategy(player, "tit-for-tat")
    assert (theirs.move == mine.state // 2).all()  # also in round 0, where the state was drawn
    assert (mine.state[:, 1:] == 2 * mine.move[:, :-1] + theirs.move[:, :-1]).all()
    assert (theirs.state == 2 * (mine.state % 2) + mine.state // 2).all()


@pytest.mark.parametrize(
    "opponent, first",
    [("always-cooperate", 0), ("always-defect", 1), ("random", 0.5), ("tit-for-tat", 0.5)],
)
def test_opening_moves(opponent, first):
    mine, _ = play_strategy(ALWAYS[C], opponent)
    assert (mine.state[:, 0] % 2).mean() == pytest.approx(first, abs=0.05)
    # The player's own is always drawn.
    assert (mine.state[:, 0] // 2).mean() == pytest.approx(0.5, abs=0.05)


def test_illegal_leaves_the_last_legal_move():
    mine, theirs = play_strategy(ALWAYS[ILLEGAL], "tit-for-tat")
    assert (mine.action == ILLEGAL).all()
    # The drawn move stands for the whole episode, and tit-for-tat goes on answering it.
    assert (mine.move == mine.state[:, :1] // 2).all()
    assert (theirs.move == mine.move).all()


def test_illegal_opponent_plays_its_last_legal_move():
    _, theirs = play(rng(), ALWAYS[D], ALWAYS[ILLEGAL], 500, 5)
    assert (theirs.action == ILLEGAL).all() and (theirs.move == theirs.state // 2).all()
    assert set(theirs.move.ravel()) == {C, D}


def test_actions_follow_the_probabilities():
    player = np.random.default_rng(3).dirichlet([1, 1, 1], size=(4, 4))
    mine, _ = play(rng(), player, memory_one([0.5] * 4), 20_000, 5)
    for row, expected in enumerate(player.reshape(16, 3)):
        seen = mine.action[mine.prompt == row]
        share = np.bincount(seen, minlength=3) / len(seen)
        assert np.abs(share - expected).max() < 5 * 0.5 / np.sqrt(len(seen))


def test_play_is_reproducible_and_its_sides_are_symmetric():
    player = np.random.default_rng(4).dirichlet([1, 1, 1], size=(4, 4))
    first, second = (play(np.random.default_rng(7), player, player, 50, 5) for _ in range(2))
    for seen, again in zip(first, second):
        assert np.array_equal(seen, again)
    mine, theirs = first
    assert (mine.state // 2 == theirs.state % 2).all()


def test_action_counts():
    player = np.random.default_rng(5).dirichlet([1, 1, 1], size=(4, 4))
    mine, theirs = play(rng(), player, player, 40, 5)
    expected = dict.fromkeys(["C|C", "C|D", "D|C", "D|D", "illegal|C", "illegal|D"], 0)
    for action, their_last in zip(mine.action.ravel(), (theirs.state // 2).ravel()):
        expected["C D illegal".split()[action] + "|" + "CD"[their_last]] += 1
    assert action_counts(mine) == expected and min(expected.values()) > 0


@pytest.mark.parametrize(
    "numbers", [(1, 0, 1), (1, 0, 1, 2), (-0.1, 0, 0, 0), (float("nan"), 0, 0, 0), (1, 0, 1, 0, 1)]
)
def test_four_probabilities(numbers):
    with pytest.raises(ValueError, match="four probabilities"):
        memory_one(numbers)


@pytest.mark.parametrize(
    "numbers, words",
    [
        ((0.98, 0.03, 0.99, 0.01), "tit for tat"),
        ((0.02, 0.01, 0, 0.05), "always defect"),
        ((1, 0.6, 0.95, 0.5), "never betrays a cooperator"),
        ((0.05, 0.6, 0.1, 0.5), "always betrays a cooperator"),
        ((0.7, 0.6, 0.5, 0.3), "no classic strategy"),
    ],
)
def test_describe(numbers, words):
    player = memory_one(numbers)
    assert describe(player) == words
    some_illegal = np.concatenate([0.7 * player, np.full((4, 1, 1), 0.3)], axis=2)
    assert describe(some_illegal) == words  # of the legal answers


def test_describe_mostly_illegal():
    assert describe(np.broadcast_to([0.0, 0.1, 0.9], (4, 4, 3))) == "mostly illegal"
