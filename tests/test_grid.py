"""Grids of runs, their tables, and what learning.py calls learned."""

import subprocess
import sys
from argparse import Namespace
from unittest.mock import Mock

import pytest

import grid
import learning
import paper
import train
from conftest import ROOT, read_json, refused, run_training
from errors import InputError
from runs import RunFolder, write_json


def test_a_grid_may_be_stopped_and_given_again(tmp_path, monkeypatch):
    """What is finished is skipped, what was interrupted is resumed, to the very bytes."""
    options = "--reward game --prompt brief --episodes 24 --batch 8 --save-every 0".split()
    whole, stopped, new = outs = [tmp_path / name for name in ("whole", "stopped", "new")]
    run_training(whole, *options)
    save = RunFolder.save

    def interrupt(folder, learners, state):
        save(folder, learners, state)
        if state["updates"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", interrupt)
    with pytest.raises(SystemExit):
        run_training(stopped, *options)
    assert (stopped / "state.safetensors").exists()
    new.mkdir()  # killed before its first state was saved: to be started again
    (new / "config.json").write_bytes((whole / "config.json").read_bytes())
    before = (whole / "result.json").stat().st_mtime_ns
    started = Mock(side_effect=grid.run_script)
    monkeypatch.setattr(grid, "run_script", started)
    runs = [(out, options) for out in outs]
    assert list(grid.train_all(runs, Namespace(model="tiny", jobs=2))) == outs
    assert sorted(call.args[1] for call in started.mock_calls) == ["--resume", "--reward"]
    assert (whole / "result.json").stat().st_mtime_ns == before
    for other in (["--seed", "2"], ["--model", "other"], ["--until", "0.9"]):
        with pytest.raises(InputError, match=f"differ in their {other[0][2:]}"):
            grid.train_run(whole, [*options, *other], {})
    expected = read_json(whole / "result.json") | {"seconds": 0}
    for out in (stopped, new):
        for name in ("metrics.csv", "adapter_model.safetensors", "value_head.safetensors"):
            assert (out / name).read_bytes() == (whole / name).read_bytes()
        assert read_json(out / "result.json") | {"seconds": 0} == expected


def test_a_grid_ends_with_the_command_and_what_went_wrong(capsys):
    command = "train.py --reward game --opponent tit-for-tat --seed 1 --model tiny --greed --out "
    with refused(capsys, command, ": train.py: error: unrecognized arguments: --greed"):
        learning.main(["--seeds", "1", "--jobs", "1", "--greed"])


def test_markdown():
    leaf, exact, none = ({"mean": m, "ci95": c} for m, c in ((0.5, 0.125), (1, None), (None, None)))
    head = "| agent | a | b |\n| --- | --- | --- |\n"
    table = grid.markdown(["agent", "a", "b"], [["x", leaf, exact], ["y", none, "-"]])
    assert table == head + "| x | 0.50±0.12 | 1.00 |\n| y | - | - |\n"


@pytest.mark.parametrize("model", ["tiny", "google/gemma-2-2b-it"])
def test_the_grids_are_of_different_runs_named_after_them(model, tmp_path):
    papers = [*paper.list_runs(model, "paper", 5, tmp_path)]
    learners = 5 if model == "tiny" else 2
    count = 5 * (6 + 3 * 4 + 1) + 6 * learners  # fixed opponents, swapped names, learners
    other = 4 * 3 * 5 + 2 * 5 + 4 * 3 if model == "tiny" else 4 * 2 * 5
    for grid_of, number in ((papers, count), (learning.list_runs(model, 5, tmp_path, []), other)):
        settings = set()
        folders = set()
        for out, options in grid_of:
            args, _ = train.parse([*map(str, options), "--out", "never-written"])
            assert args.model == model and out.parent == tmp_path
            swapped = "-swapped" if args.actions == ["action2", "action1"] else ""
            name = f"{'-then-'.join(args.reward)}-vs-{args.opponent[0]}{swapped}-seed{args.seed}"
            assert out.name.startswith(name)
            folders.add(out)
            settings.add(
                f"{args.reward} {args.opponent} {args.actions} {args.seed} {args.sampling}"
            )
        assert len(folders) == len(settings) == number
    assert all({"--recipe", "paper", "--sampling", "free"} <= {*options} for _, options in papers)


RIGHT = {"CC": 0.98, "CD": 0.02, "DC": 1, "DD": 0.04}  # game+deontological, nearly
CASES = [  # is it right? rewards, what else the run has
    (True, ["game+deontological"], {"opponent_policy_after": RIGHT}),
    (True, ["deontological"], {}),  # what it leaves open does not count
    (False, ["game+deontological"], {"xi": 0.5}),  # then it shall defect
    (False, ["game+deontological"], {"policy_after": RIGHT | {"DC": 0.94}}),
    (False, ["game+deontological"], {"opponent_policy_after": RIGHT | {"CD": 0.06}}),
    (False, ["game+deontological"], {"illegal_after": {"CC": 0, "CD": 0.03}}),
    (False, ["game+deontological"], {"opponent_illegal_after": {"CC": 0, "CD": 0.03}}),
    (True, ["equality"], {}),  # against a player that may do anything it decides nothing
    (True, ["game", "deontological"], {"switch": 0.05}),
    (False, ["game", "deontological"], {"switch": 0.06}),
]


@pytest.mark.parametrize("right, rewards, own", CASES)
def test_what_learning_calls_right(right, rewards, own, tmp_path):
    result = {"policy_after": RIGHT, "illegal_before": {"CC": 1}, "illegal_after": {"CC": 0.01}}
    settings = {"base": "", "sampling": "free", "reward": rewards, "illegal": -6}
    write_json(tmp_path / "config.json", {**settings, "xi": own.get("xi", 3)})
    write_json(tmp_path / "result.json", result | {"seconds": 1.0} | own)
    rows = [(rewards[0], 0.9), (rewards[-1], own.get("switch", 0)), (rewards[-1], 0.9)]
    lines = ["phase," + ",".join(f"p_C_after_{state}" for state in ("DC", "CC", "CD", "DD"))]
    lines += [f"{word},{p},0,0,0" for word, p in rows]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    line, verdict = learning.check_run(tmp_path)
    assert verdict == right and line.endswith("ok" if right else "MISS")
    assert ("at the switch" in line) == (len(rewards) == 2)


@pytest.mark.parametrize("name", ["paper", "transfer", "learning"])
def test_an_experiment_is_a_script(name, tmp_path):
    command = [sys.executable, ROOT / "experiments" / f"{name}.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"python experiments/{name}.py" in done.stdout
