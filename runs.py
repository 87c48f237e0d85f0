"""What is not the method: the run folder, resume, several processes.

A run folder holds

    config.json         all settings and versions
    metrics.csv         a row per update; its columns are below
    state.safetensors   while training: all that --resume needs, its JSON in the file's metadata
    adapter_model.safetensors, adapter_config.json, value_head.safetensors, result.json, and for a
    learning opponent opponent/: when training has finished

The folder is begun after the first update, and the state saved: what fails before leaves nothing
behind. From then on a run without result.json can be resumed. JSON files and the state are written
to a second file that is then renamed, so a run may be killed at any moment.

The columns of metrics.csv, those of a learning opponent with opponent_ before them:

    update, episodes    how many there were, this update included
    phase               the reward that was trained for
    game, actions, layout, prompt   what was played; `shlex.split` reads the two names back
    reward, ..._regret  what was played: the mean reward of a round, and both moral regrets
    right               P(what the reward asks for), a mean over states, of the policy *before* this
                        update; nan where no action is better, or with --gamma
    p_C_after_CC ...    P(C | state) of the policy before this update
    count_C_after_C ... how often an action was played after the other's last move
    the others          see `Learner.report` in ppo.py
"""

import csv
import io
import json
import math
import os
import tempfile
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
from safetensors import numpy as safetensors

from errors import InputError, about

# By default the threads of torch spin while they wait, which makes a run beside another one many
# times slower. The library behind them reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

STATE = "state.safetensors"
WRITTEN = (
    "config.json",
    "metrics.csv",
    STATE,
    "adapter_model.safetensors",
    "adapter_config.json",
    "value_head.safetensors",
    "result.json",
)


@contextmanager
def writing(path):
    """Raise InputError for an OSError of the block, in which `path` is written and nothing else."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error


def check_free(path, overwrite):
    """Raise InputError, before any work, if a file must not be written or cannot be."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file: choose another place")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another place, or give --overwrite")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: choose another place")


def replace(path, content):
    """Write bytes to `path`: the whole file, or none of it."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file: take it away")
    second = Path(f"{path}.tmp")
    with writing(path):
        second.write_bytes(content)
        second.replace(path)


def write_json(path, content):
    """Write what JSON can hold; raises ValueError at NaN."""
    replace(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def json_options(parser):
    """Give a program --json and --overwrite."""
    parser.option("--json", "write everything to this file", type=Path, metavar="FILE")
    parser.option("--overwrite", "replace this file", action="store_true")


def check_json(args):
    """Raise InputError, before any work, if the file of --json cannot be written."""
    if args.json:
        with about("--json"):
            check_free(args.json, args.overwrite)


def save_json(args, content):
    """Write the file of --json, if it is asked for."""
    if args.json:
        with about("--json"):
            write_json(args.json, content)


def read_json(path):
    """What a JSON file holds. Raises InputError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def read_config(run, finished=True):
    """The settings of a run folder, a dict. Raises InputError if it is none, or not `finished`."""
    if not run.exists():
        raise InputError(f"there is no folder {run}")
    if not (run / "config.json").exists():
        raise InputError(f"{run} is not a run folder of train.py: it has no config.json")
    config = read_json(run / "config.json")
    if not isinstance(config, dict) or not {"reward", "base", "sampling"} <= config.keys():
        raise InputError(f"{run} is not a run folder of train.py: its config.json is another's")
    # The folder of a learning opponent is written when its run has finished.
    last = "adapter_config.json" if "side" in config else "result.json"
    if finished and not (run / last).exists():
        resume = f"python train.py --resume {run}"
        raise InputError(f"{run} is not finished: leave it out, or continue it with  {resume}")
    return config


def require_same(configs, *keys):
    """Raise InputError unless each of these settings has one value in all configs."""
    for key in keys:
        values = sorted({str(config[key]) for config in configs})
        if len(values) > 1:
            raise InputError(f"runs differ in their {key}: {' and '.join(values)}")


def run_name(rewards, opponent, seed):
    """The name of a run's folder: str. rewards: of its phases, a list;  opponent: a word."""
    return f"{'-then-'.join(rewards)}-vs-{opponent}-seed{seed}"


