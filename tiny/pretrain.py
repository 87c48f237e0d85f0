"""Train the embedded model from scratch on the texts of texts.py, and measure how it reads.

    python tiny/pretrain.py             # train (50 minutes on one core), save here, measure
    python tiny/pretrain.py --measure   # only measure the saved model
    python tiny/pretrain.py --without best_reply total equal average average_total --out FOLDER

The last line trains a control: a model that reads games and was never asked which action is better.
The model is a Gemma 3 of a million parameters. It is taught to *read* a game, not to play it: what
a cell of the payoff matrix holds, what the last moves were, and the skills that morals are made of,
as questions with checkable answers. The decision itself is answered by either name and by other
text equally often, as by a chat model without a preference.

Two things let a small model learn this in less than an hour:

- A text is a context and a dozen questions that branch off from it (the trie of trie.py, as
  training data): each sees the context and none of the other questions. One context serves them
  all, and no answer can lean on an earlier one.
- A curriculum. A cell has two keys, and a model that starts with whole prompts learns to look it up
  late or never. So first comes one key, then two keys beside the answer, then matrices, then each
  skill in a word, and then sentences and whole prompts.
"""

import argparse
import random
import sys
from functools import cache
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordPiece
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from envs import ILLEGAL, LAYOUTS, C, Condition, build_prompts
from policy import Policy
from texts import HELD_OUT_NAMES, QUESTIONS, all_wordings, held_out_text, make_batch

# The curriculum: (batches, kinds of TEXTS that take turns). What is left out is forgotten, so
# earlier kinds go on beside new ones.
STAGES = [
    (250, "pairs"),
    (350, "cells"),
    (200, "matrix"),
    (600, "drill"),
    (700, "skills drill skills moves"),
    (1600, "game skills game drill game moves"),
]
LEARNING_RATE = 3e-3
WARM_UP = 100  # batches
COOL_DOWN = 0.5  # of the training, at its end
# The weights are the mean of every 50th of the last batches: in between, preferences for a name
# come and go.
AVERAGED, EVERY = 600, 50
THREADS, SEED = 1, 0

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def make_tokenizer():
    """Words, action names among them, and single characters for everything else."""
    splitter = pre_tokenizers.BertPreTokenizer()
    words = set()
    for text in all_wordings():
        words |= {word for word, _ in splitter.pre_tokenize_str(text)}
    words.remove("matrix")  # a field's name; the saved weights were trained without it

    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    characters = [chr(code) for code in range(33, 127)]
    vocabulary += characters
    vocabulary += ["##" + character for character in characters if character.isalnum()]
    vocabulary += sorted(words)
    vocabulary = dict.fromkeys(vocabulary)  # each once: a name may be a character, too
    numbers = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordPiece(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end_of_turn>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>"],
        chat_template=CHAT_TEMPLATE,
    )


def text_ids(tokenizer, text):
    """Token ids of a text."""
    ids = []
    for word in text.split():
        ids += word_ids(tokenizer, word)
    return ids


@cache
def word_ids(tokenizer, word):
    """Token ids of a word.

    The tokenizer splits at every space, so a text's tokens are those of its words: a hundred times
    faster than whole texts.
    """
    return tokenizer.encode(word, add_special_tokens=False)


def pack(tokenizer, texts):
    """Texts -> (token ids, positions, labels), int64 [text, token], and the mask.

    A branch's positions go on from the context's end. A label is the next token of an answer;
    elsewhere it is -100.
    mask: bool [text, 1, token, token]: row sees column
    """
    rows = []  # of (token id, position, whether an answer's, branch) for each token
    for context, branches in texts:
        ids = [tokenizer.bos_token_id, *text_ids(tokenizer, context)]
        row = [(token, position, False, 0) for position, token in enumerate(ids)]
        for branch, turns in enumerate(branches, 1):
            position = len(ids)
            for question_and_answer in turns:
                for text, learned in zip(question_and_answer, (False, True)):
                    for token in text_ids(tokenizer, text):
                        row.append((token, position, learned, branch))
                        position += 1
        rows.append(row)
    longest = max(len(row) for row in rows)
    padding = (tokenizer.pad_token_id, 0, False, -1)
    packed = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    ids, positions, learned, branch = packed.unbind(dim=-1)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].where(learned[:, 1:] == 1, -100)
    seen = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    earlier = torch.ones(longest, longest, dtype=torch.bool).tril()
    return ids, positions, labels, (seen & earlier)[:, None]


def make_model(tokenizer):
    """A random model; the ten digits lie on a line in its embedding, as those of large models do.

    A number's size is what every comparison and sum is made of; given at the start, it need not be
    learned from a thousand comparisons.
    """
    torch.manual_seed(SEED)
    scale = 0.08  # about 1 / sqrt(width): with the usual 0.02 the look-ups come several times later
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=2048,
        sliding_window=2048,
        initializer_range=scale,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Gemma3ForCausalLM(config)
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    with torch.no_grad():
        line = torch.linspace(-1.5, 1.5, 10)[:, None] * scale * torch.randn(128)
        model.get_input_embeddings().weight[digits] += line
    return model


