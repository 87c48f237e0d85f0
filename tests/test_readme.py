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
# Of hf, torchrun, ruff and sbatch.
OTHERS = {"--local-dir", "--nproc-per-node", "--check", "--array", "--gres", "--wrap"}


def options(text):
    return set(re.findall(r"--[a-z][a-z-]+", text))
