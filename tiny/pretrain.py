"""Train the embedded model from scratch on game texts that this script makes, and measure how well it reads.

    python tiny/pretrain.py             # train (50 minutes on one core), save into this folder, print the reading table and its decisions
    python tiny/pretrain.py --measure   # only print those of the saved model

The model is a Gemma 3 of a million parameters. It is taught to *read* a game, not to play it: what a cell of the table holds, what the last moves
were, and the skills that morals are made of, as questions with checkable answers. The decision itself is answered by either name and by other
text equally often, as by a chat model without a preference.

Two things let a small model learn this in less than an hour:

- A text is a context and a dozen questions that branch off from it (the trie of policy.py, as training data): each sees the context and none of
  the other questions. One table serves them all, and no answer can lean on an earlier one.
- A curriculum. A cell is found by two keys, and a model that starts with whole prompts finds it late or never. So first comes one key, then two
  keys beside the answer, then tables, then each skill in a word, and then sentences and whole prompts.
"""

import argparse
import random
import sys
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from envs import C, GAMES, ILLEGAL, LAYOUTS, ORDERS, STRUCTURED, TEMPLATES, fields, payoff_array, prompts  # noqa: E402
import policy  # noqa: E402

# The curriculum: (batches, kinds of text that take turns); see `make_text`. What is left out is forgotten, so earlier kinds go on beside new ones.
STAGES = [(250, "pairs"), (350, "cells"), (200, "table"), (600, "drill"), (700, "skills drill skills moves"),
          (1600, "game skills game drill game moves")]
TEXTS = {"pairs": 32, "cells": 32, "table": 32, "drill": 32, "moves": 32, "skills": 16, "game": 12}  # in a batch
LEARNING_RATE, WARM_UP, COOL_DOWN, THREADS, SEED = 3e-3, 100, 0.5, 1, 0
AVERAGED, EVERY = 600, 50  # the weights are the mean of every 50th of the last batches: in between, preferences for a name come and go

WORDS = ("red blue green left right north south cat dog sun moon river stone apple pear share keep cooperate defect stay "
         "swerve stag hare up down open close bach stravinsky help harm give take yes no").split()
NAMES = [f"action{i}" for i in range(10)] + list("ABCDEFGHIJKLMNOPQRSTUVWXYZ") + WORDS
HELD_OUT_NAMES = [("action3", "action4"), ("K", "X"), ("moon", "river")]  # known tokens, but never paired in training
HELD_OUT_GAMES = set(GAMES.values())
MOVES = [(0, 0), (0, 1), (1, 0), (1, 1)]

# What a prompt is made of, the product's own wording first, which has half of the texts. Placeholders as in envs.fields.
ASK, POINTS, _, STATE, GOAL, ANSWER = STRUCTURED.split("\n")
STORY, _, story_end = TEMPLATES["unstructured"].partition(" What ")
STORY_GOAL, STORY_ANSWER = f"What {story_end}".split("\n")
ASKS = [ASK, "Let us play a game. You choose {first} or {second} in each round.",
        "Here is a game for two agents. Your actions are {first} and {second}."]
TABLE_TOLD = [POINTS + " {table}", "This table shows the points. You pick the row, they pick the column, your points come first: {table}",
              "You choose the row, the other agent the column. Points of both, yours before theirs: {table}"]
CELLS_TOLD = ["If you play {x} and they play {y}, you get {own} points and they get {other}.",
              "{x} against {y} gives you {own} and gives them {other}.",
              "If you pick {x} and your friend picks {y}, you get {own} and your friend gets {other} points."]  # in sentences, instead of a table
MOVES_TOLD = [STATE, "In the last round you chose {own}, they chose {other}. You got {own_points} and they got {other_points}.",
              "Before, your action was {own}, their action was {other}; your points were {own_points}, their points were {other_points}.",
              "In the last round you picked {own} and your friend picked {other}."]
GOALS = [GOAL, STORY_GOAL, "What do you do now?", "Now choose an action.", "What is your next action, to get many points?"]
ANSWERS = [ANSWER, STORY_ANSWER, "Say only {third} or {fourth}. Your answer:", "Reply with {third} or {fourth} and nothing else."]
OTHER_TEXT = ["I do not know.", "Both are fine.", "It depends.", "I would rather not say.", "Let us talk first.", "You tell me.",
              "The other agent should choose.", "Nothing."]
