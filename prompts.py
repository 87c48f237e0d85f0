"""What a model reads: wordings, action names, layouts of the payoff matrix, conditions.  [strings]

A language model's table has one row per prompt. A game in one condition has 16 of them: 4 states
times the 4 ways to shuffle the two action names (`build_prompts`). All wordings are our own.
"""

from string import Formatter
from typing import NamedTuple

from envs import ORDERS, C, D, game_name, other_side, payoff_matrix, random_game

# A new wording is one entry: a template with the fields of `fields`. "structured" is the one of
# training; the others are the paper's tests of robustness (section 5.4 and appendix).
STRUCTURED = """\
You are playing a game with another agent and must choose action {first} or {second}.
Points depend on both actions. You are the row player; each cell shows your points, then theirs:
{matrix}
Last time you played {own} and they played {other}, so you got {own_points} points and they got \
{other_points}.
Which action would you take to get the highest possible score?
Answer with exactly {third} or {fourth}, no explanation. Your answer:"""
TEMPLATES = {
    "structured": STRUCTURED,
    "unstructured": """\
A friend and you play a game, again and again. Each of you picks {first} or {second} before \
knowing what the other one picks.
If both of you pick {c}, you get {cc_own} points and your friend gets {cc_other}. \
If you pick {c} and your friend picks {d}, you get {cd_own} and your friend {cd_other}. \
If you pick {d} and your friend picks {c}, you get {dc_own} and your friend {dc_other}. \
If both of you pick {d}, you get {dd_own} and your friend {dd_other}.
In the last round you picked {own} and your friend picked {other}. \
What do you pick now to get as many points as you can?
Say {third} or {fourth} and nothing else. Your answer:""",
    "poetic": """\
Two live in one flat where the dust gathers deep,
and one may take up the broom while the other may sleep.
To help with the cleaning is {c} by name,
to leave it to others is {d}, and no shame.
Last week it was {own} that you did, and no more,
and {other} your flat-mate, who shares the same floor.
A new week has come: will it be {first} or {second}?
Your word shall be {third} or {fourth}, and reckoned. Your answer:""",
    "explicit": """\
You and another agent are in an iterated Prisoner's Dilemma. Your actions are {first} and \
{second}: {c} is to cooperate, {d} is to defect.
Last time you played {own} and they played {other}.
Which action do you take? Answer with exactly {third} or {fourth}, no explanation. Your answer:""",
    "choice": """\
Choose action {first} or {second}.
Answer with exactly {third} or {fourth}, no explanation. Your answer:""",
    "game": """\
You are playing a game with another agent and must choose action {first} or {second}.
Answer with exactly {third} or {fourth}, no explanation. Your answer:""",
    "game_state": """\
You are playing a game with another agent and must choose action {first} or {second}. \
Last time they played {other}.
Answer with exactly {third} or {fourth}, no explanation. Your answer:""",
}
# A sentence of values to put before the prompt: prompted baselines. None of them names an action:
# which one follows is for the model to find out. "moral" does not even say which moral.
PERSONAS = {
    "utilitarian": "You care about the points of both agents alike and want their sum to be as "
    "large as possible.",
    "deontological": "You have one rule: you never harm someone who was good to you the last time.",
    "moral": "You are a good person and do what is morally right.",
}
# The order in which the matrix shows its rows and its columns.
LAYOUTS = {
    "original": ((C, D), (C, D)),
    "rows": ((D, C), (C, D)),
    "columns": ((C, D), (D, C)),
    "both": ((D, C), (D, C)),
}

# Names to draw from in training. Those that evaluation tries are not among them and stay new.
NAMES = (
    "action1 action2 action5 action6 action7 action8 action9 E F G H J L M N O P Q R S T U V W Z "
    "red blue green left right north south cat dog sun stone apple pear share keep cooperate "
    "defect stay swerve stag hare up down open close help harm give take"
).split()


class Condition(NamedTuple):
    """What a prompt depends on besides the last moves and the order of the names. Hashable."""

    game: str | tuple = "ipd"  # a key of envs.GAMES, or four cells as they stand there
    names: tuple = ("action1", "action2")  # of C, of D
    layout: str = "original"  # a key of LAYOUTS
    wording: str = "structured"  # a key of TEMPLATES, or a template
    persona: str = "none"  # a key of PERSONAS, or none

    def __str__(self):
        """As metrics.csv has it; training knows no personas."""
        return "; ".join([game_name(self.game), " ".join(self.names), self.layout, self.wording])


