"""Fine-tune a language model with PPO on an intrinsic moral reward, while it plays a repeated matrix game in text.

    python train.py --reward utilitarian                                      # the embedded model: under a minute on a laptop
    python train.py --reward game --opponent always-cooperate --seed 2
    python train.py --reward deontological --opponent 1 0.3 1 0.3             # an opponent is four numbers P(C | CC CD DC DD)
    python train.py --reward utilitarian --model google/gemma-2-2b-it         # any causal language model, the paper's settings

Writes a run folder: config.json, metrics.csv (a row per update), result.json (the policy before and after), value_head.safetensors, and the
adapter in PEFT's layout. Method: Tennant, Hailes & Musolesi, Moral Alignment for LLM Agents (ICLR 2025).
"""

import argparse
import csv
import json
import math
import platform
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from envs import (C, GAMES, ILLEGAL, ORDERS, STATES, STRATEGIES, check_names, describe, memory_one, opening, parse_strategy,
                  payoff_array, play, prompts)
from rewards import REWARDS, reward_table

# torch, transformers and the rooms that need them are imported in `setup`: --help and a bad option answer at once.

EMBEDDED = Path(__file__).resolve().parent / "tiny"
DEFAULTS = {  # settings that depend on the model; None on the command line means: take them from here
    "embedded": dict(episodes=2560, batch=64, lr=3e-3, rank=8, alpha=16.0, epochs=2, kl_coef=0.05),
    "paper": dict(episodes=1000, batch=1, lr=1.41e-5, rank=64, alpha=32.0, epochs=4, kl_coef=0.2),
}
ACTION_TYPES = ("C|C", "C|D", "D|C", "D|D", "illegal|C", "illegal|D")  # own action | opponent's last move


