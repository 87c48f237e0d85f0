"""The embedded model: it reads held-out games, and decides at random."""

import sys

import numpy as np
import pytest

from conftest import ROOT
from envs import C, ILLEGAL, payoff_array, prompts
from policy import Policy, encode

sys.path.insert(0, str(ROOT / "tiny"))
from pretrain import reading  # noqa: E402


def test_reads_the_last_moves_of_held_out_games(tiny):
    scores = reading(*tiny, texts=300, seed=5)
    assert scores["own"] >= 0.95 and scores["other"] >= 0.95


@pytest.mark.parametrize("names", [("action1", "action2"), ("action3", "action4"), ("moon", "river")])
def test_untuned_decisions_are_undecided(names, tiny):
    model, tokenizer = tiny
    texts, answers = encode(tokenizer, prompts(payoff_array("ipd"), names), names)
    constrained = Policy(model, None, texts, answers, free=False)()[0].detach().exp().numpy().reshape(4, 4, 2)
    free = Policy(model, None, texts, answers, free=True)()[0].detach().exp().numpy().reshape(4, 4, 3)
    assert 0.35 <= constrained[..., C].mean() <= 0.65
    assert 0.2 <= free[..., ILLEGAL].mean() <= 0.7
    assert np.allclose(free.sum(-1), 1, atol=1e-5)


def test_size_on_disk():
    assert sum(path.stat().st_size for path in (ROOT / "tiny").iterdir() if path.is_file()) <= 5 * 2**20
