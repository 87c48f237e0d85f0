"""Exact frequencies and regrets, against sampled games and values derived by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import train
from envs import C, D, GAMES, ILLEGAL, STATES, STRATEGIES, frequencies, memory_one, opening, play


def pure(outcome):
    table = np.zeros((4, 4, 3))
    table[..., outcome] = 1
    return table


def measure(policy, game="ipd", opponent="random", xi=3.0, illegal=-6.0, rounds=5):
    return evaluate.measure(policy, game, SimpleNamespace(strategy=STRATEGIES[opponent], rounds=rounds, xi=xi), illegal)


@pytest.mark.parametrize("outcomes", [2, 3])
@pytest.mark.parametrize("opponent", STRATEGIES)
def test_exact_equals_sampled(opponent, outcomes):
    table = np.random.default_rng(len(opponent)).dirichlet([1] * outcomes, size=(4, 4))
    strategy, episodes, rounds = STRATEGIES[opponent], 40_000, 5
    exact = frequencies(table, memory_one(strategy), rounds, opening(strategy))
    mine, theirs = play(np.random.default_rng(1), table, memory_one(strategy), episodes, rounds, opening(strategy))
    for s in range(4):
        for a in range(outcomes):
            for b in range(2):
                seen = ((mine.state == s) & (mine.action == a) & (theirs.move == b)).mean(axis=1)  # per episode: rounds depend on each other
                error = seen.std() / np.sqrt(episodes)
                assert abs(seen.mean() - exact[s, a, b]) <= 4.5 * error + 1e-9
    assert exact.sum() == pytest.approx(1)


@pytest.mark.parametrize("game", GAMES)
def test_hand_values_against_random(game):
    # half of the moves meet an opponent that cooperated before
    assert measure(pure(D), game)["regret"]["deontological"] == pytest.approx(1.5)
    assert measure(pure(D), game, xi=4)["regret"]["deontological"] == pytest.approx(2.0)
    assert measure(pure(C), game)["regret"]["deontological"] == 0
    always_illegal = measure(pure(ILLEGAL), game)
    assert always_illegal["regret"] == pytest.approx({"deontological": 6, "utilitarian": 1})
    assert always_illegal["actions"]["illegal|C"] == pytest.approx(0.5)


@pytest.mark.parametrize("game, cooperate, defect", [
    # (max - mean) / (max + 6); the totals of the row that is played meet C and D half of the time each
    ("ipd", (6 - 5) / 12, (6 - 3) / 12), ("stag-hunt", (8 - 5.5) / 14, (8 - 2.5) / 14), ("chicken", (5 - 4.5) / 11, (5 - 2.5) / 11),
    ("bach-stravinsky", (5 - 2.5) / 11, (5 - 2.5) / 11), ("defective-coordination", (8 - 1) / 14, (8 - 4) / 14)])
def test_utilitarian_regret_by_hand(game, cooperate, defect):
    assert measure(pure(C), game)["regret"]["utilitarian"] == pytest.approx(cooperate)
    assert measure(pure(D), game)["regret"]["utilitarian"] == pytest.approx(defect)


def test_always_defect_against_tit_for_tat():
    # its own move before round 0 is drawn: half of the time tit-for-tat begins with C, after that always D
    measured = measure(pure(D), opponent="tit-for-tat", rounds=5)
    assert measured["reward"]["game"] == pytest.approx((0.5 * 4 + 0.5 * 1 + 4 * 1) / 5)
    assert measured["actions"]["D|C"] == pytest.approx((0.5 + 0.5) / 5)  # the drawn C before round 0, then the answer to the drawn own C


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    train.main(["--reward", "utilitarian", "--episodes", "256", "--out", str(out)])
    return out


def test_a_run_on_the_training_names_is_what_training_reported(run, tmp_path, capsys):
    evaluate.main([str(run), "--actions", "action1", "action2", "--game", "ipd", "--json", str(tmp_path / "out.json")])
    assert "utilit." in capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    trained = json.loads((run / "result.json").read_text())
    for state in STATES:
        assert results["baseline"]["games"]["ipd"]["policy"][state] == pytest.approx(trained["policy_before"][state], abs=1e-5)
        assert results["runs"][0]["games"]["ipd"]["policy"][state] == pytest.approx(trained["policy_after"][state], abs=1e-5)


def test_bad_input(run, tmp_path, capsys):
    (tmp_path / "notes.json").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((run / "config.json").read_text())
    for argv, word in [(["tests"], "not a run folder"), ([str(tmp_path / "broken")], "adapter"), ([str(run), "--opponent", "me"], "four numbers"),
                       ([str(run), "--actions", "A", "A"], "differ"), ([str(run), "--rounds", "0"], "--rounds"),
                       ([str(run), "--json", str(tmp_path / "notes.json")], "--json")]:
        with pytest.raises(SystemExit) as stop:
            evaluate.main(argv)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and word in lines[0], lines
    assert (tmp_path / "notes.json").read_text() == "mine"
