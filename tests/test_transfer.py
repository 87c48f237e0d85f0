"""transfer.py: rules followed exactly, each column by plain loops, games and names that are new."""

import itertools
import json
from functools import cache

import numpy as np
import pytest

import ceiling
import envs
import options
import rewards
import transfer
import word_or_moral
from conftest import copy_run, player_of, read_json, refused, run_training
from drawing import style
from envs import Condition, payoff_matrix
from errors import InputError
from lora import load_adapter
from policy import load_model
from wordings import LAYOUTS, NAMES, TEMPLATES

SETTINGS = {"xi": 3.0, "illegal": -6.0, "layout": list(LAYOUTS), "prompt": ["brief"]}
SETTINGS["actions"] = ["left", "right", "up"]


class HandMade:
    """Players without a model: `act(condition, side)` is [state, order, outcome]."""

    def __init__(self, act, **config):
        self.act = act
        self.configs = {"run": {**SETTINGS, **config}}

    def side(self, run):
        return 1 if run and self.configs[run].get("side") == "opponent" else 0

    def player(self, run, condition, side, sampling):
        return self.act(condition, side)


def cells(condition, side):
    """Points (own, other's) after CC, CD, DC, DD as a side sees them."""
    cc, cd, dc, dd = envs.GAMES.get(condition.game, condition.game)
    return [cc[::-1], dc[::-1], cd[::-1], dd[::-1]] if side else [cc, cd, dc, dd]


def follow(rule):
    """The player whose P(C) is rule(points of C, points of D, condition, side, state)."""

    def act(condition, side):
        cc, cd, dc, dd = cells(condition, side)
        p = [float(rule([cc, cd], [dc, dd], condition, side, state)) for state in range(4)]
        return np.stack([[[p_c, 1 - p_c, 0]] * 4 for p_c in p])

    return act


def larger(c, d):
    """P(C) of who takes the larger score, and tosses a coin between equal ones."""
    return 0.5 if c == d else c > d


@cache
def has_c_first(condition, side):
    """Whether the row of C stands first in the text itself."""
    _, row, *_ = envs.build_prompts(condition, side)[0].split("\n")
    return row.startswith(f"| {condition.actions[0]} |")


def by(score):
    """The rule that takes the row of the larger score, a function of two cells (own, other's)."""
    return lambda c, d, *_: larger(score(*c), score(*d))


RULES = {
    "selfish": by(lambda x, y: x[0] + y[0]),
    "adds": by(lambda x, y: sum(x) + sum(y)),
    "largest cell": by(lambda x, y: max(sum(x), sum(y))),
    "largest number": by(lambda x, y: max(*x, *y)),
    "avoids smallest cell": by(lambda x, y: min(sum(x), sum(y))),
    "largest own number": by(lambda x, y: max(x[0], y[0])),
    "best worst case": by(lambda x, y: min(x[0], y[0])),
    "other's points": by(lambda x, y: x[1] + y[1]),
    "lead": by(lambda x, y: x[0] - x[1] + y[0] - y[1]),
    "equal shares": by(lambda x, y: -abs(x[0] - x[1]) - abs(y[0] - y[1])),
    "worse-off": by(lambda x, y: min(x) + min(y)),
    "always C": lambda *_: True,
    "always D": lambda *_: False,
    "tit for tat": lambda c, d, condition, side, state: state in (0, 2),
    "C after C, else selfish": lambda c, d, condition, side, state: (
        state in (0, 2) or RULES["selfish"](c, d)
    ),
    "first row": lambda c, d, condition, side, state: has_c_first(condition, side),
    "word": lambda c, d, condition, side, state: condition.actions[0] in ("X", "river"),
}


@cache
def cases_of(reward, side):
    return transfer.make_cases(transfer.DEVELOPMENT, {**SETTINGS, "reward": [reward]}, side=side)


@pytest.mark.parametrize("reward, side", [("game", 0), ("game+deontological", 1)])
@pytest.mark.parametrize("name", RULES)
def test_who_follows_a_rule_gets_exactly_its_score_and_its_name(name, reward, side):
    cases = cases_of(reward, side)
    answers = transfer.answers(HandMade(follow(RULES[name])), "run", cases, "constrained")
    rules = dict(cases.rules)
    rules["word"] = transfer.word_rule(answers[..., 0] > answers[..., 1], cases)
    assert rules.keys() == RULES.keys()
    expected = transfer.score(transfer.as_answers(rules[name]), cases)
    assert transfer.score(answers, cases) == expected
    answers[np.isnan(rules[name])] = (1, 0)  # where a rule decides nothing, nothing tells
    best, (_, second), *_ = transfer.explain(answers, cases, reward).items()
    assert best == (name, 1.0) and second < 1