def check_out(out, overwrite):
    """Raise InputError unless `out` is free, empty, or a run folder that may be replaced."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder: choose another one")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"{out} exists: choose another folder, or give --overwrite")
        read_config(out, finished=False)
    parent = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} cannot be written: choose another folder")


def read_state(run):
    """(settings, state, arrays) of an interrupted run. Raises InputError if it cannot go on."""
    config = read_config(run, finished=False)
    if (run / "result.json").exists():
        raise InputError(f"{run} is finished")
    path = run / STATE
    if not path.is_file():
        raise InputError(f"{run} has no {STATE}: start it anew, with --overwrite")
    try:
        arrays = safetensors.load_file(path)
        with safetensors.safe_open(path, "np") as file:
            state = json.loads(file.metadata()["json"])
    except Exception as error:  # of the file system, of safetensors, of JSON
        raise InputError(f"cannot read {path}: {error!r}") from None
    saved = state["settings"]
    for key in saved.keys() | config.keys():
        if saved.get(key) != config.get(key) and key != "versions":
            change = f"{key} {config.get(key)}, it was saved with {saved.get(key)}"
            raise InputError(f"{run / 'config.json'} has {change}")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise InputError(f"{path} has numbers that are not finite")
    return config, state, arrays


class RunFolder:
    """A run that is being written.

    path:     its folder
    settings: for config.json, a dict; which folder it is, and how it was asked for, is left out
    """

    def __init__(self, path, settings):
        self.path = path
        self.settings = {}
        for key, value in settings.items():
            if key not in ("resume", "out", "overwrite"):
                self.settings[key] = str(value) if isinstance(value, Path) else value
        self.columns = []  # of metrics.csv; empty as long as nothing is written
        self.started = time.perf_counter()
        self.last_save = -math.inf

    def seconds(self):
        """How many seconds this run took so far, those before an interruption included."""
        return time.perf_counter() - self.started

    def begin(self):
        """Take away what train.py wrote for an earlier run, and nothing else; start anew."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.path / "opponent"):
                for name in WRITTEN:
                    (folder / name).unlink(missing_ok=True)
        write_json(self.path / "config.json", self.settings)

    def resume(self, source, state):
        """Go on from the state of the folder `source`: metrics.csv is cut to it."""
        self.started -= state["seconds"]
        try:
            text = (source / "metrics.csv").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read metrics.csv of {source}: {error}") from None
        rows = list(csv.reader(text.splitlines(keepends=True)))
        if len(rows) <= state["updates"]:
            raise InputError(f"metrics.csv of {source} has fewer rows than the saved state")
        kept = io.StringIO()
        writer = csv.writer(kept, lineterminator="\n")
        writer.writerows(rows[: state["updates"] + 1])  # the first one is the header
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        replace(self.path / "metrics.csv", kept.getvalue().encode())
        self.columns = rows[0]

    def log(self, row):
        """Add a dict of numbers and strings to metrics.csv; the first one's keys are the header.

        Raises ValueError if a later one has other keys, or in another order.
        """
        columns = list(row)
        is_first = not self.columns
        if is_first:
            self.begin()
        elif columns != self.columns:
            raise ValueError(f"metrics.csv has the columns {self.columns}, this row {columns}")
        shown = [f"{v:.6g}" if isinstance(v, float) else v for v in row.values()]
        path = self.path / "metrics.csv"
        with writing(path), open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_first:
                writer.writerow(columns)
            writer.writerow(shown)
        self.columns = columns

    def is_due(self, interval):
        """Whether the last state was saved so many seconds ago, or none was."""
        return time.perf_counter() - self.last_save >= interval

    def save(self, learners, state):
        """Save all that --resume needs: what the ppo.Learners hold, and a dict for JSON."""
        arrays = {}
        content = {**state, "settings": self.settings, "seconds": self.seconds(), "learners": {}}
        for learner in learners:
            tensors, numbers = learner.state()
            arrays.update(tensors)
            content["learners"].update(numbers)
        text = json.dumps(content, allow_nan=False)
        replace(self.path / STATE, safetensors.save(arrays, {"json": text}))
        self.last_save = time.perf_counter()

    def finish(self, result):
        """Write result.json; then the state is no longer needed. Returns the seconds of the run."""
        seconds = round(self.seconds(), 2)
        write_json(self.path / "result.json", {**result, "seconds": seconds})
        (self.path / STATE).unlink(missing_ok=True)
        return seconds


def choose_device(device, dtype):
    """What --device and --dtype are, where they are not given: a GPU if there is one.

    Raises InputError if torch cannot use the device.
    """
    import torch  # here and not above: --help and a bad option answer at once

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # of torch; which one depends on the device
        raise InputError(error, "--device") from error
    return device, dtype


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
        raise InputError("start it with torchrun, or unset WORLD_SIZE", "torchrun")
    import torch
    from torch import distributed

    device, _ = choose_device(device, dtype=None)
    if device.startswith("cuda:"):
        raise InputError("under torchrun each process takes its own GPU: give cuda", "--device")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" now means this one
    try:
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        if is_first():
            yield out
        else:
            with (
                tempfile.TemporaryDirectory() as folder,
                open(os.devnull, "w") as nowhere,
                redirect_stdout(nowhere),
            ):
                yield Path(folder) / "run"
    except RuntimeError as error:  # gloo has no class of its own for a process that is gone
        resume = "the same torchrun with --resume RUN as train.py's only option continues"
        error.add_note(f"If another process is gone, {resume}.")
        raise
    distributed.destroy_process_group()
