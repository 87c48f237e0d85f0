"""What the README shows must work as it stands there."""

import re
import shutil
import subprocess
import sys

import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_fork_it(tmp_path):
    """Its snippets, appended to the files that it names, and its commands (shortened) on a copy of the project."""
    section = README[README.index("## Fork it"):README.index("## Where this differs")]
    files = re.findall(r"at the end of `(\w+\.py)`", section)
    snippets = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    commands = re.findall(r"^    python (.*)$", section, flags=re.MULTILINE)
    assert files == ["rewards.py", "envs.py"] and len(snippets) == 2 and len(commands) == 2
    shutil.copytree(ROOT, tmp_path / "fork", ignore=shutil.ignore_patterns(".git", "tests", "runs", "results", "__pycache__"))
    for file, snippet in zip(files, snippets):
        with open(tmp_path / "fork" / file, "a") as target:
            target.write("\n\n" + snippet)
    for command in commands:
        short = ["--episodes", "16", "--batch", "8"] if command.startswith("train") else []
        done = subprocess.run([sys.executable, *command.split(), *short], cwd=tmp_path / "fork", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_option_in_the_readme_exists():
    helps = {}
    for door in ("train", "evaluate"):
        helps[door] = subprocess.run([sys.executable, f"{door}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"--[a-z][a-z-]+", helps["train"] + helps["evaluate"])) | {"--nproc-per-node", "--seeds", "--help", "--measure"}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= known
    for reward in train.REWARDS:
        assert f"`{reward}`" in README
