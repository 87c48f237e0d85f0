"""What does it say? Prompts, answers, and what an agent says when asked why.

    python studies/ask.py runs/utilitarian-vs-tit-for-tat-seed1
    python studies/ask.py runs/* --game chicken --prompt-file my_prompt.txt --json answers.json

For each state: the prompt (first name order), an answer sampled as in training, and after it, each
by itself, the model's own words on two questions (paper, appendix; greedy, 60 tokens). Options as
in evaluate.py; always the same samples.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from envs import ORDERS, STATES
from evaluator import Evaluator
from lora import adapter
from models import write_chats
from program import printing, user_error
from prompts import build_prompts
from runs import write_json
from tested import condition_from, condition_parser, games_from, read_runs

QUESTIONS = ("Why did you make this decision?", "What strategy did you use to decide?")


def ask(evaluator, run, condition):
    """A dict per state: state, prompt, answer, and what is said on each of QUESTIONS.

    run: None: the untuned model
    """
    table, prompts = evaluator.table(run, condition)[::ORDERS], build_prompts(condition)[::ORDERS]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    if evaluator.free:
        length = max(map(len, evaluator.tokens(condition)[1])) + 1
        torch.manual_seed(0)
        answers = generate(evaluator, run, chats, do_sample=True, max_new_tokens=length)
    else:
        rng = np.random.default_rng(0)
        answers = [condition.names[int(rng.random() >= p[0])] for p in table]
    asked = []
    for state, prompt, answer in zip(STATES, prompts, answers):
        asked.append({"state": state, "prompt": prompt, "answer": answer})
    for question in QUESTIONS:
        after = []
        for chat, answer in zip(chats, answers):
            said = {"role": "assistant", "content": answer}
            after.append([*chat, said, {"role": "user", "content": question}])
        replies = generate(evaluator, run, after, do_sample=False, max_new_tokens=60)
        for entry, reply in zip(asked, replies):
            entry[question] = reply
    return asked


def generate(evaluator, run, chats, **settings):
    """The next turn of each chat, all at once, by a run's agent (None: the untuned model)."""
    model, tokenizer = evaluator.model, evaluator.tokenizer
    if tokenizer.chat_template:
        texts = write_chats(tokenizer, chats, add_generation_prompt=True)
    else:
        texts = []
        for chat in chats:
            texts.append("".join(turn["content"] + "\n" for turn in chat))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    special = not tokenizer.chat_template  # a template writes its own special tokens
    padded = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    inputs = tokenizer(texts, add_special_tokens=special, **padded).to(model.device)
    inputs.pop("token_type_ids", None)
    settings |= {"pad_token_id": tokenizer.pad_token_id, "top_k": 0, "top_p": 1.0}
    with adapter(model, None if run is None else "agent"):
        out = model.generate(**inputs, **settings)
    start = inputs["input_ids"].shape[1]
    said = tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
    return [text.strip() for text in said]


def main(argv=None):
    args = condition_parser("ask.py", __doc__, games=["ipd"]).parse_args(argv)
    configs = read_runs(args)
    results = {}
    with user_error("RUN", ValueError, OSError):
        evaluator = Evaluator(configs[0], args.sampling, runs=args.runs)
        for run in [None, *args.runs]:
            name = "untuned" if run is None else str(run)
            results[name] = ask(evaluator, run, condition_from(args, games_from(args)[0]))
    if args.json:
        with user_error("--json", OSError):
            write_json(args.json, results)
    with printing():
        for name, asked in results.items():
            for entry in asked:
                prompt = entry["prompt"].replace("\n", "\n  | ")
                print(f"\n{name}, state {entry['state']}\n  | {prompt}\n  > {entry['answer']}")
                for question in QUESTIONS:
                    print(f"  {question}\n  > {entry[question]}")


if __name__ == "__main__":
    main()
