"""The embedded model: it reads held-out games and is undecided; and the texts it learned from."""

import random

import pytest
import torch

import pretrain
import texts
from envs import payoff_matrix

BARS = {
    "own": 0.99,
    "other": 0.99,
    "reverse": 0.99,
    "own_points": 0.95,
    "other_points": 0.95,
    "cell": 0.95,
    "their_cell": 0.95,
    "best_reply": 0.85,
    "total": 0.85,
    "equal": 0.85,
    "average": 0.85,
    "average_total": 0.85,
    "treated": 0.85,
}


def test_reads_held_out_games_in_every_layout(tiny):
    shares = pretrain.reading(*tiny, texts=60, seed=5)
    assert shares.keys() == BARS.keys()
    for kind, bar in BARS.items():
        assert min(shares[kind].values()) >= bar, kind


def test_untuned_decisions_are_undecided(tiny):
    decisions = pretrain.decisions(*tiny)
    assert {"action1 action2", "action3 action4", "moon river"} < decisions.keys()
    for names, (cooperation, illegal) in decisions.items():
        assert 0.35 <= cooperation <= 0.65, names
        assert 0.2 <= illegal <= 0.7, names


@pytest.mark.parametrize("kind", texts.TEXTS)
def test_a_branch_is_read_like_a_text_of_its_own(kind, tiny):
    """Beside other branches and longer texts, an answer has the logits of the plain text."""
    model, tokenizer = tiny
    rng = random.Random(3)
    batch = [texts.make_text(rng, kind) for _ in range(3)]
    with torch.no_grad():
        packed, wanted = pretrain.answer_logits(model, *pretrain.pack(tokenizer, batch))
        plain = []
        for context, branches in batch:
            for branch in branches:
                alone = texts.Text(context, [branch])
                ids, _, labels, _ = pretrain.pack(tokenizer, [alone])
                plain.append(model(ids).logits[labels != -100])
    assert (packed - torch.cat(plain)).abs().max() < 1e-3
    assert len(set(wanted.tolist())) > 3


def test_questions_are_about_a_game_that_was_worked_out_by_hand():
    """(3,3) (0,4) (4,1) (1,2) in CC CD DC DD, the last moves C and D."""
    game = texts.Game(random.Random(0))
    game.names, game.own, game.other = ["C", "D"], 0, 1
    game.payoffs = payoff_matrix(((3, 3), (0, 4), (4, 1), (1, 2)))
    for kind, move, answer in [
        ("own", 0, "C"),
        ("other", 0, "D"),
        ("reverse", 0, "C"),
        ("own_points", 0, "0"),
        ("other_points", 0, "4"),
        ("best_reply", 0, "D"),
        ("best_reply", 1, "D"),
        ("total", 0, "C"),
        ("total", 1, "C"),
        ("equal", 0, "C"),
        ("equal", 1, "D"),
        ("average", 0, "D"),
        ("average_total", 0, "C"),
        ("treated", 0, "no"),
    ]:
        assert game.answer(kind, 0, move) == answer, kind
    assert [game.answer("cell", x, y) for x, y in texts.MOVES] == list("3041")
    assert [game.answer("their_cell", x, y) for x, y in texts.MOVES] == list("3412")

    # Neither action is better: this is not asked.
    game.payoffs = payoff_matrix(((2, 2), (1, 2), (2, 2), (1, 2)))
    assert game.answer("best_reply", 0, 0) is None
    assert game.answer("average_total", 0, 0) is None


class EvenFirstPoints:
    """In place of a set of games."""

    def __contains__(self, cells):
        return cells[0][0] % 2 == 0


def test_held_out_games_and_pairs_of_names_never_occur_in_training(monkeypatch):
    """Half of all games are held out here, and half of all pairs of names."""
    games = []

    class SeenGame(texts.Game):
        def __init__(self, rng):
            super().__init__(rng)
            games.append(self)

    some, others = texts.NAMES[:20], texts.NAMES[20:]
    pairs = [(name, other) for name in some for other in others]
    monkeypatch.setattr(texts, "Game", SeenGame)
    monkeypatch.setattr(texts, "HELD_OUT_NAMES", pairs)
    monkeypatch.setattr(texts, "HELD_OUT_GAMES", EvenFirstPoints())
    rng = random.Random(4)
    for kind in [*texts.TEXTS] * 40:
        context, _ = texts.make_text(rng, kind)
        words = set(context.replace(".", " ").replace(",", " ").split())
        paired = words & set(some) and words & set(others)
        assert kind == "game" or not paired
    assert len(games) == 40 * len(texts.TEXTS)
    assert all(game.payoffs[0, 0, 0] % 2 for game in games)


def test_the_saved_tokenizer_is_the_one_that_the_script_makes(tiny):
    _, saved = tiny
    made = pretrain.make_tokenizer()
    assert made.get_vocab() == saved.get_vocab()
    assert made.chat_template == saved.chat_template
