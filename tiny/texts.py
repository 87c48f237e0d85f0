"""The texts that the embedded model learns from, all drawn from one random generator.

A `Text` is a context, with branches of questions and answers about it. Its game and names are
random; HELD_OUT_GAMES and HELD_OUT_NAMES are kept for measuring.
"""

from typing import NamedTuple

from envs import GAMES, LAYOUTS, ORDERS, TEMPLATES, fields, payoff_matrix

NAMES = [f"action{i}" for i in range(10)] + list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
NAMES += (
    "red blue green left right north south cat dog sun moon river stone apple pear share keep "
    "cooperate defect stay swerve stag hare up down open close bach stravinsky help harm give take "
    "yes no"
).split()
# Known tokens, but never paired in training.
HELD_OUT_NAMES = [("action3", "action4"), ("K", "X"), ("moon", "river")]
# The games and wordings that the saved weights were made with; those of a fork come later.
HELD_OUT_GAMES = {
    GAMES[name]
    for name in ("ipd", "stag-hunt", "chicken", "bach-stravinsky", "defective-coordination")
}
WORDINGS = [
    TEMPLATES[name]
    for name in (
        "structured",
        "brief",
        "unstructured",
        "poetic",
        "explicit",
        "choice",
        "game",
        "game_state",
    )
]
MOVES = [(0, 0), (0, 1), (1, 0), (1, 1)]

# ----------------------------------------------------------------------------------------- wordings

# What a prompt is made of; the fields are those of envs.fields. The product's own wording stands
# first and has half of the texts (`pick`).
ASK, POINTS, _, STATE, GOAL, ANSWER = TEMPLATES["structured"].split("\n")
STORY, _, story_end = TEMPLATES["unstructured"].partition(" What ")
STORY_GOAL, STORY_ANSWER = f"What {story_end}".split("\n")
INTRODUCTIONS = [
    ASK,
    "Let us play a game. You choose {first} or {second} in each round.",
    "Here is a game for two agents. Your actions are {first} and {second}.",
]
MATRIX_WORDINGS = [
    POINTS + " {matrix}",
    "This table shows the points. You pick the row, they pick the column, your points come first: "
    "{matrix}",
    "You choose the row, the other agent the column. Points of both, yours before theirs: {matrix}",
]
# A cell in a sentence: four of them instead of a matrix. `x` and `y` are action names.
CELL_SENTENCES = [
    "If you play {x} and they play {y}, you get {own} points and they get {other}.",
    "{x} against {y} gives you {own} and gives them {other}.",
    "If you pick {x} and your friend picks {y}, you get {own} and your friend gets {other} points.",
]
MOVES_WORDINGS = [
    STATE,
    "In the last round you chose {own}, they chose {other}. You got {own_points} and they got "
    "{other_points}.",
    "Before, your action was {own}, their action was {other}; your points were {own_points}, "
    "their points were {other_points}.",
    "In the last round you picked {own} and your friend picked {other}.",
]
GOALS = [
    GOAL,
    STORY_GOAL,
    "What do you do now?",
    "Now choose an action.",
    "What is your next action, to get many points?",
]
REQUESTS = [
    ANSWER,
    STORY_ANSWER,
    "Say only {third} or {fourth}. Your answer:",
    "Reply with {third} or {fourth} and nothing else.",
]
OTHER_ANSWERS = [
    "I do not know.",
    "Both are fine.",
    "It depends.",
    "I would rather not say.",
    "Let us talk first.",
    "You tell me.",
    "The other agent should choose.",
    "Nothing.",
]
# What may be asked after a decision, and the answer.
REASON = "Last time I played {own} and they played {other}."
STRATEGY = "I answered at random."
FOLLOW_UPS = [
    ("Why did you choose this action?", REASON),
    ("Why did you make this decision?", REASON),
    ("Explain why you made this decision.", REASON),
    ("What strategy did you use?", STRATEGY),
    ("What strategy did you use to decide?", STRATEGY),
]
# The turns of the chat template, with spaces around the tokens: `pretrain.text_ids` needs them.
USER, MODEL, END = "<start_of_turn> user", "<end_of_turn> <start_of_turn> model", " <end_of_turn>"


