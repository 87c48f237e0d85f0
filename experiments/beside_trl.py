"""Seconds until the policy is learned: here, and with the usual tool, TRL's GRPOTrainer.

    pip install trl peft                                           # for this script alone
    python experiments/beside_trl.py --model FOLDER --json FILE    # 270M: ten minutes

Both train on the same 16 prompts (Prisoner's Dilemma, tit-for-tat, utilitarian reward) an adapter
of the same rank with the same learning rate, float32 on a CPU, free sampling, no more tokens than
an answer has; each in a process of its own, until the exact mean P(C) is above 0.9 (looking at it
is not timed), or for 50 updates. GRPO has TRL's defaults but for what costs it time or precision
(bfloat16 and gradient checkpointing are off), and 64 answers an update: 8 to each of 8 prompts.
"""

import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from envs import ILLEGAL, ORDERS, OWN, C
from errors import InputError, stop
from options import Parser, number, preset
from policy import load_model, prompt_heads
from runs import check_json, json_options, save_json
from speed import GB, ROUNDS, Job, load


class Curve:
    """What is known after each update: seconds, answers, the exact mean P(C)."""

    def __init__(self, job, name):
        self.job = job
        self.name = name
        self.points = []
        self.looking = 0.0
        self.start = time.perf_counter()

    def look(self, answers):
        """Add a point. True: it is learned."""
        now = time.perf_counter()
        cooperation = float(self.job.policy.probabilities(self.job.trie)[:, C].mean())
        seconds = now - self.start - self.looking
        self.points.append({"P(C)": cooperation, "seconds": seconds, "answers": answers})
        print(f"{self.name}{seconds:8.1f} s{answers:7} answers  P(C) {cooperation:.3f}", flush=True)
        self.looking += time.perf_counter() - now
        return cooperation > 0.9

    def figures(self):
        last = self.points[-1]
        return {
            **last,
            "answers per second": last["answers"] / last["seconds"],
            "peak memory, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GB,
            "curve": self.points,
        }


def here(model, seed, lr, **_):
    """Our loop, with 256 episodes an update."""
    base, tokenizer = load(model, layers=None, gpu=False, seed=seed)
    job = Job(base, tokenizer, free=True, lr=lr, seed=seed)
    curve = Curve(job, "here")
    for update in range(51):
        if curve.look(update * 256 * ROUNDS):
            break
        job.update(256)
    return curve.figures()


def with_trl(model, seed, lr, rank, alpha):
    """The same task as a dataset, and GRPOTrainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    base, tokenizer = load_model(model, "cpu")
    job = Job(base, tokenizer, free=True, name=None)  # its prompts; PEFT's adapter is in `base`
    heads = [head.removesuffix(" ") for head in prompt_heads(tokenizer, job.texts)]
    if tokenizer(heads)["input_ids"] != job.trie.prompts:
        raise InputError("TRL would give other tokens: its template repeats a first one", "--model")
    # Points of C, D and an illegal answer, where the other one repeats what the agent did last.
    points = []
    for row in range(len(heads)):
        state = row // ORDERS
        points.append(job.rewards[state, :, OWN[state]])

    def reward(completion_ids, points, **_):
        answers = job.trie.answers
        kinds = [answers.index(ids) if ids in answers else ILLEGAL for ids in completion_ids]
        return [float(own[kind]) for own, kind in zip(points, kinds)]

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = curve.look(64 * state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            use_cpu=True,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=4,
            num_generations=8,
            max_completion_length=max(map(len, job.trie.answers)),
            learning_rate=lr,
            lr_scheduler_type="constant",
            seed=seed,
            max_steps=50,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            base,
            reward,
            args=config,
            peft_config=LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"),
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": heads, "points": points}),
            callbacks=[Watch()],
        )
        curve = Curve(job, "TRL ")
        curve.look(0)
        trainer.train()
    return curve.figures()


def main(argv=None):
    parser = Parser(__doc__)
    parser.option("--model", "tiny (embedded), a folder, or a name on the hub", default="tiny")
    parser.option("--seed", "of both", type=number(int, 0, 2**63), default=1)
    json_options(parser)
    args = parser.parse_args(argv)
    try:
        if not (find_spec("trl") and find_spec("peft")):
            raise InputError("not installed: pip install trl peft", "trl, peft")
        check_json(args)
        usual = preset("quick", args.model)
        own = {key: usual[key] for key in ("lr", "rank", "alpha")}
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as alone:
            jobs = [alone.submit(way, args.model, args.seed, **own) for way in (here, with_trl)]
            ours = jobs[0].result()
            theirs = jobs[1].result()
        figures = {"model": args.model, "seed": args.seed, "here": ours, "TRL": theirs}
        for name in ours:
            if name != "curve":
                print(f"{name:20} here {ours[name]:8.4g}   TRL {theirs[name]:8.4g}")
        figures["TRL / here, seconds"] = theirs["seconds"] / ours["seconds"]
        print(f"TRL takes {figures['TRL / here, seconds']:.3g} times as long")
        save_json(args, figures)
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
