"""What does it say? Prompts, answers, and what an agent says when asked why.

    python experiments/ask.py runs/utilitarian-vs-tit-for-tat-seed1
    python experiments/ask.py runs/* --game chicken --prompt my_prompt.txt --json answers.json

For each state: the prompt, an answer sampled as in training, and the model's own words on each of
two questions (paper, appendix; greedy, 60 tokens). Then the most probable answers, by best-first
search: exact. Nothing of the model's generation_config.json acts. Options as in evaluate.py.
"""

import heapq
import math
import sys
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import GenerationConfig

from envs import ORDERS, STATES, C, build_prompts
from evaluate import evaluate_parser, prepare
from lora import adapter
from policy import Trie, write_chats
from runs import InputError, stop, write_json

QUESTIONS = ("Why did you make this decision?", "What strategy did you use to decide?")
ROLES = ("user", "assistant", "user")
COUNT, RARE = 5, 1e-6  # so many of the most probable answers; those with less are not looked for
PASSES, WIDTH = 200, 8  # the search ends after so many; a pass looks behind so many first tokens


def ask(players, run, condition, sampling):
    """What an agent (run None: the untuned model) says: dict.

    states: of each what is asked and said;  answers: the COUNT most probable, p in each state
    unseen: what another answer may have at most where the search ran out of passes, else None
    """
    model, tokenizer, second = players.model, players.tokenizer, players.second(run)
    texts, trie = build_prompts(condition, second)[::ORDERS], players.trie(condition, second)
    prompts, length = trie.prompts[::ORDERS], max(map(len, trie.answers)) + 1
    free = players.policy(run, sampling).free  # and its adapter is loaded
    # What ends a text: the special tokens, also those that the tokenizer has no attribute for.
    ends = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    with adapter(model, "agent" if run else None):
        if free:
            torch.manual_seed(0)
            said = generate(model, tokenizer, prompts, ends, length, do_sample=True)
        else:
            p = players.player(run, condition, second, sampling)[:, 0, C]
            said = [condition.names[int(x)] for x in np.random.default_rng(0).random(4) >= p]
        columns = {"state": STATES, "prompt": texts, "answer": said}
        for question in QUESTIONS:
            tokens = asked_after(tokenizer, texts, said, question)
            columns[question] = generate(model, tokenizer, tokens, ends, 60)
        found, unseen = likely_texts(model, prompts, length, ends, COUNT)
    states = [dict(zip(columns, entry)) for entry in zip(*columns.values())]
    answers = [{"text": tokenizer.decode(tokens), "p": p.tolist()} for tokens, p in found]
    return {"states": states, "answers": answers, "unseen": unseen}


def asked_after(tokenizer, prompts, answers, question):
    """Token ids of each prompt, its answer and a question: list of lists."""
    if not tokenizer.chat_template:
        texts = [f"{prompt} {answer}\n{question}\n" for prompt, answer in zip(prompts, answers)]
        return tokenizer(texts)["input_ids"]
    turns = zip(prompts, answers, [question] * len(prompts))
    chats = [[{"role": role, "content": x} for role, x in zip(ROLES, turn)] for turn in turns]
    texts = write_chats(tokenizer, chats, add_generation_prompt=True)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template writes its own


def generate(model, tokenizer, tokens, ends, length, do_sample=False):
    """What a model writes after each text (ids, list of lists), greedily if not: list of str."""
    width = max(map(len, tokens))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    if width + length > limit:
        raise InputError("--prompt", f"the model takes {limit} tokens, here are {width + length}")
    # Padded on the left, with an id that every model has; nothing sees it.
    ids = torch.tensor([[0] * (width - len(text)) + text for text in tokens])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in tokens])
    # Instead of the model's own, from which `generate` takes whatever is left open.
    settings = {"max_new_tokens": length, "eos_token_id": [*ends] or None, "pad_token_id": 0}
    model.generation_config = GenerationConfig(do_sample=do_sample, top_k=0, **settings)
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))[:, width:]
    rows = [takewhile(lambda token: token not in ends, row) for row in out.tolist()]
    return [tokenizer.decode(list(row)).strip() for row in rows]


@torch.no_grad()
def likely_texts(model, prompts, length, ends, count):
    """The texts with the highest probability, a mean over the prompts: exact, by best-first search.

    A text is of `length` tokens, or ends at one of `ends`, and at most as probable as its first
    tokens. Returns `count` of (tokens, probabilities [prompt]), fewer where no others have RARE;
    and None, or where the PASSES ran out what another one may have at most.
    """
    waiting, found = [(-1.0, (), np.ones(len(prompts)))], []  # a heap of first tokens, and texts
    for passes in range(PASSES + 1):
        done = not waiting or (len(found) == count and found[-1][0] <= waiting[0][0])
        if done or passes == PASSES:
            break
        prefixes = [heapq.heappop(waiting) for _ in range(min(WIDTH, len(waiting)))]
        # A trie has no node for an answer's last token: any will do.
        trie = Trie(prompts, [(*prefix, 0) for _, prefix, _ in prefixes])
        logits = model(**trie.inputs(model)).logits.flatten(0, 1).cpu().double()
        for (_, prefix, so_far), path in zip(prefixes, trie.paths):
            joint = so_far[:, None] * logits[trie.branches[:, path[-1][0]]].softmax(-1).numpy()
            for token in np.flatnonzero(joint.mean(axis=0) >= RARE).tolist():
                p = joint[:, token].copy()
                whole = token in ends or len(prefix) + 1 == length
                heapq.heappush(found if whole else waiting, (-p.mean(), (*prefix, token), p))
        found = sorted(found)[:count]
    return [entry[1:] for entry in found], None if done else -waiting[0][0]


def main(argv=None):
    try:
        args = evaluate_parser(__doc__, games=["ipd"]).parse_args(argv)
        [condition], players = prepare(args, one=True)
        results = {}
        for run in [None, *args.runs]:
            results[str(run or "untuned")] = ask(players, run, condition, args.sampling)
        if args.json:
            write_json(args.json, results)
        for name, result in results.items():
            for entry in result["states"]:
                prompt = entry["prompt"].replace("\n", "\n  | ")
                print(f"\n{name}, state {entry['state']}\n  | {prompt}\n  > {entry['answer']}")
                print(*(f"  {question}\n  > {entry[question]}" for question in QUESTIONS), sep="\n")
            print(f"\n{name}: most probable answers {'':12}   mean     {'     '.join(STATES)}")
            for answer in result["answers"]:
                shown = "".join(f"{p:7.3f}" for p in (np.mean(answer["p"]), *answer["p"]))
                print(f"  {answer['text']!r:34}{shown}")
            if result["unseen"]:
                print(f"  stopped after {PASSES} passes: others may have {result['unseen']:.2g}")
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