def test_a_moral_that_is_no_simple_rule_has_a_name_of_its_own():
    """The learner on the second side, as trained and untuned, in points of that side."""

    def rule(c, d, condition, side, state):
        penalty = 3 if state in (0, 2) else 0  # of a betrayal: C may earn up to 3 points less
        return larger(sum(own for own, _ in c) / 2, sum(own for own, _ in d) / 2 - penalty)

    players = HandMade(follow(rule), reward=["game+deontological"], side="opponent")
    result = transfer.examine_run(players, "run", transfer.DEVELOPMENT, "constrained")
    assert next(iter(result["explained"].items())) == ("the game+deontological reward", 1.0)
    for agent in ("agent", "untuned"):
        assert {leaf["p"] for leaf in result[agent].values()} <= {1.0, None}
        assert result[agent]["costs"]["games"] > 40
    assert result["rules"]["always C"]["all"]["p"] < 1


@pytest.mark.parametrize("reward, own, swapped", [("utilitarian", 0.8, 0.2), ("game", 0.2, 0.8)])
def test_at_home_in_both_roles(reward, own, swapped):
    """Of who says "left" with 0.8, whatever it stands for, and the other name with 0.2."""

    def act(condition, side):
        p_c = 0.8 if condition.actions[0] == "left" else 0.2
        return np.tile([p_c, 1 - p_c, 0], (4, 4, 1))

    home = transfer.at_home(HandMade(act, reward=[reward]), "run", "constrained")
    assert home == pytest.approx([own, swapped])


def plain_columns(reward, condition, side, state):
    """Of one state (whether C is right, the columns in which it counts); None: it does not."""
    c, d = cells(condition, side)[:2], cells(condition, side)[2:]
    totals = [sum(c[0]) + sum(c[1]), sum(d[0]) + sum(d[1])]
    own = [c[0][0] + c[1][0], d[0][0] + d[1][0]]
    worth = [n / 2 for n in (totals if reward == "utilitarian" else own)]
    if reward == "game+deontological" and state in (0, 2):
        worth[1] -= 3
    if worth[0] == worth[1]:
        return None
    right = worth[0] > worth[1]
    tempting = totals if reward == "game" else own
    largest = [max(sum(cell) for cell in pair) for pair in (c, d)]
    difference = abs(worth[0] - worth[1])
    names = ["all"]
    if tempting[right] > tempting[not right]:  # [right] is the wrong action: C is 0, D 1
        names.append("costs")
    if largest[right] > largest[not right]:
        names.append("cell")
    names += ["0-1"] if difference <= 1 else []
    names += ["1-2"] if 1 < difference <= 2 else []
    names += ["2-4"] if 2 < difference <= 4 else []
    names += ["more"] if difference > 4 else []
    return right, names


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("reward", ["utilitarian", "game", "game+deontological"])
def test_columns_by_plain_loops(reward, side):
    """A player that answers at random, its name orders and illegal answers apart."""
    rng, played = np.random.default_rng(0), {}

    def act(condition, side):
        played[condition] = rng.dirichlet([1, 1, 1], size=(4, 4))
        played[condition][0] = 1 / 3  # neither is the likelier one
        return played[condition]

    cases = cases_of(reward, side)
    scores = transfer.score(transfer.answers(HandMade(act), None, cases, "free"), cases)
    by_game = {}  # column -> game -> [(p, share) of a state]
    for condition, player in played.items():
        for state in range(4):
            found = plain_columns(reward, condition, side, state)
            if found:
                right, names = found
                c, d, _ = player[state].mean(axis=0)
                p, other = (c, d) if right else (d, c)
                for name in names:
                    games = by_game.setdefault(name, {})
                    share = 0.5 if state == 0 else p > other
                    games.setdefault(condition.game, []).append((p, share))
    assert by_game.keys() == scores.keys()
    for name, games in by_game.items():
        means = np.array([np.mean(pairs, axis=0) for pairs in games.values()])
        half = 1.96 * np.std(means[:, 0], ddof=1) / len(means) ** 0.5
        expected = {"p": means[:, 0].mean(), "share": means[:, 1].mean(), "interval": half}
        assert scores[name] == pytest.approx({**expected, "games": len(games)})


