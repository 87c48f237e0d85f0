"""Games, opponents, play and prompts, against rules and expectations worked out by hand."""

from itertools import permutations

import numpy as np
import pytest

import envs
from envs import ILLEGAL, C, Condition, D, build_prompts, memory_one, payoff_matrix, play
from errors import InputError
from options import action_names, parse_games, parse_opponent, read_wording
from policy import encode
from wordings import NAMES

ALWAYS = np.eye(3)[:, None, None] * np.ones((4, 4, 1))  # ALWAYS[C] plays C everywhere


def rng(seed=0):
    return np.random.default_rng(seed)


def anyone(seed):
    """A player with all three outcomes in every state and order."""
    return rng(seed).dirichlet([1, 1, 1], size=(4, 4))


def play_strategy(player, name):
    """2000 episodes of 5 rounds against one of envs.STRATEGIES."""
    strategy = envs.STRATEGIES[name]
    opponent = envs.Opponent(strategy=strategy)
    return play(rng(), player, opponent.player(Condition()), 2000, 5, opponent.opening)


def test_payoffs_are_own_first():
    ipd = payoff_matrix("ipd")
    assert ipd[D, C].tolist() == [4, 0] and ipd[C, D].tolist() == [0, 4]
    assert payoff_matrix("bach-stravinsky")[C, C].tolist() == [3, 2]
    assert payoff_matrix("bach-stravinsky", side=1)[C, C].tolist() == [2, 3]
    assert payoff_matrix("ipd", side=1)[C, D].tolist() == [0, 4]
    assert all(np.shape(cells) == (4, 2) for cells in envs.GAMES.values())


def test_what_a_command_line_lists(tmp_path):
    assert parse_games(["chicken", "random"]) == ["chicken", "random"]
    assert parse_games(["contested"]) == ["contested"]
    assert parse_games("3 3 -1 4 4 -1 0 0".split()) == [((3, 3), (-1, 4), (4, -1), (0, 0))]
    for words in ("checkers", "3 3 0 4 4 0 1", "3 3 0 4 4 0 1 x", "3 3 0 4 4 0 1 0.5", "ipd 1"):
        with pytest.raises(InputError, match="none of"):
            parse_games(words.split())
    assert parse_opponent(["tit-for-tat"]).strategy == (1, 0, 1, 0)
    assert parse_opponent(["learner"]) == envs.Opponent(learns=True)
    assert parse_opponent([str(tmp_path)]) == envs.Opponent(run=tmp_path)
    assert parse_opponent("1 0.3 1 0.3".split()).strategy == (1, 0.3, 1, 0.3)
    for words in ("no/folder", "1 0 1", "1 0 1 2", "-0.1 0 0 0", "nan 0 0 0", "1 0 1 0 1"):
        with pytest.raises(InputError, match="none of"):
            parse_opponent(words.split())


@pytest.mark.parametrize(
    "numbers, words",
    [
        ((0.98, 0.03, 0.99, 0.01), "tit for tat"),
        ((0.02, 0.01, 0, 0.05), "always defect"),
        ((1, 0.6, 0.95, 0.5), "never betrays a cooperator"),
        ((0.05, 0.6, 0.1, 0.5), "always betrays a cooperator"),
        ((0.7, 0.6, 0.5, 0.3), "no classic strategy"),
    ],
)
def test_describe(numbers, words):
    player = memory_one(numbers)
    some_illegal = np.concatenate([0.7 * player, np.full((4, 1, 1), 0.3)], axis=2)
    assert envs.describe(player) == envs.describe(some_illegal) == words  # of the legal answers
    assert envs.describe(np.broadcast_to([0.0, 0.1, 0.9], (4, 4, 3))) == "mostly illegal"


