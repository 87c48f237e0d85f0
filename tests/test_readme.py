"""What the README shows must work as it stands there."""

import re
import shutil
import subprocess
import sys

import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_every_command_and_snippet(tmp_path):
    """On a copy of the project: the changes of "Fork it" first, then all commands and snippets in their order, with short training.

    Left out are those of a real model (google/...) and of benchmarks/.
    """
    fork = tmp_path / "fork"
    shutil.copytree(ROOT, fork, ignore=shutil.ignore_patterns(".git", "tests", "runs", "results", "__pycache__"))
    change = r"at the end of `(\w+\.py)`:\n\n```python\n(.*?)```"
    changes = re.findall(change, README, flags=re.DOTALL)
    assert [file for file, _ in changes] == ["rewards.py", "envs.py"]
    for file, snippet in changes:
        with open(fork / file, "a") as target:
            target.write("\n\n" + snippet)
    shown = re.findall(r"^(?: {4})?(python (?:train|evaluate)\.py [^\n]*)$|^```python\n(.*?)```", re.sub(change, "", README, flags=re.DOTALL),
                       flags=re.MULTILINE | re.DOTALL)
    shown = [(command, snippet) for command, snippet in shown if "google/" not in command]
    assert [bool(snippet) for _, snippet in shown].count(True) == 1 and len(shown) >= 6
    for command, snippet in shown:
        command = command.replace("python", sys.executable, 1) + (" --episodes 512" if "train.py" in command else "")
        done = subprocess.run([sys.executable, "-c", snippet] if snippet else ["bash", "-c", command], cwd=fork, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
    assert (fork / "figures" / "training.png").exists()


def test_every_option_in_the_readme_exists():
    helps = {}
    for door in ("train", "evaluate"):
        helps[door] = subprocess.run([sys.executable, f"{door}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"--[a-z][a-z-]+", helps["train"] + helps["evaluate"])) | {"--nproc-per-node", "--seeds", "--help", "--measure"}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= known
    for reward in train.REWARDS:
        assert f"`{reward}`" in README
