"""speed.py measures something."""

import pytest

import speed
from conftest import read_json, refused


def test_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "SIZES", (1, 16))
    monkeypatch.setattr(speed, "ROUNDS", 2)
    path = tmp_path / "speed.json"
    speed.main(["--repeats", "1", "--json", str(path)])
    figures = read_json(path)
    for key in ("update / floor", "16 padded prompts / trie", "peak memory, GB"):
        assert figures[key] > 0
    assert min(figures["rounds per second"].values()) > 0
    assert sum(figures["share of the time, 256 episodes"].values()) == pytest.approx(1)
    with refused(capsys, "--json", "--overwrite"):
        speed.main(["--json", str(path)])