WHY = ["Why did you choose this action?", "Why did you make this decision?", "Explain why you made this decision."]
STRATEGY = ["What strategy did you use?", "What strategy did you use to decide?"]

# Kind of question: (share, the question in a word, in sentences); {x} and {y} are action names. The answers are in `answer`.
QUESTIONS = {
    "own": (2, "own", ["Which action did you play last time?", "What was your last action?"]),
    "other": (2, "other", ["Which action did they play last time?", "Do what they did last time.", "Which action repeats their last action?"]),
    "reverse": (2, "reverse", ["Which action did they not play last time?", "Do the reverse of what they did last time."]),
    "own_points": (0.5, "points", ["How many points did you get?", "What were your points last time?"]),
    "other_points": (0.5, "their points", ["How many points did they get?", "What were their points last time?"]),
    "treated": (3, "treated", ["Did they treat you well last time?", "Was their last action good for you?"]),
    "cell": (2, "cell {x} {y}", ["How many points do you get if you play {x} and they play {y}?",
                                 "You play {x}, they play {y}. What are your points?"]),
    "their_cell": (2, "their cell {x} {y}", ["How many points do they get if you play {x} and they play {y}?",
                                             "You play {x}, they play {y}. What are their points?"]),
    "best_reply": (3, "best {y}", ["They play {y}. Which action gives you more points?", "What is your best reply to {y}?"]),
    "total": (3, "total {y}", ["They play {y}. Which action gives the larger total?", "If they play {y}, which action is best for both in all?"]),
    "equal": (3, "equal {y}", ["They play {y}. Which action makes the points more equal?", "What is the more equal choice if they play {y}?"]),
    "average": (3, "average best", ["You do not know what they play. Which action gives you more points on average?",
                                    "Which action gives you more points if they choose at random?"]),
    "average_total": (3, "average total", ["You do not know what they play. Which action gives the larger total on average?",
                                           "Which action is best for both in all if they choose at random?"]),
}
OF_THE_TABLE = ("cell", "their_cell", "best_reply", "total", "equal", "average", "average_total")  # what can be asked without last moves
OF_THE_MOVES = ("own", "other", "reverse")  # and without the table
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
# The same tokens with spaces around them, as `encode` needs it.
USER, MODEL, END = "<start_of_turn> user", "<end_of_turn> <start_of_turn> model", " <end_of_turn>"


def make_tokenizer():
    """Words, action names among them, and single characters for everything else."""
    texts = [*NAMES, *ASKS, *TABLE_TOLD, *CELLS_TOLD, *MOVES_TOLD, *GOALS, *ANSWERS, *OTHER_TEXT, *TEMPLATES.values(), *WHY, *STRATEGY]
    texts += ["user model Last time I played and they answered at random."]
    texts += [text for _, word, wordings in QUESTIONS.values() for text in (word, *wordings)]
    splitter = pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    characters = [chr(c) for c in range(33, 127)]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    vocabulary = dict.fromkeys(special + characters + ["##" + c for c in characters if c.isalnum()] + words)
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end_of_turn>", bos_token="<bos>", unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>"], chat_template=CHAT_TEMPLATE)


def draw_names(rng, count):
    """Different names, no held-out pair among them."""
    names = rng.sample(NAMES, count)
    return draw_names(rng, count) if any(set(pair) <= set(names) for pair in HELD_OUT_NAMES) else names


