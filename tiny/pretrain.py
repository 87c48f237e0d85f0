"""Train the embedded model from scratch on game texts that this script makes, and measure how well it reads.

    python tiny/pretrain.py             # train (about an hour on one core), save into this folder, print the reading table
    python tiny/pretrain.py --measure   # only print the reading table of the saved model

The model is a Gemma 3 of about a million parameters. It is taught to *read* a game, not to play it. A cell of a payoff table is found by two keys,
and a small model finds it late or never when it meets whole prompts only; so it learns to look things up by one key, by two keys beside the
answer, in tables and sentences, then to compare and add what it finds there, and then the words for all this, before the prompts come: random
points, many action names in both roles, every layout, several wordings, and questions with checkable answers: what a cell holds, what the last
moves were, and the skills that morals are made of. The decision itself is answered at random between the two names, with a share of other
text, as an untuned chat model does.
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
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from envs import GAMES, LAYOUTS, STRUCTURED, TEMPLATES, table_text  # noqa: E402

# The curriculum: (batches, kinds of text that take turns); see `make_text`. What is left out for long is forgotten, so the last stages go on
# with the earlier kinds.
STAGES = [(400, "pairs"), (700, "more"), (300, "cells"), (400, "table"), (1500, "drill"), (900, "drill lookup skills"),
          (3000, "game drill game skills")]
TEXTS = dict(pairs=24, more=24, cells=24, table=24, drill=24, lookup=16, skills=16, game=16)  # in a batch
LEARNING_RATE, SEED, ILLEGAL_SHARE, TURNS = 5e-3, 0, 0.4, 9

WORDS = ("red blue green left right north south cat dog sun moon river stone apple pear share keep cooperate defect stay "
         "swerve stag hare up down open close bach stravinsky help harm give take yes no").split()
NAMES = [f"action{i}" for i in range(10)] + [chr(c) for c in range(ord("A"), ord("Z") + 1)] + WORDS
HELD_OUT_NAMES = [("action3", "action4"), ("K", "X"), ("moon", "river")]  # known words, but never paired in training
HELD_OUT_GAMES = set(GAMES.values())

# Wordings of the five parts of a prompt. The first of each is the product's own and is used half of the time.
ASK, POINTS, _, STATE, GOAL, ANSWER = STRUCTURED.replace("{table}", "TABLE").split("\n")
WORDINGS = [
    [ASK, "Let us play a game. You choose {first} or {second} in each round.",
     "Here is a game for two agents. Your actions are {first} and {second}."],
    [POINTS, "This table shows the points. You pick the row, they pick the column, your points come first:",
     "You choose the row, the other agent the column. Points of both, yours before theirs:"],
    [STATE, "In the last round you chose {own}, they chose {other}. You got {own_points} and they got {other_points}.",
     "Before, your action was {own}, their action was {other}; your points were {own_points}, their points were {other_points}."],
    [GOAL, "What do you do now?", "Now choose an action.", "What is your next action, to get many points?"],
    [ANSWER, "Say only {third} or {fourth}. Your answer:", "Reply with {third} or {fourth} and nothing else."],
]
SENTENCES = ["If you play {x} and they play {y}, you get {own} points and they get {other}.",  # instead of a table
             "{x} against {y} gives you {own} and gives them {other}.",
             "If you pick {x} and your friend picks {y}, you get {own} and your friend gets {other} points."]
QUESTIONS = {  # kind: (share, wordings); {x}, {y} are action names
    "own": (0.7, ["Which action did you play last time?", "What was your last action?"]),
    "other": (0.7, ["Which action did they play last time?", "What was the last action of the other agent?"]),
    "own_points": (0.5, ["How many points did you get?", "What were your points last time?"]),
    "other_points": (0.5, ["How many points did they get?", "What were their points last time?"]),
    "repeat": (0.7, ["Which action repeats their last action?", "Do what they did last time."]),
    "reverse": (0.7, ["Which action did they not play last time?", "Do the reverse of what they did last time."]),
    "not": (0.5, ["Which action is not {x}?", "What can you choose instead of {x}?"]),
    "same": (0.7, ["Did you both play the same action?"]),
    "cell": (2, ["How many points do you get if you play {x} and they play {y}?", "You play {x}, they play {y}. What are your points?"]),
    "their_cell": (2, ["How many points do they get if you play {x} and they play {y}?",
                       "You play {x}, they play {y}. What are their points?"]),
    "sum": (1, ["What is the total if you play {x} and they play {y}?", "You play {x}, they play {y}. How many points do both get in all?"]),
    "best_reply": (3, ["They play {y}. Which action gives you more points?", "What is your best reply to {y}?"]),
    "total": (3, ["They play {y}. Which action gives the larger total?", "If they play {y}, which action is best for both in all?"]),
    "equal": (1, ["They play {y}. Which action makes the points more equal?", "What is the more equal choice if they play {y}?"]),
    "average": (2, ["You do not know what they play. Which action gives you more points on average?",
                    "Which action gives you more points if they choose at random?"]),
    "average_total": (2, ["You do not know what they play. Which action gives the larger total on average?",
                          "Which action is best for both in all if they choose at random?"]),
    "kind": (0.7, ["Did they treat you well last time?", "Was their last action good for you?"]),
    "decide": (2, [f"{goal} {answer}" for goal in WORDINGS[3] for answer in WORDINGS[4]]),
    "why": (0.2, ["Why did you choose this action?", "Explain why you made this decision."]),
    "strategy": (0.2, ["What strategy did you use?", "Which strategy did you follow to decide?"]),
}
DRILLS = {"best_reply": "best {y}", "total": "both {y}", "equal": "equal {y}", "average": "average best", "average_total": "average both",
          "sum": "sum {x} {y}"}  # the skills in a word, for the stage "drill"
LOOKUP = dict(own=1, other=1, own_points=0.5, other_points=0.5, repeat=0.5, reverse=0.5, cell=4, their_cell=4)  # shares in the stage "lookup"
SKILLS = {kind: share for kind, (share, _) in QUESTIONS.items() if kind not in ("decide", "why", "strategy")}
AS_GOAL = ("own", "other", "repeat", "reverse", "best_reply", "total", "equal", "average", "average_total")  # may take the decision's place
OTHER_TEXT = ["I do not know.", "Both are fine.", "It depends.", "I would rather not say.", "Let us talk first.", "You tell me.",
              "The other agent should choose.", "Nothing."]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
TURN = "<start_of_turn>user\n{} <end_of_turn>\n<start_of_turn>model\n"  # the same tokens; a space on either side, see `encode`


def make_tokenizer():
    """Words, and single characters for everything else. A digit after a word is a token of its own: action1 = action ##1."""
    texts = [w for part in WORDINGS for w in part] + [w for _, part in QUESTIONS.values() for w in part] + OTHER_TEXT + WORDS + SENTENCES
    texts += [*TEMPLATES.values(), "user model action I answered at random because played and they last time. more less sum"]
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


