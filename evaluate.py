"""What did the agent become? Exact policies, frequencies, rewards and moral regrets of trained runs, beside the untuned model.

    python evaluate.py runs/utilitarian-vs-tit-for-tat-seed1
    python evaluate.py runs/*-seed1 --opponent tit-for-tat --actions action1 action2 --json results.json

An agent is a table of probabilities over 4 states x 4 name orders and its opponent is four numbers, so every figure is an expectation over a
Markov chain of the last moves: nothing is sampled. By default the action names are ones that training never showed.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from envs import (C, GAMES, ILLEGAL, ORDERS, STATES, STRATEGIES, check_names, frequencies, memory_one, opening, parse_strategy,
                  payoff_array, prompts)
from rewards import REWARDS, deontological_regret, reward_table, utilitarian_regret

EMBEDDED = Path(__file__).resolve().parent / "tiny"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py", usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders that train.py wrote, all of one base model")
    parser.add_argument("--game", nargs="+", choices=GAMES, default=list(GAMES), help="which games [all five]")
    parser.add_argument("--opponent", nargs="+", default=["random"],
                        help=f"one of {', '.join(STRATEGIES)}; or four numbers P(C | CC CD DC DD) [random]")
    parser.add_argument("--actions", nargs=2, metavar=("C_NAME", "D_NAME"), default=["action3", "action4"],
                        help="the names of C and of D [action3 action4]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per episode [5]")
    parser.add_argument("--xi", type=float, default=3.0, help="penalty for betraying a cooperator, in points; the authors' tests have 4 [3]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    args = parser.parse_args(argv)
    try:
        check_names(args.actions)
        args.strategy = parse_strategy(args.opponent)
        if args.rounds < 1 or not 0 <= args.xi < float("inf"):
            raise ValueError("--rounds must be at least 1 and --xi a finite number of at least 0")
        args.configs = [read_config(run) for run in args.runs]
        if len({config["model"] for config in args.configs}) > 1:
            raise ValueError(f"the runs have different base models: {', '.join(sorted({c['model'] for c in args.configs}))}")
        if args.json and args.json.exists():
            raise ValueError(f"--json: {args.json} exists and is not overwritten")
    except ValueError as error:
        parser.error(str(error))
    return parser, args


def read_config(run):
    """The settings of a run folder. Raises ValueError where it is none."""
    try:
        config = json.loads((run / "config.json").read_text())
        return {key: config[key] for key in ("model", "reward", "opponent", "game", "seed", "sampling", "illegal", "dtype")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is not a run folder of train.py: {type(error).__name__}: {error}") from None


def measure(policy, game, args, illegal):
    """Everything about one agent in one game, from its table [state, order, outcome]; plain floats, ready for JSON."""
    payoffs = payoff_array(game)
    share = np.zeros((4, 3, 2))  # [state, action, opponent's move]
    share[:, :policy.shape[-1]] = frequencies(policy, memory_one(args.strategy), args.rounds, opening(args.strategy))
    reward = {name: float((share * reward_table(name, payoffs, args.xi, illegal)).sum()) for name in REWARDS}
    after = share.sum(axis=-1).reshape(2, 2, 3).sum(axis=0)  # [opponent's last move, action]
    mean = policy.mean(axis=1)
    return {
        "policy": dict(zip(STATES, mean[:, C].tolist())),
        "illegal": dict(zip(STATES, mean[:, ILLEGAL].tolist() if mean.shape[1] > ILLEGAL else [0.0] * 4)),
        "actions": {f"{action}|{last}": float(after[j, i]) for i, action in enumerate(("C", "D", "illegal")) for j, last in enumerate("CD")},
        "reward": reward,
        "regret": {"deontological": deontological_regret(reward["deontological"]),
                   "utilitarian": float(utilitarian_regret(reward["utilitarian"], payoffs, illegal))},
    }


def evaluate(args):
    """Load the base once, swap the adapters. Returns {"runs": [...], "baseline": ...}. Raises ValueError or OSError on what cannot be loaded."""
    import torch

    from lora import load_adapter
    from ppo import Policy, encode, load_model

    config = args.configs[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(EMBEDDED if config["model"] == "tiny" else config["model"], device, getattr(torch, config["dtype"]))
    texts = {game: encode(tokenizer, prompts(payoff_array(game), args.actions), args.actions) for game in args.game}

    def games(name, free, illegal):
        with torch.no_grad():
            tables = {game: Policy(model, name, *texts[game], free)()[0].exp().double().cpu().numpy() for game in args.game}
        return {game: measure(table.reshape(len(STATES), ORDERS, -1), game, args, illegal) for game, table in tables.items()}

    results = {"opponent": " ".join(args.opponent), "actions": args.actions, "rounds": args.rounds, "xi": args.xi,
               "baseline": {"games": games(None, config["sampling"] == "free", config["illegal"])}, "runs": []}
    for number, (run, config) in enumerate(zip(args.runs, args.configs)):
        load_adapter(model, f"run{number}", run)
        results["runs"].append({"run": str(run), **config, "games": games(f"run{number}", config["sampling"] == "free", config["illegal"])})
    return results


def report(results):
    """The readable table: a block per game, a line per agent."""
    print(f"Against {results['opponent']}, actions {' '.join(results['actions'])}, {results['rounds']} rounds, xi {results['xi']:g}; exact.")
    agents = [("untuned", results["baseline"])] + [(Path(run["run"]).name, run) for run in results["runs"]]
    width = max(len(name) for name, _ in agents)
    for game in results["baseline"]["games"]:
        print(f"\n{game:{width}}   " + " ".join(f"P(C|{state})" for state in STATES) + "  illegal     points    regret: deontol.  utilit.")
        for name, agent in agents:
            m = agent["games"][game]
            print(f"{name:{width}}   " + " ".join(f"{p:7.3f}" for p in m["policy"].values())
                  + f"  {m['actions']['illegal|C'] + m['actions']['illegal|D']:7.3f}  {m['reward']['game']:9.3f}"
                  + f"  {m['regret']['deontological']:16.3f}  {m['regret']['utilitarian']:7.3f}")


def main(argv=None):
    parser, args = parse_args(argv)
    try:
        results = evaluate(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    report(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