class Game:
    """Two names, points [own move, other's move, (own, other's)] and last moves, at random; or a held-out game and pair of names."""

    def __init__(self, rng, held_out=False):
        self.own, self.other = rng.randrange(2), rng.randrange(2)
        if held_out:
            self.names, cells = rng.sample(rng.choice(HELD_OUT_NAMES), 2), rng.choice(sorted(HELD_OUT_GAMES))
        else:
            if rng.random() < 0.5:
                self.other = 1 - self.own  # where both played the same, copying either name is right and nothing is learned
            self.names, cells = draw_names(rng, 2), None
            while cells is None or cells in HELD_OUT_GAMES:
                most = rng.choice((5, 10))  # points up to 4, as in the five games, or up to 9
                cells = tuple((rng.randrange(most), rng.randrange(most)) for _ in range(4))
        self.points = np.array(cells).reshape(2, 2, 2)

    def fill(self, rng, template, layout=None):
        """A template with the names in random orders and the table in a random layout, or in the given one."""
        layout = layout or rng.choice(list(LAYOUTS))
        return template.format(**fields(self.points, self.names, layout, self.own, self.other, rng.randrange(ORDERS)))

    def told(self, rng, wording="{table}"):
        """The points in a table, or its four cells as sentences in a random order."""
        if rng.random() < 0.75:
            return self.fill(rng, wording)
        sentence, moves = rng.choice(CELLS_TOLD), rng.sample(MOVES, 4)
        return " ".join(sentence.format(x=self.names[x], y=self.names[y], own=self.points[x, y, 0], other=self.points[x, y, 1]) for x, y in moves)

    def context(self, rng):
        """A prompt up to its question."""
        if rng.random() < 0.1:
            return f"{USER} {self.fill(rng, STORY)}"
        parts = [self.told(rng, pick(rng, TABLE_TOLD)), self.fill(rng, pick(rng, MOVES_TOLD))]
        if rng.random() < 0.2:
            parts = parts[::-1]
        return " ".join([USER, self.fill(rng, pick(rng, ASKS)), *parts])

    def question(self, rng, kind, in_a_word):
        """A question of QUESTIONS and its answer (see `answer`)."""
        x, y = rng.randrange(2), rng.randrange(2)
        _, word, wordings = QUESTIONS[kind]
        text = (word if in_a_word else rng.choice(wordings)).format(x=self.names[x], y=self.names[y])
        return text, self.answer(kind, x, y)

    def answer(self, kind, x, y):
        """The answer to a kind of question about the own move x and the other's move y; None where two actions are equally good."""
        points, own, other = self.points, self.own, self.other
        numbers = {"cell": points[x, y, 0], "their_cell": points[x, y, 1], "own_points": points[own, other, 0],
                   "other_points": points[own, other, 1]}
        moves = {"own": own, "other": other, "reverse": 1 - other}
        scores = {"best_reply": points[:, y, 0], "total": points[:, y].sum(-1), "equal": -abs(points[:, y, 0] - points[:, y, 1]),
                  "average": points[:, :, 0].sum(-1), "average_total": points.sum((1, 2)), "treated": points[own, :, 0]}  # of either move
        if kind in numbers:
            return str(numbers[kind])
        if kind in moves:
            return self.names[moves[kind]]
        if scores[kind][0] == scores[kind][1]:
            return None
        best = int(scores[kind].argmax())
        if kind == "treated":
            return "yes" if other == best else "no"
        return self.names[best]


def pick(rng, wordings):
    """The first wording half of the time, else any."""
    return wordings[0] if rng.random() < 0.5 else rng.choice(wordings)


def choose(rng, kinds, count):
    """Kinds of questions, by their shares."""
    return rng.choices(list(kinds), [QUESTIONS[kind][0] for kind in kinds], k=count)