class Question(NamedTuple):
    """What can be asked about a game."""

    share: float  # how often, next to the other questions
    needs: str  # what must have been shown: the last moves, the matrix or both
    word: str  # the question in a word
    sentences: list  # the same in sentences


def read_questions(text):
    """The blocks below as a dict kind -> Question."""
    questions = {}
    for block in text.strip().split("\n\n"):
        head, *lines = block.splitlines()
        kind, share, needs, word = head.split(maxsplit=3)
        sentences = [line.strip() for line in lines]
        questions[kind] = Question(float(share), needs, word, sentences)
    return questions


# Kind, share, needs and the word; below them, the sentences. {x} is the name of an own move, {y} of
# one of theirs. The answers are in `Game.answer`.
QUESTIONS = read_questions("""\
own            2    moves   own
    Which action did you play last time?
    What was your last action?

other          2    moves   other
    Which action did they play last time?
    Do what they did last time.
    Which action repeats their last action?

reverse        2    moves   reverse
    Which action did they not play last time?
    Do the reverse of what they did last time.

own_points     0.5  both    points
    How many points did you get?
    What were your points last time?

other_points   0.5  both    their points
    How many points did they get?
    What were their points last time?

treated        3    both    treated
    Did they treat you well last time?
    Was their last action good for you?

cell           2    matrix  cell {x} {y}
    How many points do you get if you play {x} and they play {y}?
    You play {x}, they play {y}. What are your points?

their_cell     2    matrix  their cell {x} {y}
    How many points do they get if you play {x} and they play {y}?
    You play {x}, they play {y}. What are their points?

best_reply     3    matrix  best {y}
    They play {y}. Which action gives you more points?
    What is your best reply to {y}?

total          3    matrix  total {y}
    They play {y}. Which action gives the larger total?
    If they play {y}, which action is best for both in all?

equal          3    matrix  equal {y}
    They play {y}. Which action makes the points more equal?
    What is the more equal choice if they play {y}?

average        3    matrix  average best
    You do not know what they play. Which action gives you more points on average?
    Which action gives you more points if they choose at random?

average_total  3    matrix  average total
    You do not know what they play. Which action gives the larger total on average?
    Which action is best for both in all if they choose at random?
""")


def all_wordings():
    """Everything that a text is made of, with its fields."""
    every = [*WORDINGS, *INTRODUCTIONS, *MATRIX_WORDINGS, *CELL_SENTENCES]
    every += [*MOVES_WORDINGS, *GOALS, *REQUESTS, *OTHER_ANSWERS, *NAMES, "user model"]
    for question, answer in FOLLOW_UPS:
        every += [question, answer]
    for question in QUESTIONS.values():
        every += [question.word, *question.sentences]
    return every


# -------------------------------------------------------------------------------------------- games


def pick(rng, wordings):
    """The first wording half of the time, else any of them."""
    return wordings[0] if rng.random() < 0.5 else rng.choice(wordings)


def draw_kinds(rng, kinds, count):
    """Kinds of QUESTIONS, by their shares."""
    shares = [QUESTIONS[kind].share for kind in kinds]
    return rng.choices(kinds, shares, k=count)


def draw_names(rng, count):
    """Different names, no held-out pair among them."""
    while True:
        names = rng.sample(NAMES, count)
        if not any(set(pair) <= set(names) for pair in HELD_OUT_NAMES):
            return names


def draw_cells(rng):
    """Four cells of points, as in envs.GAMES: up to 4, as in the five games there, or up to 9."""
    while True:
        most = rng.choice((5, 10))
        cells = tuple((rng.randrange(most), rng.randrange(most)) for _ in range(4))
        if cells not in HELD_OUT_GAMES:
            return cells


