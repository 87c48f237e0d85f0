"""Train the embedded model from scratch on game texts that this script makes, and measure how well it reads.

    python tiny/pretrain.py             # train (about a quarter of an hour on 2 cores), save into this folder, print the reading table
    python tiny/pretrain.py --measure   # only print the reading table of the saved model

The model is a Gemma 2 of about a million parameters. It is taught to *read* a game, not to play it: random points, many
action names in both roles, shuffled orders, permuted tables and several wordings; then questions with checkable answers.
The decision itself is answered at random between the two names, with a share of other text, as an untuned chat model does.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from envs import GAMES, STRUCTURED  # noqa: E402

BATCHES, SHORT_BATCHES, BATCH, TURNS, LEARNING_RATE, SEED = 1000, 400, 32, 4, 2e-3, 0
ILLEGAL_SHARE = 0.4

WORDS = ("red blue green left right north south cat dog sun moon river stone apple pear share keep cooperate defect stay "
         "swerve stag hare up down open close bach stravinsky help harm give take yes no").split()
NAMES = [f"action{i}" for i in range(10)] + [chr(c) for c in range(ord("A"), ord("Z") + 1)] + list("0123456789") + WORDS
HELD_OUT_NAMES = [("action3", "action4"), ("K", "X"), ("moon", "river")]  # known words, but never paired in training
HELD_OUT_GAMES = set(tuple(map(tuple, cells)) for cells in GAMES.values())

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
QUESTIONS = {  # kind: (share, wordings); {x}, {y} are the two action names in a random order
    "own": (6, ["Which action did you play last time?", "What was your last action?"]),
    "other": (6, ["Which action did they play last time?", "What was the last action of the other agent?"]),
    "own_points": (1.5, ["How many points did you get?", "What were your points last time?"]),
    "other_points": (1.5, ["How many points did they get?", "What were their points last time?"]),
    "not": (1, ["Which action is not {x}?", "What can you choose instead of {x}?"]),
    "same": (0.7, ["Did you both play the same action?"]),
    "cell": (0.3, ["How many points do you get if you play {x} and they play {y}?"]),
    "why": (0.3, ["Why did you choose this action?", "Explain why you made this decision."]),
    "strategy": (0.3, ["What strategy did you use?", "Which strategy did you follow to decide?"]),
}
OTHER_TEXT = ["I do not know.", "Both are fine.", "It depends.", "I would rather not say.", "Let us talk first.", "You tell me.",
              "The other agent should choose.", "Nothing."]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


def make_tokenizer():
    """Words, and single characters for everything else. A digit after a word is a token of its own: action1 = action ##1."""
    texts = [w for part in WORDINGS for w in part] + [w for _, part in QUESTIONS.values() for w in part] + OTHER_TEXT + WORDS
    texts += ["user model action I answered at random because played and they last time. TABLE"]
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


def make_game(rng, held_out):
    """(names, cells, own, other): two names, ((own, other's points) of CC, CD, DC, DD), last moves 0/1."""
    if held_out:
        names = list(rng.choice(HELD_OUT_NAMES))
        rng.shuffle(names)
        return names, rng.choice(sorted(HELD_OUT_GAMES)), rng.randrange(2), rng.randrange(2)
    while True:
        names = rng.sample(NAMES[:10] if rng.random() < 0.25 else NAMES, 2)
        cells = tuple((rng.randrange(10), rng.randrange(10)) for _ in range(4))
        if cells not in HELD_OUT_GAMES and not any(set(names) == set(pair) for pair in HELD_OUT_NAMES):
            own = rng.randrange(2)
            # Mostly different moves: where both played the same, copying either name is right and nothing is learned.
            return names, cells, own, 1 - own if rng.random() < 0.8 else own


def make_table(rng, names, cells):
    """The table in markdown, its rows and its columns each in a random order."""
    rows, columns = rng.sample((0, 1), 2), rng.sample((0, 1), 2)
    lines = [f"| | {names[columns[0]]} | {names[columns[1]]} |"]
    lines += [f"| {names[r]} | " + " | ".join("{}, {}".format(*cells[2 * r + c]) for c in columns) + " |" for r in rows]
    return "\n".join(lines)


def pick(rng, wordings):
    """The product's own wording half of the time, else any."""
    return wordings[0] if rng.random() < 0.5 else rng.choice(wordings)


def fill(rng, game, parts):
    """The parts of a text with the game's names, moves and points in them."""
    names, cells, own, other = game
    first, second = rng.sample(names, 2)
    third, fourth = rng.sample(names, 2)
    own_points, other_points = cells[2 * own + other]
    return "\n".join(parts).format(first=first, second=second, third=third, fourth=fourth, own=names[own], other=names[other],
                                   own_points=own_points, other_points=other_points)


def make_prompt(rng, game, product_wording=False):
    """The decision prompt of a game, with one wording of each part (the product's own with `product_wording`)."""
    parts = [wordings[0] if product_wording else pick(rng, wordings) for wordings in WORDINGS]
    return fill(rng, game, parts[:2] + [make_table(rng, *game[:2])] + parts[2:])


