"""A task without a game."""

import re
import runpy

from conftest import ROOT


def test_it_learns_all_three_right_answers(capsys):
    runpy.run_path(str(ROOT / "experiments" / "own_task.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[-3:]
    for i, line in enumerate(lines):
        light, *p = re.match(r"The light is (\w+)\..*?(\S+) +(\S+) +(\S+)$", line).groups()
        assert light == ("red", "yellow", "green")[i] and float(p[i]) >= 0.95