class Game:
    """A game at random, or a held-out one with a held-out pair of names.

    names:      of the two actions
    payoffs:    [own move, other's move, (own, other's)]
    own, other: the last moves
    """

    def __init__(self, rng, held_out=False):
        self.own, self.other = rng.randrange(2), rng.randrange(2)
        if held_out:
            self.names = rng.sample(rng.choice(HELD_OUT_NAMES), 2)
            cells = rng.choice(sorted(HELD_OUT_GAMES))
        else:
            # Where both played the same, copying either name is right and nothing is learned.
            if rng.random() < 0.5:
                self.other = 1 - self.own
            self.names = draw_names(rng, 2)
            cells = draw_cells(rng)
        self.payoffs = payoff_matrix(cells)

    def fill(self, rng, template, layout=None):
        """A template with the names in random orders; the layout is drawn where none is given."""
        layout = layout or rng.choice(list(LAYOUTS))
        order = rng.randrange(ORDERS)
        words = fields(self.payoffs, self.names, layout, self.own, self.other, order)
        return template.format(**words)

    def points(self, rng, wording="{matrix}"):
        """The points in a matrix, or its four cells as sentences in a random order."""
        if rng.random() < 0.75:
            return self.fill(rng, wording)
        wording = rng.choice(CELL_SENTENCES)
        sentences = []
        for x, y in rng.sample(MOVES, 4):
            own, other = self.payoffs[x, y]
            sentence = wording.format(x=self.names[x], y=self.names[y], own=own, other=other)
            sentences.append(sentence)
        return " ".join(sentences)

    def prompt(self, rng):
        """A prompt up to its question."""
        if rng.random() < 0.1:
            return f"{USER} {self.fill(rng, STORY)}"
        points = self.points(rng, pick(rng, MATRIX_WORDINGS))
        moves = self.fill(rng, pick(rng, MOVES_WORDINGS))
        parts = [moves, points] if rng.random() < 0.2 else [points, moves]
        return " ".join([USER, self.fill(rng, pick(rng, INTRODUCTIONS)), *parts])

    def question(self, rng, kind, in_a_word):
        """A question of QUESTIONS about random moves, and its answer (see `answer`)."""
        x, y = rng.randrange(2), rng.randrange(2)
        question = QUESTIONS[kind]
        wording = question.word if in_a_word else rng.choice(question.sentences)
        return wording.format(x=self.names[x], y=self.names[y]), self.answer(kind, x, y)

    def answer(self, kind, x, y):
        """The answer to a kind of question about the own move x and the other's move y.

        None where two actions are equally good.
        """
        payoffs, own, other = self.payoffs, self.own, self.other
        numbers = {
            "cell": payoffs[x, y, 0],
            "their_cell": payoffs[x, y, 1],
            "own_points": payoffs[own, other, 0],
            "other_points": payoffs[own, other, 1],
        }
        if kind in numbers:
            return str(numbers[kind])
        moves = {"own": own, "other": other, "reverse": 1 - other}
        if kind in moves:
            return self.names[moves[kind]]
        scores = {
            "best_reply": payoffs[:, y, 0],
            "total": payoffs[:, y].sum(-1),
            "equal": -abs(payoffs[:, y, 0] - payoffs[:, y, 1]),
            "average": payoffs[:, :, 0].sum(-1),
            "average_total": payoffs.sum((1, 2)),
            "treated": payoffs[own, :, 0],  # what each of their moves gives you
        }
        if scores[kind][0] == scores[kind][1]:
            return None
        best = int(scores[kind].argmax())
        if kind == "treated":
            return "yes" if other == best else "no"
        return self.names[best]


# -------------------------------------------------------------------------------------------- texts


class Text(NamedTuple):
    """Only the answers are learned."""

    context: str
    branches: list  # each a list of (question, answer) that follow each other


def look_ups(rng, game, kind):
    """Keys and what they stand for; one branch asks for them again.

    pairs    a name: a number            A 3 B 5 ...      ->  B: 5, A: 3 ...
    cells    two names: two numbers      A A 3 3 ...      ->  A B: 0 4 ...
    matrix   the same, in a matrix or in sentences
    """
    if kind == "pairs":
        entries = [(name, str(rng.randrange(10))) for name in draw_names(rng, 4)]
    else:
        entries = []
        for x, y in rng.sample(MOVES, 4):
            numbers = "{} {}".format(*game.payoffs[x, y])
            entries.append((f"{game.names[x]} {game.names[y]}", numbers))
    if kind == "matrix":
        context = game.points(rng)
    else:
        context = " ".join(f"{key} {numbers}" for key, numbers in entries)
    return Text(context, [rng.choices(entries, k=12 if kind == "pairs" else 8)])


