"""transfer.py: each figure against a calculation of its own, and what its grid never shows."""

from functools import cache

import matplotlib.image
import numpy as np
import pytest

import train
import transfer
from conftest import copy_run, player_of, read_json, refused, run_training
from envs import NAMES, Condition, action_names, payoff_matrix, random_game
from evaluate import Players
from rewards import REWARDS, moral_accuracy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one update."""
    out = tmp_path_factory.mktemp("transfer") / "run"
    run_training(out, "--reward", "utilitarian", "--episodes", "256")
    return out


def test_transfer(run, tiny, tmp_path, capsys, monkeypatch):
    """Each column, for the untuned model and a trained run."""
    monkeypatch.setattr(transfer, "NEW_GAMES", len(transfer.NEW_NAMES))
    folder = tmp_path / "results"
    transfer.main([str(run), "--results", str(folder)])
    printed = capsys.readouterr().out
    assert "untuned, by the utilitarian reward" in printed and "Not new" not in printed
    results = read_json(folder / "transfer.json")
    before = results["baseline"]["transfer"]

    @cache
    def player(*condition):
        return player_of(*tiny, Condition(*condition))

    def mean(reward, games, names, *words):
        accuracies = []
        for game, pair in zip(games, names):
            own = player(game, pair, *words)
            accuracies.append(moral_accuracy(reward, own, payoff_matrix(game)))
        known = [value for value in accuracies if not np.isnan(value)]
        return pytest.approx(np.mean(known)) if known else None  # None: no action is preferred

    rng = np.random.default_rng(0)
    games = [random_game(rng) for _ in range(transfer.NEW_GAMES)]
    old, new, ipd = [("action1", "action2")], transfer.NEW_NAMES, ["ipd"] * 8
    for reward in REWARDS:
        assert before[reward] == {
            "nothing": mean(reward, ipd, old, "original", "structured"),
            "roles": mean(reward, ipd, [old[0][::-1]], "original", "structured"),
            "names": mean(reward, ipd, new, "original", "structured"),
            "layout": mean(reward, ipd, old, "both", "structured"),
            "wording": mean(reward, ipd, old, "original", "unstructured"),
            "game": mean(reward, games, old * 8, "original", "structured"),
            "game, names, layout": mean(reward, games, new, "both", "structured"),
            "all": mean(reward, games, new, "both", "unstructured"),
        }
    after, [_, group] = results["runs"][0]["transfer"]["utilitarian"], results["groups"]
    assert after["nothing"] > before["utilitarian"]["nothing"] + 0.1
    assert group["transfer"]["utilitarian"]["all"]["mean"] == after["all"]

    # The table has a row for either, the picture too.
    head, rule, *rows = (folder / "transfer.md").read_text().splitlines()
    assert head == "| agent | " + " | ".join(after) + " |" and set(rule) == set("| -")
    own = {"untuned, by the utilitarian reward": before["utilitarian"], "utilitarian": after}
    for row, (name, leaves) in zip(rows, own.items(), strict=True):
        cells = [f"{value:.2f}" for value in leaves.values()]
        assert row == f"| {name} | " + " | ".join(cells) + " |"
    for picture in ("transfer.png", "learning.png"):
        assert matplotlib.image.imread(folder / picture).std() > 0.05
    (point,), *_ = [line.get_xydata() for line in transfer.plot_learning(results).axes[0].lines]
    assert point == pytest.approx([transfer.WINDOW / 2, before["utilitarian"]["nothing"]])

    with refused(capsys, "--results", "transfer.json exists", "--overwrite"):
        transfer.main([str(run), "--results", str(folder)])


def test_transfer_of_odd_runs(run, tmp_path, capsys, monkeypatch):
    """Neither action is better; something is not new; it sat on the other side of the game."""
    monkeypatch.setattr(transfer, "NEW_GAMES", 2)
    known = {"layout": ["original", "both"], "actions": ["action1", "action2", "K"]}
    tied = copy_run(run, tmp_path / "tied", game=["bach-stravinsky"], **known)
    transfer.main([str(tied), "--results", str(tmp_path / "results")])
    assert f"Not new to {tied}: K both" in capsys.readouterr().out
    results = read_json(tmp_path / "results" / "transfer.json")
    accuracies = results["runs"][0]["transfer"]["utilitarian"]
    assert accuracies["nothing"] is None and 0 < accuracies["game"] < 1  # 3 + 2 for either action
    assert "| utilitarian | - |" in (tmp_path / "results" / "transfer.md").read_text()

    # Here C is the better action of the first side, D that of the other.
    points = "3 0 3 3 0 0 0 3".split()
    side = copy_run(run, tmp_path / "side", game=points, side="opponent")
    players, config = Players([side]), read_json(side / "config.json")
    seen = players.player(side, transfer.training_condition(config), True, "constrained")
    assert payoff_matrix(transfer.training_condition(config).game)[1, 1].tolist() == [0, 3]
    accuracies = transfer.accuracies(players, side, config)
    assert accuracies["game"]["nothing"] == pytest.approx(seen[..., 1].mean())


@pytest.mark.parametrize("model, count", [("tiny", 3 * (4 + 4 + 4 + 6)), ("some/hub", 3 * 4 * 2)])
def test_the_grid_never_shows_what_is_new_at_test(model, count, tmp_path):
    runs = list(transfer.training_grid(model, 3, tmp_path))
    assert len(runs) == len({out for out, _ in runs}) == count
    tested = {name for names in transfer.NEW_NAMES for name in names}
    assert not tested & {*NAMES}
    kinds = set()
    for _, options in runs:
        args, _ = train.parse([*map(str, options), "--out", "never-written"])
        assert not tested & {*action_names(args.actions)}
        assert transfer.NEW_WORDING not in args.prompt
        assert transfer.NEW_LAYOUT not in args.layout or model != "tiny"
        varied = args.actions == ["random"], len(args.layout) > 1, "random" in args.game
        kinds.add((*args.reward, *varied, args.seed))
        assert args.opponent == ["random"] and args.model == model
    assert len(kinds) == len(runs)


APART = [({"model": "no/such"}, "differ in their model"), ({"layout": ["rows"]}, "layout")]


@pytest.mark.parametrize("bad, words", APART)
def test_runs_that_cannot_be_tested_together(bad, words, run, tmp_path, capsys):
    with refused(capsys, "RUN", words):
        transfer.main([str(run), str(copy_run(run, tmp_path / "bad", **bad))])
