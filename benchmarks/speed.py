"""How near is an update to its limit, one forward and one backward pass over the distinct tokens? And how far from the usual ways?

    python benchmarks/speed.py                                # the embedded model, about two minutes on two cores
    python benchmarks/speed.py --model gemma-2-2b-shape       # random weights of Gemma 2 2B's dimensions: for a GPU (10 GB of memory in bfloat16)
    python benchmarks/speed.py --json speed.json

Prints medians of interleaved repeats. The weights do not change the work, so the random ones of a real shape measure a real model; the embedded
tokenizer stands in for its own. "The authors' way" is written from what the README says of their loop ("Where this differs").
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import envs
from lora import adapter, add_adapter
from policy import Policy, encode, load_model
from ppo import Learner
from rewards import reward_table

GEMMA_2_2B = dict(vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
                  num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096)
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16
NAMES = ("action1", "action2")
ROUNDS = 5


def build(args):
    """(model with an adapter, tokenizer) on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if args.model == "gemma-2-2b-shape":
        _, tokenizer = load_model("tiny", "cpu", torch.float32)
        with torch.device(device):
            torch.set_default_dtype(dtype)
            model = Gemma2ForCausalLM._from_config(Gemma2Config(**{**GEMMA_2_2B, "num_hidden_layers": args.layers}), attn_implementation="eager")
            torch.set_default_dtype(torch.float32)
        model = model.eval()
    else:
        model, tokenizer = load_model(args.model, device, dtype)
    torch.manual_seed(0)
    rank = 8 if args.model == "tiny" else 64
    add_adapter(model, "player", rank, rank / 2)
    return model, tokenizer


def interleaved(ways, repeats):
    """Median seconds of each way, after one warm-up: dict name -> function of no arguments, timed in turn."""
    times = {name: [] for name in ways}
    for i in range(repeats + 1):
        for name, way in ways.items():
            synchronise()
            start = time.perf_counter()
            way()
            synchronise()
            times[name] += [time.perf_counter() - start] * (i > 0)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Timer:
    """Wraps functions and adds up the seconds spent in them."""

    def __init__(self):
        self.seconds = {}

    def wrap(self, name, function):
        def timed(*args, **kwargs):
            synchronise()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronise()
            self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start
            return result
        return timed


def sequences(prompts, answers, rounds=None):
    """Plain padded sequences: each prompt with the tokens up to the answers' last one, left-padded; or one for each sampled round."""
    rows = [prompt + answers[0][:-1] for prompt in (prompts if rounds is None else [prompts[p] for p in rounds])]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def plain_pass(model, ids, mask):
    """Forward and backward pass over plain sequences, with the output head on the last position alone."""
    with adapter(model, "player"):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1, use_cache=False).logits
    logits.float().log_softmax(-1)[:, 0, :2].sum().backward()


