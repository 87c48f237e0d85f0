"""How near is an update to its limit, a forward and a backward pass over the distinct tokens?

And how far is it from the usual ways?

    python benchmarks/speed.py                            # embedded model: half a minute
    python benchmarks/speed.py --model FOLDER             # any other one: ten minutes for 270M
    python benchmarks/speed.py --model gemma-2-2b-shape   # random weights: a GPU of 10 GB, bfloat16
    python benchmarks/speed.py --json speed.json

Prints medians of interleaved repeats. The floor is the bare model on the same trie: no adapters,
frozen weights, gradients of the activations only. The weights do not change the work, so the random
ones of a real shape measure a real model; the embedded tokenizer stands in for its own.
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

import envs
from authors import ROUNDS, authors_update, plain_inputs
from lora import adapter, add_adapter
from models import default_device, encode, load_model
from policy import Policy
from ppo import Learner, act
from prompts import Condition, build_prompts
from rewards import reward_array

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16
SIZES = (1, 16, 1_000, 10_000)  # episodes in an update


def load(name, layers):
    """(model with an adapter, tokenizer) on the default device."""
    device = default_device()
    dtype = "bfloat16" if device == "cuda" else "float32"
    if name == "gemma-2-2b-shape":
        _, tokenizer = load_model("tiny", "cpu")
        config = Gemma2Config(num_hidden_layers=layers)  # the rest is by default Gemma 2 2B's
        options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, **options).eval()
    else:
        model, tokenizer = load_model(name, device, dtype)
    torch.manual_seed(0)
    rank = 8 if name == "tiny" else 16
    add_adapter(model, "player", rank, 2 * rank)
    return model, tokenizer


def clock():
    """Seconds, with all of the device's work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(ways, repeats):
    """Median seconds of each way, a dict name -> function, timed in turn after one warm-up."""
    times = {name: [] for name in ways}
    for i in range(repeats + 1):
        for name, way in ways.items():
            start = clock()
            way()
            if i > 0:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class Job:
    """A policy to train: the Prisoner's Dilemma, tit-for-tat, the utilitarian reward."""

    def __init__(self, model, tokenizer, epochs, free):
        condition = Condition()
        self.prompts, self.answers = encode(tokenizer, build_prompts(condition), condition.names)
        self.model, self.epochs = model, epochs
        self.policy = Policy(model, "player", self.prompts, self.answers, free)
        self.learner = Learner(self.policy.parameters(), lr=1e-5, epochs=epochs)
        self.rewards = reward_array("utilitarian", envs.payoff_matrix(condition.game))
        self.opponent = envs.memory_one(envs.STRATEGIES["tit-for-tat"])
        self.rng = np.random.default_rng(0)

    def update(self, episodes):
        """One turn of train.py's loop."""
        acted = act(self.policy)
        player = envs.as_player(acted.probabilities)
        mine, theirs = envs.play(self.rng, player, self.opponent, episodes, ROUNDS)
        points = self.rewards[mine.state, mine.action, theirs.move]
        self.learner.update(acted, mine.prompt, mine.action, points)

    def bare_pass(self):
        """The floor of an epoch: the frozen model on the same trie, forward and backward."""
        inputs = dict(self.policy.shards[0].inputs)
        embedded = self.model.get_input_embeddings()(inputs.pop("input_ids"))
        with adapter(self.model, None):
            logits = self.model(inputs_embeds=embedded.detach().requires_grad_(), **inputs).logits
        logits.float().logsumexp(-1).sum().backward()

    def pass_of_table(self):
        """Forward and backward pass of the whole table, adapters and value head included."""
        self.learner.optimizer.zero_grad()
        table = self.policy.forward()
        gradients = torch.ones_like(table.log_probs), torch.ones_like(table.values)
        self.policy.backward(table, gradients)


def plain_pass(model, inputs):
    """Forward and backward pass over plain sequences, the output head on the last position."""
    with adapter(model, "player"):
        logits = model(**inputs, logits_to_keep=1).logits
    logits.float().log_softmax(-1)[:, 0, :2].sum().backward()


