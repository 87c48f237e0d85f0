"""Shared by the studies: grids of runs that may be stopped and given again, and their tables."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from program import number, program_parser
from report import show


def grid_parser(prog, description, results):
    """The options of all grids; `results`: what --results is by default, in words."""
    parser = program_parser(prog, description)
    help = "runs of each kind [5]"
    parser.add_argument("--seeds", type=number(int, 1, 1000), default=5, help=help)
    help = f"folder for what is written [{results}]"
    parser.add_argument("--results", type=Path, help=help)
    return parser


def train_all(grid, jobs, threads=None):
    """Train every (run folder, options of train.py) of the grid, `jobs` at a time.

    What is finished is skipped, what was interrupted is resumed.
    threads: of each run; by default torch's own choice
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with ThreadPoolExecutor(jobs) as pool:
        runs = pool.map(lambda job: train(*job, environment), grid)
        for _ in tqdm(runs, total=len(grid), unit="run"):
            pass


def train(out, options, environment):
    """One run, resumed where it was interrupted."""
    if (out / "result.json").exists():
        return
    if (out / "state.safetensors").exists():
        options = ["--resume", out]
    else:
        options = [*options, "--out", out, *(["--overwrite"] if out.exists() else [])]
    run_script("train.py", *options, env=environment)


def run_script(name, *options, **settings):
    """What a script of the project prints; ends the program where it fails, with its last line."""
    command = [sys.executable, ROOT / name, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    if done.returncode:
        reasons = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        sys.exit(f"{' '.join(map(str, command[1:]))}\n{reasons[-1]}")
    return done.stdout


def markdown(head, rows):
    """A table in markdown; cells are strings, or means with their intervals."""
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([cell if isinstance(cell, str) else show(cell, digits=2) for cell in row])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