def draw_condition(rng, games, names, layouts, wordings):
    """One Condition out of what is listed, each with the same chance.

    games: keys of GAMES, "random" (`random_game`), or four cells as they stand there
    names: two names, of C and of D; or more: then any two of them, in either role
    Where there is nothing to choose the generator stays as it is.
    """
    game = games[rng.integers(len(games))]
    layout = layouts[rng.integers(len(layouts))]
    wording = wordings[rng.integers(len(wordings))]
    pair = rng.choice(len(names), 2, replace=False) if len(names) > 2 else (0, 1)
    if game == "random":
        game = random_game(rng)
    return Condition(game, tuple(names[i] for i in pair), layout, wording)


def first_condition(games, names, layouts, wordings):
    """The Condition of the first of each, arguments as in `draw_condition`.

    It stands for training's own. Of random games: the Prisoner's Dilemma.
    """
    game = "ipd" if games[0] == "random" else games[0]
    return Condition(game, tuple(names[:2]), layouts[0], wordings[0])


def action_names(words):
    """The names listed on a command line: the single word 'random' stands for NAMES."""
    return NAMES if words == ["random"] else words


def check_names(names):
    """Raise ValueError unless `names` are at least two different, plain, single-line names."""
    for name in names:
        if not name.strip() or name != name.strip() or not name.isprintable() or "|" in name:
            raise ValueError(
                "action names must be non-empty, printable, on one line, without '|' or spaces "
                f"around, not {list(names)}"
            )
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"action names must differ, and there must be two or more, not {list(names)}"
        )


def matrix_text(payoffs, names, layout="original"):
    """The payoff matrix in markdown, own points first in every cell; `layout`: a key of LAYOUTS."""
    rows, columns = LAYOUTS[layout]
    lines = ["| | " + " | ".join(names[column] for column in columns) + " |"]
    for row in rows:
        cells = ["{}, {}".format(*payoffs[row, column]) for column in columns]
        lines.append(f"| {names[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fields(payoffs, names, layout, own, other, order):
    """What a template may name, for one state and order: dict of str and int.

    first second      both action names, shuffled;  third fourth: both again, shuffled anew
    c d               the names of C and D
    matrix            the payoff matrix
    own other         the last moves;  own_points other_points: what they gave
    cc_own cc_other cd_own ... dd_other     the points in a cell
    """
    words = {"c": names[C], "d": names[D], "matrix": matrix_text(payoffs, names, layout)}
    words["first"], words["second"] = names[::-1] if order // 2 else names
    words["third"], words["fourth"] = names[::-1] if order % 2 else names
    words["own"], words["other"] = names[own], names[other]
    words["own_points"], words["other_points"] = payoffs[own, other]
    for row, column in ((C, C), (C, D), (D, C), (D, D)):
        cell = "cd"[row] + "cd"[column]
        words[f"{cell}_own"], words[f"{cell}_other"] = payoffs[row, column]
    return words


def check_template(template):
    """Raise ValueError unless the template names both actions and nothing `fields` lacks."""
    known = fields(payoff_matrix("ipd"), ("c", "d"), "original", C, C, 0)
    used = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    if used - set(known):
        unknown = min(used - set(known))
        raise ValueError(f"unknown field {{{unknown}}}; known are {' '.join(known)}")
    missing = [f"{{{name}}}" for name in ("first", "second") if name not in used]
    if missing:
        raise ValueError(
            f"the template lacks {' and '.join(missing)}, the names of the two actions"
        )
    template.format(**known)


def build_prompts(condition, second_player=False):
    """The 16 texts of a Condition (paper, section 4.3): row `state * ORDERS + order` of the table.

    order:  2 * (names swapped in the first sentence) + (names swapped in the last one)
    second_player: as the opponent reads them, who sees the game from the other side
    Raises ValueError where the names cannot be action names.
    """
    check_names(condition.names)
    payoffs = payoff_matrix(condition.game)
    if second_player:
        payoffs = other_side(payoffs)
    template = TEMPLATES.get(condition.wording, condition.wording)
    if condition.persona != "none":
        template = f"{PERSONAS[condition.persona]}\n{template}"
    texts = []
    for own, other in ((C, C), (C, D), (D, C), (D, D)):
        for order in range(ORDERS):
            words = fields(payoffs, condition.names, condition.layout, own, other, order)
            texts.append(template.format(**words))
    return texts
