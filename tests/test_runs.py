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
from torch import distributed

import conftest
import train
from conftest import change_json, copy_run, read_json, refused, run_training, start_training
from errors import InputError
from grid import read_metrics
from policy import Policy
from ppo import Learner
from runs import RunFolder, processes, read_state, replace

# Four updates in two phases; games and names are drawn, and drawn again. "brief" is read quickly.
OPTIONS = (
    "--reward game utilitarian --opponent learner --sampling free --episodes 32 --batch 8 "
    "--epochs 1 --save-every 0 --prompt brief --game ipd random --actions moon river A"
).split()
SHORT = "--reward game --episodes 1 --batch 1 --epochs 1 --prompt brief".split()  # one update
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


def stop_after(patch, update, error):
    """From now on raise an error as soon as this update has its row in metrics.csv."""
    log = RunFolder.log

    def log_and_stop(self, row):
        log(self, row)
        if row["update"] == update:
            raise error

    patch.setattr(RunFolder, "log", log_and_stop)


def bug(*_, **__):
    raise KeyError("mine")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and the folder as it was at each saved state."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        copy_states(patch, folder)
        train.main([*OPTIONS, "--out", str(folder / "run")])
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished run of one update, in a folder that was there, empty."""
    out = tmp_path_factory.mktemp("short")
    before = os.umask(0o022)
    run_training(out, *SHORT)
    os.umask(before)
    return out


def test_resumes_to_the_same_bytes_from_every_state(whole, tmp_path):
    states = sorted(whole.glob("state*"))
    assert len(states) == 4 and not (whole / "run" / STATE).exists()
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
        file.write("4,32,uti")  # a row that was cut off as well
    train.main(["--resume", str(tmp_path / "run")])
    assert outcome(tmp_path / "run") == outcome(whole / "run")


def test_resumes_without_the_run_that_it_started_from(short, tmp_path, monkeypatch):
    """The state has all of it."""
    shutil.copytree(short, tmp_path / "earlier")
    copy_states(monkeypatch, tmp_path)
    options = ["--episodes", "2", "--save-every", "0", "--init", str(tmp_path / "earlier")]
    run_training(tmp_path / "run", *SHORT, *options)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "earlier")
    train.main(["--resume", str(tmp_path / "state0")])
    assert files(tmp_path / "state0")["metrics.csv"] == files(tmp_path / "run")["metrics.csv"]


def test_killed_in_the_middle(tmp_path, monkeypatch):
    """What came after the last saved state, here the first one, is made again."""
    out = tmp_path / "run"
    process = start_training(*SHORT, "--episodes", "48000", "--out", str(out))
    conftest.wait_for(out / STATE, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert read_state(out)[1]["updates"] == 1
    stop_after(monkeypatch, update=3, error=Killed)
    with pytest.raises(Killed):
        train.main(["--resume", str(out)])
    assert [row["update"] for row in read_metrics(out)] == ["1", "2", "3"]


def test_interrupted_it_says_how_to_go_on(whole, tmp_path, monkeypatch, capsys):
    """What came after the last saved state is lost, and made again."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_after(patch, update=3, error=KeyboardInterrupt)
        train.main([*OPTIONS, "--out", str(tmp_path / "run")])
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line]
    assert stop.value.code == 130
    assert len(lines) == 1 and f"--resume {tmp_path / 'run'}" in lines[0]
    assert read_state(tmp_path / "run")[1]["updates"] == 2
    train.main(["--resume", str(tmp_path / "run")])
    assert outcome(tmp_path / "run") == outcome(whole / "run")


def raise_interrupt(*_, **__):
    raise KeyboardInterrupt


def test_interrupted_before_there_is_a_state_it_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Learner, "update", raise_interrupt)
    with pytest.raises(SystemExit) as stop:
        run_training(tmp_path / "run", *SHORT)
    assert stop.value.code == 130 and "--resume" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_offered_to_go_on_with(whole, tmp_path, monkeypatch, capsys):
    """The run that was resumed; not an older one in whose place an unbegun one was to stand."""
    run = copy_run(whole / "state1", tmp_path / "run")
    before = files(run)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Learner, "update", raise_interrupt)
        run_training(run, *SHORT, "--overwrite")
    assert "--resume" not in capsys.readouterr().err and files(run) == before
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Learner, "update", raise_interrupt)
        train.main(["--resume", str(run)])
    assert f"--resume {run}" in capsys.readouterr().err