def authors_update(model, reference, optimizer, prompts, answers, rng, payoffs):
    """One PPO step on one episode, as their loop does it: each token of an answer is sampled by an uncached pass over one sequence; then
    old log-probabilities and those of a second full model, on the batch of 5 rounds with logits everywhere; then 4 epochs into one step."""
    with adapter(model, "player"), adapter(reference, None):
        chosen = []
        for _ in range(ROUNDS):
            prompt = list(prompts[rng.integers(len(prompts))])
            with torch.no_grad():
                for _ in range(len(answers[0])):
                    logits = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[0, -1]
                    prompt.append(int(torch.multinomial(logits.float().softmax(-1), 1)))
            chosen.append(prompt)
        ids, mask = sequences(chosen, [[0]])
        ids, mask = ids.to(model.device), mask.to(model.device)
        inputs = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False)

        def log_probs(network):
            tail = network(**inputs).logits[:, -len(answers[0]) - 1:-1].float().log_softmax(-1)
            return tail.gather(2, ids[:, -len(answers[0]):, None]).sum((1, 2))

        with torch.no_grad():
            old, against = log_probs(model), log_probs(reference)
        advantage = torch.as_tensor(rng.normal(size=ROUNDS), dtype=torch.float32, device=model.device) - 0.2 * (old - against)
        optimizer.zero_grad()
        for _ in range(4):
            ratio = (log_probs(model) - old).exp()
            (torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean() / 4).backward()
        optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, a folder, a name on the hub, or gemma-2-2b-shape")
    parser.add_argument("--layers", type=int, default=26, help="of gemma-2-2b-shape; fewer where a CPU has to do")
    parser.add_argument("--epochs", type=int, default=1, help="optimizer steps per update; the authors' code makes one")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    model, tokenizer = build(args)
    payoffs = envs.payoff_array("ipd")
    prompts, answers = encode(tokenizer, envs.prompts(payoffs, NAMES), NAMES)
    policy = Policy(model, "player", prompts, answers, free=False)
    epochs = args.epochs
    learner = Learner(policy, lr=1e-5, epochs=epochs, clip=0.2, kl_coef=0.2, kl_target=6, vf_coef=0.1, gamma=0)
    rewards, opponent, rng = reward_table("utilitarian", payoffs), envs.memory_one(envs.STRATEGIES["tit-for-tat"]), np.random.default_rng(0)
    learner.act()
    figures = {"model": args.model, "device": str(model.device), "threads": torch.get_num_threads(), "nodes": policy.shards[0][1].tokens.numel(),
               "sequences": len(policy.shards[0][1].tokens),
               "plain tokens": int(sequences(prompts, answers)[1].sum()), "epochs": epochs}

    def update(episodes):
        """One turn of train.py's loop."""
        mine, theirs = envs.play(rng, np.exp(learner.log_probs).reshape(4, 4, -1), opponent, episodes, ROUNDS)
        learner.update(mine.prompt, mine.action, rewards[mine.state, mine.action, theirs.move])
        learner.act()

    def bare_pass():
        learner.optimizer.zero_grad()
        log_probs, values = policy.forward(policy.shards[0])
        (log_probs.sum() + values.sum()).backward()

    mine, _ = envs.play(rng, envs.memory_one((.5,) * 4), opponent, 16, ROUNDS)
    spread = np.random.default_rng(0).integers(16, size=16 * ROUNDS)
    padded, sampled = (tuple(t.to(model.device) for t in sequences(prompts, answers, rounds)) for rounds in (None, spread))
    cpu_2b = args.model != "tiny" and model.device.type == "cpu" and args.layers > 4  # would take an hour
    near = interleaved({"update, 16 episodes": lambda: update(16), "bare pass": bare_pass}, 2 * args.repeats)
    figures["update / floor"] = near["update, 16 episodes"] / (epochs * near["bare pass"])
    # Apart from the former: what passes over many sequences leave in memory and caches would slow down whatever follows.
    far = interleaved({"bare pass": bare_pass, "16 padded prompts": lambda: plain_pass(model, *padded),
                       **({} if cpu_2b else {"one sequence per round": lambda: plain_pass(model, *sampled)})}, args.repeats)
    figures["seconds"] = {**far, **near}
    for way in list(far)[1:]:
        figures[f"{way} / trie"] = far[way] / far["bare pass"]

    sizes = (1, 16, 1_000, 10_000)
    by_size = interleaved({size: lambda size=size: update(size) for size in sizes}, max(3, args.repeats // 2))
    figures["rounds per second"] = {size: size * ROUNDS / by_size[size] for size in sizes}
    figures["10,000 episodes / 16"] = by_size[10_000] / by_size[16]

    timer = Timer()
    plays, forward, backward, step = envs.play, policy.forward, torch.Tensor.backward, learner.optimizer.step
    envs.play, policy.forward = timer.wrap("rollout", plays), timer.wrap("forward", forward)
    torch.Tensor.backward, learner.optimizer.step = timer.wrap("backward", backward), timer.wrap("optimizer", step)
    whole = timer.wrap("update", update)
    for _ in range(args.repeats):
        whole(256)
    envs.play, policy.forward, torch.Tensor.backward, learner.optimizer.step = plays, forward, backward, step
    total = timer.seconds.pop("update")
    figures["share of the time, 256 episodes"] = {**{name: value / total for name, value in timer.seconds.items()},
                                                  "rest": 1 - sum(timer.seconds.values()) / total}

    if not cpu_2b:
        reference = copy.deepcopy(model)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-5)
        theirs = interleaved({"theirs": lambda: authors_update(model, reference, optimizer, prompts, answers, rng, payoffs)}, max(3, args.repeats // 3))
        figures["authors' way, rounds per second"] = ROUNDS / theirs["theirs"]
        figures["times the authors' way"] = {size: figures["rounds per second"][size] * theirs["theirs"] / ROUNDS for size in sizes}
    if model.device.type == "cuda":
        figures["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
        weights = sum(p.numel() for n, p in model.named_parameters() if ".A." not in n and ".B." not in n and "embed" not in n)
        if peak:  # frozen weights: 2 flops per weight and token forward, 2 backward; adapters and attention are small beside that
            figures["model FLOPs utilisation"] = 4 * weights * figures["nodes"] * epochs / near["update, 16 episodes"] / peak
    else:
        figures["peak memory, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    def show(value):
        if isinstance(value, dict):
            return ", ".join(f"{key}: {show(one)}" for key, one in value.items())
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    for name, value in figures.items():
        print(f"{name:34}{show(value)}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