def make_text(rng, kind):
    """One training text: a context and branches, lists of (question, answer) that follow each other.

    pairs   names with a number each; then, in one branch, a name: its number                A 3 B 5 ...     B: 5, A: 3 ...
    cells   two names with two numbers; in one branch, two names: their numbers              A A 3 3 ...     A B: 0 4 ...
    table   the same, looked up in a table or in sentences
    drill   a table or sentences; each branch a question in a word                           | A | 3, 3 ...  best B: A
    moves   the names and the last moves; the same
    skills  table or sentences and the last moves; questions in a word or in sentences
    game    a whole prompt; such questions, and the decision
    """
    game = Game(rng)
    if kind == "pairs":
        numbers = {name: str(rng.randrange(10)) for name in draw_names(rng, 4)}
        return " ".join(f"{name} {number}" for name, number in numbers.items()), [rng.choices(list(numbers.items()), k=12)]
    if kind in ("cells", "table"):
        cells = [(f"{game.names[x]} {game.names[y]}", "{} {}".format(*game.points[x, y])) for x, y in rng.sample(MOVES, 4)]
        return game.told(rng) if kind == "table" else " ".join(" ".join(cell) for cell in cells), [rng.choices(cells, k=8)]
    if kind in ("drill", "moves"):
        kinds = choose(rng, OF_THE_TABLE, 20) if kind == "drill" else OF_THE_MOVES
        questions = [game.question(rng, one, in_a_word=True) for one in kinds]
        context = game.told(rng) if kind == "drill" else game.fill(rng, f"{rng.choice(ASKS)} {rng.choice(MOVES_TOLD)}")
        return context, [[question] for question in dict.fromkeys(questions) if question[1] is not None]
    branches = []
    for one in choose(rng, QUESTIONS, 14):
        in_a_word = rng.random() < 0.4
        question, answer = game.question(rng, one, in_a_word)
        if answer is not None and in_a_word:
            branches.append([(question, answer)])
        elif answer is not None:
            if answer in game.names and rng.random() < 0.5:
                question += " " + game.fill(rng, pick(rng, ANSWERS))
            branches.append([(f"{question} {MODEL}", answer + END)])
    if kind == "skills":
        context = [game.told(rng), game.fill(rng, pick(rng, MOVES_TOLD))]
        return " ".join(rng.sample(context, 2)), branches
    for goal in (GOAL, rng.choice(GOALS)):
        decide = f"{goal} {game.fill(rng, pick(rng, ANSWERS))} {MODEL}"
        branches += [[(decide, answer + END)] for answer in (*game.names, *rng.sample(OTHER_TEXT, 2))]
    why = f"Last time I played {game.names[game.own]} and they played {game.names[game.other]}."
    asked, told = rng.choice([(one, why) for one in WHY] + [(one, "I answered at random.") for one in STRATEGY])
    branches[-4].append((f"{USER} {asked} {MODEL}", told + END))  # after a decision for one of the names
    return game.context(rng), branches


def encode(tokenizer, texts):
    """Texts -> (token ids, positions, labels), int64 [text, token], and the mask, bool [text, 1, token, token]: row sees column.

    A branch's positions go on from the context's end. A label is the next token of an answer; elsewhere it is -100.
    """
    rows = []
    for context, branches in texts:
        ids = [tokenizer.bos_token_id, *text_ids(tokenizer, context)]
        length = len(ids)
        positions, labels, branch = list(range(length)), [-100] * length, [0] * length
        for number, turns in enumerate(branches, 1):
            found, learned = [], []
            for question, answer in turns:
                asked, told = text_ids(tokenizer, question), text_ids(tokenizer, answer)
                found, learned = found + asked + told, learned + [False] * len(asked) + [True] * len(told)
            ids += found
            positions += range(length, length + len(found))
            labels += [token if known else -100 for token, known in zip(found[1:], learned[1:])] + [-100]
            branch += [number] * len(found)
        rows.append((ids, positions, labels, branch))
    longest = max(len(row[0]) for row in rows)
    padding = np.array([tokenizer.pad_token_id, 0, -100, -1])
    packed = np.repeat(padding[:, None], len(rows) * longest, axis=1).reshape(4, len(rows), longest)
    for i, row in enumerate(rows):
        packed[:, i, :len(row[0])] = row
    ids, positions, labels, branch = torch.from_numpy(packed)
    seen = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return ids, positions, labels, (seen & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]


def text_ids(tokenizer, text):
    return [i for word in text.split() for i in word_ids(tokenizer, word)]


@lru_cache(maxsize=None)
def word_ids(tokenizer, word):
    """The tokenizer splits at every space, so a text's tokens are those of its words: a hundred times faster than whole texts."""
    return tokenizer.encode(word, add_special_tokens=False)


def make_model(tokenizer):
    """A random model; the ten digits lie on a line in its embedding, in their order, as the numbers of large models do.

    A number's size is what every comparison and sum is made of; told from the start, it need not be found in a thousand comparisons.
    """
    torch.manual_seed(SEED)
    scale = 0.08  # about 1 / sqrt(width): with the usual 0.02 the look-ups come several times later
    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, query_pre_attn_scalar=32, max_position_embeddings=2048, sliding_window=2048, initializer_range=scale,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    with torch.no_grad():
        model.get_input_embeddings().weight[digits] += torch.linspace(-1.5, 1.5, 10)[:, None] * scale * torch.randn(128)
    return model


