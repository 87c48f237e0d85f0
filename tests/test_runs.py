"""The run folder: resume gives the very bytes, faults leave the last good state; processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import conftest
import train
from conftest import ROOT, change_json, copy_run, read_json, refused, run_training, start_training
from grid import read_metrics
from runs import RunFolder, read_config, read_state, replacing, stop_signals

OPTIONS = (
    "--reward game utilitarian --opponent learner --sampling free --episodes 40 --batch 8 "
    "--epochs 1 --save-every 2 --game ipd random --actions moon river A"  # drawn, and drawn again
).split()
SHORT = "--reward game --episodes 8 --batch 8".split()
STATE = "state.safetensors"
ADAPTER = "adapter_model.safetensors"
BYTES = ["metrics.csv", ADAPTER, "value_head.safetensors", f"opponent/{ADAPTER}"]


def outcome(run):
    """What must not depend on whether a run was interrupted."""
    result = read_json(run / "result.json") | {"seconds": 0}
    settings = read_json(run / "config.json")
    return settings, result, [(run / name).read_bytes() for name in BYTES]


def files(run):
    """Names and contents of what is in a run folder."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def copy_states(patch, folder):
    """From now on leave the run folder as it is at each saved state: folder/state0 and so on."""
    save = RunFolder.save

    def save_and_copy(self, *learners, **state):
        save(self, *learners, **state)
        shutil.copytree(self.path, folder / f"state{len([*folder.glob('state*')])}")

    patch.setattr(RunFolder, "save", save_and_copy)


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
                conftest.cut_file(path, 100)
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals(number, tmp_path):
    out = tmp_path / "run"
    process = start_training(*SHORT, "--episodes", "48", "--out", str(out))
    conftest.wait_for(out / STATE, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 130) and "Traceback" not in errors
    assert killed or f"--resume {out}" in errors
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
    conftest.wait_for(out / STATE, process)
    half = (out / STATE).stat().st_size // 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (half, half))
    _, errors = process.communicate(timeout=60)
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert process.returncode == 2 and len(lines) == 1 and "--resume" in lines[0]
    train.main(["--resume", str(out)])
    assert outcome(out) == outcome(whole / "run")


@pytest.mark.parametrize("updates", [2, 16])
def test_not_finite_ends_the_run_with_the_last_good_state(updates, tmp_path, capsys):
    """After ten updates in a row, and in a run that is shorter than that."""
    options = [*SHORT, "--lr", "1e30", "--episodes", str(8 * updates), "--save-every", "1"]
    with refused(capsys, "--lr", "finite", "lower it and start again"):
        run_training(tmp_path / "run", *options)
    tensors = load_file(tmp_path / "run" / STATE)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert not (tmp_path / "run" / ADAPTER).exists()


def other_state(run, number):
    """A state with one tensor, of one number, and the JSON that was there."""
    with safe_open(run / STATE, "pt") as file:
        metadata = file.metadata()
    save_file({"0.0.parameter": torch.tensor([number])}, run / STATE, metadata=metadata)


DAMAGES = [
    (lambda run: conftest.cut_file(run / STATE, 5000), [STATE]),
    (lambda run: (run / STATE).unlink(), [STATE]),
    (lambda run: torch.save({"weight": torch.zeros(3)}, run / STATE), [STATE]),  # a pickle
    (lambda run: other_state(run, 0.0), []),
    (lambda run: conftest.narrow_matrices(run / STATE), ["shape"]),
    (lambda run: other_state(run, torch.nan), [STATE, "not finite"]),
    (lambda run: (run / "metrics.csv").write_text(""), ["metrics.csv"]),
    (lambda run: (run / "metrics.csv").unlink(), ["metrics.csv"]),
    (lambda run: (run / "config.json").write_text("{"), ["not a run folder"]),
    (lambda run: (run / "result.json").write_text("{}"), ["finished"]),
    # Edited settings, whatever their type: the state knows what it was saved with.
    (lambda run: change_json(run / "config.json", lr=0.5), ["lr", "0.5", "0.003"]),
    (lambda run: change_json(run / "config.json", rank="big"), ["rank"]),
    (lambda run: change_json(run / "config.json", game=["chicken"]), ["game"]),
    (lambda run: change_json(run / "config.json", colour="red"), ["colour"]),
    (lambda run: change_json(run / "config.json", out="elsewhere"), ["out", "elsewhere"]),
]


@pytest.mark.parametrize("damage, words", DAMAGES)
def test_damaged_states_are_refused_and_kept(damage, words, whole, tmp_path, capsys):
    run = copy_run(whole / "state1", tmp_path / "run")
    damage(run)
    before = files(run)
    with refused(capsys, "--resume", *words):
        train.main(["--resume", str(run)])
    assert files(run) == before and list(tmp_path.iterdir()) == [run]


def test_resume_takes_no_other_option(whole, capsys):
    for other in ("--lr 1", "--overwrite", "--reward game"):
        with refused(capsys, "--resume", "leave", "others"):
            train.main(["--resume", str(whole / "state1"), *other.split()])


def test_resume_with_other_weights(whole, capsys, tmp_path, monkeypatch):
    """What stands in the model's folder has changed since the run was stopped."""
    run = copy_run(whole / "state1", tmp_path / "run")
    before = files(run)
    monkeypatch.setattr("lora.base_fingerprint", lambda model: "other")
    with refused(capsys, "--resume", "base"):
        train.main(["--resume", str(run)])
    assert files(run) == before