def make_question(rng, game, kind):
    """A question about the game and its answer."""
    names, cells, own, other = game
    x, y = rng.sample((0, 1), 2) if kind != "cell" else (rng.randrange(2), rng.randrange(2))
    answer = {
        "own": names[own], "other": names[other], "own_points": cells[2 * own + other][0],
        "other_points": cells[2 * own + other][1], "not": names[y], "same": "yes" if own == other else "no",
        "cell": cells[2 * x + y][0], "why": f"Last time I played {names[own]} and they played {names[other]}.",
        "strategy": "I answered at random.",
    }[kind]
    return rng.choice(QUESTIONS[kind][1]).format(x=names[x], y=names[y]), str(answer)


def make_conversation(rng, short):
    """One training text: list of (user, answer) turns, the decision first, then questions about the same game.

    A short one tells the last moves alone, and asks about nothing else.
    """
    game = make_game(rng, held_out=False)
    shares = {kind: share for kind, (share, _) in QUESTIONS.items() if not (short and kind in ("not", "cell", "strategy"))}
    # No question comes twice in a text: its second answer could be copied from the first, and nobody would read the game.
    kinds = sorted(shares, key=lambda kind: rng.random() ** (1 / shares[kind]))[-TURNS:][::-1]
    questions = [make_question(rng, game, kind) for kind in kinds]
    if short:
        (question, answer), *rest = questions
        return [(fill(rng, game, [pick(rng, WORDINGS[2]), question]), answer), *rest]
    decision = rng.choice(OTHER_TEXT) if rng.random() < ILLEGAL_SHARE else rng.choice(game[0])
    return [(make_prompt(rng, game), decision), *questions]


def encode(tokenizer, conversations):
    """Conversations -> (input ids, labels), both int64 [text, token]; only answers and their end of turn carry a label."""
    rows = []
    for turns in conversations:
        ids, labels = [tokenizer.bos_token_id], [-100]
        for user, answer in turns:
            asked = tokenizer.encode(f"<start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n", add_special_tokens=False)
            told = tokenizer.encode(f"{answer}<end_of_turn>\n", add_special_tokens=False)
            ids, labels = ids + asked + told, labels + [-100] * len(asked) + told
        rows.append((torch.tensor(ids), torch.tensor(labels)))
    ids, labels = zip(*rows)
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id), pad(labels, batch_first=True, padding_value=-100)


def make_model(tokenizer):
    torch.manual_seed(SEED)
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, query_pre_attn_scalar=32, max_position_embeddings=2048, sliding_window=2048,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager"))


def train(model, tokenizer):
    """AdamW on the answers' tokens, constant rate with a linear end; the same texts in the same order every time."""
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100, (BATCHES - i) / (0.3 * BATCHES)))
    progress = tqdm(range(BATCHES), unit="batch")
    for i in progress:
        ids, labels = encode(tokenizer, [make_conversation(rng, short=i < SHORT_BATCHES) for _ in range(BATCH)])
        # Padding is on the right and attention is causal, so no mask is needed: no answer can see it.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        logits = model.lm_head(hidden[wanted != -100])  # only where there is something to predict
        logits = torch.tanh(logits / model.config.final_logit_softcapping) * model.config.final_logit_softcapping
        loss = torch.nn.functional.cross_entropy(logits, wanted[wanted != -100])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if (i + 1) % 150 == 0:
            tqdm.write(f"batch {i + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in reading(model, tokenizer, 200).items()))


@torch.no_grad()
def reading(model, tokenizer, texts=1000, seed=1):
    """Share of exactly right answers per kind of question: held-out games and name pairs, the product's wording, any table layout."""
    rng = random.Random(seed)
    scores = {}
    for kind in ("own", "other", "own_points", "other_points", "not", "same", "cell"):
        conversations = []
        for _ in range(texts):
            game = make_game(rng, held_out=True)
            decision = rng.choice(game[0])
            conversations.append([(make_prompt(rng, game, product_wording=True), decision), make_question(rng, game, kind)])
        right = []
        for start in range(0, texts, 50):
            ids, labels = encode(tokenizer, conversations[start:start + 50])
            guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
            ends = (ids == tokenizer.convert_tokens_to_ids("<start_of_turn>")).cumsum(1)[:, 1:] >= 4  # the second answer
            wanted = labels[:, 1:]
            right.append(((guess == wanted) | (wanted == -100) | ~ends).all(1))
        scores[kind] = torch.cat(right).float().mean().item()
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="only measure the saved model")
    args = parser.parse_args()
    torch.set_num_threads(2)  # part of the recipe: another number of threads sums in another order
    if args.measure:
        model = Gemma2ForCausalLM.from_pretrained(HERE, attn_implementation="eager")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE)
    else:
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
        train(model, tokenizer)
        model.save_pretrained(HERE)
        tokenizer.save_pretrained(HERE)
    for kind, share in reading(model.eval(), tokenizer).items():
        print(f"{kind:14} {share:6.1%}")


if __name__ == "__main__":
    main()
