"""Everything beside the method: bad input, the run folder, resume, signals, several processes.

A run folder holds

    config.json         all settings and versions; the first file that is written
    metrics.csv         a row per update
    state.safetensors   while training: all that --resume needs, its JSON in the file's metadata
    adapter_model.safetensors, adapter_config.json, value_head.safetensors, result.json, and for a
    learning opponent opponent/: when training has finished

JSON files and the state are written beside and renamed, metrics.csv is cut to the state: a run
without result.json can be resumed whatever the moment at which it was killed.
"""

import argparse
import csv
import io
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, redirect_stdout, suppress
from os.path import lexists
from pathlib import Path

import numpy as np
from safetensors import numpy as safetensors

STATE = "state.safetensors"
WRITTEN = (
    "config.json metrics.csv state.safetensors adapter_model.safetensors adapter_config.json "
    "value_head.safetensors result.json"
).split()


class InputError(ValueError):
    """What a user can correct: an option, and a reason; an InputError as one stays as it is."""

    def __init__(self, option, reason):
        text = " ".join(str(reason).split())[:500]
        super().__init__(text if isinstance(reason, InputError) else f"{option}: {text}")


def stop(error):
    """End the program with one line on stderr and exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, low=-math.inf, high=math.inf, above=False):
    """An argparse type: a finite int or float from `low` (or strictly above it) to `high`."""

    def parse(text):
        value = kind(text)
        if low <= value <= high and math.isfinite(value) and not (above and value == low):
            return value
        least = f"above {low}" if above else f"at least {low}"
        raise argparse.ArgumentTypeError(f"must be finite, {least}, at most {high}, not {text}")

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid number value"
    return parse


class Parser(argparse.ArgumentParser):
    """Its help is the script's docstring and shows the defaults; its errors are one line."""

    def __init__(self, description):
        for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows its number
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        settings = {"usage": argparse.SUPPRESS, "allow_abbrev": False}
        settings["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, **settings)

    def option(self, flag, help, **kwargs):
        default = kwargs.get("default")
        if default is not None:
            help += f" [{' '.join(default) if isinstance(default, list) else default}]"
        self.add_argument(flag, help=help, **kwargs)


def replaceable(path):
    """Whether a file may be written beside this path and renamed to it: over regular files only."""
    places = [place for place in (path, Path(f"{path}.tmp")) if lexists(place)]
    return all(place.is_file() and not place.is_symlink() for place in places)


def check_free(option, path, overwrite):
    """Raise InputError, before any work, where a file cannot or must not be written."""
    if not replaceable(path):
        raise InputError(option, f"{path} is no regular file: choose another place")
    if path.exists() and not overwrite:
        raise InputError(option, f"{path} exists: choose another place, or give --overwrite")
    if not os.access(path.parent, os.W_OK):
        raise InputError(option, f"{path} cannot be written: choose another place")


@contextmanager
def replacing(path):
    """A path beside `path`, renamed to it at the end of the block: a whole file, or none."""
    beside = Path(f"{path}.tmp")
    if not replaceable(path):
        raise OSError(f"{path} is no regular file")
    yield beside
    beside.replace(path)


def write_json(path, content):
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_config(run, option, finished=True):
    """The settings of a run folder. Raises InputError where it is none, or has not `finished`."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        current = isinstance(config["reward"], list) and "base" in config
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(option, f"{run} is not a run folder of train.py ({error!r})") from None
    if not current:
        raise InputError(option, f"{run} was written by an earlier version: train it anew")
    side = "side" in config  # the folder of a learning opponent, written when its run has finished
    if finished and not (run / ("adapter_config.json" if side else "result.json")).exists():
        resume = f"python train.py --resume {run}"
        raise InputError(option, f"{run} is not finished: continue it with  {resume}")
    return config


def require_same(option, configs, *keys):
    """Raise InputError unless these settings have one value in all configs."""
    for key in keys:
        values = sorted({str(config[key]) for config in configs})
        if len(values) > 1:
            raise InputError(option, f"runs differ in their {key}: {' and '.join(values)}")


def check_out(out, overwrite):
    """Raise InputError unless `out` is free, or a run folder that may be replaced."""
    if out.exists() and not overwrite:
        raise InputError("--out", f"{out} exists: choose another folder, or give --overwrite")
    check_written("--out", out)
    if out.exists() and not (out.is_dir() and set(os.listdir(out)) <= {"config.json.tmp"}):
        read_config(out, "--out", finished=False)


def written(run):
    """All files of a run, and of its learning opponent."""
    return [folder / name for folder in (run, run / "opponent") for name in WRITTEN]


def check_written(option, run):
    """Raise InputError where something else stands in the place of a file of a run."""
    folder = run / "opponent"
    odd = [path for path in written(run) if not replaceable(path)]
    if lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        odd.append(folder)
    if odd:
        raise InputError(option, f"{odd[0]} or {odd[0].name}.tmp is in the way: take it away")


def read_state(run):
    """(settings, state, arrays) of an interrupted run. Raises InputError if it cannot go on."""
    check_written("--resume", run)
    config, path = read_config(run, "--resume", finished=False), run / STATE
    if (run / "result.json").exists():
        raise InputError("--resume", f"{run} is finished")
    try:
        arrays = safetensors.load_file(path)
        with safetensors.safe_open(path, "np") as file:
            state = json.loads(file.metadata()["json"])
        settings, lines = state["settings"], (run / "metrics.csv").read_text("utf-8").count("\n")
    except Exception as error:  # of the file system, of safetensors, of JSON, a key that lacks
        reason = f"{type(error).__name__} {error}"
        raise InputError("--resume", f"cannot continue from {path}: {reason}") from None
    for key in config.keys() | settings.keys():
        if config.get(key) != settings.get(key) and key != "versions":
            now, then = config.get(key), settings.get(key)
            raise InputError("--resume", f"it was saved with {key}={then}, config.json has {now}")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise InputError("--resume", f"{path} has numbers that are not finite")
    if lines < state["updates"] + bool(state["updates"]):  # the header is a line, too
        raise InputError("--resume", f"{run / 'metrics.csv'} has fewer lines than the saved state")
    return config, state, arrays


class RunFolder:
    """A run that is being written. settings: all; resume, out and overwrite are left out."""

    def __init__(self, path, settings):
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
        own = {k: v for k, v in settings.items() if k not in ("resume", "out", "overwrite")}
        self.path, self.settings = path, own
        self.started = time.perf_counter()

    def seconds(self):
        """Spent on this run so far, those before an interruption included."""
        return time.perf_counter() - self.started

    def create(self):
        """Take away what train.py wrote for an earlier run, and nothing else; start anew."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in written(self.path):
            path.unlink(missing_ok=True)
            Path(f"{path}.tmp").unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or someone else's files are in it
            (self.path / "opponent").rmdir()
        write_json(self.path / "config.json", self.settings)
        (self.path / "metrics.csv").touch()

    def resume(self, source, state):
        """Go on from the state of the folder `source`: metrics.csv is cut to it."""
        self.path.mkdir(parents=True, exist_ok=True)
        count = state["updates"] + 1 if state["updates"] else 0
        text = (source / "metrics.csv").read_text(encoding="utf-8")
        with replacing(self.path / "metrics.csv") as beside:
            beside.write_text("".join(text.splitlines(keepends=True)[:count]), encoding="utf-8")
        self.started -= state["seconds"]

    def log(self, row):
        """Add a dict of numbers and strings to metrics.csv; the first one's keys are the header."""
        shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        with open(self.path / "metrics.csv", "a+", newline="", encoding="utf-8") as file:
            writer, _ = csv.DictWriter(file, shown, lineterminator="\n"), file.seek(0)
            if not (header := file.readline()):
                writer.writeheader()
            elif header != ",".join(shown) + "\n":
                raise OSError("a row with other columns than metrics.csv has")
            writer.writerow(shown)

    def save(self, learners, **state):
        """All that --resume needs. learners: `ppo.Learner.state()` of each; state: for JSON."""
        arrays, state["learners"] = {}, {}
        for own_arrays, numbers in learners:
            arrays |= own_arrays
            state["learners"] |= numbers
        state |= {"settings": self.settings, "seconds": self.seconds()}
        content = safetensors.save(arrays, {"json": json.dumps(state, allow_nan=False)})
        with replacing(self.path / STATE) as beside:
            beside.write_bytes(content)

    def finish(self, result):
        """Write result.json; then the state is no longer needed. Returns the seconds of the run."""
        seconds = round(self.seconds(), 2)
        write_json(self.path / "result.json", result | {"seconds": seconds})
        (self.path / STATE).unlink(missing_ok=True)
        return seconds


@contextmanager
def stop_signals():
    """Ctrl-C, or a batch system's SIGTERM, sets the Event, so that an update is finished first.

    A second one stops at once. In a thread that is not the main one no signal is handled.
    """
    stop, before = threading.Event(), {}

    def handle(*_):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is threading.main_thread():
        before = {which: signal.signal(which, handle) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def is_first():
    """Whether this is the only process, or the first of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def processes(device, out):
    """Join the other processes that torchrun has started. Yields the folder to write to.

    All do the same, each with its share of the prompts: they play the same games from the same
    generator. What the others write goes to a temporary folder.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield out
        return
    if "MASTER_ADDR" not in os.environ:
        raise InputError("torchrun", "start it with torchrun, or unset WORLD_SIZE")
    import torch  # here and not above: --help and a bad option answer at once
    from torch import distributed

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda:"):
        raise InputError("--device", "under torchrun each process takes its own GPU: give cuda")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" now means this one
    backend = "nccl" if device == "cuda" else "gloo"
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(sys.stdout if is_first() else nowhere),
    ):
        try:
            distributed.init_process_group(backend)
            yield out if is_first() else Path(folder) / "run"
        except (distributed.DistError, RuntimeError) as error:
            hint = "the same torchrun with --resume RUN as the only option of train.py continues"
            raise InputError("torchrun", f"a process has failed; {hint}; {error}") from error
        distributed.destroy_process_group()
