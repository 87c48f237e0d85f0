"""The run folder: what a door may read, what training writes, and how a stopped run continues; bad input gets one line.  [knows no game]

    config.json         all settings and versions; the first file that is written
    metrics.csv         a row per update
    state.safetensors   while training: all that --resume needs (parameters, Adam's moments, generator ...), its JSON in the file's metadata
    adapter_model.safetensors, adapter_config.json, value_head.safetensors, result.json     when it is finished
    opponent/, merged/  a learning opponent's adapter; the standalone model of --merge

The state and the JSON files are written beside and renamed, metrics.csv is cut to the state: a run without result.json can be resumed
whatever the moment at which it was killed. Nothing is ever unpickled.
"""

import argparse
import csv
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path

WRITTEN = ("config.json", "metrics.csv", "state.safetensors", "adapter_model.safetensors", "adapter_config.json", "value_head.safetensors",
           "result.json", "opponent", "merged")
LOCK = ".lock"


# ---------------------------------------------------------------------------------------------------------------------- bad input

@contextmanager
def blame(option, *errors, mend=""):
    """One of these errors (default: ValueError) in this block is the user's to mend: one line that names the option, exit code 2."""
    try:
        yield
    except errors or ValueError as error:
        if type(error).__name__ == "OutOfMemoryError" and option != "--device":  # of whatever step: the door says what to lower
            raise
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        print(f"error: {option}: {reason}{mend and '; ' + mend}", file=sys.stderr)
        raise SystemExit(2) from None


def number(kind, low=-math.inf, high=math.inf, above=False):
    """An argparse type: an int or float from `low` (or strictly above it) to `high`; never NaN or infinite."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value) or (above and value == low):
            bound = f"above {low}" if above and value <= low else f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"must be {'a finite number' if kind is float and not math.isfinite(value) else bound}, not {text}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid number value: 'x'"
    return parse


# --------------------------------------------------------------------------------------------------------------------- run folders

def read_config(run):
    """The settings of a run folder. Raises ValueError where it is none."""
    try:
        config = json.loads((run / "config.json").read_text())
        for key in ("model", "dtype", "reward", "then", "switch", "opponent", "game", "actions", "layout", "prompt",
                    "seed", "sampling", "rank", "alpha", "versions"):
            config[key]
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is not a run folder of train.py ({type(error).__name__}: {error})") from None


def base_of(run, model):
    """The settings of another run, which must have the same base model. Raises ValueError."""
    config = read_config(run)
    if config["model"] != model:
        raise ValueError(f"{run} was trained on {config['model']}, not on {model}")
    return config


def resumed_words(run, argv):
    """The command line of an interrupted run, from its config.json. Raises ValueError where it cannot be continued."""
    if any(word.startswith("--") and word.split("=")[0] != "--resume" for word in argv):
        raise ValueError("it takes all settings from the run: leave the other options out")
    if (run / "result.json").exists():
        raise ValueError(f"{run} is finished")
    words = []
    for key, value in read_config(run).items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, list) and value:
            words += [flag, *map(str, value)]
        elif value is True:
            words += [flag]
        elif not (value is None or value is False or value == [] or key == "versions"):
            words += [f"{flag}={value}"]
    return words


def check_out(out, overwrite):
    """Raise ValueError unless a run may be written to `out`: it does not exist, or it is a run folder and may be replaced."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another folder, or give --overwrite to replace it")
    if out.exists() and not (out.is_dir() and set(os.listdir(out)) <= {LOCK}):
        read_config(out)


@contextmanager
def locked(out):
    """Make the folder and hold its lock, which ends with the process. Raises OSError where another process holds it."""
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / LOCK, timeout=0):
            yield
    except Timeout:
        raise OSError(f"another process is training in {out}") from None


