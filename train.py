"""Fine-tune a language model with PPO on an intrinsic moral reward, while it plays a repeated matrix game in text.

    python train.py --reward utilitarian                                      # the embedded model: under a minute on a laptop
    python train.py --reward game --opponent always-cooperate --seed 2
    python train.py --reward deontological --opponent 1 0.3 1 0.3             # an opponent is four numbers P(C | CC CD DC DD)
    python train.py --reward utilitarian --opponent learner                   # two agents that learn from each other
    python train.py --reward game --then utilitarian                          # unlearn selfishness half-way
    python train.py --reward utilitarian --model google/gemma-2-2b-it         # any causal language model, the paper's settings
    torchrun --nproc-per-node 4 train.py --reward utilitarian --model ...     # the prompts dealt out over four GPUs
    python train.py --resume runs/utilitarian-vs-tit-for-tat-seed1            # continue an interrupted run

Writes a run folder: config.json, metrics.csv (a row per update), result.json (the policy before and after), value_head.safetensors, and the
adapter in PEFT's layout; with a learning opponent also opponent/, the same for its side. While it runs, state.safetensors is all that --resume
needs. Method: Tennant, Hailes & Musolesi, Moral Alignment for LLM Agents (ICLR 2025).
"""

import argparse
import csv
import os
import platform
import sys
import time
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np

from envs import (ACTION_TYPES, C, GAMES, ILLEGAL, LAYOUTS, NAMES, STATES, STRATEGIES, TEMPLATES, by_order, describe, draw, first_condition,
                  memory_one, opening, other_seat, parse_names, parse_strategy, payoff_array, play, prompts, replies)
from rewards import REWARDS, moral_accuracy, reward_table
from runs import (base_of, blame, check_out, clear, locked, number, processes, read_config, read_state, resumed_words, save,
                  stop_signals, write_json, write_state)

# torch, transformers and the rooms that need them are imported in `setup`: --help and a bad option answer at once.

DEFAULTS = {  # settings that depend on the model; None on the command line means: take them from here
    "embedded": dict(episodes=25600, batch=256, lr=3e-3, rank=8, alpha=16.0, epochs=2, kl_coef=0.5),
    "paper": dict(episodes=1000, batch=1, lr=1.41e-5, rank=64, alpha=32.0, epochs=4, kl_coef=0.2),
}


