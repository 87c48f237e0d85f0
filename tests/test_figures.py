"""Pictures: each seed as long as it lasts, names as they are, the caller's matplotlib untouched."""

import json

import numpy as np
import pytest
from matplotlib import pyplot

import drawing
import evaluate
import figures
from conftest import change_json, read_json, run_training
from grid import read_metrics


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """What evaluate.py writes of seeds of 4 and of 2 updates."""
    folder = tmp_path_factory.mktemp("figures")
    for episodes in ("32", "16"):
        options = f"--reward game --prompt brief --batch 8 --episodes {episodes} --seed {episodes}"
        run_training(folder / episodes, *options.split())
        change_json(folder / episodes / "config.json", episodes=32)  # both are of one group
    runs = [str(folder / "32"), str(folder / "16")]
    few = {axis: values[:2] for axis, values in evaluate.AXES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "AXES", few)
        evaluate.main([*runs, "--game", "ipd", "--axes", "--json", str(folder / "results.json")])
    return folder / "results.json"


def test_a_seed_that_stopped_keeps_its_last_update(path):
    long, short = (read_metrics(path.parent / name) for name in ("32", "16"))
    with figures.style():
        curves, played = (f(read_json(path)) for f in (figures.plot_curves, figures.plot_training))
    episodes, shown = curves.axes[0].lines[0].get_data()
    rewards = [[float(row["reward"]) for row in rows] for rows in (long, short + short[-1:] * 2)]
    assert episodes.tolist() == [8, 16, 24, 32] and played.axes[0].get_xlim() == (0, 32)
    assert shown == pytest.approx(np.mean(rewards, axis=0))
    for figure in (curves, played):
        assert drawing.EARLY in figure.get_suptitle().replace("\n", " ")


@pytest.mark.filterwarnings("ignore:Glyph")  # which no font has
def test_names_are_shown_as_they_are_and_the_callers_settings_stay(path):
    """No mathematics in them, whether the signs stand in one name or in two of a title."""
    text = path.read_text()
    odd = {"action3": "$\\foo", "action4": "x$中", "game (n=2)": "$_a^{ \\b%$ 🙂"}
    for old, new in odd.items():
        text = text.replace(old, json.dumps(new)[1:-1])
    mine, own = path.parent / "mine.json", pyplot.figure()
    mine.write_text(text)
    with pyplot.rc_context({"font.size": 33}):
        before = dict(pyplot.rcParams), pyplot.get_backend()
        figures.main([str(mine), "--overwrite"])
        assert (dict(pyplot.rcParams), pyplot.get_backend()) == before
    assert pyplot.get_fignums() == [own.number]
    pyplot.close(own)
    assert len([*(path.parent / "figures").glob("*.png")]) == 9
