"""How near is an update to its limit, a forward and a backward pass over the distinct tokens?

    python experiments/speed.py                            # embedded model: half a minute
    python experiments/speed.py --model FOLDER             # any other one: ten minutes for 270M
    python experiments/speed.py --model gemma-2-2b-shape   # random weights: a GPU, bfloat16

Medians of interleaved repeats, also of plain padded sequences. The floor is the bare model on the
same trie: no adapters, frozen weights, gradients of the activations only. Random weights are as
much work; the embedded tokenizer stands in for theirs. Another tool: beside_trl.py.
"""

import os
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, see runs.py

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Gemma2Config

import envs
from errors import InputError, about, stop
from lora import active_adapter, add_adapter
from options import COUNT, Parser, preset
from policy import Policy, load_model
from ppo import Learner
from rewards import reward_array

SIZES = (1, 16, 1_000, 10_000)  # episodes in an update
ROUNDS = 5
GB = 1e9 if sys.platform == "darwin" else 1e9 / 1024  # in units of ru_maxrss, bytes or KiB


def load(name, layers, gpu=True, seed=0):
    """(model with an adapter, tokenizer), on a GPU where there is one (not if gpu is False)."""
    device = "cpu"
    dtype = "float32"
    if gpu and torch.cuda.is_available():
        device = "cuda"
        dtype = "bfloat16"
    if name == "gemma-2-2b-shape":
        _, tokenizer = load_model("tiny", "cpu")
        config = Gemma2Config(num_hidden_layers=layers)  # the rest is by default Gemma 2 2B's
        config.dtype = getattr(torch, dtype)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    else:
        model, tokenizer = load_model(name, device, dtype)
    torch.manual_seed(seed)
    usual = preset("quick", name)
    add_adapter(model, "player", rank=usual["rank"], alpha=usual["alpha"])
    return model, tokenizer


def interleaved(repeats, ways):
    """Median seconds of each way, a dict name -> function, timed in turn after one warm-up."""
    times = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


class Job:
    """A policy to train: the Prisoner's Dilemma, tit-for-tat, the utilitarian reward.

    name: of its adapter; None: what trains `model` is none of ours
    """

    def __init__(self, model, tokenizer, free, lr=1e-5, name="player", seed=0):
        condition = envs.Condition()
        settings = {"illegal": -6.0}
        self.model = model
        self.policy = Policy(model, tokenizer, name, free)
        self.texts = envs.build_prompts(condition)
        self.trie = self.policy.trie(self.texts, condition.actions)
        self.inputs = self.trie.inputs(model)
        self.learner = Learner(self.policy, lr=lr, epochs=1)
        self.optimizer = self.learner.optimizer
        self.rewards = reward_array("utilitarian", envs.payoff_matrix(condition.game), settings)
        self.opponent = envs.memory_one(envs.STRATEGIES["tit-for-tat"])
        self.rng = np.random.default_rng(seed)

    def update(self, episodes):
        """One turn of train.py's loop."""
        table = self.policy(self.trie)
        player = envs.as_player(np.exp(table[0].detach().double().numpy()))
        row, action, reward = self.rollout(player, episodes)
        self.learner.update(self.trie, table, row=row, action=action, reward=reward)

    def rollout(self, player, episodes):
        """What is played: row of the prompt, action and points, [episode, round]."""
        mine, theirs = envs.play(self.rng, player, self.opponent, episodes, ROUNDS)
        return mine.row, mine.action, self.rewards[mine.state, mine.action, theirs.move]

    def floor(self):
        """The frozen model on the same trie, forward and backward."""
        inputs = dict(self.inputs)
        embedded = self.model.get_input_embeddings()(inputs.pop("input_ids"))
        with active_adapter(self.model, None):
            logits = self.model(inputs_embeds=embedded.detach().requires_grad_(), **inputs).logits
        logits.float().logsumexp(-1).sum().backward()

    def table_pass(self):
        """Forward and backward pass of the whole table, adapters and value head included."""
        self.optimizer.zero_grad()
        log_probs, values = self.policy(self.trie)
        (log_probs.sum() + values.sum()).backward()

    def plain_pass(self, inputs):
        """The same over plain sequences, the output head on the last position."""
        self.optimizer.zero_grad()
        with active_adapter(self.model, "player"):
            logits = self.model(**inputs, logits_to_keep=1).logits
        logits.float().log_softmax(-1)[:, 0, :2].sum().backward()


def padded(texts, device):
    """Plain sequences for a model, left-padded; texts: lists of token ids."""
    rows = [torch.tensor(text, device=device) for text in texts]
    ones = [torch.ones_like(row) for row in rows]
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_side="left"),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }


def measure(job, repeats):
    """All figures, a dict."""
    ways = {
        "update": partial(job.update, 256),
        "floor": job.floor,
        "pass of the table": job.table_pass,
        "forward": partial(job.policy, job.trie),
        "rollout": partial(job.rollout, job.opponent, 256),
        "optimizer": job.optimizer.step,
    }
    seconds = interleaved(repeats, ways)
    share = {name: median / seconds["update"] for name, median in seconds.items()}
    parts = {
        "forward": share["forward"],
        "backward": share["pass of the table"] - share["forward"],
        "optimizer": share["optimizer"],
        "rollout": share["rollout"],
    }
    parts["rest"] = 1 - sum(parts.values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GB
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 1e9

    sized = interleaved(repeats, {size: partial(job.update, size) for size in SIZES})

    # Last: what passes over many sequences leave in memory and caches slows down what follows.
    plain = [prompt + job.trie.answers[0][:-1] for prompt in job.trie.prompts]
    padded_pass = partial(job.plain_pass, padded(plain, job.model.device))
    passes = interleaved(repeats, {"trie": job.table_pass, "padded": padded_pass})
    return {
        "nodes": job.trie.tokens.numel(),
        "plain tokens": sum(map(len, plain)),
        "update / floor": 1 / share["floor"],
        "share of the time, 256 episodes": parts,
        "peak memory, GB": memory,
        "rounds per second": {size: size * ROUNDS / sized[size] for size in SIZES},
        "most episodes / 16": sized[SIZES[-1]] / sized[16],
        "16 padded prompts / trie": passes["padded"] / passes["trie"],
        "seconds": {**seconds, **passes},
    }


def as_text(value):
    if isinstance(value, dict):
        return ", ".join(f"{key}: {as_text(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv=None):
    parser = Parser(__doc__)
    parser.option("--model", "tiny, a folder, a hub name, or gemma-2-2b-shape", default="tiny")
    parser.option("--layers", "of gemma-2-2b-shape; fewer for a CPU", type=COUNT, default=26)
    parser.option("--repeats", "of each measurement", type=COUNT, default=10)
    args = parser.parse_args(argv)
    try:
        with about("--model"):
            model, tokenizer = load(args.model, args.layers)
            job = Job(model, tokenizer, free=args.model != "tiny")
    except InputError as error:
        stop(error)
    figures = {"model": args.model, "device": model.device, "threads": torch.get_num_threads()}
    figures.update(measure(job, args.repeats))
    for name, value in figures.items():
        print(f"{name:34}{as_text(value)}")


if __name__ == "__main__":
    main()
