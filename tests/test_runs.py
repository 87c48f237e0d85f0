"""The run folder: resume gives the very bytes, faults leave the last good state."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from agents import setup
from conftest import (
    change_json,
    cut_file,
    narrow_matrices,
    read_json,
    read_metrics,
    refused,
    run_training,
    start_training,
    wait_for,
)
from options import parse_train, run_settings
from program import processes, stop_signals
from runs import LOCK, RunFolder, read_config, replacing, write_json

OPTIONS = (
    "--reward game --then utilitarian --opponent learner --sampling free --episodes 40 --batch 8 "
    "--epochs 1 --save-every 2 "
    "--game ipd random --actions moon river A"  # what is drawn must be drawn again
).split()
SHORT = "--reward game --episodes 8 --batch 8".split()
STATE = "state.safetensors"
ADAPTER = "adapter_model.safetensors"
BYTES = ["metrics.csv", ADAPTER, "value_head.safetensors", f"opponent/{ADAPTER}"]


def outcome(run):
    """What must not depend on whether a run was interrupted."""
    result = read_json(run / "result.json")
    del result["seconds"]
    return result, [(run / name).read_bytes() for name in BYTES]


def files(run):
    """Names and contents of what is in a run folder, the lock apart."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.name != LOCK}


def copy_states(patch, folder):
    """From now on leave the run folder as it is at each saved state: folder/state0 and so on."""
    save = RunFolder.save_state

    def save_and_copy(self, before, rng, updates):
        save(self, before, rng, updates)
        count = len(list(folder.glob("state*")))
        shutil.copytree(self.path, folder / f"state{count}")

    patch.setattr(RunFolder, "save_state", save_and_copy)


class Killed(BaseException):
    """A kill inside this process: nothing in the product may catch it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and the folder as it was at each saved state."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        copy_states(patch, folder)
        train.main([*OPTIONS, "--out", str(folder / "run")])
    return folder


# ------------------------------------------------------------------------------- stopped, continued


def test_resumes_to_the_same_bytes_from_every_state(whole, tmp_path):
    states = sorted(whole.glob("state*"))
    assert len(states) == 3 and not (whole / "run" / STATE).exists()
    for state in states:
        shutil.copytree(state, tmp_path / state.name)
        train.main(["--resume", str(tmp_path / state.name)])
        assert outcome(tmp_path / state.name) == outcome(whole / "run")


def test_killed_during_a_save_and_after_further_rows(whole, tmp_path, monkeypatch):
    """The third save is cut within its file, when metrics.csv is already ahead of the state."""
    replace, saves = Path.replace, []

    def cut(path, target):
        if os.path.basename(target) == STATE:
            saves.append(target)
            if len(saves) == 3:
                cut_file(path, 100)
                raise Killed
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(Killed):
        train.main([*OPTIONS, "--out", str(tmp_path / "run")])
    monkeypatch.undo()
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("32,uti")  # a row that was cut off as well
    train.main(["--resume", str(tmp_path / "run")])
    assert outcome(tmp_path / "run") == outcome(whole / "run")


def test_resumes_without_the_run_that_it_started_from(tmp_path, monkeypatch):
    """The state has all of it."""
    run_training(tmp_path / "earlier", *SHORT)
    copy_states(monkeypatch, tmp_path)
    options = ["--episodes", "16", "--save-every", "1", "--init", str(tmp_path / "earlier")]
    run_training(tmp_path / "run", *SHORT, *options)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "earlier")
    train.main(["--resume", str(tmp_path / "state1")])
    assert files(tmp_path / "state1")["metrics.csv"] == files(tmp_path / "run")["metrics.csv"]


@pytest.mark.parametrize(
    "number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
def test_signals(number, code, tmp_path):
    out = tmp_path / "run"
    process = start_training(*SHORT, "--episodes", "48", "--out", str(out))
    wait_for(out / STATE, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    if number != signal.SIGKILL:
        assert f"--resume {out}" in errors
    train.main(["--resume", str(out)])
    assert len((out / "metrics.csv").read_text().splitlines()) == 7


def test_a_second_signal_stops_at_once():
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_signals() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_disk_full(whole, tmp_path):
    """A limit on the size of files is like a full disk: the last state that did fit stays."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "run"
    process = start_training(*OPTIONS, "--out", str(out))
    wait_for(out / STATE, process)
    half = (out / STATE).stat().st_size // 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (half, half))
    _, errors = process.communicate(timeout=60)
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert process.returncode == 2 and len(lines) == 1 and "--resume" in lines[0]
    train.main(["--resume", str(out)])
    assert outcome(out) == outcome(whole / "run")