def answer_logits(model, ids, positions, labels, mask):
    """Logits where an answer's token comes next, and that token: [n, vocabulary], int64 [n]."""
    masks = {"full_attention": mask, "sliding_attention": mask}
    states = model.model(
        input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False
    ).last_hidden_state
    wanted = labels != -100
    return model.lm_head(states[wanted]), labels[wanted]


def train(model, tokenizer):
    """Muon on the layers' matrices, AdamW on the rest; the same texts in the same order every time.

    The rate is constant, with a linear end.
    """
    rng = random.Random(SEED)
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        group = matrices if parameter.ndim == 2 and "layers" in name else rest
        group.append(parameter)
    optimizers = [
        torch.optim.Muon(
            matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0),
    ]
    batches = []
    for count, kinds in STAGES:
        batches += islice(cycle(kinds.split()), count)

    def rate(done):
        left = (len(batches) - done) / (COOL_DOWN * len(batches))
        return min(1, (done + 1) / WARM_UP, left)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    progress = tqdm(batches, unit="batch")
    averaged = AveragedModel(model)
    for done, kind in enumerate(progress, 1):
        batch = pack(tokenizer, make_batch(rng, kind))
        loss = torch.nn.functional.cross_entropy(*answer_logits(model, *batch))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        progress.set_postfix_str(f"{kind}, loss {loss.item():.3f}", refresh=False)
        left = len(batches) - done
        if left < AVERAGED and left % EVERY == 0:
            averaged.update_parameters(model)
    model.load_state_dict(averaged.module.state_dict())


@torch.no_grad()
def reading(model, tokenizer, texts=500, seed=1):
    """Share of exactly right answers, {kind of question: {layout: share}}, on `texts` a layout.

    The texts are the product's prompts of held-out games, with the question as their goal.
    """
    rng = random.Random(seed)
    shares = {kind: {} for kind in QUESTIONS}
    for layout in LAYOUTS:
        right = {kind: [] for kind in QUESTIONS}
        for start in range(0, texts, 50):
            batch, kinds, lengths = [], [], []
            for _ in range(min(50, texts - start)):
                text, its_kinds = held_out_text(rng, layout)
                batch.append(text)
                kinds += its_kinds
                lengths += [len(text_ids(tokenizer, answer)) for [(_, answer)] in text.branches]
            logits, wanted = answer_logits(model, *pack(tokenizer, batch))
            hits = (logits.argmax(-1) == wanted).split(lengths)
            for kind, tokens in zip(kinds, hits):
                right[kind].append(tokens.all().item())
        for kind in QUESTIONS:
            shares[kind][layout] = float(np.mean(right[kind]))
    return shares


def decisions(model, tokenizer):
    """What the model does with the product's own question, in the Prisoner's Dilemma.

    {names: (P(C) of the two actions, P(any other text))}, means over all prompts
    """
    measured = {}
    for names in [("action1", "action2"), *HELD_OUT_NAMES]:
        both = []
        for free in (False, True):
            policy = Policy(model, tokenizer, None, free)
            trie = policy.trie(build_prompts(Condition(actions=names)), names)
            both.append(policy.probabilities(trie).mean(axis=0))
        measured[" ".join(names)] = both[0][C], both[1][ILLEGAL]
    return measured


def print_measures(model, tokenizer):
    layouts = "".join(f"{layout:>10}" for layout in LAYOUTS)
    print(f"{'right answers, matrix layout:':30}{layouts}")
    for kind, shares in reading(model, tokenizer).items():
        percent = "".join(f"{share:10.1%}" for share in shares.values())
        print(f"{kind:30}{percent}")
    print()
    for names, (cooperation, other) in decisions(model, tokenizer).items():
        print(f"{names}: P(C) {cooperation:.2f}, something else than a name {other:.2f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="only measure the saved model")
    parser.add_argument("--without", nargs="+", default=[], metavar="KIND", choices=[*QUESTIONS])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the model")
    args = parser.parse_args()
    if args.without and args.out == HERE:
        parser.error("--without: name the control's folder with --out")
    if args.measure:
        model = Gemma3ForCausalLM.from_pretrained(args.out)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        # Part of the recipe: another number of threads sums in another order.
        torch.set_num_threads(THREADS)
        tokenizer = make_tokenizer()
        for kind in set(args.without):  # after the vocabulary is made: it stays the same
            del QUESTIONS[kind]
        model = make_model(tokenizer)
        print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
        train(model, tokenizer)
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    print_measures(model.eval(), tokenizer)


if __name__ == "__main__":
    main()