def make_names(rng, count):
    """Different action names: known words and letters, or a word with different digits, or made-up strings.

    So many that a name must be recognised by its tokens: of few names a model learns codes, and two that never met may share one.
    """
    kind = rng.random()
    if kind < 0.5:
        return rng.sample(NAMES, count)
    if kind < 0.8:
        stem = "action" if rng.random() < 0.5 else rng.choice(WORDS)
        return [f"{stem}{digit}" for digit in rng.sample(range(10), count)]
    made_up = set()
    while len(made_up) < count:
        made_up.add("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 3))))
    return rng.sample(sorted(made_up), count)


class Game:
    """Two names, points [own move, other's move, (own, other's)] and last moves, at random; or a held-out game and pair of names."""

    def __init__(self, rng, held_out=False):
        self.own, self.other = rng.randrange(2), rng.randrange(2)
        if not held_out and rng.random() < 0.5:
            self.other = 1 - self.own  # where both played the same, copying either name is right and nothing is learned
        if held_out:
            self.names = rng.sample(rng.choice(HELD_OUT_NAMES), 2)
            cells = rng.choice(sorted(HELD_OUT_GAMES))
        else:
            cells = None
            while cells is None or cells in HELD_OUT_GAMES or any(set(self.names) == set(pair) for pair in HELD_OUT_NAMES):
                self.names = make_names(rng, 2)
                most = rng.choice((5, 10))  # points up to 4, as in the five games, or up to 9
                cells = tuple((rng.randrange(most), rng.randrange(most)) for _ in range(4))
        self.points = np.array(cells).reshape(2, 2, 2)

    def fields(self, rng):
        """What the wordings may name."""
        (first, second), (third, fourth) = rng.sample(self.names, 2), rng.sample(self.names, 2)
        own_points, other_points = self.points[self.own, self.other]
        return dict(first=first, second=second, third=third, fourth=fourth, own=self.names[self.own], other=self.names[self.other],
                    own_points=own_points, other_points=other_points)

    def table(self, rng, layout=None):
        return table_text(self.points, self.names, layout or rng.choice(list(LAYOUTS)))

    def sentences(self, rng):
        """The four cells as sentences, in a random order."""
        wording = rng.choice(SENTENCES)
        return " ".join(wording.format(x=self.names[x], y=self.names[y], own=self.points[x, y, 0], other=self.points[x, y, 1])
                        for x, y in rng.sample([(0, 0), (0, 1), (1, 0), (1, 1)], 4))

    def prompt(self, rng, goal=None, product=False, layout=None):
        """A prompt with one wording of each part. goal: a question in the decision's place; product: only the product's own wording."""
        ask, points, state, decide, answer = (w[0] if product or rng.random() < 0.5 else rng.choice(w) for w in WORDINGS)
        table = self.table(rng, layout)
        parts = [points + " " + table if product or rng.random() < 0.8 else self.sentences(rng), state]
        if not product and rng.random() < 0.2:
            parts = parts[::-1]
        return "\n".join([ask, *parts, goal or decide, answer]).format(**self.fields(rng))

    def question(self, rng, kind, wording=None):
        """A question (in the given wording, or one of QUESTIONS) and its answer, which is None where two actions are equally good."""
        x, y = rng.randrange(2), rng.randrange(2)
        points, names, own, other = self.points, self.names, self.own, self.other

        def better(score):
            return None if score[0] == score[1] else names[int(score[1] > score[0])]

        answer = {
            "own": names[own], "other": names[other], "own_points": points[own, other, 0], "other_points": points[own, other, 1],
            "repeat": names[other], "reverse": names[1 - other], "not": names[1 - x], "same": "yes" if own == other else "no",
            "cell": points[x, y, 0], "their_cell": points[x, y, 1], "sum": points[x, y].sum(),
            "best_reply": better(points[:, y, 0]), "total": better(points[:, y].sum(-1)),
            "equal": better(-abs(points[:, y, 0] - points[:, y, 1])),
            "average": better(points[:, :, 0].sum(-1)), "average_total": better(points.sum((1, 2))),
            "kind": {1: "yes", -1: "no", 0: None}[int(np.sign(points[own, other, 0] - points[own, 1 - other, 0]))],
            "decide": rng.choice(OTHER_TEXT) if rng.random() < ILLEGAL_SHARE else rng.choice(names),
            "why": f"Last time I played {names[own]} and they played {names[other]}.",
            "strategy": "I answered at random.",
        }[kind]
        words = (wording or rng.choice(QUESTIONS[kind][1])).format(x=names[x], y=names[y], **self.fields(rng))
        return words, None if answer is None else str(answer)


def make_text(rng, kind):
    """One training text, a list of (part, whether it is to be learned).

    pairs           names with a number each, then names: their numbers                        A 3 B 5 ... B 5
    more            the same, and which of two names has more, or less                         A 3 B 5 ... more A B B
    cells           two names with two numbers, then two names: their numbers                  A A 3 3 A B 0 4 ... A B 0 4
    table           the same, looked up in a table or in sentences
    drill           the same, and each skill in a word                                         best B A
    lookup, skills  a table or sentences and the last moves, then questions in whole sentences
    game            a conversation: the prompt with the decision or a question in its place, then further questions
    """
    game = Game(rng)
    if kind == "game":
        return [part for user, answer in make_conversation(rng, game) for part in ((TURN.format(user), False), (f"{answer} <end_of_turn>", True))]
    if kind in ("pairs", "more"):
        keys = make_names(rng, 4)
        values = [str(rng.randrange(10)) for _ in keys]
        shown, asked = [f"{key} {value}" for key, value in zip(keys, values)], []
        for _ in range(10):
            i, j = rng.sample(range(4), 2)
            if kind == "pairs" or rng.random() < 0.2:
                asked.append((keys[i], values[i]))
            elif values[i] != values[j]:
                word, choose = rng.choice((("more", max), ("less", min)))
                asked.append((f"{word} {keys[i]} {keys[j]}", choose((values[i], keys[i]), (values[j], keys[j]))[1]))
    elif kind in ("cells", "table", "drill"):
        def cell(x, y):
            return f"{game.names[x]} {game.names[y]}", "{} {}".format(*game.points[x, y])

        form = kind if kind == "cells" else rng.choice(("table", "table", "sentences"))
        order = rng.sample([(x, y) for x in (0, 1) for y in (0, 1)], 4)
        if form == "cells":
            shown = [" ".join(cell(x, y)) for x, y in order]
        else:
            shown = [game.table(rng) if form == "table" else game.sentences(rng)]
        asked = [cell(rng.randrange(2), rng.randrange(2)) for _ in range(1 if kind == "drill" else 8)]
        if kind == "drill":  # no question comes twice: its second answer could be copied, and nobody would read the table
            asked = list(dict(asked + [game.question(rng, skill, words) for skill, words in DRILLS.items() for _ in range(3)]).items())
            rng.shuffle(asked)
    else:
        shown = [game.table(rng) if rng.random() < 0.75 else game.sentences(rng), rng.choice(WORDINGS[2]).format(**game.fields(rng))]
        rng.shuffle(shown)
        shares = LOOKUP if kind == "lookup" else SKILLS
        asked = [game.question(rng, one) for one in rng.choices(list(shares), shares.values(), k=12)]
    return [(part, False) for part in shown] + [part for question, answer in asked if answer is not None
                                                for part in ((question, False), (answer, True))]


def make_conversation(rng, game):
    """Turns (user, answer), the first with the whole prompt: the decision, or a question in its place. No kind of question comes twice."""
    turns = []
    for kind in sorted(QUESTIONS, key=lambda kind: rng.random() ** (1 / QUESTIONS[kind][0]))[::-1]:
        first = not turns
        if first and (kind not in AS_GOAL or rng.random() < 0.3):
            kind = "decide"
        question, answer = game.question(rng, kind)
        if first:
            question = game.prompt(rng, goal=None if kind == "decide" else question)
        if answer is not None:
            turns.append((question, answer))
        if len(turns) == TURNS:
            break
    return turns


def encode(tokenizer, texts):
    """Texts -> (input ids, labels), both int64 [text, token]; only what is to be learned carries a label."""
    rows = []
    for parts in texts:
        ids, labels = [tokenizer.bos_token_id], [-100]
        for part, learned in parts:
            found = [i for word in part.split() for i in word_ids(tokenizer, word)]
            ids, labels = ids + found, labels + (found if learned else [-100] * len(found))
        rows.append((torch.tensor(ids), torch.tensor(labels)))
    ids, labels = zip(*rows)
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id), pad(labels, batch_first=True, padding_value=-100)


