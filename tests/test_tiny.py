"""The embedded model: it reads held-out games, and decides at random; and the texts it learned from."""

import random
import sys

import pytest
import torch

from conftest import ROOT
from envs import payoff_array

sys.path.insert(0, str(ROOT / "tiny"))
import pretrain  # noqa: E402

BARS = dict(own=0.99, other=0.99, reverse=0.99, own_points=0.95, other_points=0.95, cell=0.95, their_cell=0.95, best_reply=0.85, total=0.85,
            equal=0.85, average=0.85, average_total=0.85, treated=0.85)


def test_reads_held_out_games_in_every_layout(tiny):
    shares = pretrain.reading(*tiny, texts=100, seed=5)
    assert shares.keys() == BARS.keys()
    for kind, bar in BARS.items():
        assert min(shares[kind].values()) >= bar, kind


def test_untuned_decisions_are_undecided(tiny):
    found = pretrain.decisions(*tiny)
    assert {"action1 action2", "action3 action4", "moon river"} < found.keys()
    for names, (cooperation, illegal) in found.items():
        assert 0.35 <= cooperation <= 0.65 and 0.2 <= illegal <= 0.7, names


@pytest.mark.parametrize("kind", pretrain.TEXTS)
def test_a_branch_is_read_like_a_text_of_its_own(kind, tiny):
    """Packed beside other branches, and beside longer texts, an answer has the logits that it has in the plain text."""
    model, tokenizer = tiny
    rng = random.Random(3)
    texts = [pretrain.make_text(rng, kind) for _ in range(3)]
    alone = [(context, [branch]) for context, branches in texts for branch in branches]
    with torch.no_grad():
        packed, wanted = pretrain.answer_logits(model, *pretrain.encode(tokenizer, texts))
        plain = []
        for text in alone:
            ids, _, labels, _ = pretrain.encode(tokenizer, [text])
            plain.append(model(ids).logits[labels != -100])
    assert (packed - torch.cat(plain)).abs().max() < 1e-3 and len(set(wanted.tolist())) > 3


def test_questions_are_about_a_game_that_was_worked_out_by_hand():
    """(3,3) (0,4) (4,1) (1,2) in CC CD DC DD, the last moves C and D."""
    game = pretrain.Game(random.Random(0))
    game.names, game.own, game.other, game.points = ["C", "D"], 0, 1, payoff_array(((3, 3), (0, 4), (4, 1), (1, 2)))
    for kind, move, answer in [("own", 0, "C"), ("other", 0, "D"), ("reverse", 0, "C"), ("own_points", 0, "0"), ("other_points", 0, "4"),
                               ("best_reply", 0, "D"), ("best_reply", 1, "D"), ("total", 0, "C"), ("total", 1, "C"),
                               ("equal", 0, "C"), ("equal", 1, "D"), ("average", 0, "D"), ("average_total", 0, "C"), ("treated", 0, "no")]:
        assert game.answer(kind, 0, move) == answer, kind
    assert [game.answer("cell", x, y) for x, y in pretrain.MOVES] == list("3041")
    assert [game.answer("their_cell", x, y) for x, y in pretrain.MOVES] == list("3412")
    game.points = payoff_array(((2, 2), (1, 2), (2, 2), (1, 2)))
    assert game.answer("best_reply", 0, 0) is game.answer("average_total", 0, 0) is None  # neither is better: not asked


class EvenFirstPoints:
    """In place of a set of games."""

    def __contains__(self, cells):
        return cells[0][0] % 2 == 0


def test_held_out_games_and_pairs_of_names_never_occur_in_training(monkeypatch):
    games = []
    create = pretrain.Game.__init__
    monkeypatch.setattr(pretrain.Game, "__init__", lambda self, rng: create(self, rng) or games.append(self))
    monkeypatch.setattr(pretrain, "HELD_OUT_NAMES", [(name, other) for name in pretrain.NAMES[:20] for other in pretrain.NAMES[20:]])
    monkeypatch.setattr(pretrain, "HELD_OUT_GAMES", EvenFirstPoints())  # half of all games, as those names are half of all pairs
    rng = random.Random(4)
    for kind in [*pretrain.TEXTS] * 40:
        context, _ = pretrain.make_text(rng, kind)
        found = set(context.replace(".", " ").replace(",", " ").split())
        assert kind == "game" or not (found & set(pretrain.NAMES[:20]) and found & set(pretrain.NAMES[20:]))
    assert len(games) == 40 * len(pretrain.TEXTS) and all(game.points[0, 0, 0] % 2 for game in games)


def test_size_on_disk():
    assert sum(path.stat().st_size for path in (ROOT / "tiny").iterdir() if path.is_file()) <= 5 * 2**20
