"""How a program of this project starts, is stopped and ends.

program_parser, number   its command line
user_error, check_free   bad input: one line on stderr and exit code 2, nothing overwritten
check_replaceable        only regular files are replaced
printing                 to a pipe that may close
stop_signals             Ctrl-C, or a batch system's SIGTERM
processes                several of them, started by torchrun
"""

import argparse
import io
import math
import os
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path

# What torchrun tells each of its processes.
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def number(kind, low=-math.inf, high=math.inf, above=False):
    """An argparse type: an int or float from `low` (or strictly above it) to `high`.

    NaN and infinite are never taken.
    """

    def parse(text):
        value = kind(text)
        if not math.isfinite(value):
            bound = "a finite number"
        elif above and value <= low:
            bound = f"above {low}"
        elif value < low:
            bound = f"at least {low}"
        elif value > high:
            bound = f"at most {high}"
        else:
            return value
        raise argparse.ArgumentTypeError(f"must be {bound}, not {text}")

    # argparse: "invalid number value: 'x'"
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def program_parser(prog, description):
    """A parser whose help is the file's docstring and whose errors are one line."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return argparse.ArgumentParser(
        prog=prog,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextmanager
def user_error(option, *errors, hint=""):
    """One of these errors (default: ValueError) in this block is the user's to correct.

    It becomes one line on stderr that names the option (the error's own where it has one), with the
    hint (a string, or a function that gives it), and exit code 2.
    """
    kinds = errors or (ValueError,)
    try:
        yield
    except kinds as error:
        if type(error).__name__ == "OutOfMemoryError" and option != "--device":
            raise  # whatever ran out of device memory, the program itself says what to lower
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        more = hint() if callable(hint) else hint
        if more:
            reason += f"; {more}"
        print(f"error: {getattr(error, 'option', option)}: {reason}", file=sys.stderr)
        raise SystemExit(2) from None


def beside(path):
    """Where a file is written before it is renamed to `path`."""
    return Path(f"{path}.tmp")


def check_replaceable(path, folder=False):
    """Raise OSError where anything but a regular file (or, if that is meant, a folder) is in place.

    A file that is renamed to a device, a FIFO or a link takes its place, also that of /dev/null;
    one that is written beside would follow a link there, or wait for a reader.
    """
    for place in (path,) if folder else (path, beside(path)):
        link, right = place.is_symlink(), place.is_dir() if folder else place.is_file()
        if link or (place.exists() and not right):
            kind = "a link" if link else "no folder" if folder else "no regular file"
            raise OSError(f"{place} is {kind}: nothing is put in its place")


def check_free(option, path, overwrite, folder=False):
    """Refuse, before any work, to replace a file that nobody said may be replaced.

    Or what is no regular file, or to write where that is impossible. folder: `path` is one, and is
    made
    """
    with user_error(option, ValueError, OSError):
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        else:
            check_replaceable(path)
            if path.exists() and not overwrite:
                raise ValueError(f"{path} exists: choose another place, or give --overwrite")
        place = path if folder else path.parent
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise ValueError(f"{path} cannot be written: choose another place")


@contextmanager
def printing():
    """What is printed in this block may end early: `head` has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # also what Python itself flushes at the end must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def stop_signals():
    """Ctrl-C, or a batch system's SIGTERM, sets the Event, so that an update is finished first.

    A second one stops at once.
    """
    stop = threading.Event()

    def handle(*_):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {which: signal.signal(which, handle) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def is_first():
    """Whether this is the only process, or the first of torchrun's."""
    from torch import distributed

    return not distributed.is_initialized() or distributed.get_rank() == 0


def world_size():
    """How many processes torchrun has started, 1 without it.

    Raises ValueError where it says that there are several, and not all else that it always says.
    """
    size, *others = (os.environ.get(key, "") for key in TORCHRUN)
    if size in ("", "1"):
        return 1
    if not (size.isdecimal() and all(others) and others[0].isdecimal()):
        raise ValueError(f"of the variables {' '.join(TORCHRUN)} some are missing or no numbers")
    if not int(others[0]) < int(size):
        raise ValueError(f"RANK={others[0]} is not below WORLD_SIZE={size}")
    return int(size)


@contextmanager
def processes(device, out):
    """Join the other processes where torchrun has started several. Yields the folder to write to.

    All of them do the same, each with its share of the prompts: they play the same games from the
    same generator. What the others write goes to a temporary folder.
    """
    import torch
    from torch import distributed

    with user_error("torchrun", hint="start it with torchrun, or unset WORLD_SIZE"):
        size = world_size()
    if size == 1:
        yield out
        return
    with user_error("--device"):
        if device.startswith("cuda:"):
            raise ValueError("under torchrun each process takes a GPU of its own: give cuda")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" now means this one
    backend = "nccl" if device.startswith("cuda") else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=45))
    first = is_first()
    hint = "to continue: the same torchrun, with --resume RUN as the only option of train.py"
    with (
        user_error("torchrun", RuntimeError, hint=f"a process has ended; {hint}"),
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(sys.stdout if first else nowhere),
    ):
        yield out if first else Path(folder) / "run"
    distributed.destroy_process_group()