def test_not_finite_ends_the_run_with_the_last_good_state(tmp_path, capsys):
    options = [*SHORT, "--lr", "1e30", "--episodes", "64", "--save-every", "1"]
    with refused(capsys, "--lr", "finite", "lower it and start again"):
        run_training(tmp_path / "run", *options)
    tensors = load_file(tmp_path / "run" / STATE)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


# --------------------------------------------------------------------------- what is refused, kept


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


def pickled(path):
    """What loads a pickle here would run code."""
    torch.save({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda run: cut_file(run / STATE, 5000), [STATE]),
        (lambda run: (run / STATE).unlink(), ["not there"]),
        (lambda run: foreign(run / STATE), [STATE]),
        (lambda run: narrow_matrices(run / STATE), ["shape"]),
        (lambda run: pickled(run / STATE), [STATE]),
        (lambda run: (run / "metrics.csv").write_text(""), ["metrics.csv"]),
        (lambda run: (run / "metrics.csv").unlink(), ["metrics.csv"]),
        (lambda run: (run / "config.json").write_text("{"), ["not a run folder", "--resume"]),
        (lambda run: change_json(run / "config.json", lr=0.5), ["lr", "0.5", "0.003"]),
        (lambda run: change_json(run / "config.json", batch=4), ["batch"]),
        (lambda run: change_json(run / "config.json", rank="big"), ["--rank"]),
        (lambda run: change_json(run / "config.json", colour="red"), ["--colour"]),
        (lambda run: (run / "result.json").write_text("{}"), ["finished"]),
    ],
)
def test_damaged_states_are_refused_and_kept(damage, words, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole / "state1", run)
    damage(run)
    before = files(run)
    with refused(capsys, *words):
        train.main(["--resume", str(run)])
    assert files(run) == before


@pytest.mark.parametrize("name", [STATE, "config.json", f"{STATE}.tmp"])
@pytest.mark.parametrize("kind", ["link", "no regular file"])
def test_a_run_folder_with_what_is_no_regular_file_is_refused(kind, name, whole, tmp_path, capsys):
    """Before it is read, which would wait for ever at a FIFO."""
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(whole / "state1", run)
    mine.write_text("mine")
    (run / name).unlink(missing_ok=True)
    if kind == "link":
        (run / name).symlink_to(mine)
    else:
        os.mkfifo(run / name)
    before = (run / name).lstat()
    with refused(capsys, "--resume", name, kind):
        train.main(["--resume", str(run)])
    with refused(capsys, "--out", name, kind):
        run_training(run, *SHORT, "--overwrite")
    with pytest.raises(OSError, match=kind), replacing(run / name.removesuffix(".tmp")):
        pytest.fail("written")
    after = (run / name).lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert mine.read_text() == "mine"


def test_resume_takes_no_other_option(whole, capsys):
    with refused(capsys, "--resume", "leave the other options out"):
        train.main(["--resume", str(whole / "run"), "--lr", "1"])


def test_a_settings_file_cannot_make_the_run_write_elsewhere(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole / "state2", run)
    change_json(run / "config.json", out=str(tmp_path / "elsewhere"))
    train.main(["--resume", str(run)])
    assert list(tmp_path.iterdir()) == [run]
    assert outcome(run) == outcome(whole / "run")


def test_settings_survive_the_way_through_the_file(tmp_path):
    typed = (
        "--reward game --then utilitarian deontological --opponent 1 0.5 0 0.25 --seed 0 --xi 0 "
        "--vf-coef 0 --kl-coef 0 --illegal -1.5 --actions moon river sun --lr 1e-7 --merge "
        "--nodes 99 --layout both --prompt explicit poetic --checkpointing "
        "--moral-weight 0.5 --payoffs 1 2 3 4 5 6 7 8"
    )
    run = tmp_path / "run"
    settings = run_settings(parse_train("", [*typed.split(), "--out", str(run)]), "b")
    run.mkdir()
    write_json(run / "config.json", settings)
    assert run_settings(parse_train("", ["--resume", str(run)]), "b") == settings
    assert settings["lr"] == 1e-7 and settings["opponent"] == ["1", "0.5", "0", "0.25"]