@lru_cache(maxsize=None)
def word_ids(tokenizer, word):
    """The tokenizer splits at every space, so a text's tokens are those of its words: a hundred times faster than whole texts."""
    return tokenizer.encode(word, add_special_tokens=False)


def make_model(tokenizer):
    torch.manual_seed(SEED)
    return Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, query_pre_attn_scalar=32, max_position_embeddings=2048, sliding_window=2048,
        initializer_range=0.08,  # about 1 / sqrt(width): with the usual 0.02 the look-ups come several times later
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))


def train(model, tokenizer):
    """Muon on the layers' matrices, AdamW on the rest; constant rate with a linear end. The same texts in the same order every time."""
    rng = random.Random(SEED)
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "layers" in name else rest).append(parameter)
    optimizers = [torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0)]
    batches = [kind for count, kinds in STAGES for kind in islice(cycle(kinds.split()), count)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 100, (len(batches) - i) / (0.6 * STAGES[-1][0])))
                 for optimizer in optimizers]
    progress = tqdm(batches, unit="batch")
    for kind in progress:
        ids, labels = encode(tokenizer, [make_text(rng, kind) for _ in range(TEXTS[kind])])
        # Padding is on the right and attention is causal, so no mask is needed: no answer can see it.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        logits = model.lm_head(hidden[wanted != -100])  # only where there is something to predict
        loss = torch.nn.functional.cross_entropy(logits, wanted[wanted != -100])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        progress.set_postfix_str(f"{kind}, loss {loss.item():.3f}", refresh=False)


