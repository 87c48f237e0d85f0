"""Exact frequencies and regrets, against sampled games and values derived by hand."""

import json
import shutil
import sys
from functools import cache
from itertools import cycle

import numpy as np
import matplotlib.image
import pytest
from safetensors.torch import load_file, save_file

import evaluate
import rewards
import train
from conftest import refused
from envs import (C, D, GAMES, ILLEGAL, LAYOUTS, NAMES, STATES, STRATEGIES, TEMPLATES, frequencies, legal_moves, long_run, memory_one,
                  opening, other_seat, payoff_array, play, prompts, random_game, table_text)
from policy import Policy, encode
from rewards import REWARDS, reward_table


def pure(outcome):
    table = np.zeros((4, 4, 3))
    table[..., outcome] = 1
    return table


def measure(policy, game="ipd", opponent="random", rounds=5, **settings):
    return rewards.measure(policy, payoff_array(game), STRATEGIES[opponent], rounds, **settings)


def within_four_errors(samples, exact):
    """samples [episode, ...]: one mean per episode, because the rounds of an episode depend on each other."""
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert (np.abs(samples.mean(axis=0) - exact) <= 4 * error + 1e-9).all()


@pytest.mark.parametrize("outcomes", [2, 3])
@pytest.mark.parametrize("opponent", [*STRATEGIES, "a model"])
def test_exact_equals_200_000_sampled_rounds(opponent, outcomes):
    rng = np.random.default_rng(len(opponent))
    table = rng.dirichlet([1] * outcomes, size=(4, 4))
    other, start = (memory_one(STRATEGIES[opponent]), opening(STRATEGIES[opponent])) if opponent in STRATEGIES else (
        rng.dirichlet([1] * 3, size=(4, 4)), 0.5)
    exact = frequencies(table, other, 5, start)
    mine, theirs = play(np.random.default_rng(1), table, other, 40_000, 5, start)
    seen = np.zeros((40_000, 4, outcomes, 2))
    np.add.at(seen, (np.arange(40_000)[:, None], mine.state, mine.action, theirs.move), 1 / 5)
    within_four_errors(seen, exact)
    assert exact.sum() == pytest.approx(1)
    for game in GAMES:
        for name in REWARDS:
            points = reward_table(name, payoff_array(game))
            within_four_errors(points[mine.state, mine.action, theirs.move].mean(axis=1), (exact * points[:, :outcomes]).sum())


def test_samples_option_estimates_the_same():
    table = np.random.default_rng(0).dirichlet([1] * 3, size=(4, 4))
    exact, sampled = (measure(table, opponent="tit-for-tat", samples=samples) for samples in (None, 40_000))
    assert sampled != exact
    for part in ("actions", "reward", "regret"):
        assert sampled[part] == pytest.approx(exact[part], abs=0.05)


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


# ----------------------------------------------------------------------------------------------------------------------- society

IPD = payoff_array("ipd")[..., 0]


def long_run_points(one, other):
    return rewards.meet(memory_one(one), memory_one(other), 0.5, payoff_array("ipd"), 5)


def test_textbook_meetings():
    tit_for_tat, all_d, all_c, pavlov = (STRATEGIES[k] for k in ("tit-for-tat", "always-defect", "always-cooperate", "win-stay-lose-shift"))
    # tit-for-tat meets itself: CC for ever, DD for ever or two kinds of alternation, by the opening moves
    itself = long_run_points(tit_for_tat, tit_for_tat)
    assert itself["long_run"] == pytest.approx((3 + 1 + (4 + 0) / 2 * 2) / 4) and itself["depends_on_opening"]
    assert long_run_points(all_d, tit_for_tat)["long_run"] == pytest.approx(1)
    assert long_run_points(all_d, all_c) == pytest.approx({"rounds": 4, "long_run": 4, "depends_on_opening": False})
    assert long_run_points(all_c, all_d)["long_run"] == pytest.approx(0)
    assert long_run_points(pavlov, pavlov)["long_run"] == pytest.approx(3)  # it mends every opening
    assert long_run_points(pavlov, all_d)["long_run"] == pytest.approx(0.5)  # alternates: exploited, then mutual defection
    noisy = tuple(0.99 * p + 0.01 * (1 - p) for p in tit_for_tat)  # any noise makes tit-for-tat visit all four states alike
    meeting = long_run_points(noisy, noisy)
    assert meeting["long_run"] == pytest.approx((3 + 0 + 4 + 1) / 4) and not meeting["depends_on_opening"]