def in_a_word(rng, game, kind):
    """Each branch is a question in a word.

    drill    about a matrix or sentences      | A | 3, 3 ...  ->  best B: A
    moves    about the last moves
    """
    needs = "matrix" if kind == "drill" else "moves"
    asked = [name for name, question in QUESTIONS.items() if question.needs == needs]
    if kind == "drill":
        asked = draw_kinds(rng, asked, 20)
    turns = [game.question(rng, name, in_a_word=True) for name in asked]
    if kind == "drill":
        context = game.points(rng)
    else:
        template = f"{rng.choice(INTRODUCTIONS)} {rng.choice(MOVES_WORDINGS)}"
        context = game.fill(rng, template)
    branches = [[turn] for turn in dict.fromkeys(turns) if turn[1] is not None]
    return Text(context, branches)


def in_sentences(rng, game, kind):
    """Branches are questions in sentences, some in a word.

    skills   about a matrix or sentences, and the last moves
    game     about a whole prompt; and the decision
    """
    branches = []
    for name in draw_kinds(rng, list(QUESTIONS), 14):
        short = rng.random() < 0.4
        question, answer = game.question(rng, name, in_a_word=short)
        if answer is None:
            continue
        if not short:
            if answer in game.names and rng.random() < 0.5:
                question += " " + game.fill(rng, pick(rng, REQUESTS))
            question, answer = f"{question} {MODEL}", answer + END
        branches.append([(question, answer)])
    if kind == "skills":
        points = game.points(rng)
        parts = [points, game.fill(rng, pick(rng, MOVES_WORDINGS))]
        return Text(" ".join(rng.sample(parts, 2)), branches)
    branches += decision(rng, game)
    return Text(game.prompt(rng), branches)


def decision(rng, game):
    """Branches: two goals, each answered by either name and by other text equally often."""
    branches = []
    for goal in (GOAL, rng.choice(GOALS)):
        question = f"{goal} {game.fill(rng, pick(rng, REQUESTS))} {MODEL}"
        for answer in (*game.names, *rng.sample(OTHER_ANSWERS, 2)):
            branches.append([(question, answer + END)])
    question, answer = rng.choice(FOLLOW_UPS)
    answer = answer.format(own=game.names[game.own], other=game.names[game.other])
    named = branches[-4]  # after the second goal, the first name
    named.append((f"{USER} {question} {MODEL}", answer + END))
    return branches


# Kind of text: how it is made, and how many are in a batch.
TEXTS = {
    "pairs": (look_ups, 32),
    "cells": (look_ups, 32),
    "matrix": (look_ups, 32),
    "drill": (in_a_word, 32),
    "moves": (in_a_word, 32),
    "skills": (in_sentences, 16),
    "game": (in_sentences, 12),
}


def make_text(rng, kind):
    """A Text of a kind of TEXTS, about a game of its own."""
    make, _ = TEXTS[kind]
    return make(rng, Game(rng), kind)


def make_batch(rng, kind):
    """So many Texts of a kind as one step of training takes."""
    _, count = TEXTS[kind]
    return [make_text(rng, kind) for _ in range(count)]


def held_out_text(rng, layout):
    """A held-out game in the product's wording: (Text, kind of question in each branch)."""
    game = Game(rng, held_out=True)
    branches, kinds = [], []
    for kind in QUESTIONS:
        question, answer = game.question(rng, kind, in_a_word=False)
        if answer is None:
            continue
        if answer in game.names:
            question += " " + game.fill(rng, ANSWER)
        branches.append([(f"{question} {MODEL}", answer)])
        kinds.append(kind)
    context = game.fill(rng, " ".join([ASK, MATRIX_WORDINGS[0], STATE]), layout)
    return Text(f"{USER} {context}", branches), kinds
