"""What does it say? Prompts, answers, and what an agent says when asked why.

    python experiments/ask.py runs/utilitarian-vs-tit-for-tat-seed1
    python experiments/ask.py runs/* --game chicken --prompt my_prompt.txt --json answers.json

For each state: the prompt, an answer sampled as in training, one of two questions drawn at random,
and the model's own words on it, as in the paper (appendix): sampled with temperature 1, 100 tokens.
Then the most probable answers, by best-first search: exact. All of it in the first of the four
orders of the names, where evaluate.py has the mean of them. Nothing of the model's
generation_config.json acts. The options of evaluate.py are here, too, but for --opponent, --rounds
and --axes; --game takes one.
"""

import heapq
import math
import os
import sys
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, see runs.py

import numpy as np
import torch
from transformers import GenerationConfig

from envs import ORDERS, STATES, C, D, build_prompts
from errors import InputError, stop
from evaluate import asked_of, evaluate_parser, prepare
from lora import active_adapter
from options import number
from policy import write_chats
from runs import save_json
from trie import Trie

QUESTIONS = ("Why did you make this decision?", "What strategy did you use to decide?")
ROLES = ("user", "assistant", "user")
LENGTH = 100  # tokens of a reply
MOST = 5  # so many of the most probable answers are shown
RARE = 1e-6  # answers that are less probable are not looked for
PASSES = 200  # the search ends after so many
WIDTH = 8  # so many first tokens are looked behind in a pass


def ask(players, run, condition, sampling, seed):
    """What an agent (run None: the untuned model) says: dict.

    states: of each what is asked and said; the seed draws the questions, the same for every agent
    answers: the most probable, MOST of them, p in each state
    unseen: what another answer may have at most where the search ran out of passes, else None
    """
    model = players.model
    tokenizer = players.tokenizer
    side = players.side(run)
    texts = build_prompts(condition, side)[::ORDERS]
    trie = players.trie(condition, side)
    prompts = trie.prompts[::ORDERS]
    length = max(map(len, trie.answers)) + 1
    free = players.policy(run, sampling).free  # and its adapter is loaded
    # What ends a text: the special tokens, also those that the tokenizer has no attribute for.
    ends = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    rng = np.random.default_rng(seed)
    questions = rng.choice(QUESTIONS, len(STATES)).tolist()
    torch.manual_seed(seed)
    with active_adapter(model, "agent" if run else None):
        if free:
            said = generate(model, tokenizer, prompts, ends, length)
        else:
            player = players.player(run, condition, side, sampling)
            said = draw_names(rng, player, condition.actions)
        tokens = asked_after(tokenizer, texts, said, questions)
        replies = generate(model, tokenizer, tokens, ends, LENGTH)
        found, unseen = likely_texts(model, prompts, length, ends, MOST)
    states = []
    for values in zip(STATES, texts, said, questions, replies):
        states.append(dict(zip(("state", "prompt", "answer", "question", "reply"), values)))
    answers = [{"text": tokenizer.decode(tokens), "p": p.tolist()} for tokens, p in found]
    return {"states": states, "answers": answers, "unseen": unseen}


def draw_names(rng, player, names):
    """An answer of a player that always gives one of the names, in each state: list of str."""
    p = player[:, 0, C]
    draws = rng.random(len(STATES))
    return [names[D] if draw >= limit else names[C] for draw, limit in zip(draws, p)]


def asked_after(tokenizer, prompts, answers, questions):
    """Token ids of each prompt, its answer and its question: list of lists."""
    if not tokenizer.chat_template:
        texts = []
        for prompt, answer, question in zip(prompts, answers, questions):
            texts.append(f"{prompt} {answer}\n{question}\n")
        return tokenizer(texts)["input_ids"]
    chats = []
    for contents in zip(prompts, answers, questions):
        turns = zip(ROLES, contents)
        chats.append([{"role": role, "content": text} for role, text in turns])
    texts = write_chats(tokenizer, chats, add_generation_prompt=True)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template writes its own


