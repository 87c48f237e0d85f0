"""The run folder: resume gives the very bytes, faults leave the last good state; processes."""

import os
import shutil
import signal
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
from conftest import change_json, copy_run, read_json, refused, run_training, start_training
from grid import read_metrics
from ppo import Learner
from runs import RunFolder, read_state

OPTIONS = (
    "--reward game utilitarian --opponent learner --sampling free --episodes 40 --batch 8 "
    "--epochs 1 --save-every 0 --game ipd random --actions moon river A"  # drawn, and drawn again
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

    def save_and_copy(self, learners, state):
        save(self, learners, state)
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
    assert len(states) == 5 and not (whole / "run" / STATE).exists()
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
    options = ["--episodes", "16", "--save-every", "0", "--init", str(tmp_path / "earlier")]
    run_training(tmp_path / "run", *SHORT, *options)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "earlier")
    train.main(["--resume", str(tmp_path / "state0")])
    assert files(tmp_path / "state0")["metrics.csv"] == files(tmp_path / "run")["metrics.csv"]


def test_killed_in_the_middle(tmp_path):
    out = tmp_path / "run"
    process = start_training(*SHORT, "--episodes", "48000", "--out", str(out))
    conftest.wait_for(out / STATE, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    config, state, _ = read_state(out)
    assert config["seed"] == 1 and state["updates"] == 1


def test_interrupted_it_says_how_to_go_on(whole, tmp_path, monkeypatch, capsys):
    """What came after the last saved state is lost, and made again."""
    log = RunFolder.log

    def log_and_stop(self, row):
        log(self, row)
        if row["update"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "log", log_and_stop)
    with pytest.raises(SystemExit) as stop:
        train.main([*OPTIONS, "--out", str(tmp_path / "run")])
    monkeypatch.undo()
    assert stop.value.code == 130 and f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert read_state(tmp_path / "run")[1]["updates"] == 2
    train.main(["--resume", str(tmp_path / "run")])
    assert outcome(tmp_path / "run") == outcome(whole / "run")


def test_saved_by_the_clock(tmp_path, monkeypatch):
    """At once, and then when the time is over."""
    copy_states(monkeypatch, tmp_path)
    run_training(tmp_path / "run", *SHORT, "--episodes", "32", "--save-every", "3600")
    assert len([*tmp_path.glob("state*")]) == 1


def test_disk_full(whole, tmp_path, monkeypatch, capsys):
    """The last state that did fit stays."""
    write, out = Path.write_bytes, tmp_path / "run"

    def full(path, content):
        if path.name == f"{STATE}.tmp" and (out / STATE).exists():
            write(path, content[:100])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with refused(capsys, "--out", "No space left"):
        train.main([*OPTIONS, "--out", str(out)])
    monkeypatch.undo()
    train.main(["--resume", str(out)])
    assert outcome(out) == outcome(whole / "run")


@pytest.mark.parametrize("updates", [2, 16])
def test_not_finite_ends_the_run_with_the_last_good_state(updates, tmp_path, capsys):
    """After ten updates in a row, and in a run that is shorter than that."""
    options = [*SHORT, "--lr", "1e30", "--epochs", "1", "--save-every", "0"]
    options += ["--episodes", str(8 * updates)]
    with refused(capsys, "--lr", "finite"):
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
    (lambda run: (run / "config.json").write_text("{"), ["config.json"]),
    (lambda run: (run / "result.json").write_text("{}"), ["finished"]),
    # Edited settings, whatever their type: the state knows what it was saved with.
    (lambda run: change_json(run / "config.json", lr=0.5), ["lr 0.5", "with 0.003"]),
    (lambda run: change_json(run / "config.json", rank="big"), ["rank"]),
    (lambda run: change_json(run / "config.json", colour="red"), ["colour"]),
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
        with refused(capsys, "--resume", "leave other options out"):
            train.main(["--resume", str(whole / "state1"), *other.split()])


def test_resume_with_other_weights(whole, capsys, tmp_path, monkeypatch):
    """What stands in the model's folder has changed since the run was stopped."""
    run = copy_run(whole / "state1", tmp_path / "run")
    before = files(run)
    monkeypatch.setattr("lora.base_fingerprint", lambda model: "other")
    with refused(capsys, "--resume", "base"):
        train.main(["--resume", str(run)])
    assert files(run) == before


def test_only_a_regular_file_is_replaced(tmp_path, capsys):
    out = tmp_path / "run"
    run_training(out, *SHORT)
    (out / "metrics.csv").unlink()
    (out / "metrics.csv").mkdir()
    with refused(capsys, "--out", "metrics.csv"):
        run_training(out, *SHORT, "--overwrite")
    assert (out / "metrics.csv").is_dir()


def test_what_a_row_of_metrics_looks_like(tmp_path):
    folder = RunFolder(tmp_path, {})
    folder.log({"episodes": 8, "reward": 1 / 3, "phase": "game"})
    folder.log({"episodes": 16, "reward": np.float64(0.25), "phase": "a,b"})
    expected = 'episodes,reward,phase\n8,0.333333,game\n16,0.25,"a,b"\n'
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8") == expected


def test_a_bug_in_the_log_is_a_traceback(tmp_path, monkeypatch):
    """And an update that fails leaves what was there before it."""
    run_training(tmp_path / "run", *SHORT)
    before = files(tmp_path / "run")
    monkeypatch.setattr(Learner, "report", lambda *_: {"reward": [].index(0)})
    with pytest.raises(ValueError, match="not in list"):
        run_training(tmp_path / "run", *SHORT, "--overwrite")
    assert files(tmp_path / "run") == before


def test_overwrite_takes_away_only_what_a_run_wrote(tmp_path, capsys):
    out, mine = tmp_path / "run", tmp_path / "thesis"
    mine.mkdir()
    (mine / "metrics.csv").write_text("mine")
    with refused(capsys, "--out", "--overwrite"):
        run_training(mine, *SHORT)
    for place, word in ((mine, "not a run folder"), (mine / "metrics.csv", "no folder")):
        with refused(capsys, "--out", word):
            run_training(place, *SHORT, "--overwrite")
    assert files(mine) == {"metrics.csv": b"mine"}

    run_training(out, *SHORT, "--opponent", "learner")
    (out / "thesis.tex").write_text("years of work")
    before = files(out)
    with refused(capsys, "--model"):  # not before the input is checked
        run_training(out, *SHORT, "--overwrite", "--model", "no/such-model")
    assert files(out) == before and (out / "opponent").exists()
    result = run_training(out, *SHORT, "--reward", "utilitarian", "--overwrite")
    assert result["reward"] == ["utilitarian"] and not [*(out / "opponent").iterdir()]
    assert (out / "thesis.tex").read_text() == "years of work"
    run_training(out, *SHORT, "--opponent", "learner", "--overwrite")
    (out / "opponent" / "results.json").write_text("mine")
    run_training(out, *SHORT, "--overwrite")
    assert files(out / "opponent") == {"results.json": b"mine"}


def test_an_empty_folder_will_do_and_files_have_the_usual_permissions(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    before = os.umask(0o022)
    run_training(out, *SHORT)
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


# A low rate: Adam's first steps are its rate times the gradient's sign, also where that is rounding
# noise.
SHARED = "--reward utilitarian --opponent learner --batch 8 --lr 1e-4 --save-every 0".split()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The metrics of three updates in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    run_training(run, *SHARED, "--episodes", "24")
    return read_metrics(run)


def check_same_metrics(rows, expected):
    assert len(rows) == len(expected) == 3
    for row, other in zip(rows, expected):
        words = ("phase", "game", "actions", "layout", "prompt")
        assert [row[key] for key in words] == [other[key] for key in words]
        for key in row.keys() - {*words}:
            assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-4, abs=1e-6), key


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


def test_a_state_goes_on_in_two_processes(whole, tmp_path):
    """The second one has no folder of the run then."""
    run = copy_run(whole / "state3", tmp_path / "run")
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