def test_metrics_refuse_a_row_with_other_keys_than_the_header(tmp_path):
    folder = RunFolder(tmp_path, {}, [])
    folder.log({"episodes": 8, "reward": 1 / 3})
    with pytest.raises(ValueError):
        folder.log({"episodes": 16, "points": 0.5})
    with pytest.raises(ValueError):
        folder.log({"episodes": 16})
    folder.log({"reward": 0.25, "episodes": 16})
    assert (tmp_path / "metrics.csv").read_text() == "episodes,reward\n8,0.333333\n16,0.25\n"


def test_a_second_process_is_refused(tmp_path, capsys):
    run = tmp_path / "run"
    with RunFolder(run, {}, []).locked(), refused(capsys, "--out", "another process"):
        run_training(run, *SHORT, "--overwrite")
    assert [path.name for path in run.iterdir()] in ([], [LOCK])
    run_training(run, *SHORT, "--overwrite")  # what is left does not stand in the way


def test_overwrite_takes_away_only_what_a_run_wrote(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("mine")
    with refused(capsys, "--out", "not a run folder"):
        run_training(tmp_path, *SHORT, "--overwrite")
    assert (tmp_path / "metrics.csv").read_text() == "mine"
    run = tmp_path / "run"
    run_training(run, *SHORT, "--merge")
    assert (run / "merged").exists()
    (run / "thesis.tex").write_text("years of work")
    run_training(run, *SHORT, "--overwrite")
    assert (run / "thesis.tex").read_text() == "years of work"
    assert not (run / "merged").exists()


# ------------------------------------------------------------------------------- several processes

# A low rate: Adam's first steps are its rate times the gradient's sign, also where that is rounding
# noise.
SHARED = "--reward utilitarian --opponent learner --batch 8 --lr 1e-4 --save-every 1".split()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The metrics of three updates in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    run_training(run, *SHARED, "--episodes", "24")
    return read_metrics(run)


def check_same_metrics(rows, expected):
    assert len(rows) == len(expected) == 3
    for row, other in zip(rows, expected):
        assert row.keys() == other.keys()
        for key, value in row.items():
            if key in ("phase", "condition"):
                assert value == other[key]
            else:
                assert float(value) == pytest.approx(float(other[key]), rel=1e-4, abs=1e-6), key


def test_three_processes_give_the_same_metrics(alone, tmp_path):
    run = tmp_path / "run"
    process = start_training(*SHARED, "--episodes", "24", "--out", str(run), processes=3)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    check_same_metrics(read_metrics(run), alone)


def test_two_processes_give_the_same_metrics_and_if_one_dies_the_other_ends(alone, tmp_path):
    run = tmp_path / "run"
    process = start_training(*SHARED, "--episodes", "32000", "--out", str(run), processes=2)
    wait_for(run / STATE, process)
    while (run / "metrics.csv").read_text().count("\n") < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    check_same_metrics(read_metrics(run)[:3], alone)

    command = ["pgrep", "-P", str(process.pid)]
    children = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    args = parse_train("", ["--resume", str(run)])
    with processes(args.device, args.out):
        agents, _ = setup(args)
    settings = {key: value for key, value in read_config(run).items() if key != "versions"}
    folder = RunFolder(tmp_path, settings, [agent.learner for agent in agents])
    assert folder.load_state(run)["updates"] >= 2, errors


def test_two_processes_finish_a_run_that_was_stopped_between_two_states(tmp_path, monkeypatch):
    """The second one has no state in its folder then."""
    run, log = tmp_path / "run", RunFolder.log

    def log_and_stop(self, row):
        log(self, row)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "log", log_and_stop)
    with pytest.raises(SystemExit):
        run_training(run, *SHARED, "--save-every", "2", "--episodes", "16")
    monkeypatch.undo()
    process = start_training("--resume", str(run), processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (run / "result.json").exists() and not (run / STATE).exists()