def test_extortion_is_a_linear_relation_between_the_scores():
    rng = np.random.default_rng(0)
    for _ in range(20):
        victim = rng.uniform(0.05, 0.95, 4)
        share = frequencies(memory_one(STRATEGIES["extortionate"]), memory_one(victim), np.inf).sum(axis=0)
        own, other = (share * IPD).sum(), (share * IPD.T).sum()
        assert own - 1 == pytest.approx(3 * (other - 1), abs=1e-9)


@pytest.mark.parametrize("outcomes", [2, 3])
def test_long_run_is_what_long_matches_show(outcomes):
    rng = np.random.default_rng(outcomes)
    one, other = (rng.dirichlet([1] * outcomes, size=(4, 4)) for _ in range(2))
    mine, theirs = play(rng, one, other, 400, 2_000)
    points = reward_table("game", payoff_array("chicken"))[mine.state, mine.action, theirs.move][:, 100:].mean(axis=1)
    meeting = rewards.meet(one, other, 0.5, payoff_array("chicken"), 5)
    assert abs(points.mean() - meeting["long_run"]) <= 4 * points.std() / 20 and not meeting["depends_on_opening"]
    first = reward_table("game", payoff_array("chicken"))[mine.state, mine.action, theirs.move][:, :5].mean(axis=1)
    assert abs(first.mean() - meeting["rounds"]) <= 4 * first.std() / 20


def test_long_run_of_chains_that_are_hard_to_iterate():
    alternating = np.array([[0, 1.0], [1, 0]])
    assert long_run(alternating) == pytest.approx(np.full((2, 2), 0.5))
    sticky = np.array([[1 - 1e-9, 1e-9], [3e-9, 1 - 3e-9]])
    assert long_run(sticky) == pytest.approx(np.array([[0.75, 0.25]] * 2), abs=1e-4)


# --------------------------------------------------------------------------------------------------------------------- many runs

