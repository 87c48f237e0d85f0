"""What a model reads: sixteen texts, layouts, names, templates; how conditions are drawn."""

from itertools import permutations

import numpy as np
import pytest

from envs import C, D, payoff_matrix
from models import encode
from prompts import (
    LAYOUTS,
    NAMES,
    PERSONAS,
    TEMPLATES,
    Condition,
    action_names,
    build_prompts,
    check_names,
    check_template,
    draw_condition,
    first_condition,
    matrix_text,
)


def test_sixteen_prompts():
    texts = build_prompts(Condition(names=("north", "south")))
    assert len(texts) == len(set(texts)) == 16
    cd = texts[4:8]  # state CD: own C, other's D, in all four orders
    state = "played north and they played south, so you got 0 points and they got 4."
    matrix = "| north | 3, 3 | 0, 4 |\n| south | 4, 0 | 1, 1 |"
    assert all(state in text for text in cd)
    assert all(matrix in text for text in texts)
    starts, ends = {text.splitlines()[0] for text in cd}, {text.splitlines()[-1] for text in cd}
    assert len(starts) == len(ends) == 2  # the two shuffles are independent of each other


def test_the_second_player_sees_its_own_points_first():
    condition = Condition("bach-stravinsky", ("A", "B"))
    assert "so you got 3 points and they got 2." in build_prompts(condition)[0]
    assert "so you got 2 points and they got 3." in build_prompts(condition, second_player=True)[0]


def test_persona_and_own_template():
    condition = Condition(names=("A", "B"), wording="Now {first} or {second}?")
    assert build_prompts(condition)[:4] == ["Now A or B?"] * 2 + ["Now B or A?"] * 2
    text = build_prompts(condition._replace(persona="deontological"))[0]
    assert text == PERSONAS["deontological"].format(c="A", d="B") + "\nNow A or B?"


def test_layouts_show_the_same_points():
    seen = set()
    for layout in LAYOUTS:
        lines = []
        for line in matrix_text(payoff_matrix("chicken"), ("c", "d"), layout).split("\n"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        (_, *columns), *rows = lines
        cells = {}
        for row, *points in rows:
            for column, cell in zip(columns, points):
                cells[row, column] = cell
        expected = {("c", "c"): "2, 2", ("c", "d"): "1, 4", ("d", "c"): "4, 1", ("d", "d"): "0, 0"}
        assert cells == expected
        seen.add((columns[0], rows[0][0]))
    assert len(seen) == 4


@pytest.mark.parametrize("wording", TEMPLATES)
def test_every_wording_can_be_answered_by_the_embedded_model(wording, tiny):
    """The boundary holds and both names can be distinguished in every wording and layout."""
    names = ("action3", "action4")
    for layout in LAYOUTS:
        texts = build_prompts(Condition("chicken", names, layout, wording))
        _, answers = encode(tiny[1], texts, names)
        assert len(texts) == 16 and answers[0] != []


@pytest.mark.parametrize("names", [("a", "a"), ("", "b"), (" a", "b"), ("a\nb", "c"), ("a|b", "c")])
def test_bad_names(names):
    with pytest.raises(ValueError, match="action names"):
        check_names(names)
    with pytest.raises(ValueError, match="action names"):
        build_prompts(Condition(names=names))


@pytest.mark.parametrize(
    "template, word",
    [
        ("{first} or what?", "{second}"),
        ("{first} {second} {colour}", "{colour}"),
        ("{first} {second} {", "'{'"),
        ("nothing", "{first} and {second}"),
    ],
)
def test_bad_templates(template, word):
    with pytest.raises(ValueError) as error:
        check_template(template)
    assert word in str(error.value)


def test_built_in_templates_and_names_are_good():
    for template in TEMPLATES.values():
        check_template(template)
    check_names(NAMES)
    assert action_names(["random"]) == NAMES and action_names(["A", "B"]) == ["A", "B"]


def test_conditions_are_drawn_from_everything_listed():
    rng = np.random.default_rng(0)
    listed = ["chicken", "random"], ["a", "b", "c"], ["rows", "both"], ["structured", "poetic"]
    drawn = [draw_condition(rng, *listed) for _ in range(400)]
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
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    listed = ["ipd"], ["a", "b"], ["rows"], ["poetic"]
    assert draw_condition(rng, *listed) == Condition("ipd", ("a", "b"), "rows", "poetic")
    assert rng.bit_generator.state == before


def test_first_condition():
    only = Condition("ipd", ("a", "b"), "rows", "poetic")
    assert first_condition(["ipd"], "abc", ["rows"], ["poetic"]) == only
    assert first_condition(["random"], "ab", ["rows", "both"], ["poetic"]) == only