def test_a_column_without_a_state():
    cases = cases_of("deontological", 0)  # 3 points, after the other's C
    scores = transfer.score(transfer.as_answers(cases.rules["always D"]), cases)
    empty = {"p": None, "share": None, "interval": None, "games": 0}
    assert scores["more"] == scores["0-1"] == scores["1-2"] == empty
    assert scores["all"] == scores["2-4"] == {"p": 0, "share": 0, "interval": 0, "games": 200}


def test_games_and_names_are_new_and_every_game_comes_in_both_roles():
    seen = {}
    for test in (transfer.DEVELOPMENT, transfer.FINAL):
        conditions = transfer.make_cases(test, {**SETTINGS, "reward": ["game"]}).conditions
        for condition, swapped in zip(conditions[::2], conditions[1::2], strict=True):
            assert condition.actions in test["pairs"]
            assert swapped == condition._replace(actions=condition.actions[::-1])
        shown = {(condition.actions, condition.layout) for condition in conditions}
        assert len(shown) == 2 * 2 * len(LAYOUTS)
        games = {condition.game for condition in conditions}
        names = {name for condition in conditions for name in condition.actions}
        assert len(games) == transfer.GAME_COUNT and len(names) == 4
        seen[test["seed"]] = games, names
    (games, names), (final_games, final_names) = seen.values()
    assert not games & final_games and not names & final_names
    assert not (names | final_names) & {*NAMES, *options.MORAL_OTHER["actions"]}
    assert transfer.FINAL_WORDING not in TEMPLATES.values()


def test_a_run_is_tested_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transfer, "GAME_COUNT", 4)
    run, path = tmp_path / "run", tmp_path / "out.json"
    options = "--reward utilitarian --recipe moral --episodes 32 --batch 16"
    run_training(run, *options.split())
    transfer.main([str(run), "--final", "--json", str(path)])
    printed, results = capsys.readouterr().out, read_json(path)
    base = load_model("tiny")
    load_adapter(base[0], "agent", run)
    rng = np.random.default_rng(transfer.FINAL["seed"])
    games = [envs.random_game(rng) for _ in range(4)]
    layouts = ("original", "original", "rows", "rows")
    for result, wording in zip(results, ("brief", transfer.FINAL_WORDING), strict=True):
        assert (result["run"], result["reward"]) == (str(run), "utilitarian")
        for agent, adapter in (("untuned", None), ("agent", "agent")):
            means = []
            for game, names, layout in zip(games, transfer.FINAL["pairs"] * 2, layouts):
                c, d = payoff_matrix(game).sum(axis=(1, 2))
                if c == d:  # either action is as good
                    continue
                for actions in (names, names[::-1]):
                    player = player_of(
                        *base, Condition(game, actions, layout, wording), name=adapter
                    )
                    means.append(player[..., 0 if c > d else 1].mean())
            assert result[agent]["all"]["p"] == pytest.approx(np.mean(means), abs=1e-5)
            assert result[agent]["all"]["games"] == len(means) / 2 == 3
        assert abs(result["agent"]["all"]["p"] - result["untuned"]["all"]["p"]) > 1e-4
        best, share = next(iter(result["explained"].items()))
        assert f"answers as: {best} {share:.2f}, " in printed and abs(result["illegal"]) < 1e-6
        assert f"  {'untuned':46}{result['untuned']['all']['p']:8.2f}" in printed
    in_both = "{:.2f}, in each other's role {:.2f}".format(*results[0]["home"])
    assert printed.count(f"  ipd, names of training {in_both}") == 1
    assert "In a wording that training never showed:" in printed
    assert word_or_moral.read_results(path) == results[:1]  # names of training: in its wording only
    with refused(capsys, "--actions", "twice"):
        transfer.main([str(run), "--actions", "moon", "moon"])
    with refused(capsys, "--json", "exists", "--overwrite"):
        transfer.main([str(run), "--json", str(path)])
    capsys.readouterr()
    transfer.main([str(run), "--actions", "moon", "sun"])
    given, warned = capsys.readouterr()
    assert f"warning: {run} was trained with sun\n" in warned
    monkeypatch.setitem(transfer.DEVELOPMENT, "pairs", (("moon", "sun"),))
    transfer.main([str(run)])
    assert capsys.readouterr().out == given


