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
    prompts = build_prompts(condition)[::ORDERS]
    if run is not None:
        evaluator.load(run)
    if evaluator.free:
        tokens, names = evaluator.tokens(condition)
        length = max(map(len, names)) + 1
        torch.manual_seed(0)
        answers = generate(evaluator, run, tokens[::ORDERS], do_sample=True, max_new_tokens=length)
    else:
        rng = np.random.default_rng(0)
        table = evaluator.table(run, condition)[::ORDERS]
        answers = [condition.names[int(rng.random() >= p[0])] for p in table]
    asked = []
    for state, prompt, answer in zip(STATES, prompts, answers):
        asked.append({"state": state, "prompt": prompt, "answer": answer})
    for question in QUESTIONS:
        tokens = asked_after(evaluator.tokenizer, prompts, answers, question)
        replies = generate(evaluator, run, tokens, do_sample=False, max_new_tokens=60)
        for entry, reply in zip(asked, replies):
            entry[question] = reply
    return asked


def asked_after(tokenizer, prompts, answers, question):
    """Token ids of each prompt, its answer and a question: list of lists."""
    if not tokenizer.chat_template:
        texts = [f"{prompt} {answer}\n{question}\n" for prompt, answer in zip(prompts, answers)]
        return tokenizer(texts)["input_ids"]
    chats = []
    for prompt, answer in zip(prompts, answers):
        turns = zip(("user", "assistant", "user"), (prompt, answer, question))
        chats.append([{"role": role, "content": text} for role, text in turns])
    texts = write_chats(tokenizer, chats, add_generation_prompt=True)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template writes its own


def generate(evaluator, run, tokens, **settings):
    """What the agent of a run (None: the untuned model) writes after each text: list of str.

    tokens: ids of each text, list of lists
    """
    model, tokenizer = evaluator.model, evaluator.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer.pad({"input_ids": tokens}, padding_side="left", return_tensors="pt")
    inputs = padded.to(model.device)
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