@pytest.mark.parametrize("name", [STATE, "config.json", f"{STATE}.tmp", "opponent"])
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_a_run_folder_with_what_is_no_regular_file_is_refused(kind, name, whole, tmp_path, capsys):
    """Before it is read, which would wait for ever at a FIFO."""
    run, mine = copy_run(whole / "state1", tmp_path / "run"), tmp_path / "mine"
    mine.mkdir()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(mine) if kind == "link" else os.mkfifo(run / name)
    before, listed = (run / name).lstat()[:2], sorted(os.listdir(run))  # mode and inode
    with refused(capsys, "--resume", name, "in the way"):
        train.main(["--resume", str(run)])
    with refused(capsys, "--out", name, "in the way"):
        run_training(run, *SHORT, "--overwrite")
    with pytest.raises(OSError, match="no regular"), replacing(run / name.removesuffix(".tmp")):
        pytest.fail("written")
    assert ((run / name).lstat()[:2], sorted(os.listdir(run))) == (before, listed)
    assert mine.exists()


def test_what_a_row_of_metrics_looks_like(tmp_path):
    folder = RunFolder(tmp_path, {})
    folder.log({"episodes": 8, "reward": 1 / 3, "phase": "game"})
    folder.log({"episodes": 16, "reward": np.float64(0.25), "phase": "a,b"})
    expected = 'episodes,reward,phase\n8,0.333333,game\n16,0.25,"a,b"\n'
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8") == expected


def test_overwrite_takes_away_only_what_a_run_wrote(tmp_path, capsys):
    out, mine = tmp_path / "run", tmp_path / "thesis"
    mine.mkdir()
    (mine / "metrics.csv").write_text("mine")
    with refused(capsys, "--out", "--overwrite"):
        run_training(mine, *SHORT)
    for place in (mine, mine / "metrics.csv"):
        with refused(capsys, "--out", "not a run folder"):
            run_training(place, *SHORT, "--overwrite")
    assert files(mine) == {"metrics.csv": b"mine"}

    run_training(out, *SHORT, "--opponent", "learner")
    (out / "thesis.tex").write_text("years of work")
    before = files(out)
    with refused(capsys, "--model"):  # not before the input is checked
        run_training(out, *SHORT, "--overwrite", "--model", "no/such-model")
    assert files(out) == before and (out / "opponent").exists()
    result = run_training(out, *SHORT, "--reward", "utilitarian", "--overwrite")
    assert result["reward"] == ["utilitarian"] and not (out / "opponent").exists()
    assert (out / "thesis.tex").read_text() == "years of work"
    run_training(out, *SHORT, "--opponent", "learner", "--overwrite")
    (out / "opponent" / "results.json").write_text("mine")
    run_training(out, *SHORT, "--overwrite")
    assert files(out / "opponent") == {"results.json": b"mine"}


def test_a_run_that_could_not_begin_is_replaced_with_the_usual_permissions(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json.tmp").write_text("{")
    before = os.umask(0o022)
    run_training(out, *SHORT, "--overwrite")
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    assert not (out / "config.json.tmp").exists() and read_config(out, "RUN")["seed"] == 1


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
        numbers = {key: float(other[key]) for key in other if key not in ("phase", "condition")}
        assert (row.pop("phase"), row.pop("condition")) == (other["phase"], other["condition"])
        assert {k: float(v) for k, v in row.items()} == pytest.approx(numbers, rel=1e-4, abs=1e-6)


def test_three_processes_give_the_same_metrics(alone, tmp_path):
    run = tmp_path / "run"
    process = start_training(*SHARED, "--episodes", "24", "--out", str(run), processes=3)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    check_same_metrics(read_metrics(run), alone)


def test_two_processes_give_the_same_metrics_and_if_one_dies_the_other_ends(alone, tmp_path):
    run = tmp_path / "run"
    process = start_training(*SHARED, "--episodes", "32000", "--out", str(run), processes=2)
    conftest.wait_for(run / STATE, process)
    while (run / "metrics.csv").read_text().count("\n") < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    check_same_metrics(read_metrics(run)[:3], alone)

    psutil.Process(process.pid).children()[-1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert read_state(run)[1]["updates"] >= 2, errors


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


@pytest.mark.parametrize("option, host", [("torchrun", ""), ("--device", "127.0.0.1")])
def test_half_of_what_torchrun_says(option, host, capsys, tmp_path, monkeypatch):
    """The rest is not there; or all processes would share one GPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", host) if host else monkeypatch.delenv("MASTER_ADDR", False)
    with refused(capsys, option):
        run_training(tmp_path / "run", *SHORT, "--device", "cuda:0")
    assert not (tmp_path / "run").exists()


def test_any_locale(whole, tmp_path):
    """Folders, files and a terminal, in a locale that knows nothing but ASCII."""
    run = copy_run(whole / "state1", tmp_path / "ä")
    rows = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(rows.replace("game", "gäme"), encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment = os.environ | plain | {"PYTHONIOENCODING": "ascii"}
    code = "import train; train.main(); print('\\u0438\\u043c\\u044f')"
    command = [sys.executable, "-c", code, "--resume", str(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\\u0438\\u043c\\u044f\n")  # what it lacks is shown by number
    assert "gäme" in (run / "metrics.csv").read_text(encoding="utf-8")