def write_json(path, content):
    """Written beside and renamed: there is a whole file at any moment, or none."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    beside.replace(path)


def clear(out):
    """Of an earlier run take away what train.py wrote, and nothing else."""
    for path in (out / name for name in WRITTEN):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_state(args, learners, settings, seconds, before, rng, updates):
    """All that `read_state` needs in one file, written beside and renamed, so that a kill at any moment leaves a whole one."""
    from safetensors.torch import save_file

    tensors, numbers = {}, []
    for seat, learner in enumerate(learners):
        found, number = learner.state()
        tensors.update({f"{seat}.{key}": value.cpu().contiguous() for key, value in found.items()})
        numbers.append(number)
    content = {"settings": settings, "updates": updates, "rng": rng.bit_generator.state, "learners": numbers,
               "before": [table.tolist() for table in before], "seconds": seconds}
    save_file(tensors, args.out / "state.tmp", metadata={"json": json.dumps(content, allow_nan=False)})
    (args.out / "state.tmp").replace(args.out / "state.safetensors")


def read_state(args, learners, settings):
    """Put the learners where the state in `args.resume` was and cut metrics.csv in `args.out` to it.

    Returns the rest of the state. Raises ValueError or OSError.
    """
    from safetensors import SafetensorError, safe_open

    path = args.resume / "state.safetensors"
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["json"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        other = sorted(key for key in settings if key != "versions" and state["settings"].get(key) != settings[key])
        if other:
            raise ValueError(f"it was saved with {other[0]}={state['settings'].get(other[0])}, config.json has {settings[other[0]]}")
        for seat, learner in enumerate(learners):
            own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{seat}.")}
            learner.load_state(own, state["learners"][seat])
        rows = (args.resume / "metrics.csv").read_text().splitlines(keepends=True)[:1 + state["updates"]]
        if len(rows) != 1 + state["updates"]:
            raise ValueError(f"metrics.csv has fewer than the {state['updates']} rows of the saved state")
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename or path} is not there") from None
    except (SafetensorError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot continue from {path}: {error}") from None
    (args.out / "metrics.tmp").write_text("".join(rows))
    (args.out / "metrics.tmp").replace(args.out / "metrics.csv")
    return state


def save(args, learners, tokenizer, settings, result):
    """What remains of a finished run; result.json comes last, and then the state is no longer needed."""
    from lora import merge_adapter, save_adapter

    for learner, folder in zip(learners, (args.out, args.out / "opponent")):
        folder.mkdir(exist_ok=True)
        save_adapter(learner.policy.model, learner.policy.name, folder)
        learner.policy.save_value_head(folder)
        if folder != args.out:  # a folder that evaluate.py reads like any other
            own_reward, own_phase = {}, {}
            if args.opponent_reward:
                own_reward, own_phase = {"reward": args.opponent_reward, "then": [], "switch": []}, {"phase": args.opponent_reward}
            write_json(folder / "config.json", {**settings, "seat": "opponent", **own_reward})
            with open(args.out / "metrics.csv") as both, open(folder / "metrics.csv", "w", newline="") as own:
                rows = list(csv.DictReader(both))
                writer = csv.DictWriter(own, [name for name in rows[0] if not name.startswith("opponent ")], lineterminator="\n")
                writer.writeheader()
                writer.writerows({name: row.get(f"opponent {name}", row[name]) for name in writer.fieldnames} | own_phase for row in rows)
    if args.merge and os.environ.get("RANK", "0") == "0":  # torchrun: one copy is enough
        merge_adapter(learners[0].policy.model, learners[0].policy.name)
        learners[0].policy.model.save_pretrained(args.out / "merged")
        tokenizer.save_pretrained(args.out / "merged")
    write_json(args.out / "result.json", result)
    (args.out / "state.safetensors").unlink()


# ----------------------------------------------------------------------------------------------------------- signals and processes

@contextmanager
def stop_signals(args):
    """Ctrl-C, or the SIGTERM of a batch system, sets `args.stop`, so that an update is finished first; a second one stops at once."""
    def stop(*_):
        if args.stop:
            raise KeyboardInterrupt
        args.stop = True

    args.stop = False
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def processes(args):
    """Choose the device; join the other processes where torchrun has started several.

    All of them do the same, each with its share of the prompts: they play the same games from the same generator. What the
    others write goes to a temporary folder.
    """
    import torch
    from torch import distributed

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" now means this one, and is what config.json tells
    distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo", timeout=timedelta(seconds=45))
    with blame("torchrun", RuntimeError, mend="a process has ended; to continue: the same torchrun, with --resume RUN as the only option of train.py"), \
            tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, \
            redirect_stdout(nowhere if distributed.get_rank() else sys.stdout):
        if distributed.get_rank():
            args.out = Path(folder) / "run"
        yield
    distributed.destroy_process_group()