@torch.no_grad()
def reading(model, tokenizer, kinds=SKILLS, texts=500, seed=1):
    """Share of exactly right answers, {kind of question: {layout: share}}, on held-out games and name pairs in the product's wording."""
    rng = random.Random(seed)

    def share(kind, layout):
        conversations, right = [], []
        while len(conversations) < texts:
            game = Game(rng, held_out=True)
            question, answer = game.question(rng, kind)
            if answer is not None:
                start = TURN.format(game.prompt(rng, product=True, layout=layout)) + f"{rng.choice(game.names)} <end_of_turn> "
                conversations.append([(start + TURN.format(question), False), (answer, True)])
        for begin in range(0, texts, 50):
            ids, labels = encode(tokenizer, conversations[begin:begin + 50])
            guess, wanted = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1), labels[:, 1:]
            right.append(((guess == wanted) | (wanted == -100)).all(1))
        return torch.cat(right).float().mean().item()

    return {kind: {layout: share(kind, layout) for layout in LAYOUTS} for kind in kinds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="only measure the saved model")
    args = parser.parse_args()
    if args.measure:
        model, tokenizer = Gemma3ForCausalLM.from_pretrained(HERE), PreTrainedTokenizerFast.from_pretrained(HERE)
    else:
        torch.set_num_threads(1)  # part of the recipe: another number of threads sums in another order
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
        train(model, tokenizer)
        model.save_pretrained(HERE)
        tokenizer.save_pretrained(HERE)
    print(f"{'right answers, table layout:':30}" + "".join(f"{layout:>10}" for layout in LAYOUTS))
    for kind, shares in reading(model.eval(), tokenizer).items():
        print(f"{kind:30}" + "".join(f"{share:10.1%}" for share in shares.values()))


if __name__ == "__main__":
    main()
