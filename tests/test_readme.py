"""What the README shows must work as it stands there."""

import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest

from conftest import ROOT, read_json
from rewards import REWARDS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPER = (ROOT / "docs" / "PAPER.md").read_text(encoding="utf-8")
APPENDED = re.compile(r"at the end of `(\w+\.py)`:\n\n```python\n(.*?)```", flags=re.DOTALL)
REPLACED = re.compile(
    r"In `(\w+\.py)`, instead of `([^`]+)`:\n\n```python\n(.*?)```", flags=re.DOTALL
)
SHOWN = re.compile(
    r"^(?: {4}|.*&& )?"
    r"(python (?:train|evaluate|experiments/(?:figures|society|ask|drift))\.py [^\n]*)$"
    r"|^```python\n(.*?)```",
    flags=re.MULTILINE | re.DOTALL,
)


@pytest.fixture
def fork(tmp_path):
    """A copy of the project."""
    left_out = shutil.ignore_patterns(".*", "tests", "docs", "runs", "results", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "fork", ignore=left_out)
    return tmp_path / "fork"


def in_fork(fork, *command):
    done = subprocess.run(command, cwd=fork, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)


def test_every_command_and_snippet(fork):
    """The changes of "Fork it" first, then all commands and snippets in their order.

    Training is short. Left out are commands of a real model (Qwen/...) and of its run, and grids.
    """
    changes = APPENDED.findall(README)
    assert [file for file, _ in changes] == ["rewards.py", "envs.py"]
    for file, snippet in changes:
        with open(fork / file, "a") as target:
            target.write("\n\n" + snippet)
    shown = []
    pages = APPENDED.sub("", README) + REPLACED.sub("", PAPER)
    for command, snippet in SHOWN.findall(pages):
        if "Qwen/" not in command and "real/" not in command and "--paper" not in command:
            shown.append((command, snippet))
    assert sum(snippet != "" for _, snippet in shown) == 1 and len(shown) >= 8
    # One process for all: to import torch takes as long as most of them.
    code = ["import glob, runpy, sys; sys.path.append('experiments')"]
    for command, snippet in shown:
        command = re.sub(r" --episodes \d+", "", command)
        words = shlex.split(command.replace("train.py", "train.py --episodes 256"), comments=True)
        code.append(f"words = [w for x in {words[1:]} for w in sorted(glob.glob(x)) or [x]]")
        code.append(snippet or "sys.argv = words; runpy.run_path(words[0], run_name='__main__')")
    in_fork(fork, sys.executable, "-c", "\n".join(code))
    assert (fork / "figures" / "training.png").exists()


def test_group_relative_advantage(fork):
    """The snippet for ppo.py, in place of the line that it names: the agent learns."""
    [(file, line, snippet)] = REPLACED.findall(PAPER)
    text = (fork / file).read_text()
    assert file == "ppo.py" and text.count(f"\n        {line}\n") == 1 == text.count(line)
    assert len(snippet.splitlines()) == 5
    replaced = text.replace(f"        {line}\n", textwrap.indent(snippet, " " * 8))
    (fork / file).write_text(replaced.replace("VF_COEF = 0.1", "VF_COEF = 0"))
    options = ["--reward", "utilitarian", "--opponent", "random"]
    options += ["--episodes", "7680", "--out", "run"]
    in_fork(fork, sys.executable, "train.py", *options)
    assert min(read_json(fork / "run" / "result.json")["policy_after"].values()) >= 0.95


def test_every_option_in_the_readme_exists():
    known = {"--nproc-per-node", "--check"}  # of torchrun, of ruff
    for name in ("train", "evaluate", "experiments/figures", "experiments/paper"):
        command = [sys.executable, ROOT / f"{name}.py", "--help"]
        known |= options(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert options(README + PAPER) <= known
    for reward in REWARDS:
        assert f"`{reward}`" in README


def options(text):
    return set(re.findall(r"--[a-z][a-z-]+", text))