def test_resume_of_a_run_from_before_an_option(whole, monkeypatch, capsys):
    config, state, arrays = read_state(whole / "state1")
    del config["kl_final"]
    monkeypatch.setattr("runs.read_state", lambda run: (config, state, arrays))
    with refused(capsys, "--resume", "older than", "kl_final"):
        train.main(["--resume", str(whole / "state1")])


def test_saved_by_the_clock(tmp_path, monkeypatch):
    """At once, and then when the time is over."""
    copy_states(monkeypatch, tmp_path)
    run_training(tmp_path / "run", *SHORT, "--episodes", "2", "--save-every", "3600")
    assert len([*tmp_path.glob("state*")]) == 1
    folder = RunFolder(tmp_path, {})
    folder.last_save = time.perf_counter() - 60
    assert folder.is_due(59) and not folder.is_due(3600)


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


def test_not_finite_ends_the_run_with_the_last_good_state(tmp_path, capsys):
    options = [*SHORT, "--lr", "1e30", "--save-every", "0", "--episodes", "2"]
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
    for other in ("--lr 1", "--overwrite", "--reward game", "--seed 1"):  # 1 is its default
        with refused(capsys, "--resume", "leave other options out"):
            train.main(["--resume", str(whole / "state1"), *other.split()])


def test_a_row_with_other_columns_is_no_row(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    folder.log({"update": 1, "reward": 0.5})
    for row in ({"update": 2, "reward": 0.5, "more": 1}, {"reward": 0.5, "update": 2}):
        with pytest.raises(ValueError, match="columns"):
            folder.log(row)
    assert (tmp_path / "run" / "metrics.csv").read_text() == "update,reward\n1,0.5\n"


def test_resume_with_another_constant(whole, capsys, tmp_path, monkeypatch):
    """They are in the settings, so that a fork's runs are told from others, too."""
    run = copy_run(whole / "state1", tmp_path / "run")
    assert read_json(run / "config.json")["CLIP"] == 0.2
    monkeypatch.setattr("ppo.CLIP", 0.1)
    with refused(capsys, "--resume", "CLIP: 0.1 and 0.2"):
        train.main(["--resume", str(run)])


def test_resume_with_other_weights(whole, capsys, tmp_path, monkeypatch):
    """What stands in the model's folder has changed since the run was stopped."""
    run = copy_run(whole / "state1", tmp_path / "run")
    before = files(run)
    monkeypatch.setattr("lora.base_fingerprint", lambda model: "other")
    with refused(capsys, "--resume", "base"):
        train.main(["--resume", str(run)])
    assert files(run) == before


def test_only_a_regular_file_is_replaced(short, tmp_path, capsys):
    out = copy_run(short, tmp_path / "run")
    (out / "metrics.csv").unlink()
    (out / "metrics.csv").mkdir()
    with refused(capsys, "--out", "metrics.csv"):
        run_training(out, *SHORT, "--overwrite")
    with pytest.raises(InputError, match="no regular file"):
        replace(out / "metrics.csv", b"")
    assert (out / "metrics.csv").is_dir()


def test_what_a_row_of_metrics_looks_like(tmp_path):
    folder = RunFolder(tmp_path, {})
    folder.log({"episodes": 8, "reward": 1 / 3, "phase": "game"})
    folder.log({"episodes": 16, "reward": np.float64(0.25), "phase": "a,b"})
    expected = 'episodes,reward,phase\n8,0.333333,game\n16,0.25,"a,b"\n'
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8") == expected


def test_a_bug_is_a_traceback_and_costs_nothing(tmp_path, monkeypatch):
    """In the first update no folder is begun; in the log the one of before stays as it was."""
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="mine"):
        patch.setattr(Learner, "update", bug)
        run_training(tmp_path / "run", *SHORT)
    assert not (tmp_path / "run").exists()
    run_training(tmp_path / "run", *SHORT)
    before = files(tmp_path / "run")
    monkeypatch.setattr(RunFolder, "log", bug)
    with pytest.raises(KeyError, match="mine"):
        run_training(tmp_path / "run", *SHORT, "--overwrite")
    assert files(tmp_path / "run") == before