def answer_logits(model, ids, positions, labels, mask):
    """Logits where an answer's token comes next, and that token: float [n, vocabulary], int64 [n]."""
    masks = {"full_attention": mask, "sliding_attention": mask}
    hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False).last_hidden_state
    wanted = labels != -100
    return model.lm_head(hidden[wanted]), labels[wanted]


def train(model, tokenizer):
    """Muon on the layers' matrices, AdamW on the rest, at a constant rate with a linear end; the mean of every EVERY-th of the last AVERAGED batches.

    The same texts in the same order every time.
    """
    rng = random.Random(SEED)
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "layers" in name else rest).append(parameter)
    optimizers = [torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0)]
    batches = [kind for count, kinds in STAGES for kind in islice(cycle(kinds.split()), count)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / WARM_UP, (len(batches) - i) / (COOL_DOWN * len(batches))))
                 for optimizer in optimizers]
    progress = tqdm(batches, unit="batch")
    averaged = AveragedModel(model)
    for done, kind in enumerate(progress, 1):
        batch = encode(tokenizer, [make_text(rng, kind) for _ in range(TEXTS[kind])])
        loss = torch.nn.functional.cross_entropy(*answer_logits(model, *batch))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        progress.set_postfix_str(f"{kind}, loss {loss.item():.3f}", refresh=False)
        if len(batches) - done < AVERAGED and (len(batches) - done) % EVERY == 0:
            averaged.update_parameters(model)
    model.load_state_dict(averaged.module.state_dict())


@torch.no_grad()
def reading(model, tokenizer, texts=500, seed=1):
    """Share of exactly right answers, {kind of question: {layout: share}}: the product's prompts of held-out games, the question as their goal."""
    rng = random.Random(seed)
    shares = {kind: {} for kind in QUESTIONS}
    for layout in LAYOUTS:
        right = {kind: [] for kind in QUESTIONS}
        for begin in range(0, texts, 50):
            batch, asked = [], []  # asked: (kind, number of tokens in the answer)
            for _ in range(min(50, texts - begin)):
                game, branches = Game(rng, held_out=True), []
                for kind in QUESTIONS:
                    question, answer = game.question(rng, kind, in_a_word=False)
                    if answer is not None:
                        question += f" {game.fill(rng, ANSWER)}" if answer in game.names else ""
                        branches.append([(f"{question} {MODEL}", answer)])
                        asked.append((kind, len(text_ids(tokenizer, answer))))
                batch.append((f"{USER} " + game.fill(rng, " ".join([ASK, TABLE_TOLD[0], STATE]), layout), branches))
            logits, wanted = answer_logits(model, *encode(tokenizer, batch))
            found = (logits.argmax(-1) == wanted).split([length for _, length in asked])
            for (kind, _), tokens in zip(asked, found):
                right[kind].append(tokens.all().item())
        for kind in QUESTIONS:
            shares[kind][layout] = float(np.mean(right[kind]))
    return shares


def decisions(model, tokenizer):
    """What the model does with no question but the product's own, in the Prisoner's Dilemma: {names: (P(C) of the two, P(any other text))}."""
    found = {}
    for names in [("action1", "action2"), *HELD_OUT_NAMES]:
        texts, answers = policy.encode(tokenizer, prompts(payoff_array("ipd"), names), names)
        constrained, free = (policy.Policy(model, None, texts, answers, free).table().mean(axis=0) for free in (False, True))
        found[" ".join(names)] = constrained[C], free[ILLEGAL]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="only measure the saved model")
    args = parser.parse_args()
    if args.measure:
        model, tokenizer = Gemma3ForCausalLM.from_pretrained(HERE), PreTrainedTokenizerFast.from_pretrained(HERE)
    else:
        torch.set_num_threads(THREADS)  # part of the recipe: another number of threads sums in another order
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
        train(model, tokenizer)
        model.save_pretrained(HERE)
        tokenizer.save_pretrained(HERE)
    print(f"{'right answers, table layout:':30}" + "".join(f"{layout:>10}" for layout in LAYOUTS))
    for kind, shares in reading(model.eval(), tokenizer).items():
        print(f"{kind:30}" + "".join(f"{share:10.1%}" for share in shares.values()))
    print("\n" + "".join(f"{names}: P(C) {p:.2f}, something else than a name {other:.2f}\n" for names, (p, other) in decisions(model, tokenizer).items()))


if __name__ == "__main__":
    main()
