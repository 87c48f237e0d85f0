"""What does it say? Prompts, answers, and what an agent says when asked why.

    python studies/ask.py runs/utilitarian-vs-tit-for-tat-seed1
    python studies/ask.py runs/* --game chicken --prompt-file my_prompt.txt --json answers.json

For each state: the prompt (first name order), the likelier legal action, and the model's own words
on two questions (paper, appendix; greedy, 60 tokens). Options as in evaluate.py.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agents import Evaluator
from envs import ILLEGAL, ORDERS, STATES
from evaluate import condition_from, condition_parser, read_runs
from lora import adapter
from prompts import build_prompts
from runs import user_error

QUESTIONS = ("Why did you make this decision?", "What strategy did you use to decide?")


def ask(evaluator, run, condition):
    """A dict per state: state, prompt, answer, and what is said on each of QUESTIONS."""
    player, texts = evaluator.player(run, condition), build_prompts(condition)
    asked = []
    for i, state in enumerate(STATES):
        action = int(player[i, 0, :ILLEGAL].argmax())
        answers = {"state": state, "prompt": texts[i * ORDERS], "answer": condition.names[action]}
        chat = [{"role": "user", "content": answers["prompt"]}]
        chat.append({"role": "assistant", "content": answers["answer"]})
        for question in QUESTIONS:
            chat.append({"role": "user", "content": question})
            answers[question] = generate(evaluator, None if run is None else "agent", chat)
            chat.append({"role": "assistant", "content": answers[question]})
        asked.append(answers)
    return asked


def generate(evaluator, name, chat):
    """The model's greedy reply to a chat, with the adapter `name` or (None) without."""
    model, tokenizer = evaluator.model, evaluator.tokenizer
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    else:
        text = "\n".join(turn["content"] for turn in chat) + "\n"
    special = not tokenizer.chat_template  # a template writes its own special tokens
    ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
    ids = ids.to(model.device)
    settings = {"do_sample": False, "max_new_tokens": 60, "pad_token_id": tokenizer.eos_token_id}
    with adapter(model, name):
        out = model.generate(ids, attention_mask=ids.new_ones(ids.shape), **settings)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def main(argv=None):
    args = condition_parser("ask.py", __doc__, games=["ipd"]).parse_args(argv)
    configs = read_runs(args)
    results = {}
    with user_error("RUN", ValueError, OSError):
        evaluator = Evaluator(configs[0], args.sampling, args.actions)
        for run in [None, *args.runs]:
            name = "untuned" if run is None else str(run)
            results[name] = ask(evaluator, run, condition_from(args, args.game[0]))
            for answers in results[name]:
                prompt = answers["prompt"].replace("\n", "\n  | ")
                print(f"\n{name}, state {answers['state']}\n  | {prompt}\n  > {answers['answer']}")
                for question in QUESTIONS:
                    print(f"  {question}\n  > {answers[question]}")
    if args.json:
        with user_error("--json", OSError):
            args.json.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
