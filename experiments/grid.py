"""Shared by the grids: runs of train.py that may be stopped and given again, and their tables."""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import show
from runs import InputError, Parser, number, read_config, require_same
from train import parse


def read_metrics(run):
    """The rows of metrics.csv, dicts of str; a learning opponent's stand in those of its run."""
    own = (run / "metrics.csv").exists()
    path = run / "metrics.csv" if own else run.parent / "metrics.csv"
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    for row in [] if own else rows:
        row |= {k.removeprefix("opponent "): row[k] for k in row if k.startswith("opponent ")}
    return rows


def grid_parser(description, seeds, results):
    """The options of all grids; seeds, results: their defaults, in words."""
    parser, count = Parser(description), number(int, 1, 1000)
    parser.option("--model", "tiny (embedded), a folder, or a name on the hub", default="tiny")
    parser.option("--seeds", f"runs of each kind [{seeds}]", type=count)
    parser.option("--jobs", "runs at a time [embedded model: one per core, else 1]", type=count)
    parser.option("--results", f"folder for what is written [{results}]", type=Path)
    return parser


def train_all(grid, args):
    """Train each (run folder, options of train.py); yields the folders, in their order."""
    env = {"OMP_NUM_THREADS": "1"} if args.model == "tiny" else {}
    with ThreadPoolExecutor(args.jobs or (os.cpu_count() if env else 1)) as pool:
        yield from pool.map(lambda run: train(*run, os.environ | env), grid)


def train(out, options, env):
    """One run: finished it is skipped, interrupted resumed; with other settings: InputError."""
    if (out / "config.json").exists():
        asked = vars(parse([*map(str, options), "--out", str(out), "--overwrite"])[0])
        asked = {k: v for k, v in asked.items() if v is not None or k == "until"}  # None: never
        require_same("--results", [asked | read_config(out, "--results", False), asked], *asked)
    saved = (out / "state.safetensors").exists()
    options = ["--resume", out] if saved else [*options, "--out", out, "--overwrite"]
    if not (out / "result.json").exists():
        run_script("train.py", *options, env=env)
    return out


def run_script(name, *options, env=None):
    """What a script of the project prints. Raises InputError, with its last line, if it fails."""
    command = [sys.executable, ROOT / name, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        *_, reason = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()]
        raise InputError(" ".join([name, *command[2:]]), reason.removeprefix("error: "))
    return done.stdout


def markdown(head, rows):
    """A table in markdown; cells are strings, or means with their intervals."""
    cells = [[cell if isinstance(cell, str) else show(cell, digits=2) for cell in r] for r in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *cells])
