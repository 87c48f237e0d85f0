"""Meetings worked out by hand, exploitability against long matches, every agent on its own side."""

import numpy as np
import pytest

import society
from conftest import copy_run, player_of, read_json, refused
from envs import STRATEGIES, Condition, memory_one, payoff_matrix, play
from evaluate import shares, transitions
from lora import load_adapter
from policy import load_model
from rewards import reward_array

IPD = payoff_matrix("ipd")
BOTH = [payoff_matrix("ipd", side) for side in (0, 1)]
SETTINGS = {"illegal": -6.0}


def test_textbook_meetings():
    tit_for_tat, pavlov = STRATEGIES["tit-for-tat"], STRATEGIES["win-stay-lose-shift"]
    all_c, all_d, grudge = (1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 0)
    noisy = tuple(0.99 * p + 0.01 * (1 - p) for p in tit_for_tat)
    for first, second, points, total, depends in (
        # CC for ever, DD for ever or two kinds of alternation, by the opening moves.
        (tit_for_tat, tit_for_tat, (3 + 1 + (4 + 0) / 2 * 2) / 4, 4, True),
        (noisy, noisy, (3 + 0 + 4 + 1) / 4, 4, False),  # any noise: all four states alike
        (all_d, tit_for_tat, 1, 2, False),
        (all_c, all_d, 0, 4, False),
        (pavlov, pavlov, 3, 6, False),  # it corrects every opening
        (pavlov, all_d, 0.5, (4 + 2) / 2, False),  # exploited, then mutual defection
        (all_c, grudge, (3 + 0 + 0 + 0) / 4, (6 + 4 + 4 + 4) / 4, True),  # from before round 0 on
    ):
        meeting = society.meet(memory_one(first), memory_one(second), 0.5, BOTH, 5, SETTINGS)
        assert (meeting["long_run"], meeting["total"]) == pytest.approx((points, total))
        assert meeting["depends_on_opening"] == depends
    meeting = society.meet(memory_one(all_d), memory_one(all_c), 0.5, BOTH, 5, SETTINGS)
    assert list(meeting.values()) == pytest.approx([4, 4, 4, 0, False])  # its own 4, the other's 0


def test_exploitability():
    """By hand in the Prisoner's Dilemma, and against all 16 replies, played out for long."""
    hand = {(1, 1, 1, 1): [4, 1], (0, 0, 0, 0): [1, 0], (1, 0, 1, 0): [3, 1]}  # points and gain
    for strategy in [*hand, (0.9, 0.2, 0.7, 0.4)]:
        player, played = memory_one(strategy), []
        found = society.exploitability(player, player, BOTH, SETTINGS)
        best = [found["points"], found["gain"]]
        assert best == pytest.approx(hand.get(strategy, best))
    for reply in np.ndindex(2, 2, 2, 2):
        mine, theirs = play(np.random.default_rng(0), memory_one(reply), player, 100, 500)
        played.append(IPD[mine.move, theirs.move, 0].mean())
    assert best[0] == pytest.approx(max(played), abs=0.05)


def test_extortion_is_a_linear_relation_between_the_scores():
    rng, points = np.random.default_rng(0), IPD[..., 0]
    for _ in range(20):
        both = memory_one(STRATEGIES["extortionate"]), memory_one(rng.uniform(0.05, 0.95, 4))
        share = shares(*both, society.long_run(transitions(*both))[0]).sum(axis=0)
        own, other = (share * points).sum(), (share * points.T).sum()
        assert own - 1 == pytest.approx(3 * (other - 1), abs=1e-9)


def test_long_run_of_chains_that_are_hard_to_iterate():
    alternating = np.array([[0, 1.0], [1, 0]])
    assert society.long_run(alternating) == pytest.approx(np.full((2, 2), 0.5))
    sticky = np.array([[1 - 1e-9, 1e-9], [3e-9, 1 - 3e-9]])
    assert society.long_run(sticky) == pytest.approx(np.array([[0.75, 0.25]] * 2), abs=1e-4)


@pytest.mark.parametrize("outcomes", [2, 3])
def test_long_run_is_what_long_matches_show(outcomes):
    rng = np.random.default_rng(outcomes)
    chicken = [payoff_matrix("chicken", side) for side in (0, 1)]
    player, other = (rng.dirichlet([1] * outcomes, size=(4, 4)) for _ in range(2))
    mine, theirs = play(rng, player, other, 400, 2_000)
    points = reward_array("game", chicken[0], SETTINGS)[mine.state, mine.action, theirs.move]
    meeting = society.meet(player, other, 0.5, chicken, 5, SETTINGS)
    for key, seen in (("long_run", points[:, 100:].mean(1)), ("rounds", points[:, :5].mean(1))):
        assert abs(seen.mean() - meeting[key]) <= 4 * seen.std() / 20


def test_agents_meet_on_sides_of_their_own(run, tmp_path, capsys):
    """Bach or Stravinsky looks different from its two sides; every meeting is calculated anew."""
    path, run = tmp_path / "out.json", copy_run(run, tmp_path / "run", illegal=-1.0)
    second = copy_run(run, tmp_path / "second", sampling="free", side="opponent")
    for more, word in (
        ([second], "--sampling: runs differ in their sampling"),
        ([copy_run(run, tmp_path / "other", illegal=-6)], "RUN: runs differ in their illegal"),
        (["--game", "ipd", "chicken"], "--game: one at a time"),
        (["--json", run / "config.json"], "--json"),
    ):
        with refused(capsys, word):
            society.main([str(run), *map(str, more)])
    options = f"--json {path} --game bach-stravinsky --sampling free"
    society.main([str(run), str(second), *options.split()])
    printed, results = capsys.readouterr().out, read_json(path)["agents"]
    assert "counts -1 points" in printed and "in bach-stravinsky against" in printed
    condition, base = Condition("bach-stravinsky", ("action3", "action4")), load_model("tiny")
    load_adapter(base[0], "agent", run)
    # Its adapter, and on which side it was trained.
    agents = {"untuned": (None, 0), str(run): ("agent", 0), str(second): ("agent", 1)}
    for (name, (adapter, side)), result in zip(agents.items(), results.values(), strict=True):
        views = [payoff_matrix(condition.game, i) for i in (side, 1 - side)]
        own, across = (player_of(*base, condition, True, adapter, i) for i in (side, 1 - side))
        gain = society.exploitability(own, across, views, {"illegal": -1})["gain"]
        assert result["exploitability"]["gain"] == pytest.approx(gain, abs=1e-5)
        for key, (its, _) in agents.items():
            met = player_of(*base, condition, True, its, 1 - side)
            expected = society.meet(own, met, 0.5, views, 5, {"illegal": -1})
            assert result["society"][key] == pytest.approx(expected, abs=1e-5)
        assert {*result["society"]} == {*STRATEGIES, *agents}
        cooperates, _, illegal = own.mean(axis=1).T  # an illegal answer repeats the last move
        assert result["strategy"] == pytest.approx(cooperates + illegal * [1, 1, 0, 0], abs=1e-5)
        numbers = ", ".join(f"{p:.4f}" for p in result["strategy"])
        assert f"{name} as a memory-one strategy: ({numbers})" in printed