def test_what_a_player_does_in_each_state():
    player = memory_one([0.1, 0.2, 0.3, 0.4])
    assert envs.by_state(player, C) == pytest.approx(dict(zip(envs.STATES, [0.1, 0.2, 0.3, 0.4])))
    assert envs.by_state(player, ILLEGAL) == dict.fromkeys(envs.STATES, 0)
    # Half of the answers are illegal: the own last move, C C D D, has that half, too.
    half = np.concatenate([player, np.ones((4, 1, 1))], axis=2) / 2
    assert envs.legal_moves(half)[:, C] == pytest.approx([0.55, 0.6, 0.15, 0.2])
    assert envs.replies(half)[:, C] == pytest.approx([0.55, 0.15, 0.6, 0.2])


def test_tit_for_tat_answers_the_move_in_the_state():
    mine, theirs = play_strategy(np.full((4, 4, 2), 0.5), "tit-for-tat")
    assert (theirs.move == mine.state // 2).all()  # also in round 0, where the state was drawn
    assert (mine.state[:, 1:] == 2 * mine.move[:, :-1] + theirs.move[:, :-1]).all()
    assert (theirs.state == 2 * (mine.state % 2) + mine.state // 2).all()


FIRST = [("always-cooperate", 0), ("always-defect", 1), ("random", 0.5), ("tit-for-tat", 0.5)]


@pytest.mark.parametrize("opponent, first", FIRST)
def test_opening_moves(opponent, first):
    mine, _ = play_strategy(ALWAYS[C], opponent)
    assert (mine.state[:, 0] % 2).mean() == pytest.approx(first, abs=0.05)
    # The player's own is always drawn.
    assert (mine.state[:, 0] // 2).mean() == pytest.approx(0.5, abs=0.05)


def test_illegal_leaves_the_last_legal_move():
    mine, theirs = play_strategy(ALWAYS[ILLEGAL], "tit-for-tat")
    assert (mine.action == ILLEGAL).all()
    # The drawn move stands for the whole episode, and tit-for-tat goes on answering it.
    assert (mine.move == mine.state[:, :1] // 2).all() and (theirs.move == mine.move).all()
    # An illegal opponent plays its own last legal move.
    _, theirs = play(rng(), ALWAYS[D], ALWAYS[ILLEGAL], 500, 5)
    assert (theirs.action == ILLEGAL).all() and (theirs.move == theirs.state // 2).all()
    assert set(theirs.move.ravel()) == {C, D}


def test_actions_follow_the_probabilities():
    player = anyone(3)
    mine, _ = play(rng(), player, memory_one([0.5] * 4), 20_000, 5)
    for row, expected in enumerate(player.reshape(16, 3)):
        seen = mine.action[mine.row == row]
        share = np.bincount(seen, minlength=3) / len(seen)
        assert np.abs(share - expected).max() < 5 * 0.5 / np.sqrt(len(seen))


def test_play_is_reproducible_and_counted():
    first, second = (play(rng(7), anyone(4), anyone(4), 50, 5) for _ in range(2))
    for seen, again in zip(first, second):
        assert np.array_equal(seen, again)
    mine, theirs = first
    assert (mine.state // 2 == theirs.state % 2).all()
    expected = dict.fromkeys(["C|C", "C|D", "D|C", "D|D", "illegal|C", "illegal|D"], 0)
    for action, their_last in zip(mine.action.ravel(), (theirs.state // 2).ravel()):
        expected["C D illegal".split()[action] + "|" + "CD"[their_last]] += 1
    assert envs.action_counts(mine) == expected and min(expected.values()) > 0


def test_sixteen_prompts():
    texts = build_prompts(Condition(actions=("north", "south")))
    assert len(texts) == len(set(texts)) == 16
    cd = texts[4:8]  # state CD: own C, other's D, in all four orders
    state = "played north and they played south, so you got 0 points and they got 4."
    matrix = "| north | 3, 3 | 0, 4 |\n| south | 4, 0 | 1, 1 |"
    assert all(state in text for text in cd)
    assert all(matrix in text for text in texts)
    starts, ends = {text.splitlines()[0] for text in cd}, {text.splitlines()[-1] for text in cd}
    assert len(starts) == len(ends) == 2  # the two shuffles are independent of each other


def test_points_are_shown_as_they_are_written():
    texts = build_prompts(Condition(game=((1.5, 3), (0, 1000000), (4, 0), (-1, 0.1))))
    assert "| action1 | 1.5, 3 | 0, 1000000 |\n| action2 | 4, 0 | -1, 0.1 |" in texts[0]
    assert "you got 1.5 points and they got 3." in texts[0]


def test_the_second_player_sees_its_own_points_first():
    condition = Condition("bach-stravinsky", ("A", "B"))
    assert "so you got 3 points and they got 2." in build_prompts(condition)[0]
    assert "so you got 2 points and they got 3." in build_prompts(condition, side=1)[0]


def test_persona_and_own_template():
    condition = Condition(actions=("A", "B"), prompt="Now {first} or {second}?")
    assert build_prompts(condition)[:4] == (*["Now A or B?"] * 2, *["Now B or A?"] * 2)
    text = build_prompts(condition._replace(persona="deontological"))[0]
    assert text == envs.PERSONAS["deontological"] + "\nNow A or B?"


def test_layouts_show_the_same_points():
    seen = set()
    for layout in envs.LAYOUTS:
        words = envs.fields(payoff_matrix("chicken"), ("c", "d"), layout, C, C, 0)
        lines = [line.strip("|").split("|") for line in words["matrix"].split("\n")]
        (_, *columns), *rows = [[cell.strip() for cell in line] for line in lines]
        pairs = [(row, *pair) for row, *points in rows for pair in zip(columns, points)]
        cells = {(row, column): cell for row, column, cell in pairs}
        expected = {("c", "c"): "2, 2", ("c", "d"): "1, 4", ("d", "c"): "4, 1", ("d", "d"): "0, 0"}
        assert cells == expected
        seen.add((columns[0], rows[0][0]))
    assert len(seen) == 4
    # With both swapped it reads like a game in which C and D are exchanged: no text tells them.
    exchanged = build_prompts(Condition(envs.GAMES["chicken"][::-1], ("d", "c")))
    assert {*build_prompts(Condition("chicken", ("c", "d"), "both"))} == {*exchanged}


@pytest.mark.parametrize("wording", envs.TEMPLATES)
def test_every_wording_can_be_answered_by_the_embedded_model(wording, tiny):
    """The boundary holds and both names can be distinguished in every wording and layout."""
    names = ("action3", "action4")
    for layout in envs.LAYOUTS:
        texts = build_prompts(Condition("chicken", names, layout, wording))
        prompts, answers = encode(tiny[1], texts, names)
        assert len(prompts) == 16 and all(answers) and answers[0] != answers[1]


def test_sentences_tell_the_game_as_it_is():
    """Points are all different, and C has the name B."""
    game = ((1, 2), (3, 4), (5, 6), (7, 8))
    for text in build_prompts(Condition(game, ("B", "A"), prompt="unstructured")):
        assert "both of you pick B, you get 1 points and your friend gets 2." in text
        assert "you pick B and your friend picks A, you get 3 and your friend 4." in text
        assert "you pick A and your friend picks B, you get 5 and your friend 6." in text
        assert "both of you pick A, you get 7 and your friend 8." in text
    for text in build_prompts(Condition(actions=("B", "A"), prompt="poetic")):
        assert "To help with the cleaning is B by name,\nto leave it to others is A" in text


def test_the_explicit_wording_gives_no_meaning_away():
    """It names the game, and reads the same whichever name is to cooperate."""
    one, other = (Condition(actions=pair, prompt="explicit") for pair in (("c", "d"), ("d", "c")))
    assert {*build_prompts(one)} == {*build_prompts(other)}
    assert all("Prisoner's Dilemma" in text for text in build_prompts(one))


@pytest.mark.parametrize(
    "names", [["a", "a"], ["", "b"], [" a", "b"], ["a\nb", "c"], ["a|b", "c"], ["a"], list("aba")]
)
def test_names(names):
    with pytest.raises(InputError, match="name"):
        action_names(names)
    assert action_names(["random"]) == action_names(NAMES) == NAMES


BAD_TEMPLATES = {
    "{first} or what?": "{second}",
    "{first} {second} {colour}": "no field {colour}",
    "{first} {second} {cc_own:>3}": "{cc_own} without a format",
    "{first} {second} {": "'{'",
    "nothing": "{first} and {second}",
}


@pytest.mark.parametrize("template, word", BAD_TEMPLATES.items())
def test_bad_templates(template, word):
    with pytest.raises(InputError) as error:
        build_prompts(Condition(prompt=template))
    assert word in str(error.value)


def test_conditions_are_drawn_from_everything_listed():
    listed = ["chicken", "random"], ["a", "b", "c"], ["rows", "both"], ["structured", "poetic"]
    choices = envs.Choices(*listed)
    assert choices.varies()
    generator = rng()
    drawn = [choices.draw(generator) for _ in range(400)]
    expected = set()
    for names in permutations("abc", 2):
        for layout in ("rows", "both"):
            for wording in ("structured", "poetic"):
                expected.add(Condition("chicken", names, layout, wording))
    assert {condition for condition in drawn if condition.game == "chicken"} == expected
    fresh = [condition.game for condition in drawn if condition.game != "chicken"]
    points = np.array(fresh)
    assert len(set(fresh)) == len(fresh) > 150
    assert points.shape[1:] == (4, 2) and set(points.ravel()) == set(range(10))
    assert payoff_matrix(fresh[0])[C, D].tolist() == list(fresh[0][1])


def test_a_single_condition_costs_no_randomness():
    """So that the paper's setting plays the same games whatever could have been varied."""
    generator = rng()
    only = Condition("ipd", ("a", "b"), "rows", "poetic")
    choices = envs.Choices(["ipd"], ["a", "b"], ["rows"], ["poetic"])
    before = generator.bit_generator.state
    assert not choices.varies() and choices.draw(generator) == only
    assert generator.bit_generator.state == before
    for game in (["ipd"], ["random"], ["contested"]):
        assert envs.Choices(game, ["a", "b", "c"], ["rows", "both"], ["poetic"]).first() == only
    for varied in ({"game": ["random"]}, {"actions": list("abc")}, {"layout": ["rows", "both"]}):
        assert choices._replace(**varied).varies()


def test_contested_games_are_those_in_which_simple_rules_disagree():
    """Rules as loops over the cells; in no other random game."""

    def larger(c, d):
        return (c > d) - (c < d)

    generator = rng()
    for i in range(300):
        (cc, cd, dc, dd) = game = envs.random_game(generator, contested=i % 2 == 0)
        moves = {
            larger(cc[0] + cd[0], dc[0] + dd[0]),
            larger(sum(cc) + sum(cd), sum(dc) + sum(dd)),
            larger(max(sum(cc), sum(cd)), max(sum(dc), sum(dd))),
            larger(max(*cc, *cd), max(*dc, *dd)),
        }
        assert {1, -1} <= moves or i % 2
        assert envs.rules_disagree(payoff_matrix(game)) == ({1, -1} <= moves)


def test_a_wording_from_a_file(tmp_path):
    """Neither a byte order mark nor a final newline is part of it."""
    file = tmp_path / "wording.txt"
    file.write_bytes(b"\xef\xbb\xbf{first} or {second}?\r\n")
    assert read_wording(str(file)) == "{first} or {second}?"
    assert read_wording("poetic") == "poetic"
    with pytest.raises(InputError, match="name a text file, or one of structured"):
        read_wording("hiaku")
