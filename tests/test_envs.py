"""Games, prompts and play, against rules and expectations worked out by hand."""

from itertools import permutations

import numpy as np
import pytest

from envs import (C, D, GAMES, ILLEGAL, STRATEGIES, check_names, describe, draw, first_condition, memory_one, opening, payoff_array, play,
                  prompts)

ALWAYS = {move: np.full((4, 4, 3), 0.0) for move in (C, D, ILLEGAL)}
for move, table in ALWAYS.items():
    table[..., move] = 1


def rng():
    return np.random.default_rng(0)


def strategy_seats(player, opponent, episodes=2000, rounds=5):
    return play(rng(), player, memory_one(STRATEGIES[opponent]), episodes, rounds, opening(STRATEGIES[opponent]))


def test_payoffs_are_own_first():
    ipd = payoff_array("ipd")
    assert ipd[D, C].tolist() == [4, 0] and ipd[C, D].tolist() == [0, 4]
    assert payoff_array("bach-stravinsky")[C, C].tolist() == [3, 2]


def test_tit_for_tat_answers_the_move_in_the_state():
    player = np.full((4, 4, 2), 0.5)
    mine, theirs = strategy_seats(player, "tit-for-tat")
    assert (theirs.move == mine.state // 2).all()                       # also in round 0, where the state was drawn
    assert (mine.state[:, 1:] == 2 * mine.move[:, :-1] + theirs.move[:, :-1]).all()
    assert (theirs.state == 2 * (mine.state % 2) + mine.state // 2).all()


@pytest.mark.parametrize("opponent, first", [("always-cooperate", 0), ("always-defect", 1), ("random", 0.5), ("tit-for-tat", 0.5)])
def test_opening_moves(opponent, first):
    mine, _ = strategy_seats(ALWAYS[C], opponent)
    assert (mine.state[:, 0] % 2).mean() == pytest.approx(first, abs=0.05)
    assert (mine.state[:, 0] // 2).mean() == pytest.approx(0.5, abs=0.05)  # the player's own is always drawn


def test_illegal_leaves_the_last_legal_move():
    mine, theirs = strategy_seats(ALWAYS[ILLEGAL], "tit-for-tat")
    assert (mine.action == ILLEGAL).all()
    assert (mine.move == mine.state[:, :1] // 2).all()      # the drawn move stands for the whole episode
    assert (theirs.move == mine.move).all()                 # and tit-for-tat goes on answering it


def test_illegal_opponent_plays_its_last_legal_move():
    mine, theirs = play(rng(), ALWAYS[D], ALWAYS[ILLEGAL], 500, 5)
    assert (theirs.action == ILLEGAL).all() and (theirs.move == theirs.state // 2).all()
    assert set(theirs.move.ravel()) == {C, D}


def test_actions_follow_the_table():
    table = np.random.default_rng(3).dirichlet([1, 1, 1], size=(4, 4))
    mine, _ = play(rng(), table, memory_one([0.5] * 4), 20_000, 5)
    for row, expected in enumerate(table.reshape(16, 3)):
        seen = mine.action[mine.prompt == row]
        share = np.bincount(seen, minlength=3) / len(seen)
        assert np.abs(share - expected).max() < 5 * 0.5 / np.sqrt(len(seen))


def test_play_is_reproducible_and_seats_are_symmetric():
    table = np.random.default_rng(4).dirichlet([1, 1, 1], size=(4, 4))
    first, second = (play(np.random.default_rng(7), table, table, 50, 5) for _ in range(2))
    assert all((a == b).all() for x, y in zip(first, second) for a, b in zip(x, y))
    assert (first[0].state // 2 == first[1].state % 2).all()


@pytest.mark.parametrize("numbers", [(1, 0, 1), (1, 0, 1, 2), (-0.1, 0, 0, 0), (float("nan"), 0, 0, 0), (1, 0, 1, 0, 1)])
def test_four_probabilities(numbers):
    with pytest.raises(ValueError, match="four probabilities"):
        memory_one(numbers)


def test_sixteen_prompts():
    texts = prompts(payoff_array("ipd"), ("north", "south"))
    assert len(set(texts)) == 16
    cd = texts[4:8]                                     # state CD: own C, other's D, in all four orders
    assert all("played north and they played south, so you got 0 points and they got 4." in text for text in cd)
    assert all("| north | 3, 3 | 0, 4 |\n| south | 4, 0 | 1, 1 |" in text for text in texts)
    starts, ends = {text.splitlines()[0] for text in cd}, {text.splitlines()[-1] for text in cd}
    assert len(starts) == len(ends) == 2                # the two shuffles are independent of each other
    dc = prompts(payoff_array("bach-stravinsky"), ("A", "B"))[0]
    assert "so you got 3 points and they got 2." in dc


@pytest.mark.parametrize("names", [("a", "a"), ("", "b"), (" a", "b"), ("a\nb", "c"), ("a|b", "c")])
def test_bad_names(names):
    with pytest.raises(ValueError, match="action names"):
        check_names(names)


def test_describe():
    for numbers, word in [((0.98, 0.03, 0.99, 0.01), "tit for tat"), ((0.02, 0.01, 0, 0.05), "always defect"),
                          ((1, 0.6, 0.95, 0.5), "never betrays a cooperator"), ((0.7, 0.6, 0.5, 0.3), "no classic strategy")]:
        assert describe(memory_one(numbers)) == word
        some_illegal = np.concatenate([0.7 * memory_one(numbers), np.full((4, 1, 1), 0.3)], axis=2)
        assert describe(some_illegal) == word  # of the legal answers
    assert describe(np.broadcast_to([0.0, 0.1, 0.9], (4, 4, 3))) == "mostly illegal"


def test_games_are_complete():
    assert all(np.shape(cells) == (4, 2) for cells in GAMES.values())


def test_conditions_are_drawn_from_everything_listed():
    rng = np.random.default_rng(0)
    drawn = [draw(rng, ["chicken", "random"], ["a", "b", "c"], ["rows", "both"], ["structured", "poetic"]) for _ in range(400)]
    named = [one for one in drawn if one.game == "chicken"]
    assert {one[1:] for one in named} == {(names, layout, prompt) for names in permutations("abc", 2) for layout in ("rows", "both")
                                          for prompt in ("structured", "poetic")}
    fresh = [one.game for one in drawn if one.game != "chicken"]
    points = np.array(fresh)
    assert len(set(fresh)) == len(fresh) > 150 and points.shape[1:] == (4, 2) and set(points.ravel()) == set(range(10))
    assert payoff_array(fresh[0])[C, D].tolist() == list(fresh[0][1])


def test_a_single_condition_costs_no_randomness():
    """So that the paper's setting plays the same games whatever could have been varied."""
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    only = ("ipd", ("a", "b"), "rows", "poetic")
    assert draw(rng, ["ipd"], ["a", "b"], ["rows"], ["poetic"]) == only == first_condition(["ipd"], "abc", ["rows"], ["poetic"])
    assert rng.bit_generator.state == before and first_condition(["random"], "ab", ["rows"], ["poetic"]).game == "ipd"