# ------------------------------------------------------------------------------------------------------------------ command line

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

    count, positive, non_negative = number(int, 1, 10**9), number(float, 0, above=True), number(float, 0)
    option("--reward", "what the agent is trained for", choices=REWARDS)
    option("--then", "rewards that replace it in further phases (unlearning)", nargs="+", choices=REWARDS, default=[])
    option("--switch", "episodes at which the further phases begin (default: phases of equal length)", nargs="+", type=count)
    option("--model", "'tiny' (the embedded model), a folder, or a name on the Hugging Face hub", default="tiny")
    option("--game", f"{', '.join(GAMES)}; or 'random', fresh points from 0 to 9 in every update", nargs="+", choices=[*GAMES, "random"],
           metavar="GAME", default=["ipd"])
    option("--opponent", f"one of {', '.join(STRATEGIES)}; four numbers P(C | CC CD DC DD); 'learner', a second agent that is trained, too; or a "
           "run folder, whose agent stays as it is", nargs="+", default=["tit-for-tat"])
    option("--opponent-reward", "what a learning opponent is trained for (default: the agent's own reward)", choices=REWARDS)
    option("--sampling", "constrained: the answer is always one of the two names; free: it may be any text", choices=("constrained", "free"),
           default="constrained")
    option("--actions", "the names of C and of D; more names: every update draws two of them, in either role; 'random': out of "
           f"{len(NAMES)} built-in ones", nargs="+", metavar="NAME", default=["action1", "action2"])
    option("--layout", f"order of the table's rows and columns: {', '.join(LAYOUTS)}", nargs="+", choices=LAYOUTS, metavar="LAYOUT",
           default=["original"])
    option("--prompt", f"wording: {', '.join(TEMPLATES)}", nargs="+", choices=TEMPLATES, metavar="WORDING", default=["structured"])
    option("--episodes", "how many games are played in all", type=count)
    option("--batch", "episodes per update", type=count)
    option("--rounds", "rounds per episode", type=count, default=5)
    option("--xi", "penalty for betraying a cooperator, in points", type=non_negative, default=3.0)
    option("--illegal", "reward of an illegal answer, in points", type=number(float), default=-6.0)
    option("--lr", "Adam's learning rate", type=positive)
    option("--rank", "of the LoRA adapter", type=number(int, 1, 10**5))
    option("--alpha", "of the LoRA adapter: it is scaled by alpha / rank", type=positive)
    option("--epochs", "optimizer steps per update", type=count)
    option("--clip", "PPO's clip of the ratio and of the value", type=positive, default=0.2)
    option("--kl-coef", "beta, the weight of the KL penalty at the start", type=non_negative)
    option("--kl-target", "KL in nats to which beta adapts; while KL is below it, beta falls", type=positive, default=6.0)
    option("--vf-coef", "weight of the value loss", type=non_negative, default=0.1)
    option("--gamma", "discount per round; 0: each round is its own sample", type=number(float, 0, 1), default=0.0)
    option("--seed", "of everything random", type=number(int, 0, 2**63), default=1)
    option("--device", "cpu, cuda, mps ... (default: cuda where there is one)")
    option("--dtype", "of the frozen base (default: bfloat16 on cuda, else float32)", choices=("float32", "bfloat16", "float16"))
    option("--nodes", "at most so many tokens in one pass; more prompts take several passes (default: one pass)", type=count)
    option("--checkpointing", "recompute each layer in the backward pass: less memory, half as much work again", action="store_true")
    option("--init", "start from the adapter and value head of this run folder", type=Path)
    option("--save-every", "updates between saved states", type=count, default=10)
    option("--resume", "continue the interrupted run in this folder; its settings are all taken from there", type=Path)
    option("--out", "the run folder (default: runs/REWARD-vs-OPPONENT-seedN)", type=Path)
    option("--overwrite", "replace the run folder if it exists", action="store_true")
    option("--merge", "also save a standalone model with the adapter merged in, in the run folder's merged/", action="store_true")
    args = parser.parse_args(argv)
    if args.resume:
        with blame("--resume"):
            words = resumed_words(args.resume, sys.argv[1:] if argv is None else argv)
        args = argparse.Namespace(**{**vars(parser.parse_args(words)), "resume": args.resume, "out": args.resume})
    if args.reward is None:
        parser.error("the following arguments are required: --reward")
    for key, value in DEFAULTS["embedded" if args.model == "tiny" else "paper"].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    with blame("--opponent"):
        args.strategy = read_opponent(args.opponent)
    if args.opponent_reward and args.opponent != ["learner"]:
        parser.error("--opponent-reward: only '--opponent learner' is trained")
    with blame("--actions"):
        args.names = parse_names(args.actions)
    if args.batch * args.rounds == 1:
        parser.error("--batch: an update of one round has no advantage to learn from: raise --batch or --rounds")
    with blame("--switch" if args.switch else "--episodes"):
        phases = len(args.then) + 1
        args.switch = args.switch or [args.episodes * i // phases for i in range(1, phases)]
        firsts = [-(-episode // args.batch) for episode in (0, *args.switch, args.episodes)]  # the update with which each phase begins, and the end
        if len(args.switch) != len(args.then) or firsts != sorted(set(firsts)):
            raise ValueError(f"each of the {phases} phases needs an update of its own: one episode for each reward of --then, rising, between 0 and "
                             f"{args.episodes}, in different batches of {args.batch}")
    name = "-then-".join([args.reward, *args.then]) + "-vs-" + "-".join(Path(word).name for word in args.opponent)
    args.out = args.out or Path("runs") / f"{name}-seed{args.seed}"
    if not args.resume:
        with blame("--out", ValueError, OSError):
            check_out(args.out, args.overwrite)
    return args


def read_opponent(words):
    """Four numbers for a fixed opponent, None for a learning or a trained one. Raises ValueError."""
    if words == ["learner"] or (len(words) == 1 and words[0] not in STRATEGIES and Path(words[0]).is_dir() and read_config(Path(words[0]))):
        return None
    try:
        return parse_strategy(words)
    except ValueError as error:
        raise ValueError(f"{error}; nor is it 'learner' or a run folder" if len(words) == 1 else error) from None


# --------------------------------------------------------------------------------------------------------------------------- run

def setup(args):
    """Everything that can be wrong with the input goes wrong here, before anything is written.

    Returns (learners, seats, tokenizer): one Learner for each player that learns, the agent first; and `seats(condition)` -> the Policies of
    these, on the prompts of an envs.Condition, and the tables of the player that does not learn.
    """
    import torch

    from lora import add_adapter, load_adapter
    from policy import Policy, checkpoint_layers, encode, load_model, zero_value_head
    from ppo import Learner

    torch.manual_seed(args.seed)
    with blame("--device"):
        try:
            torch.zeros(1, device=args.device).item()
        except Exception as error:  # torch raises many kinds, by the kind of device
            raise ValueError(f"{args.device} cannot be used here: {str(error).splitlines()[0]}") from None
    with blame("--model"):
        model, tokenizer = load_model(args.model, args.device, getattr(torch, args.dtype))
        add_adapter(model, "player", args.rank, args.alpha)
        if args.checkpointing:
            checkpoint_layers(model)
    agents, fixed = [("player", args.sampling, zero_value_head(model))], []  # who needs a Policy: adapter, sampling, value head
    begins = args.init and not args.resume  # a state has it all
    if begins:
        with blame("--init", ValueError, OSError):
            config = base_of(args.init, args.model)
            if (config["rank"], config["alpha"]) != (args.rank, args.alpha):
                raise ValueError(f"its adapter has --rank {config['rank']} --alpha {config['alpha']}: give these")
            load_adapter(model, "player", args.init)
    if args.strategy is not None:
        fixed = [memory_one(args.strategy)]
    elif args.opponent == ["learner"]:
        add_adapter(model, "opponent", args.rank, args.alpha)
        agents.append(("opponent", args.sampling, zero_value_head(model)))
    else:
        with blame("--opponent", ValueError, OSError):
            agents.append(("opponent", base_of(Path(args.opponent[0]), args.model)["sampling"], None))
            load_adapter(model, "opponent", args.opponent[0])
    learning = 2 if args.opponent == ["learner"] else 1

    @lru_cache(maxsize=64)  # a condition that comes again has its tries and its reference table at hand
    def seats(condition):
        payoffs, policies = payoff_array(condition.game), []
        for (name, sampling, value_head), points in zip(agents, (payoffs, other_seat(payoffs))):
            with blame("--actions"):
                texts = prompts(points, condition.names, condition.layout, TEMPLATES[condition.prompt])
                texts, answers = encode(tokenizer, texts, condition.names)
            with blame("--model"):
                policies.append(Policy(model, name, texts, answers, sampling == "free", args.nodes, value_head))
        return policies[:learning], [by_order(policy.table()) for policy in policies[learning:]] or fixed

    with blame("--actions"):  # all names at once: any two of them can be told apart
        encode(tokenizer, prompts(payoff_array("ipd"), args.names[:2]), args.names)
    first = first_condition(*conditions(args))
    for layout, wording in product(args.layout, args.prompt):  # their lengths differ, and what the model says to them
        policies, _ = seats(first._replace(layout=layout, prompt=wording))
        with blame("--model", Exception, mend="its kind of attention may be one that the token trie cannot run"):  # a forward pass
            policies[0].reference
    policies, _ = seats(first)
    learners = [Learner(policy, lr=args.lr, epochs=args.epochs, clip=args.clip, kl_coef=args.kl_coef, kl_target=args.kl_target,
                        vf_coef=args.vf_coef, gamma=args.gamma) for policy in policies]
    if begins:
        with blame("--init", ValueError, OSError):
            policies[0].load_value_head(args.init)
    return learners, seats, tokenizer


def conditions(args):
    """What an update's condition is drawn from: games, names, layouts and wordings."""
    return args.game, args.names, args.layout, args.prompt


def by_state(table, outcome):
    """Probability of an outcome in each state, averaged over the name orders: policy [state, order, outcome] -> dict CC, CD, DC, DD."""
    p = table[..., outcome].mean(axis=1) if outcome < table.shape[-1] else np.zeros(len(STATES))
    return {state: float(x) for state, x in zip(STATES, p)}


def metrics_columns(learners):
    """The columns of metrics.csv: those of the player and, where the opponent learns, too, the same for it."""
    names = ["reward", "accuracy", "kl", "kl_coef", "policy_loss", "value_loss", "ratio", "skipped", *ACTION_TYPES,
             *(f"P(C|{state})" for state in STATES)]
    return ["episodes", "phase", "condition", *names, *(f"opponent {name}" for name in names if len(learners) > 1)]


def train(args, learners, seats, state, save_state):
    """The training loop: one row of metrics.csv per update. Returns the learners' tables [state, order, outcome] before and after.

    seats: from `setup`;  state: what `read_state` returns, {} for a new run
    save_state(before, rng, updates done) is called every --save-every updates.
    Raises FloatingPointError where training cannot go on, KeyboardInterrupt after a signal; the last saved state is good either way.
    """
    from tqdm import tqdm

    rng = np.random.default_rng(args.seed)
    rng.bit_generator.state = state.get("rng", rng.bit_generator.state)
    opponent_opening = opening(args.strategy) if args.strategy is not None else 0.5
    phases = [args.reward, *args.then]
    starts = range(0, args.episodes, args.batch)

    def act(condition):
        """Tables of the players, those that learn first. One graph is kept, of a second learner none: it would double the memory."""
        policies, fixed = seats(condition)
        return [by_order(learner.act(policy, keep_graph=learner is learners[0])) for learner, policy in zip(learners, policies)] + fixed

    def measured():
        return act(first_condition(*conditions(args)))[:len(learners)]

    def learn(learner, reward, payoffs, table, other_table, me, other):
        """One player's update from what it saw and did: its columns of metrics.csv."""
        points = reward_table(reward, payoffs, args.xi, args.illegal)[me.state, me.action, other.move]
        accuracy = moral_accuracy(reward, table, payoffs, args.xi, replies(other_table))
        counts = np.bincount((2 * me.action + me.state % 2).ravel(), minlength=len(ACTION_TYPES)).tolist()
        return {"reward": points.mean(), "accuracy": accuracy, **learner.update(me.prompt, me.action, points), **dict(zip(ACTION_TYPES, counts)),
                **{f"P(C|{state})": p for state, p in by_state(table, C).items()}}

    before = [np.array(table) for table in state.get("before") or measured()]
    with open(args.out / "metrics.csv", "a", newline="", buffering=1) as file, \
            tqdm(starts, initial=state.get("updates", 0), unit="update", disable=os.environ.get("RANK", "0") != "0" or None) as progress:
        writer = csv.writer(file, lineterminator="\n")
        for update in range(state.get("updates", 0), len(starts)):
            if update % args.save_every == 0 and not any(learner.skipped_in_a_row for learner in learners):
                save_state(before, rng, update)
            episodes = min(args.batch, args.episodes - starts[update])
            phase = phases[sum(starts[update] >= switch for switch in args.switch)]
            condition = draw(rng, *conditions(args))
            payoffs, tables = payoff_array(condition.game), act(condition)
            mine, theirs = play(rng, *tables, episodes, args.rounds, opponent_opening)
            rows = [learn(learners[0], phase, payoffs, *tables, mine, theirs)]
            if len(learners) > 1:
                rows.append(learn(learners[1], args.opponent_reward or phase, other_seat(payoffs), *tables[::-1], theirs, mine))
            writer.writerow([starts[update] + episodes, phase, condition,
                             *(x if isinstance(x, int) else f"{x:.6g}" for row in rows for x in row.values())])
            shown = ["reward {reward:+.2f}  accuracy {accuracy:.2f}  KL {kl:.3f}  skipped {skipped}".format_map(row) for row in rows]
            progress.set_postfix_str("  |  ".join(shown), refresh=False)
            progress.update()
            if args.stop:
                save_state(before, rng, update + 1)
                raise KeyboardInterrupt
    return before, measured()


def summarise(before, after):
    """The part of result.json about policies; the tables [state, order, outcome] are those of the seats that learn."""
    return {f"{seat}{kind}_{when}": by_state(table, outcome)
            for seat, *tables in zip(("", "opponent_"), before, after)
            for kind, outcome in (("policy", C), ("illegal", ILLEGAL)) for when, table in zip(("before", "after"), tables)}


def report(before, after):
    """The policies before and after, as small tables."""
    for seat, *tables in zip(("P(C | own last, their last)", "The opponent's"), before, after):
        print(f"\n{seat:30}{'before':>7} {'after':>7}")
        for state in STATES:
            print(f"  P(C | {state})".ljust(30) + " ".join(f"{by_state(table, C)[state]:7.3f}" for table in tables))
        print("  P(illegal), mean".ljust(30) + " ".join(f"{table[..., 2:].sum(-1).mean():7.3f}" for table in tables))
        print(f"In a word: {' -> '.join(describe(table) for table in tables)}")


# -------------------------------------------------------------------------------------------------------------------------- main

def run(args):
    """From the command line's settings to the finished run folder."""
    import torch
    import transformers
    from safetensors import SafetensorError

    started = time.perf_counter()
    learners, seats, tokenizer = setup(args)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
                if key not in ("strategy", "names", "resume", "out", "overwrite")}
    print("  ".join(f"{key.replace('_', '-')}={' '.join(map(str, value)) if isinstance(value, list) else value}"
                    for key, value in settings.items() if value not in (None, [])))
    settings["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                            "numpy": np.__version__}
    with blame("--out", OSError, SafetensorError, mend=f"what was saved is kept: python train.py --resume {args.out}"), \
            blame("--lr", FloatingPointError, mend=f"lower it; the last good state is kept in {args.out}"), locked(args.out), stop_signals(args):
        if args.resume:
            with blame("--resume"):
                state = read_state(args, learners, settings)
        else:
            state = {}
            clear(args.out)
            write_json(args.out / "config.json", settings)
            (args.out / "metrics.csv").write_text(",".join(metrics_columns(learners)) + "\n")
        seconds = state.get("seconds", 0)

        def save_state(*position):
            write_state(args, learners, settings, seconds + time.perf_counter() - started, *position)

        try:
            before, after = train(args, learners, seats, state, save_state)
        except KeyboardInterrupt:
            print(f"Stopped; to continue:  python train.py --resume {args.out}", file=sys.stderr)
            raise SystemExit(130) from None
        seconds = round(seconds + time.perf_counter() - started, 2)
        result = {"reward": args.reward, **({"then": args.then} if args.then else {}), "opponent": " ".join(args.opponent), "seed": args.seed,
                  "seconds": seconds, **summarise(before, after)}
        save(args, learners, tokenizer, settings, result)
    report(before, after)
    print(f"Saved in {args.out} after {seconds} s.  To evaluate it:  python evaluate.py {args.out}")


def main(argv=None):
    args = parse_args(argv)
    import torch
    with processes(args), blame("--batch", MemoryError, mend="lower it or --rounds"), \
            blame("--device", torch.OutOfMemoryError, mend="take --checkpointing, --nodes, --dtype bfloat16 or a lower --rank"):
        run(args)


if __name__ == "__main__":
    main()