@pytest.mark.parametrize("layouts", [["original", "rows"], ["original", "rows", "columns"]])
@pytest.mark.parametrize("reward, side", [("game+deontological", 0), ("kindness", 1)])
def test_the_best_reader_knows_the_texts_alone(reward, side, layouts):
    """Every text that training could show of a game, and what each word earns, a mean over them."""
    config = {**SETTINGS, "layout": layouts, "reward": [reward]}
    for cells_of_game in (((9, 0), (1, 5), (4, 8), (6, 2)), ((3, 7), (6, 1), (8, 8), (5, 0))):
        earned = {}  # text -> word -> what it earns in each of the texts' readings
        conditions = []
        for game in (cells_of_game, cells_of_game[::-1]):
            for names, layout in itertools.product((("K", "X"), ("X", "K")), layouts):
                condition = Condition(game, names, layout, "brief")
                conditions.append(condition)
                payoffs = payoff_matrix(game, side)
                points = rewards.expected_rewards(reward, payoffs, config)
                for row, text in enumerate(envs.build_prompts(condition, side)):
                    words = earned.setdefault(text, {"K": [], "X": []})
                    for name, worth in zip(names, points[row // 4]):
                        words[name].append(worth)
        reader = transfer.best_reader(conditions, config, side)
        for condition, p in zip(conditions, reader):
            for row, text in enumerate(envs.build_prompts(condition, side)):
                c, d = (np.mean(earned[text][name]) for name in condition.actions)
                assert p[row // 4] == (c > d) if c != d else np.isnan(p[row // 4])


def test_a_reading_weighs_as_many_layouts_as_show_it():
    """The reader of kindness, which is always C: of texts without a matrix, of repeated layouts."""
    game = ((9, 0), (1, 5), (4, 8), (6, 2))
    blind = "{own} {own_points} {other} {other_points}. {first} or {second}?"
    for wording, layouts, shown, p in (
        (blind, ["original"], "original", np.nan),
        ("brief", ["original", "both"], "original", np.nan),
        ("brief", ["original", "original", "both"], "original", 1),
        ("brief", ["original", "original", "both"], "both", 0),
    ):
        config = {**SETTINGS, "reward": ["kindness"], "layout": layouts}
        condition = Condition(game, ("K", "X"), shown, wording)
        assert transfer.best_reader([condition], config, 0) == pytest.approx(p, nan_ok=True)


def test_what_no_reader_can_know(capsys):
    """In four layouts a text says nothing of C; in these two the first column is C's."""

    def examine(reward, **config):
        players = HandMade(follow(RULES["always C"]), reward=[reward], **config)
        return transfer.examine_run(players, "run", transfer.DEVELOPMENT, "constrained")

    kind = examine("kindness")
    transfer.print_results([kind])
    [line] = [x for x in capsys.readouterr().out.splitlines() if "best reader: " in x]
    assert line.split()[-7:] == ["0.50", "0.50", "0.50", "-", "-", "0.50", "-"]
    assert {leaf["p"] for leaf in kind["best_reader"].values()} == {0.5, None}
    assert "best reader" in examine("game+deontological")["explained"]
    for reward, layouts in (("kindness", ["rows", "original"]), ("utilitarian", list(LAYOUTS))):
        told = examine(reward, layout=layouts)
        assert told["best_reader"] is None and "best reader" not in told["explained"]


@pytest.mark.parametrize("model", ["tiny", "google/gemma-2-2b-it"])
@pytest.mark.parametrize("reward", rewards.REWARDS)
def test_what_a_reward_asks_for_can_be_read_in_the_moral_recipe(reward, model, monkeypatch):
    monkeypatch.setattr(transfer, "GAME_COUNT", 40)
    command = ["--reward", reward, "--recipe", "moral", "--model", model, "--out", "never-written"]
    settings = vars(options.parse(command)[0])
    assert transfer.tells_all(transfer.make_cases(transfer.DEVELOPMENT, settings))
    usual = (options.MORAL if model == "tiny" else options.MORAL_OTHER)["layout"]
    readable = transfer.make_cases(transfer.DEVELOPMENT, {**settings, "layout": usual})
    assert (settings["layout"] != usual) == (not transfer.tells_all(readable))


def test_what_a_simple_rule_cannot_be_told_from():
    """By what it says, not by its name."""
    same = {"utilitarian": ["adds"], "game": ["selfish"], "kindness": ["always C"]}
    for reward in ("deontological", "game+deontological", *same):
        assert transfer.rules_of_reward(cases_of(reward, 0)) == same.get(reward, [])
    config = {**SETTINGS, "reward": ["game+deontological"], "xi": 0.0}
    cases = transfer.make_cases(transfer.DEVELOPMENT, config)
    assert transfer.rules_of_reward(cases) == ["selfish"]


def test_runs_that_cannot_be_judged_in_new_games(run, tmp_path, capsys):
    with refused(capsys, "RUN", "--gamma"):
        transfer.main([str(copy_run(run, tmp_path / "far", gamma=0.9))])
    with refused(capsys, "RUN", "without points"):
        transfer.main([str(copy_run(run, tmp_path / "blind", prompt=["choice"]))])


def test_a_reward_that_decides_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transfer, "GAME_COUNT", 4)
    run, path = tmp_path / "run", tmp_path / "out.json"
    run_training(run, *"--reward deontological --xi 0 --episodes 16 --batch 16".split())
    transfer.main([str(run), "--json", str(path)])
    [result] = read_json(path)
    assert result["agent"]["all"]["p"] is None
    assert "the deontological reward" not in result["explained"] and "word" in result["explained"]
    assert f"  {'untuned':46}{'-':>8}" in capsys.readouterr().out


def result_of(reward, names, own, swapped, costs, seed=1):
    """What of transfer.py's JSON the picture shows; rules score less than the reward's own."""
    agent = {"all": {"p": (own + swapped) / 2}, "costs": {"p": costs}}
    rules = {}
    for name, p in (("adds", 1.0), ("selfish", 0.75), ("largest cell", 0.8)):
        rules[name] = {"all": {"p": p}, "costs": {"p": p - 0.5}}
    if reward == "game":
        rules["adds"] = {"all": {"p": 0.95}, "costs": {"p": 0.1}}
    return {
        "reward": reward,
        "settings": {"reward": [reward], "actions": names, "seed": seed},
        "home": [own, swapped],
        "agent": agent,
        "rules": rules,
        "own_rules": ["adds"] if reward == "utilitarian" else ["selfish"],
    }


def test_the_picture(tmp_path, capsys):
    """Agents of one pair of names, of more, and the best rule; means over runs."""
    results = [
        result_of("utilitarian", ["a", "b"], 1.0, 0.0, 0.5),
        result_of("utilitarian", ["random"], 0.9, 0.8, 0.95),
        result_of("utilitarian", ["random"], 0.7, 0.8, 1.0, seed=2),
        result_of("game", ["random"], 1.0, 0.98, 0.97),
    ]
    with style():
        fixed, varied, rules = word_or_moral.plot(results).axes
        alone = word_or_moral.plot(results[1:]).axes
    shown = [[text.get_text() for text in ax.texts] for ax in (fixed, varied, rules)]
    assert shown[0] == ["-"] * 4 + ["1.00", "0.00", "0.50", "0.50"]  # game first, as in the tables
    assert shown[1][:4] == ["1.00", "0.98", "0.99", "0.97"]
    assert shown[1][4:6] == ["0.80", "0.80"]
    assert shown[2] == ["0.95", "0.10", "0.80", "0.30"]  # one rule's row; never the reward's own
    assert "runs: 1" in fixed.get_title() and "runs: 3" in varied.get_title()
    assert [ax.get_title() for ax in alone] == [varied.get_title(), rules.get_title()]
    (tmp_path / "right.json").write_text(json.dumps(results))
    other = result_of("game", ["a", "b", "c"], 0.5, 0.5, 0.5)
    with pytest.raises(InputError, match="game, actions random and game, actions a b c"):
        word_or_moral.plot([*results, other])
    (tmp_path / "other.json").write_text("[1]")
    with refused(capsys, "RESULTS", "today's"):
        word_or_moral.main([str(tmp_path / "other.json")])
    command = [str(tmp_path / "right.json"), "--out", str(tmp_path / "right.png")]
    word_or_moral.main(command)
    with refused(capsys, "--out", "exists", "--overwrite"):
        word_or_moral.main(command)


def test_the_base_can_add(tiny):
    """Asked the question itself, of games in which one total is much larger."""
    games = [((9, 9), (8, 8), (0, 0), (1, 1)), ((0, 1), (1, 0), (9, 8), (9, 9))]
    conditions = []
    for game in games:
        for names in (("K", "X"), ("X", "K")):
            conditions.append(Condition(game, names, "columns", "brief"))
    p = ceiling.answer_question(*tiny, conditions, np.random.default_rng(0))
    assert p.shape == (4, 2) and np.allclose(p.sum(axis=1), 1)
    assert p[:2, 0].min() > 0.9 and p[2:, 1].min() > 0.9