def test_mean_and_interval():
    leaf = evaluate.mean_and_interval([{"a": {"b": x}} for x in (1.0, 2.0, 3.0, 4.0)])["a"]["b"]
    assert leaf["mean"] == 2.5 and leaf["ci95"] == pytest.approx(1.96 * np.sqrt(5 / 3) / 2)  # s^2 = 5 / 3
    assert evaluate.mean_and_interval([1.0]) == {"mean": 1.0, "ci95": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    train.main(["--reward", "utilitarian", "--episodes", "256", "--out", str(out)])
    return out


def test_a_run_on_the_training_names_is_what_training_reported(run, tmp_path, capsys):
    evaluate.main([str(run), "--actions", "action1", "action2", "--game", "ipd", "--json", str(tmp_path / "out.json")])
    assert "util. regret" in capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    trained = json.loads((run / "result.json").read_text())
    for state in STATES:
        assert results["baseline"]["games"]["ipd"]["policy"][state] == pytest.approx(trained["policy_before"][state], abs=1e-5)
        assert results["runs"][0]["games"]["ipd"]["policy"][state] == pytest.approx(trained["policy_after"][state], abs=1e-5)


def copy(run, folder, **change):
    """A run folder with other settings."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    return folder


def test_agents_meet_in_seats_of_their_own(run, tiny, tmp_path):
    """Bach or Stravinsky looks different from its two sides: the second of two agents must be asked with the second seat's prompts."""
    evaluate.main([str(run), "--game", "bach-stravinsky", "--society", "--json", str(tmp_path / "out.json")])
    met = json.loads((tmp_path / "out.json").read_text())["baseline"]["society"]["untuned"]
    model, tokenizer = tiny
    payoffs, names = payoff_array("bach-stravinsky"), ["action3", "action4"]
    first, second = (Policy(model, None, *encode(tokenizer, prompts(seen, names), names), free=False)()[0].detach().exp().numpy().reshape(4, 4, 2)
                     for seen in (payoffs, other_seat(payoffs)))
    assert met["long_run"] == pytest.approx(rewards.meet(first, second, 0.5, payoffs, 5)["long_run"], abs=1e-5)
    assert abs(met["long_run"] - rewards.meet(first, first, 0.5, payoffs, 5)["long_run"]) > 1e-4  # else the test above shows nothing


def test_everything_at_once(run, tmp_path, capsys, monkeypatch):
    """Two seeds of one setting and one of another, all options: groups, axes, society, questions, pictures, JSON."""
    monkeypatch.setattr(evaluate, "AXES", {axis: values[:2] for axis, values in evaluate.AXES.items()})
    runs = [run, copy(run, tmp_path / "seed2", seed=2), copy(run, tmp_path / "other", lr=0.5)]
    evaluate.main([*map(str, runs), "--game", "chicken", "ipd", "--axes", "--society", "--ask", "--sampling", "free",
                   "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "figures")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    assert [(one["n"], one["runs"]) for one in results["groups"]] == [(1, []), (2, [0, 1]), (1, [2])]
    assert all(word in printed for word in ("lr 0.5", "(n=2)", "long run", "What strategy did you use to decide?", "tit-for-tat"))
    agent = results["runs"][0]
    for state in STATES:  # one kind of sampling for all agents, whatever they were trained with
        assert 0 < agent["games"]["chicken"]["policy"][state] + agent["games"]["chicken"]["illegal"][state] < 1
    base = agent["games"]["chicken"]
    for axis, value in (("actions", "action3 action4"), ("layout", "original"), ("prompt", "structured"), ("persona", "none")):
        assert agent["axes"][axis][value] == base  # the first value of each axis is the command line's own
    assert agent["axes"]["layout"]["rows"] != base and agent["axes"]["prompt"]["unstructured"] != base
    assert set(agent["society"]) == {*STRATEGIES, "untuned", *map(str, runs)}
    assert agent["society"][str(runs[1])] == agent["society"][str(run)]  # the same adapter
    assert [asked["state"] for asked in agent["ask"]] == list(STATES) and "action3" in agent["ask"][0]["prompt"]
    for name in ("training", "policy", "regret", "axes"):
        image = matplotlib.image.imread(tmp_path / "figures" / f"{name}.png")
        assert image.shape[0] > 250 and image.std() > 0.05


def test_transfer(run, tiny, tmp_path, capsys, monkeypatch):
    """Each column against a calculation of its own, for the untuned model and one trained run; the heat map has a row for either."""
    monkeypatch.setattr(evaluate, "NEW_GAMES", len(evaluate.NEW_NAMES))  # fewer, for speed: each of the names once
    evaluate.main([str(run), "--game", "ipd", "--transfer", "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "figures")])
    shown = capsys.readouterr().out
    assert "untuned, by the utilitarian reward" in shown and "Not new" not in shown
    results = json.loads((tmp_path / "out.json").read_text())
    untuned = results["baseline"]["transfer"]
    model, tokenizer = tiny

    @cache
    def table(game, names, layout, template):
        texts, answers = encode(tokenizer, prompts(payoff_array(game), names, layout, TEMPLATES[template]), names)
        return Policy(model, None, texts, answers, free=False).table().reshape(4, 4, 2)

    def accuracy(reward, game, *where):
        return rewards.moral_accuracy(reward, table(game, *where), payoff_array(game))

    ipd, seen = "ipd", ("action1", "action2")
    rng = np.random.default_rng(0)
    games = [random_game(rng) for _ in range(evaluate.NEW_GAMES)]

    def in_games(reward, names, layout, template):
        return np.nanmean([accuracy(reward, game, pair, layout, template) for game, pair in zip(games, names)])

    for reward in rewards.REWARDS:
        assert untuned[reward]["game"] == pytest.approx(in_games(reward, cycle([seen]), "original", "structured"))
        assert untuned[reward]["game, names, layout"] == pytest.approx(in_games(reward, cycle(evaluate.NEW_NAMES), "both", "structured"))
        assert untuned[reward]["all"] == pytest.approx(in_games(reward, cycle(evaluate.NEW_NAMES), "both", "unstructured"))
        assert untuned[reward]["nothing"] == pytest.approx(accuracy(reward, ipd, seen, "original", "structured"))
        assert untuned[reward]["layout"] == pytest.approx(accuracy(reward, ipd, seen, "both", "structured"))
        assert untuned[reward]["wording"] == pytest.approx(accuracy(reward, ipd, seen, "original", "unstructured"))
        by_names = [accuracy(reward, ipd, names, "original", "structured") for names in evaluate.NEW_NAMES]
        assert untuned[reward]["names"] == pytest.approx(np.mean(by_names))
    assert results["runs"][0]["transfer"]["utilitarian"]["nothing"] > untuned["utilitarian"]["nothing"] + 0.1
    assert results["groups"][1]["transfer"]["utilitarian"]["all"]["mean"] == results["runs"][0]["transfer"]["utilitarian"]["all"]
    assert matplotlib.image.imread(tmp_path / "figures" / "transfer.png").std() > 0.05
    evaluate.main([str(copy(run, tmp_path / "tied", game=["bach-stravinsky"])), "--game", "ipd", "--transfer", "--json", str(tmp_path / "tied.json"),
                   "--plot", str(tmp_path / "tied figures")])
    tied = json.loads((tmp_path / "tied.json").read_text())["runs"][0]["transfer"]["utilitarian"]
    assert tied["nothing"] is None and 0 < tied["game"] < 1  # 3 + 2 for either action
    evaluate.main([str(copy(run, tmp_path / "seen", layout=["rows", "both"])), "--game", "ipd", "--transfer"])
    assert f"Not new to {tmp_path / 'seen'}: both" in capsys.readouterr().out


def test_what_is_new_at_test_is_not_in_the_built_in_names():
    assert not set(NAMES) & {name for names in evaluate.NEW_NAMES for name in names}
    shown = {name for names in evaluate.AXES["actions"] for name in names} - {"action1", "action2"}  # these two are the default of training
    assert not set(NAMES) & shown and len(set(NAMES)) == len(NAMES)


def test_an_illegal_answer_counts_as_the_last_move_in_the_strategy():
    table = np.broadcast_to([0.2, 0.3, 0.5], (4, 4, 3))
    assert legal_moves(table)[:, C] == pytest.approx([0.7, 0.7, 0.2, 0.2])


def test_tells_when_the_names_are_not_those_of_training(run, tmp_path, capsys):
    many = copy(run, tmp_path / "many", actions=["random"])
    for tested, new in (("action1 action2", [False, False]), ("action5 action6", [True, False]), ("action3 action4", [True, True])):
        for one, told in zip((run, many), new):
            evaluate.main([str(one), "--game", "ipd", "--actions", *tested.split()])
            assert ("not the names of training" in capsys.readouterr().out) == told


def test_a_run_that_was_killed_after_its_result_is_finished(run, tmp_path, capsys):
    killed = copy(run, tmp_path / "killed")
    (killed / "state.safetensors").write_bytes(b"")
    evaluate.main([str(killed), "--game", "ipd"])
    (killed / "result.json").unlink()
    with refused(capsys, "is not finished"):
        evaluate.main([str(killed), "--game", "ipd"])


def test_own_prompt_and_persona_change_the_text(run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("Choose {first} or {second}. They did {other}.")
    evaluate.main([str(run), "--game", "ipd", "--prompt-file", str(tmp_path / "mine.txt"), "--persona", "deontological", "--ask"])
    printed = capsys.readouterr().out
    assert "Choose action3 or action4. They did action4." in printed and "when the other agent chose action3" in printed


def test_bad_input(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "notes.json").write_text("mine")
    (tmp_path / "regret.png").write_text("mine")
    (tmp_path / "lacks.txt").write_text("{first} or what?")
    (tmp_path / "unknown.txt").write_text("{first} {second} {colour}")
    (tmp_path / "open.txt").write_text("{first} {second} {")
    wrong = copy(run, tmp_path / "wrong")
    tensors = load_file(wrong / "adapter_model.safetensors")
    save_file({key: tensor[:, :-1].contiguous() for key, tensor in tensors.items()}, wrong / "adapter_model.safetensors")
    (copy(run, tmp_path / "truncated") / "adapter_model.safetensors").write_bytes(b"1234")
    (copy(run, tmp_path / "lost") / "adapter_model.safetensors").unlink()
    (copy(run, tmp_path / "json") / "config.json").write_text("{")
    cases = [
        (["tests"], "not a run folder"), ([str(tmp_path / "json")], "not a run folder"), ([str(tmp_path / "lost")], "is not finished"),
        ([str(tmp_path / "truncated")], "cannot read the adapter"), ([str(wrong)], "another model"),
        ([str(copy(run, tmp_path / "gone", model="no/such"))], "no/such"), ([str(run), str(tmp_path / "gone")], "differ in their model"),
        ([str(run), str(copy(run, tmp_path / "free", sampling="free"))], "--sampling"),
        ([str(run), "--opponent", "me"], "--opponent"), ([str(run), "--actions", "A", "A"], "--actions"), ([str(run), "--rounds", "0"], "--rounds"),
        ([str(run), "--samples", "0"], "--samples"),
        ([str(run), "--samples", "9999999", "--rounds", "999999"], "--samples"), ([str(run), "--xi", "nan"], "--xi"), ([str(run), "--illegal", "6"], "--illegal"),
        ([str(run), "--actions", "moon", "moon3"], "told apart"), ([], "RUN"), ([str(run), "--layout", "diagonal"], "--layout"),
        ([str(run), "--prompt-file", str(tmp_path / "lacks.txt")], "{second}"), ([str(run), "--prompt-file", str(tmp_path / "unknown.txt")], "{colour}"),
        ([str(run), "--prompt-file", str(tmp_path / "open.txt")], "--prompt-file"), ([str(run), "--prompt-file", "nowhere.txt"], "--prompt-file"),
        ([str(run), str(run.parent / ".." / run.parent.name / run.name)], "given twice"),
        ([str(run), str(copy(run, tmp_path / "elsewhere", layout=["rows"])), "--transfer"], "evaluate them apart"),
        ([str(run), "--json", str(tmp_path / "notes.json")], "--json"), ([str(run), "--plot", str(tmp_path)], "--plot"),
    ]
    for argv, word in cases:
        with refused(capsys, word):
            evaluate.main(argv)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused(capsys, "tests/requirements.txt"):
        evaluate.main([str(run), "--plot", str(tmp_path / "figures")])
    assert (tmp_path / "notes.json").read_text() == (tmp_path / "regret.png").read_text() == "mine"


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_wording_can_be_answered_by_the_embedded_model(template, tiny):
    """The boundary holds and both names are told apart in every wording and layout."""
    for layout in LAYOUTS:
        texts = prompts(payoff_array("chicken"), ("action3", "action4"), layout, TEMPLATES[template])
        assert len(texts) == 16 and encode(tiny[1], texts, ("action3", "action4"))[1][0] != []


def test_layouts_show_the_same_points():
    seen = set()
    for layout, (rows, columns) in LAYOUTS.items():
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table_text(payoff_array("chicken"), ("c", "d"), layout).split("\n")]
        cells = {(line[0], name): line[1 + i] for line in lines[1:] for i, name in enumerate(lines[0][1:])}
        assert cells == {("c", "c"): "2, 2", ("c", "d"): "1, 4", ("d", "c"): "4, 1", ("d", "d"): "0, 0"}
        seen.add((lines[0][1], lines[1][0]))
    assert len(seen) == 4
