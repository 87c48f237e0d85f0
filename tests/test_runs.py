"""The run folder: resume gives the very bytes, faults leave the last good state, nothing foreign is loaded or overwritten."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import runs
import train
from conftest import ROOT, refused

OPTIONS = ["--reward", "game", "--then", "utilitarian", "--opponent", "learner", "--sampling", "free", "--episodes", "48", "--batch", "8",
           "--save-every", "2", "--game", "ipd", "random", "--actions", "moon", "river", "A"]  # what is drawn must be drawn again
BYTES = ("metrics.csv", "adapter_model.safetensors", "value_head.safetensors", "opponent/adapter_model.safetensors")


def outcome(out):
    """What must not depend on whether a run was interrupted."""
    result = json.loads((out / "result.json").read_text())
    del result["seconds"]
    return result, [(out / name).read_bytes() for name in BYTES]


class Killed(BaseException):
    """A kill inside this process: nothing in the product may catch it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and the folder as it was at each saved state."""
    folder = tmp_path_factory.mktemp("whole")
    write, number = runs.write_state, iter(range(100))

    def copying(args, *rest):
        write(args, *rest)
        shutil.copytree(args.out, folder / f"state{next(number)}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_state", copying)
        train.main([*OPTIONS, "--out", str(folder / "run")])
    return folder


def test_resumes_to_the_same_bytes_from_every_state(whole, tmp_path):
    states = sorted(whole.glob("state*"))
    assert len(states) == 3 and not (whole / "run" / "state.safetensors").exists()
    for state in states:
        shutil.copytree(state, tmp_path / state.name)
        train.main(["--resume", str(tmp_path / state.name)])
        assert outcome(tmp_path / state.name) == outcome(whole / "run")


def test_killed_during_a_save_and_after_further_rows(whole, tmp_path, monkeypatch):
    """The third save is cut in the middle of its file; metrics.csv is ahead of the state by then."""
    def cut(path, target):
        if os.path.basename(target) == "state.safetensors" and next(calls) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise Killed
        return replace(path, target)

    calls, replace = iter(range(10)), type(tmp_path).replace
    monkeypatch.setattr(type(tmp_path), "replace", cut)
    with pytest.raises(Killed):
        train.main([*OPTIONS, "--out", str(tmp_path / "run")])
    monkeypatch.undo()
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("40,uti")  # a row that was cut off as well
    train.main(["--resume", str(tmp_path / "run")])
    assert outcome(tmp_path / "run") == outcome(whole / "run")


def test_resumes_without_the_run_that_it_began_with(tmp_path, monkeypatch):
    """The state has all of it."""
    write = runs.write_state
    monkeypatch.setattr(train, "write_state",
                        lambda args, *rest: write(args, *rest) or shutil.copytree(args.out, tmp_path / "half", dirs_exist_ok=True))
    short = ["--reward", "game", "--batch", "8", "--save-every", "1"]
    train.main([*short, "--episodes", "8", "--out", str(tmp_path / "earlier")])
    train.main([*short, "--episodes", "16", "--init", str(tmp_path / "earlier"), "--out", str(tmp_path / "run")])
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "earlier")
    train.main(["--resume", str(tmp_path / "half")])
    assert (tmp_path / "half" / "metrics.csv").read_bytes() == (tmp_path / "run" / "metrics.csv").read_bytes()


def start(*options):
    return subprocess.Popen([sys.executable, "train.py", *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_signals(number, code, tmp_path):
    out = tmp_path / "run"
    options = ["--reward", "game", "--episodes", "160", "--batch", "8", "--out", str(out)]
    process = start(*options)
    wait_for(out / "state.safetensors", process)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == code and "Traceback" not in told
    if number != signal.SIGKILL:
        assert f"--resume {out}" in told
    train.main(["--resume", str(out)])
    assert len((out / "metrics.csv").read_text().splitlines()) == 21


def test_a_second_process_is_refused(tmp_path, capsys):
    with runs.locked(tmp_path / "run"), refused(capsys, "--out", "another process"):
        train.main([*OPTIONS, "--out", str(tmp_path / "run"), "--overwrite"])
    assert [path.name for path in (tmp_path / "run").iterdir()] in ([], [runs.LOCK])
    train.main([*OPTIONS, "--out", str(tmp_path / "run"), "--overwrite"])  # what is left does not stand in the way


def change_json(key, value):
    def change(run):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, key: value}))
    return change


def foreign(run):
    save_file({"weight": torch.zeros(3)}, run / "state.safetensors")


def other_shapes(run):
    with safe_open(run / "state.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = {key: value[..., :-1].contiguous() if value.ndim == 2 else value for key, value in load_file(run / "state.safetensors").items()}
    save_file(tensors, run / "state.safetensors", metadata=metadata)


def pickled(run):
    """What loads a pickle here would run code."""
    torch.save({"weight": torch.zeros(3)}, run / "state.safetensors")


@pytest.mark.parametrize("change, words", [
    (lambda run: (run / "state.safetensors").write_bytes((run / "state.safetensors").read_bytes()[:5000]), ["state.safetensors"]),
    (lambda run: (run / "state.safetensors").unlink(), ["not there"]), (foreign, ["state.safetensors"]), (other_shapes, ["shape"]),
    (pickled, ["state.safetensors"]), (lambda run: (run / "metrics.csv").write_text(""), ["metrics.csv"]),
    (lambda run: (run / "metrics.csv").unlink(), ["metrics.csv"]), (lambda run: (run / "config.json").write_text("{"), ["not a run folder", "--resume"]),
    (change_json("lr", 0.5), ["lr", "0.5", "0.003"]), (change_json("batch", 4), ["batch"]), (change_json("rank", "big"), ["--rank"]),
    (change_json("colour", "red"), ["--colour"]),
    (lambda run: (run / "result.json").write_text("{}"), ["finished"]),
])
def test_damaged_states_are_refused_and_kept(change, words, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole / "state1", run)
    change(run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}
    with refused(capsys, *words):
        train.main(["--resume", str(run)])
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"} == before


def test_a_settings_file_cannot_make_the_run_write_elsewhere(whole, tmp_path):
    shutil.copytree(whole / "state1", tmp_path / "run")
    change_json("out", str(tmp_path / "elsewhere"))(tmp_path / "run")
    train.main(["--resume", str(tmp_path / "run")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and outcome(tmp_path / "run") == outcome(whole / "run")


def test_settings_survive_the_way_through_the_file(tmp_path):
    options = ["--reward", "game", "--then", "utilitarian", "deontological", "--opponent", "1", "0.5", "0", "0.25", "--seed", "0", "--xi", "0",
               "--vf-coef", "0", "--kl-coef", "0", "--illegal", "-1.5", "--actions", "moon", "river", "sun", "--lr", "1e-7", "--merge", "--nodes", "99",
               "--game", "random", "chicken", "--layout", "both", "--prompt", "explicit", "poetic"]
    args = train.parse_args([*options, "--out", str(tmp_path / "run")])
    (tmp_path / "run").mkdir()
    settings = {key: value for key, value in vars(args).items() if key not in ("strategy", "names", "resume", "out", "overwrite")}
    runs.write_json(tmp_path / "run" / "config.json", {**settings, "dtype": "float32", "versions": {}})
    again = train.parse_args(["--resume", str(tmp_path / "run")])
    assert {key: getattr(again, key) for key in settings} == {**settings, "dtype": "float32"}


def test_resume_takes_no_other_option(whole, capsys):
    with refused(capsys, "--resume", "leave the other options out"):
        train.main(["--resume", str(whole / "run"), "--lr", "1"])


def test_disk_full(whole, tmp_path):
    """A limit on the size of files stands in for a full disk: the state does not fit, the last good one stays."""
    out = tmp_path / "run"
    process = start(*OPTIONS, "--out", str(out))
    wait_for(out / "state.safetensors", process)
    size = (out / "state.safetensors").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    lines = [line for line in process.communicate(timeout=60)[1].replace("\r", "\n").splitlines() if line.startswith("error")]
    assert process.returncode == 2 and len(lines) == 1 and "--resume" in lines[0]
    train.main(["--resume", str(out)])
    assert outcome(out) == outcome(whole / "run")


def test_not_finite_ends_the_run_with_the_last_good_state(tmp_path, capsys):
    with refused(capsys, "--lr", "finite", "state is kept"):
        train.main(["--reward", "game", "--lr", "1e30", "--episodes", "64", "--batch", "8", "--save-every", "1", "--out", str(tmp_path / "run")])
    tensors = load_file(tmp_path / "run" / "state.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_overwrite_takes_away_only_what_a_run_wrote(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("mine")
    with refused(capsys, "--out", "not a run folder"):
        train.main(["--reward", "game", "--out", str(tmp_path), "--overwrite"])
    assert (tmp_path / "metrics.csv").read_text() == "mine"
    short = ["--reward", "game", "--episodes", "8", "--batch", "8", "--out", str(tmp_path / "run")]
    train.main([*short, "--merge"])
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    train.main([*short, "--overwrite"])
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work" and not (tmp_path / "run" / "merged").exists()


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_give_the_same_metrics(ranks, tmp_path):
    # A low rate: Adam's first steps are its rate times the gradient's sign, also where that is rounding noise.
    options = ["--reward", "utilitarian", "--opponent", "learner", "--episodes", "32", "--batch", "8", "--lr", "1e-4"]
    train.main([*options, "--out", str(tmp_path / "one")])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(29500 + os.getpid() % 1000),
                    "train.py", *options, "--out", str(tmp_path / "several")], cwd=ROOT, check=True, capture_output=True, timeout=120)
    one, several = (list(csv.DictReader(open(tmp_path / name / "metrics.csv"))) for name in ("one", "several"))
    assert len(one) == len(several) == 4
    for a, b in zip(one, several):
        assert (a.pop("phase"), a.pop("condition")) == (b.pop("phase"), b.pop("condition"))
        for key in a:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4, abs=1e-6), key


def test_a_process_that_dies_ends_the_others(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(30500 + os.getpid() % 1000),
                                "train.py", "--reward", "game", "--batch", "8", "--save-every", "1", "--out", str(out)],
                               cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(out / "state.safetensors", process)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(found[-1]), signal.SIGKILL)
    told = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    args = train.parse_args(["--resume", str(out)])
    with runs.processes(args):
        learners, *_ = train.setup(args)
        settings = {key: value for key, value in runs.read_config(out).items() if key != "versions"}
        args.out = tmp_path
        assert runs.read_state(args, learners, settings)["updates"] >= 0, told
