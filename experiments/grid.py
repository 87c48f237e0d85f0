"""Shared by the grids: runs of train.py that may be stopped and given again, and their tables."""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from errors import InputError, about
from groups import show
from options import COUNT, Parser, parse
from runs import STATE, read_config, require_same


def read_metrics(run):
    """The rows of metrics.csv, dicts of str; a learning opponent's are columns one folder up.

    Raises InputError if there is no such file.
    """
    path = run / "metrics.csv"
    of_opponent = not path.exists() and (run.parent / "metrics.csv").exists()
    if of_opponent:
        path = run.parent / "metrics.csv"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        reason = f"{run} has no metrics.csv: was it moved, or is this another working folder?"
        raise InputError(reason) from None
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    if of_opponent:
        for row in rows:
            own = {key: row[key] for key in row if key.startswith("opponent_")}
            row.update({key.removeprefix("opponent_"): value for key, value in own.items()})
    return rows


def grid_parser(description, seeds, results):
    """The options of all grids; seeds, results: their defaults, in words."""
    parser = Parser(description)
    parser.option("--model", "tiny (embedded), a folder, or a name on the hub", default="tiny")
    parser.option("--seeds", f"runs of each kind [{seeds}]", type=COUNT)
    parser.option("--jobs", "runs at a time [embedded model: one per core, else 1]", type=COUNT)
    parser.option("--results", f"folder for what is written [{results}]", type=Path)
    return parser


def train_all(grid, args):
    """Train each (run folder, options of train.py); yields the folders, in their order."""
    env = dict(os.environ)
    jobs = args.jobs or 1
    if args.model == "tiny":
        env["OMP_NUM_THREADS"] = "1"
        jobs = args.jobs or os.cpu_count()
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda run: train_run(*run, env), grid)


def train_run(out, options, env):
    """One run: if finished it is skipped, if interrupted resumed. Returns its folder.

    Raises InputError if the folder holds a run with other settings.
    """
    from ppo import constants  # here and not above: --help answers at once

    options = [str(option) for option in options]
    if (out / "config.json").exists():
        args, _ = parse([*options, "--out", str(out), "--overwrite"])
        asked = {key: value for key, value in vars(args).items() if value is not None}
        asked.update(constants())
        with about("--results"):
            found = read_config(out, finished=False)
            require_same([{**asked, **found}, asked], *asked)
    if (out / "result.json").exists():
        return out
    if (out / STATE).exists():
        run_script("train.py", "--resume", out, env=env)
    else:
        run_script("train.py", *options, "--out", out, "--overwrite", env=env)
    return out


def run_script(name, *options, env=None):
    """What a script of the project prints. Raises InputError, with its last line, if it fails."""
    command = [sys.executable, ROOT / name, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(lines[-1].removeprefix("error: "), " ".join([name, *command[2:]]))
    return done.stdout


def markdown(head, rows):
    """A table in markdown; cells are strings, or means with their intervals."""
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([cell if isinstance(cell, str) else show(cell, digits=2) for cell in row])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
