"""A task without a game."""

import re
import subprocess
import sys

from conftest import ROOT


def test_it_learns_all_three_right_answers():
    command = [sys.executable, "experiments/own_task.py"]
    lines = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[-3:]
    for i, line in enumerate(lines):
        light, *p = re.match(r"The light is (\w+)\..*?(\S+) +(\S+) +(\S+)$", line).groups()
        assert light == ("red", "yellow", "green")[i] and float(p[i]) >= 0.95