def measure_floor(job, repeats, large):
    """An update against its floor, and the pass of a table against those over plain sequences."""
    ways = {"update, 256 episodes": lambda: job.update(256), "floor": job.bare_pass}
    near = interleaved(ways, repeats)
    figures = {"update / floor": near["update, 256 episodes"] / (job.epochs * near["floor"])}

    # Apart from the former: what passes over many sequences leave in memory and caches would slow
    # down whatever follows.
    prompts = {"16 padded prompts": job.prompts}
    if not large:
        spread = np.random.default_rng(0).integers(16, size=16 * ROUNDS)
        prompts["one sequence per round"] = [job.prompts[row] for row in spread]
    ways = {"pass of the table": job.pass_of_table}
    for name, rows in prompts.items():
        ways[name] = partial(plain_pass, job.model, plain_inputs(job.model, rows, job.answers))
    far = interleaved(ways, max(3, repeats // 3))
    figures["seconds"] = {**far, **near}
    for name in prompts:
        figures[f"{name} / trie"] = far[name] / far["pass of the table"]
    return figures


def measure_sizes(job, repeats):
    """Updates of more and more episodes."""
    ways = {size: partial(job.update, size) for size in SIZES}
    seconds = interleaved(ways, max(3, repeats // 3))
    return {
        "rounds per second": {size: size * ROUNDS / seconds[size] for size in SIZES},
        "10,000 episodes / 16": seconds[10_000] / seconds[16],
    }


def measure_parts(job, repeats):
    """What an update of 256 episodes spends its time on."""
    seconds = {}

    def timed(name, function, *args, **kwargs):
        start = clock()
        result = function(*args, **kwargs)
        seconds[name] = seconds.get(name, 0) + clock() - start
        return result

    with ExitStack() as patches:
        for owner, method, name in (
            (envs, "play", "rollout"),
            (job.policy, "forward", "forward"),
            (job.policy, "backward", "backward"),
            (job.learner.optimizer, "step", "optimizer"),
        ):
            wrapped = partial(timed, name, getattr(owner, method))
            patches.enter_context(patch.object(owner, method, wrapped))
        start = clock()
        for _ in range(repeats):
            job.update(256)
        total = clock() - start
    shares = {name: part / total for name, part in seconds.items()}
    shares["rest"] = 1 - sum(shares.values())
    return {"share of the time, 256 episodes": shares}


def measure_authors(job, repeats, rounds_per_second):
    """The authors' way; `rounds_per_second`: of ours, by size."""
    optimizer = torch.optim.Adam(job.policy.parameters(), lr=1e-5)
    update = partial(authors_update, job, copy.deepcopy(job.model), optimizer)
    theirs = ROUNDS / interleaved({"theirs": update}, max(3, repeats // 3))["theirs"]
    times = {size: rounds_per_second[size] / theirs for size in SIZES}
    return {"authors' way, rounds per second": theirs, "times the authors' way": times}


def measure_device(job, seconds):
    """Peak memory, and on a known GPU the share of its FLOPS; `seconds`: of an update."""
    if job.model.device.type != "cuda":
        return {"peak memory, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    figures = {"peak memory, GB": torch.cuda.max_memory_allocated() / 1e9}
    weights = 0
    for name, parameter in job.model.named_parameters():
        if not any(part in name for part in (".A.", ".B.", "embed")):
            weights += parameter.numel()
    for gpu, flops in PEAK_FLOPS.items():
        if gpu in torch.cuda.get_device_name():
            # Frozen weights: 2 flops per weight and token forward, 2 backward; adapters and
            # attention are small beside that.
            tokens = job.policy.shards[0].trie.tokens.numel() * job.epochs
            figures["model FLOPs utilisation"] = 4 * weights * tokens / seconds / flops
    return figures


def as_text(value):
    if isinstance(value, dict):
        return ", ".join(f"{key}: {as_text(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", default="tiny", help="tiny, a folder, a hub name, or gemma-2-2b-shape")
    option("--layers", type=int, default=26, help="of gemma-2-2b-shape; fewer for a CPU")
    option("--epochs", type=int, default=1, help="steps per update; the authors' code makes one")
    option("--repeats", type=int, default=10)
    option("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    large = args.model != "tiny"  # a sequence for each of 80 rounds does not fit into memory
    job = Job(*load(args.model, args.layers), args.epochs, free=large)
    weights = sum(parameter.numel() for parameter in job.model.parameters())
    slow = weights > 1e9 and job.model.device.type == "cpu"  # the authors' loop: an hour
    tokens = job.policy.shards[0].trie.tokens
    plain = plain_inputs(job.model, job.prompts, job.answers)
    figures = {
        "model": args.model,
        "device": str(job.model.device),
        "threads": torch.get_num_threads(),
        "nodes": tokens.numel(),
        "sequences": len(tokens),
        "plain tokens": int(plain["attention_mask"].sum()),
        "epochs": args.epochs,
    }
    figures |= measure_floor(job, args.repeats, large)
    figures |= measure_sizes(job, args.repeats)
    figures |= measure_parts(job, args.repeats)
    if not slow:
        figures |= measure_authors(job, args.repeats, figures["rounds per second"])
    figures |= measure_device(job, figures["seconds"]["update, 256 episodes"])
    for name, value in figures.items():
        print(f"{name:34}{as_text(value)}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
