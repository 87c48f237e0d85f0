"""The paper's figures: each is drawn, from the runs that are there, and says what it is of."""

from itertools import product

import numpy as np
import pytest
from matplotlib.figure import Figure

import drawing
import evaluate
import figures
import paper
import paper_figures
from conftest import copy_run, read_json, refused, run_training
from paper_figures import EVALUATIONS, FIGURES

NUMBERS = "2a 2b 3 4 5 12 13 14 15 16 17 18 19 20 21 22 23 24 25".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs of the grid, the second one unlearns; the others are copies."""
    folder = tmp_path_factory.mktemp("paper") / "runs"
    short = "--prompt brief --batch 8 --episodes 32 --sampling free".split()
    for rewards in (["game", "utilitarian"], ["game"]):
        name = "-then-".join(rewards)
        run_training(folder / f"{name}-vs-tit-for-tat-seed1", "--reward", *rewards, *short)
    for opponent in [*paper.GRID][1:]:
        for name in ("game", "game-then-utilitarian"):
            run = folder / f"{name}-vs-tit-for-tat-seed1"
            copy_run(run, folder / f"{name}-vs-{opponent}-seed1", opponent=[opponent])
    copy_run(folder / "game-vs-tit-for-tat-seed1", folder / "game-vs-tit-for-tat-swapped-seed1")
    return folder


@pytest.fixture(scope="module")
def results(runs):
    """What evaluate.py writes of the two, given in the order of their names."""
    options = "--game ipd chicken --axes".split()
    outs = sorted(map(str, runs.glob("*-vs-tit-for-tat-seed1")))
    axes = {"actions": (("A", "B"),), "layout": (), "persona": ()}
    axes["prompt"] = ("structured", "explicit", "game", "game_state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "AXES", axes)
        return evaluate.evaluate(evaluate.parse([*outs, *options]))


def evaluated(results, name):
    """As if each evaluation had been made."""
    opponent, options = EVALUATIONS[name]
    args = evaluate.parse(["run", *options])
    asked = {key: getattr(args, key) for key in evaluate.ASKED}
    runs = [{**run, "opponent": [opponent]} for run in results["runs"]]
    return drawing.in_order({**results, **asked, "runs": runs})


def drawn(results, number):
    figure = FIGURES[number]
    parts = [evaluated(results, name) for name in figure.tests]
    with figures.style():
        return figure.plot(*(paper_figures.select(part, figure.phases) for part in parts))


def test_every_figure_of_the_paper_is_drawn_and_nothing_is_trained(runs, results, monkeypatch):
    assert [*FIGURES] == NUMBERS
    assert {name for figure in FIGURES.values() for name in figure.tests} == {*EVALUATIONS}
    monkeypatch.setattr(paper, "train_all", None)  # a call would fail
    tested = []

    def report(outs, folder, name):
        tested.append(name)
        opponent = EVALUATIONS[name].opponent
        assert outs and all(f"-vs-{opponent}-seed1" in out.name for out in outs)
        return evaluated(results, name)

    monkeypatch.setattr(paper, "report", report)
    monkeypatch.setattr(Figure, "savefig", lambda self, path: path.touch())  # it takes a second
    paper.main(["--draw", "--results", str(runs.parent)])
    pictures = {path.name for path in (runs.parent / "figures").iterdir()}
    assert pictures == {f"figure-{number}.png" for number in NUMBERS}
    assert tested == [*EVALUATIONS]  # each once
    tested.clear()
    paper.main(["--draw", "20", "13", "21", "--results", str(runs.parent)])
    assert tested == ["training-names-vs-tit-for-tat", "training-vs-tit-for-tat-swapped"]


def test_nothing_to_draw(tmp_path, capsys):
    with refused(capsys, "--results", "no finished run"):
        paper.main(["--draw", "--results", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_pictures_show_what_was_tested(results):
    """Both roles, the wordings of each picture, and what is played in a prompt without points."""
    regrets = [text.get_text() for text in drawn(results, "20").axes[0].texts]
    expected = []
    for part, game in product(("games", "swapped"), ("ipd", "chicken")):
        for group in drawing.in_order(results)["groups"]:
            expected.append(f"{group[part][game]['regret']['deontological']['mean']:.2f}")
    assert regrets == expected and regrets[:6] != regrets[6:]
    for number, wordings in (("17", ["structured", "explicit"]), ("18", ["game", "game_state"])):
        labels = drawn(results, number).axes[0].get_xticklabels()
        assert [label.get_text() for label in labels] == wordings
    panels = drawn(results, "19").axes
    heights = [[bar.get_height() for bar in ax.patches] for ax in panels]
    assert len(panels) == 2 and heights[0] != heights[1]


def test_what_is_not_there_is_named(runs, tmp_path, capsys):
    """One run, tested in earnest: figure 13 alone is drawn."""
    name = "game-vs-tit-for-tat-swapped-seed1"
    copy_run(runs / name, tmp_path / "runs" / name)
    paper.main(["--draw", "--results", str(tmp_path)])
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["figure-13.png"]
    printed = capsys.readouterr().out
    for number in NUMBERS:
        assert (f"Figure {number}: 0 of " in printed) == (number != "13")
    name = "training-vs-tit-for-tat-swapped"
    assert [group["n"] for group in read_json(tmp_path / f"{name}.json")["groups"]] == [1, 1]
    assert "| untuned |" in (tmp_path / f"{name}.md").read_text()


def test_a_dashed_line_stands_at_the_switch(results):
    for number, count in (("3", 2), ("12", 2), ("2a", 0)):
        lines = [line for ax in drawn(results, number).axes for line in ax.lines]
        dashed = [line for line in lines if line.get_linestyle() == "--"]
        assert [line.get_xdata()[0] for line in dashed] == [16] * count  # half of 32 episodes
        assert (drawing.SWITCH in drawn(results, number).get_suptitle()) == bool(count)


def test_agents_are_in_the_order_of_the_tables(results):
    names = ["untuned", "game", "game then utilitarian"]
    assert [group["name"] for group in results["groups"]] != names
    assert [ax.get_title() for ax in drawn(results, "5").axes] == names
    legend = drawn(results, "4").axes[0].get_legend_handles_labels()
    assert legend[1] == names


def test_titles_say_what_is_tested(results):
    said = {
        "4": "against random, 5 rounds; C is action3, D is action4",
        "2b": "In training: ipd, against learner, C is action1, D is action2, wording brief",
        "20": "what varies: which name is C",
        "22": "what varies: the layout of the points",
        "24": "what varies: the sentence of values",
    }
    for number, words in said.items():
        assert words in drawn(results, number).get_suptitle().replace("\n", " ")
    part = {**results, "prompt": "poetic", "layout": "both", "persona": "moral"}
    assert drawing.say_tested(part).endswith("; wording poetic; layout both; persona moral")
    rows = drawn(results, "22").axes[0].get_yticklabels()
    assert [row.get_text() for row in rows[:3]] == [
        "layout original: ipd",
        "layout original: chicken",
        "layout rows: ipd",
    ]


def test_intervals_stay_within_what_is_possible(results):
    """A mean of 0.9 with 0.5 on both sides, of two seeds; 0.05 the same."""
    groups = [{**group, "n": 2} for group in results["groups"]]
    bars = [{"x": {"mean": 0.9, "ci95": 0.5}, "y": {"mean": 0.05, "ci95": 0.5}}] * len(groups)
    with figures.style():
        panels = {"p": figures.Panel(bars, 1, [0, 0, 0.93])}
        [ax] = figures.plot_bars({**results, "groups": groups}, panels, "").axes
        whiskers = ax.collections[0].get_segments()
        assert np.array(whiskers)[:, :, 1] == pytest.approx(np.array([[0.4, 1], [0, 0.55]]))
        assert not ax.texts  # there are bars
        [[ax]] = drawing.new_figure(2, 2)[1]
        drawing.draw_band(ax, [1, 2], np.array([[0, 1], [0.4, 1]]), (0, 1), color="red")
        heights = ax.collections[0].get_paths()[0].vertices[:, 1]
        assert heights.min() == 0 and heights.max() == 1


def test_an_agent_without_a_bar_says_why(results):
    groups = results["groups"]
    bars = [{"CC": {"mean": 0.0, "ci95": None}} for _ in groups]
    with figures.style():
        panel = figures.Panel(bars, 1, [1.0, 0.0, 0.97])  # the second one defects
        [ax] = figures.plot_bars(results, {"P(C)": panel}, "").axes
    assert [text.get_text() for text in ax.texts] == ["illegal 100%", "illegal 97%"]


def test_rewards_are_normalised_and_averaged():
    config = {"game": ["ipd"], "reward": ["game", "deontological"], "xi": 3, "illegal": -6}
    log = [{"phase": "game", "reward": "-6"}, {"phase": "game", "reward": "4"}]
    log += [{"phase": "deontological", "reward": "0"}, {"phase": "deontological", "reward": "-3"}]
    values = paper_figures.normalised_rewards(log, config)
    assert values.tolist() == [0, 1, 1, 0.5]
    rising = drawing.moving_average(np.arange(12.0), 10)
    assert rising.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5.5, 6.5]