def generate(model, tokenizer, tokens, ends, length):
    """What a model writes after each text (ids, list of lists): list of str.

    It is sampled at temperature 1, from the whole distribution.
    """
    width = max(map(len, tokens))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    if width + length > limit:
        reason = f"the model takes {limit} tokens, here are {width + length}"
        raise InputError(reason, "--prompt")
    # Padded on the left, with an id that every model has; nothing sees it.
    ids = torch.tensor([[0] * (width - len(text)) + text for text in tokens])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in tokens])
    # Instead of the model's own, from which `generate` takes whatever is left open.
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=length,
        eos_token_id=[*ends] or None,
        pad_token_id=0,
    )
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))[:, width:]
    texts = []
    for row in out.tolist():
        kept = takewhile(lambda token: token not in ends, row)
        texts.append(tokenizer.decode(list(kept)).strip())
    return texts


@torch.no_grad()
def likely_texts(model, prompts, length, ends, count):
    """The texts with the highest probability, a mean over the prompts: exact, by best-first search.

    A text ends at one of `ends`, or has `length` tokens. None is more probable than its beginning,
    so the search stops when every waiting beginning is less probable than the `count` best texts.
    Returns (texts, unseen): a list of (tokens, probabilities [prompt]), fewer than `count` where no
    others have RARE; and None, or the most that another text can have where the PASSES ran out.
    """
    waiting = [(-1.0, (), np.ones(len(prompts)))]  # a heap of first tokens
    found = []  # whole texts, the best first
    for _ in range(PASSES):
        if is_done(waiting, found, count):
            break
        prefixes = [heapq.heappop(waiting) for _ in range(min(WIDTH, len(waiting)))]
        # A trie has no node for an answer's last token: any will do.
        trie = Trie(prompts, [(*prefix, 0) for _, prefix, _ in prefixes])
        logits = model(**trie.inputs(model)).logits.flatten(0, 1).cpu().double()
        for (_, prefix, so_far), path in zip(prefixes, trie.paths):
            last, _ = path[-1]
            joint = so_far[:, None] * logits[trie.branches[:, last]].softmax(-1).numpy()
            for token in np.flatnonzero(joint.mean(axis=0) >= RARE).tolist():
                p = joint[:, token].copy()
                entry = (-p.mean(), (*prefix, token), p)
                if token in ends or len(prefix) + 1 == length:
                    found.append(entry)
                else:
                    heapq.heappush(waiting, entry)
        found = sorted(found)[:count]
    unseen = None if is_done(waiting, found, count) else -waiting[0][0]
    return [(tokens, p) for _, tokens, p in found], unseen


def is_done(waiting, found, count):
    """Whether no text that is still to be found can be among the `count` most probable ones."""
    return not waiting or (len(found) == count and found[-1][0] <= waiting[0][0])


def print_answers(name, result):
    for entry in result["states"]:
        prompt = entry["prompt"].replace("\n", "\n  | ")
        print(f"\n{name}, state {entry['state']}\n  | {prompt}\n  > {entry['answer']}")
        print(f"  {entry['question']}\n  > {entry['reply']}")
    print(f"\n{name}: most probable answers {'':12}   mean     {'     '.join(STATES)}")
    for answer in result["answers"]:
        shown = "".join(f"{p:7.3f}" for p in (np.mean(answer["p"]), *answer["p"]))
        print(f"  {answer['text']!r:34}{shown}")
    if result["unseen"]:
        print(f"  stopped after {PASSES} passes: others may have {result['unseen']:.2g}")


def main(argv=None):
    try:
        parser = evaluate_parser(__doc__, games=["ipd"])
        parser.option("--seed", "of what is drawn", type=number(int, 0, 2**63), default=1)
        args = parser.parse_args(argv)
        [condition], players = prepare(args, one=True)
        results = {}
        for run in [None, *args.runs]:
            results[str(run or "untuned")] = ask(players, run, condition, args.sampling, args.seed)
        asked = asked_of(args, condition, players)
        save_json(args, {**asked, "seed": args.seed, "agents": results})
        for name, result in results.items():
            print_answers(name, result)
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
