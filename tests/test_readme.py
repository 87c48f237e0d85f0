"""What the README shows must work as it stands there."""

import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest

from conftest import ROOT, player_of, read_json
from envs import C, Condition, by_state
from rewards import REWARDS

README = (ROOT / "README.md").read_text(encoding="utf-8")
FORK = (ROOT / "docs" / "FORK.md").read_text(encoding="utf-8")
MODELS = (ROOT / "docs" / "MODELS.md").read_text(encoding="utf-8")
PAGES = [README, *(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))]
PAGES.append((ROOT / "tiny" / "README.md").read_text(encoding="utf-8"))
# Of hf, torchrun and sbatch.
OTHERS = {"--local-dir", "--nproc-per-node", "--array", "--gres", "--wrap"}
APPENDED = re.compile(r"At the end of `(\w+\.py)`:\n\n```python\n(.*?)```", flags=re.DOTALL)
REPLACED = re.compile(
    r"In `(\w+\.py)`, instead of `([^`]+)`:\n\n```python\n(.*?)```", flags=re.DOTALL
)
BEFORE = re.compile(r"In `(\w+\.py)`, before\s+`([^`]+)`:\n\n```python\n(.*?)```", flags=re.DOTALL)
SHOWN = re.compile(
    r"^(?: {4}|.*&& )?"
    r"(python (?:train|evaluate|experiments/(?:figures|society|ask|drift))\.py [^\n]*)$"
    r"|^```python\n(.*?)```",
    flags=re.MULTILINE | re.DOTALL,
)


@pytest.fixture
def fork(tmp_path):
    """A copy of the project, with all changes of docs/FORK.md."""
    folder = tmp_path / "fork"
    left_out = shutil.ignore_patterns(".*", "runs", "results", "__pycache__", "*.png")
    shutil.copytree(ROOT, folder, ignore=left_out)
    appended = APPENDED.findall(FORK)
    assert [file for file, _ in appended] == ["rewards.py", "envs.py", "wordings.py"]
    for file, snippet in appended:
        with open(folder / file, "a") as target:
            target.write("\n\n" + snippet)
    [(file, line, snippet)] = BEFORE.findall(FORK)
    text = (folder / file).read_text()
    assert text.count(line) == 1
    (folder / file).write_text(text.replace(f"    {line}", f"{snippet}    {line}"))
    return folder


def in_fork(fork, *command):
    done = subprocess.run(command, cwd=fork, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)


def test_every_command_and_snippet(fork):
    """All commands and snippets in their order.

    Training is short. Left out are commands of a real model and of its run, and the recipe's.
    """
    shown = []
    fork_page = FORK
    for pasted in (APPENDED, BEFORE, REPLACED):
        fork_page = pasted.sub("", fork_page)
    for command, snippet in SHOWN.findall(README + fork_page + MODELS):
        if not any(word in command for word in ("--model", "real/", "RUN", "moral")):
            shown.append((command, snippet))
    assert sum(snippet != "" for _, snippet in shown) == 2 and len(shown) >= 8
    # One process for all: to import torch takes as long as most of them.
    code = ["import glob, runpy, sys; sys.path.append('experiments')"]
    for command, snippet in shown:
        command = re.sub(r" --episodes \d+", "", command)
        words = shlex.split(command.replace("train.py", "train.py --episodes 256"), comments=True)
        code.append(f"words = [w for x in {words[1:]} for w in sorted(glob.glob(x)) or [x]]")
        code.append(snippet or "sys.argv = words; runpy.run_path(words[0], run_name='__main__')")
    in_fork(fork, sys.executable, "-c", "\n".join(code))
    assert (fork / "figures" / "training.png").exists()
    # The reward's own parameter is the run's in training and in evaluation.
    assert read_json(fork / "runs" / "averse" / "config.json")["envy"] == 2


def test_a_pasted_fork_leaves_the_tests_green(fork):
    """Those that look at all rewards, games, opponents, wordings and options, and at the files."""
    names = ("house", "envs", "rewards", "readme")
    files = [f"tests/test_{name}.py" for name in names]
    quick = "not command and not fork and not relative"
    in_fork(fork, sys.executable, "-m", "pytest", "-q", "-n0", "-k", quick, *files)


def test_group_relative_advantage(fork):
    """The snippet for ppo.py, in place of the line that it names: the agent learns."""
    [(file, line, snippet)] = REPLACED.findall(FORK)
    text = (fork / file).read_text()
    assert file == "ppo.py" and text.count(f"\n        {line}\n") == 1 == text.count(line)
    assert len(snippet.splitlines()) == 5
    replaced = text.replace(f"        {line}\n", textwrap.indent(snippet, " " * 8))
    (fork / file).write_text(replaced.replace("VF_COEF = 0.1", "VF_COEF = 0"))
    options = ["--reward", "utilitarian", "--opponent", "random"]
    options += ["--episodes", "7680", "--out", "run"]
    in_fork(fork, sys.executable, "train.py", *options)
    assert min(read_json(fork / "run" / "result.json")["policy_after"].values()) >= 0.95


def test_the_readme_shows_what_the_untuned_model_says(tiny):
    before = by_state(player_of(*tiny, Condition()), C)
    for state, p in before.items():
        assert f"  P(C | {state}){p:25.3f}   1.000\n" in README


def test_every_option_on_the_pages_exists():
    [(_, _, snippet)] = BEFORE.findall(FORK)
    known = OTHERS | options(snippet)
    for folder in (".", "experiments", "tiny"):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            known |= set(re.findall(r'(?:option|argument)\(\s*"(--[a-z-]+)"', text))
    assert options("".join(PAGES)) <= known
    table = re.findall(r"^\| `([\w+]+)` \|", README, flags=re.MULTILINE)
    assert len(table) == 6 and {*table} <= {*REWARDS}


def options(text):
    return set(re.findall(r"--[a-z][a-z-]+", text))
