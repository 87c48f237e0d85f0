"""speed.py measures something."""

import pytest

import speed


def test_its_figures(monkeypatch, capsys):
    kept, measure = [], speed.measure
    monkeypatch.setattr(speed, "measure", lambda *job: kept.append(measure(*job)) or kept[0])
    monkeypatch.setattr(speed, "SIZES", (1, 16))
    monkeypatch.setattr(speed, "ROUNDS", 2)
    speed.main(["--repeats", "1"])
    figures, printed = kept[0], capsys.readouterr().out
    assert all(f"{name} " in printed for name in figures)
    for key in ("update / floor", "16 padded prompts / trie", "peak memory, GB"):
        assert figures[key] > 0
    assert min(figures["rounds per second"].values()) > 0
    assert sum(figures["share of the time, 256 episodes"].values()) == pytest.approx(1)