@contextmanager
def blame(option, *errors):
    """One of these errors (default: ValueError) in this block is the user's to mend: one line that names the option, exit code 2."""
    try:
        yield
    except errors or ValueError as error:
        print(f"train.py: error: {option}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


# ------------------------------------------------------------------------------------------------------------------ command line

def number(kind, low=-math.inf, high=math.inf, above=False):
    """An argparse type: an int or float from `low` (or strictly above it) to `high`; never NaN or infinite."""
    def parse(text):
        value = kind(text)
        if not math.isfinite(value) or value > high or value < low or (above and value == low):
            bound = f"above {low}" if above else f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {bound if low > -math.inf else 'finite'}, not {text}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid number value: 'x'"
    return parse


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="train.py", usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(flag, help, **kwargs):
        key = flag[2:].replace("-", "_")
        if "default" in kwargs and kwargs["default"] is not None:
            default = kwargs["default"]
            help += f" [{' '.join(default) if isinstance(default, list) else default}]"
        elif key in DEFAULTS["paper"]:
            help += f" [embedded model {DEFAULTS['embedded'][key]}, any other {DEFAULTS['paper'][key]}]"
        parser.add_argument(flag, help=help, **kwargs)

    count, positive, fraction = number(int, 1), number(float, 0, above=True), number(float, 0)
    option("--reward", "what the agent is trained for", choices=REWARDS, required=True)
    option("--model", "'tiny' (the embedded model), a folder, or a name on the Hugging Face hub", default="tiny")
    option("--game", "the game that is played", choices=GAMES, default="ipd")
    option("--opponent", f"one of {', '.join(STRATEGIES)}; or four numbers P(C | CC CD DC DD)", nargs="+", default=["tit-for-tat"])
    option("--sampling", "constrained: the answer is always one of the two names; free: it may be any text", choices=("constrained", "free"),
           default="constrained")
    option("--actions", "the names of C and of D", nargs=2, metavar=("C_NAME", "D_NAME"), default=["action1", "action2"])
    option("--episodes", "how many games are played in all", type=count)
    option("--batch", "episodes per update", type=count)
    option("--rounds", "rounds per episode", type=count, default=5)
    option("--xi", "penalty for betraying a cooperator, in points", type=fraction, default=3.0)
    option("--illegal", "reward of an illegal answer, in points", type=number(float), default=-6.0)
    option("--lr", "Adam's learning rate", type=positive)
    option("--rank", "of the LoRA adapter", type=count)
    option("--alpha", "of the LoRA adapter: it is scaled by alpha / rank", type=positive)
    option("--epochs", "optimizer steps per update", type=count)
    option("--clip", "PPO's clip of the ratio and of the value", type=positive, default=0.2)
    option("--kl-coef", "beta, the weight of the KL penalty at the start", type=fraction)
    option("--kl-target", "KL in nats to which beta adapts", type=positive, default=6.0)
    option("--vf-coef", "weight of the value loss", type=fraction, default=0.1)
    option("--gamma", "discount per round; 0: each round is its own sample", type=number(float, 0, 1), default=0.0)
    option("--seed", "of everything random", type=number(int, 0), default=1)
    option("--device", "cpu, cuda, mps ... (default: cuda where there is one)")
    option("--dtype", "of the frozen base (default: bfloat16 on cuda, else float32)", choices=("float32", "bfloat16", "float16"))
    option("--out", "the run folder (default: runs/REWARD-vs-OPPONENT-seedN)", type=Path)
    option("--overwrite", "replace the run folder if it exists", action="store_true")
    option("--merge", "also save a standalone model with the adapter merged in, in the run folder's merged/", action="store_true")
    args = parser.parse_args(argv)

    for key, value in DEFAULTS["embedded" if args.model == "tiny" else "paper"].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    with blame("--opponent"):
        args.strategy = parse_strategy(args.opponent)
    with blame("--actions"):
        check_names(args.actions)
    args.out = args.out or Path("runs") / f"{args.reward}-vs-{'-'.join(args.opponent)}-seed{args.seed}"
    with blame("--out"):
        check_out(args.out, args.overwrite)
    return args


def check_out(out, overwrite):
    """Raise ValueError unless a run may be written to `out`: it does not exist, or it is a run folder and may be replaced."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another folder, or give --overwrite to replace it")
    if out.exists() and not (out / "metrics.csv").exists():
        raise ValueError(f"{out} is not a run folder, so it is not overwritten: choose another one")


# --------------------------------------------------------------------------------------------------------------------------- run

def setup(args):
    """Everything that can be wrong with the input goes wrong here, before anything is written. Returns the Learner and its tokenizer."""
    import torch

    from lora import add_adapter
    from ppo import Learner, Policy, encode, load_model

    torch.manual_seed(args.seed)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    with blame("--device"):
        try:
            torch.zeros(1, device=args.device)
        except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
            raise ValueError(f"{args.device} cannot be used here: {str(error).splitlines()[0]}") from None
    with blame("--model"):
        model, tokenizer = load_model(EMBEDDED if args.model == "tiny" else args.model, args.device, getattr(torch, args.dtype))
        add_adapter(model, "player", args.rank, args.alpha)
    with blame("--actions"):
        texts, answers = encode(tokenizer, prompts(payoff_array(args.game), args.actions), args.actions)
    with blame("--model"):
        policy = Policy(model, "player", texts, answers, free=args.sampling == "free")
    learner = Learner(policy, args.lr, args.epochs, args.clip, args.kl_coef, args.kl_target, args.vf_coef, args.gamma)
    return learner, tokenizer


def by_state(table, outcome):
    """Probability of an outcome in each state, averaged over the name orders: policy [state, order, outcome] -> dict CC, CD, DC, DD."""
    p = table[..., outcome].mean(axis=1) if outcome < table.shape[-1] else np.zeros(len(STATES))
    return {state: float(x) for state, x in zip(STATES, p)}


def train(args, learner, writer):
    """The training loop; one row of metrics per update. Returns the policy before and after, [state, order, outcome]."""
    from tqdm import tqdm

    rng = np.random.default_rng(args.seed)
    opponent, opponent_opening = memory_one(args.strategy), opening(args.strategy)
    rewards = reward_table(args.reward, payoff_array(args.game), args.xi, args.illegal)

    before = policy = learner.act().reshape(len(STATES), ORDERS, -1)
    starts = range(0, args.episodes, args.batch)
    with tqdm(starts, unit="update", disable=None) as progress:
        for start in progress:
            episodes = min(args.batch, args.episodes - start)
            mine, theirs = play(rng, policy, opponent, episodes, args.rounds, opponent_opening)
            points = rewards[mine.state, mine.action, theirs.move]
            stats = learner.update(mine.prompt, mine.action, points)
            counts = np.bincount((2 * mine.action + mine.state % 2).ravel(), minlength=6)
            cooperation = by_state(policy, C)
            writer.writerow([start + episodes, f"{points.mean():.6g}", *(f"{x:.6g}" for x in stats.values()), *counts,
                             *(f"{p:.6g}" for p in cooperation.values())])
            progress.set_postfix_str(f"reward {points.mean():+.2f}  KL {stats['kl']:.3f}  P(C) {np.mean(list(cooperation.values())):.2f}")
            policy = learner.act().reshape(len(STATES), ORDERS, -1)
    return before, policy


def save(args, learner, tokenizer, result):
    """Adapter, value head, result, and the merged model if it was asked for."""
    from safetensors.torch import save_file

    from lora import merge_adapter, save_adapter

    policy = learner.policy
    save_adapter(policy.model, policy.name, args.out)
    save_file({"weight": policy.value_weight.detach().cpu(), "bias": policy.value_bias.detach().cpu()}, args.out / "value_head.safetensors")
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    if args.merge:
        merge_adapter(policy.model, policy.name)
        policy.model.save_pretrained(args.out / "merged")
        tokenizer.save_pretrained(args.out / "merged")


def report(result):
    """The policy before and after, as a small table."""
    before, after = result["policy_before"], result["policy_after"]
    print(f"\nP(C | own last, their last)   {'before':>7} {'after':>7}")
    for state in STATES:
        print(f"  P(C | {state})                  {before[state]:7.3f} {after[state]:7.3f}")
    print(f"  P(illegal), mean             {np.mean(list(result['illegal_before'].values())):7.3f} "
          f"{np.mean(list(result['illegal_after'].values())):7.3f}")
    print(f"In a word: {describe(list(before.values()))} -> {describe(list(after.values()))}")


def main(argv=None):
    args = parse_args(argv)
    started = time.perf_counter()
    learner, tokenizer = setup(args)
    import torch
    import transformers

    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "strategy"}
    print("  ".join(f"{key.replace('_', '-')}={' '.join(map(str, value)) if isinstance(value, list) else value}"
                    for key, value in settings.items()))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                "numpy": np.__version__}
    with blame("--out", OSError):
        if args.out.exists():
            shutil.rmtree(args.out)
        args.out.mkdir(parents=True)
        (args.out / "config.json").write_text(json.dumps({**settings, "versions": versions}, indent=2) + "\n")
        with open(args.out / "metrics.csv", "w", newline="", buffering=1) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["episodes", "reward", "kl", "kl_coef", "policy_loss", "value_loss", "ratio", *ACTION_TYPES,
                             *(f"P(C|{state})" for state in STATES)])
            before, after = train(args, learner, writer)
        result = {
            "reward": args.reward, "opponent": " ".join(args.opponent), "seed": args.seed,
            "seconds": round(time.perf_counter() - started, 2),
            "policy_before": by_state(before, C), "policy_after": by_state(after, C),
            "illegal_before": by_state(before, ILLEGAL), "illegal_after": by_state(after, ILLEGAL),
        }
        save(args, learner, tokenizer, result)
    report(result)
    print(f"Saved in {args.out} after {result['seconds']} s.  To evaluate it:  python evaluate.py {args.out}")


if __name__ == "__main__":
    main()