def test_overwrite_takes_away_only_what_a_run_wrote(whole, short, tmp_path, capsys):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "metrics.csv").write_text("mine")
    with refused(capsys, "--out", "--overwrite"):
        run_training(mine, *SHORT)
    for place, word in ((mine, "not a run folder"), (mine / "metrics.csv", "no folder")):
        with refused(capsys, "--out", word):
            run_training(place, *SHORT, "--overwrite")
    assert files(mine) == {"metrics.csv": b"mine"}

    out = copy_run(whole / "run", tmp_path / "run")  # it has a learning opponent
    (out / "thesis.tex").write_text("years of work")
    (out / "opponent" / "results.json").write_text("mine")
    before = files(out), files(out / "opponent")
    with refused(capsys, "--model"):  # not before the input is checked
        run_training(out, *SHORT, "--overwrite", "--model", "no/such-model")
    assert (files(out), files(out / "opponent")) == before
    result = run_training(out, *SHORT, "--reward", "utilitarian", "--overwrite")
    assert result["reward"] == ["utilitarian"]
    assert files(out).keys() == files(short).keys() | {"thesis.tex"}
    assert (out / "thesis.tex").read_text() == "years of work"
    assert files(out / "opponent") == {"results.json": b"mine"}


def test_an_empty_folder_will_do_and_files_have_the_usual_permissions(short):
    assert {path.stat().st_mode & 0o777 for path in short.iterdir()} == {0o644}


# A low rate: Adam's first steps are its rate times the gradient's sign, also where that is rounding
# noise.
SHARED = (
    "--reward utilitarian --opponent learner --batch 8 --lr 1e-4 --save-every 0 --prompt brief"
).split()


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


def test_the_processes_that_do_not_save_do_all_the_rest(whole, tmp_path, monkeypatch):
    """Else the first one would wait for ever: they meet in each pass. Elsewhere, to the end."""
    run, call, passes = (
        copy_run(whole / "state1", tmp_path / "run"),
        Policy.__call__,
        {"0": 0, "1": 0},
    )
    before = files(run)

    def count(*args, **kwargs):
        passes[os.environ["RANK"]] += 1
        return call(*args, **kwargs)

    monkeypatch.setattr(Policy, "__call__", count)
    for rank, saves in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with monkeypatch.context() as patch:
            copy_states(patch, tmp_path / f"saved{rank}")
            train.run(*train.parse(["--resume", str(run)]), tmp_path / rank)
        assert len([*tmp_path.glob(f"saved{rank}/*")]) == saves
        for name in BYTES:
            assert (tmp_path / rank / name).read_bytes() == (whole / "run" / name).read_bytes()
    assert files(run) == before and passes["0"] == passes["1"] > 0


def test_what_a_process_sees_of_another_ones_end(tmp_path, monkeypatch):
    """An error of gloo's, which is a plain RuntimeError: it stays, with a line on how to go on."""
    for key, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(distributed, "init_process_group", lambda backend: None)
    with pytest.raises(RuntimeError) as error, processes("cpu", tmp_path / "run") as path:
        path.mkdir()
        raise RuntimeError("Connection reset by peer")
    assert "--resume" in error.value.__notes__[0]
    assert not path.exists() and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("option, host", [("torchrun", ""), ("--device", "127.0.0.1")])
def test_half_of_what_torchrun_says(option, host, capsys, tmp_path, monkeypatch):
    """The rest is not there; or all processes would share one GPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", host) if host else monkeypatch.delenv("MASTER_ADDR", False)
    with refused(capsys, option):
        run_training(tmp_path / "run", *SHORT, "--device", "cuda:0")
    assert not (tmp_path / "run").exists()
