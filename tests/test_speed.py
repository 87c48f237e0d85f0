"""speed.py measures something."""

import pytest

import speed


def test_its_figures(monkeypatch):
    monkeypatch.setattr(speed, "SIZES", (1, 16))
    monkeypatch.setattr(speed, "ROUNDS", 2)
    figures = speed.measure(speed.Job(*speed.load("tiny", 0), free=False), 1)
    for key in ("update / floor", "16 padded prompts / trie", "peak memory, GB"):
        assert figures[key] > 0
    assert min(figures["rounds per second"].values()) > 0
    assert sum(figures["share of the time, 256 episodes"].values()) == pytest.approx(1)
