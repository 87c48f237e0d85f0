"""Fine-tune a language model with PPO on an intrinsic moral reward while it plays a game in text.

    python train.py --reward utilitarian                         # the embedded model, a laptop
    python train.py --reward deontological --opponent 1 0.3 1 0.3       # P(C | CC CD DC DD)
    python train.py --reward utilitarian --opponent learner      # two that learn from each other
    python train.py --reward game utilitarian                    # unlearn selfishness half-way
    python train.py --reward utilitarian --model google/gemma-2-2b-it --out gemma   # any causal LM
    torchrun --nproc-per-node 4 train.py --reward utilitarian --model ...   # prompts dealt out
    python train.py --resume runs/utilitarian-vs-tit-for-tat-seed1      # continue a stopped run

Writes a run folder, see runs.py. Method: Tennant et al., Moral Alignment for LLM Agents, ICLR 2025.
"""

import sys
from argparse import Namespace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import envs
import rewards
import runs
from envs import ILLEGAL, STATES, C, as_player, by_state
from runs import InputError, number

# torch and what needs it are imported in functions: --help and a bad option answer at once.

# What is not on the command line: of the embedded model, of any other one, of --paper.
DEFAULTS = {
    "until": (None, 0.97, None),
    "sampling": ("constrained", "free", "free"),
    "episodes": (25600, 8192, 1000),
    "batch": (256, 256, 1),
    "lr": (3e-3, 3e-4, 1.41e-5),
    "rank": (8, 16, 64),
    "alpha": (16.0, 32.0, 32.0),
    "epochs": (2, 1, 4),
    "kl_coef": (0.5, 0.2, 0.2),
}
DTYPES = ("float32", "bfloat16", "float16", "nf4")
PROGRESS = "reward {reward:+.2f}  accuracy {accuracy:.2f}  KL {kl:.3f}  skipped {skipped}"


def train_parser():
    parser = runs.Parser(__doc__)

    def option(flag, help, **kwargs):
        if defaults := DEFAULTS.get(flag[2:].replace("-", "_")):
            help += " [embedded model {}, any other {}, --paper {}]".format(*defaults)
        parser.option(flag, help, **kwargs)

    count, positive, some = number(int, 1, 10**9), number(float, 0, above=True), number(float, 0)
    share, until = number(float, 0, 1), number(float, 0, 1, above=True)
    penalty, points = number(float, 0, envs.MOST), number(float, -envs.MOST, envs.MOST)
    listed = {"nargs": "+"}
    sampling = "constrained: one of the two names; free: any text, illegal if it begins with none"
    names = f"of C and D; of more, or of random ({len(envs.NAMES)}), every update draws two"

    option("--reward", "in phases of equal length", choices=rewards.REWARDS, **listed)
    option("--model", "tiny (embedded), a folder, or a name on the hub", default="tiny")
    option("--game", envs.game_words(), metavar="GAME", default=["ipd"], **listed)
    option("--opponent", envs.opponent_words(), default=["tit-for-tat"], **listed)
    option("--sampling", sampling, choices=("constrained", "free"))
    option("--actions", names, metavar="NAME", default=["action1", "action2"], **listed)
    option("--layout", "of the payoffs", choices=envs.LAYOUTS, default=["original"], **listed)
    option("--prompt", "wording", choices=envs.TEMPLATES, default=["structured"], **listed)
    option("--paper", "the paper's settings: 1000 updates of one episode", action="store_true")
    option("--episodes", "how many games are played in all", type=count)
    option("--batch", "episodes per update", type=count)
    option("--until", "stop above this mean probability of the better action; 1: never", type=until)
    option("--rounds", "per episode", type=count, default=5)
    option("--xi", "penalty for betraying a cooperator, points", type=penalty, default=3.0)
    option("--illegal", "reward of an illegal answer, points", type=points, default=-6.0)
    option("--lr", "Adam's; it falls linearly to 0 where games, names or texts vary", type=positive)
    option("--rank", "of the LoRA adapter", type=number(int, 1, 10**5))
    option("--alpha", "of the LoRA adapter: it is scaled by alpha / rank", type=positive)
    option("--epochs", "optimizer steps per update", type=count)
    option("--kl-coef", "beta, the weight of the KL penalty at the start", type=some)
    option("--kl-target", "nats of KL to which beta adapts; 0: it is fixed", type=some, default=6.0)
    option("--gamma", "discount; 0: each round is its own sample", type=share, default=0.0)
    option("--seed", "of everything random", type=number(int, 0, 2**63), default=1)
    option("--device", "cpu, cuda, mps ... [cuda where there is one]")
    option("--dtype", "of the frozen base [bfloat16 on cuda, else float32]", choices=DTYPES)
    option("--checkpointing", "less memory, up to twice the time", action="store_true")
    option("--init", "start from the adapter and value head of this run folder", type=Path)
    option("--save-every", "updates between saved states", type=count, default=10)
    option("--resume", "continue the run in this folder with its own settings", type=Path)
    option("--out", "the run folder [runs/REWARD-vs-OPPONENT-seedN]", type=Path)
    option("--overwrite", "replace the run folder if it exists", action="store_true")
    return parser


def parse(argv=None):
    """All settings of a run, and on --resume (state, arrays), else None. Raises InputError."""
    parser = train_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if vars(args) != vars(parser.parse_args([])) | {"resume": args.resume}:
            raise InputError("--resume", "it takes all settings from the run: leave others out")
        config, *saved = runs.read_state(args.resume)
        del config["base"], config["versions"]  # they are found out anew
        return Namespace(**config, resume=args.resume, out=args.resume), saved
    if not args.reward:
        raise InputError("--reward", f"choose one or more of {', '.join(rewards.REWARDS)}")
    asked = "--game"
    try:
        envs.parse_games(args.game)
        asked = "--actions"
        envs.action_names(args.actions)
        asked = "--opponent"
        who = envs.parse_opponent(args.opponent)
    except ValueError as error:
        raise InputError(asked, error) from None
    if isinstance(who, Path):
        runs.read_config(who, "--opponent")

    # One update's accuracy does not tell what is learned where conditions are drawn or gamma > 0.
    endless = envs.varied(*choices(args)) or args.gamma > 0
    if endless and (args.until or 1) < 1:
        raise InputError("--until", "not with --gamma, nor where games, names or texts vary")
    for key, (embedded, other, paper) in DEFAULTS.items():
        if getattr(args, key) is None:
            usual = embedded if args.model == "tiny" else other
            setattr(args, key, paper if args.paper else usual)
    if endless or args.until == 1:
        args.until = None
    if phases(args) != sorted(set(phases(args))):
        raise InputError("--episodes", "each of the phases needs an update of its own: raise it")
    if args.out is None:
        opponent = "-".join(Path(word).name for word in args.opponent)
        args.out = Path(f"runs/{'-then-'.join(args.reward)}-vs-{opponent}-seed{args.seed}")
    runs.check_out(args.out, args.overwrite)
    return args, None


def choices(args):
    """What an update's condition is drawn from: games, names, layouts and wordings."""
    return envs.parse_games(args.game), envs.action_names(args.actions), args.layout, args.prompt


def phases(args):
    """The first update of each phase, as many of equal length as there are rewards; and the end."""
    count = len(args.reward)
    return [-(-(args.episodes * i // count) // args.batch) for i in range(count + 1)]


class Agent(NamedTuple):
    """A language model on one side of the game."""

    policy: Any  # policy.Policy
    second: bool  # it is the other one's opponent
    learner: Any = None  # ppo.Learner; None: it stays as it is

    def trie(self, condition):
        """The packed prompts of a Condition, as this side reads them."""
        return self.policy.trie(envs.build_prompts(condition, self.second), condition.names)

    def player(self, condition):
        """What it plays in a Condition: [state, order, outcome]."""
        return as_player(self.policy.probabilities(self.trie(condition)))


def setup(args, saved=None):
    """Load the model and put everyone in place.

    saved: (state, arrays) of an interrupted run
    What can be wrong with the input goes wrong here, before anything is written: InputError.
    Returns (agents that learn: the player, and its opponent if that learns, too;
             else whom the player meets, a function: Condition -> [state, order, outcome];
             what config.json has of the model and the versions)
    """
    import torch
    import transformers

    from lora import add_adapter, base_fingerprint
    from policy import ModelError, Policy, check_causal, encode, load_model
    from ppo import Learner

    torch.manual_seed(args.seed)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    who, free = envs.parse_opponent(args.opponent), args.sampling == "free"
    opponent, asked = None, "--device"  # asked: what is being looked at
    try:
        torch.zeros(1, device=args.device).item()
        asked = "--model"
        model, tokenizer = load_model(args.model, args.device, args.dtype, args.checkpointing)
        own = {"model": args.model, "dtype": args.dtype, "base": base_fingerprint(model)}
        add_adapter(model, "player", args.rank, args.alpha)
        agents = [Agent(Policy(model, tokenizer, "player", free), second=False)]
        asked = "--init"
        if args.init and not args.resume:  # a saved state has all of it
            start = own | {"rank": args.rank, "alpha": args.alpha}
            runs.require_same("--init", [start, runs.read_config(args.init, "--init")], *start)
            agents[0].policy.load(args.init, value_head=True)
        asked = "--opponent"
        if who == "learner":
            add_adapter(model, "opponent", args.rank, args.alpha)
            agents.append(Agent(Policy(model, tokenizer, "opponent", free), second=True))
        elif isinstance(who, Path):
            config = runs.read_config(who, "--opponent")
            runs.require_same("--opponent", [own, config], *own)
            frozen = Policy(model, tokenizer, "opponent", config["sampling"] == "free")
            frozen.load(who)
            opponent = lru_cache(maxsize=64)(Agent(frozen, second=True).player)
        else:
            opponent = lambda condition: envs.memory_one(who)  # noqa: E731
        asked, drawn = "--actions, --prompt", choices(args)
        first = envs.first_condition(*drawn)
        encode(tokenizer, envs.build_prompts(first), drawn[1])  # at once: any two names differ
        shown = [first._replace(layout=x, wording=y) for x, y in product(*drawn[2:])]
        tries = [agents[0].trie(condition) for condition in shown]
        asked = "--model (its attention may be of a kind that cannot run a token trie)"
        for trie in tries:
            agents[0].policy.reference(trie)
            check_causal(agents[0].policy, trie)
        settings = args.lr, args.epochs, args.kl_coef, args.kl_target, args.gamma
        agents = [agent._replace(learner=Learner(agent.policy, *settings)) for agent in agents]
        if saved:
            asked, (state, arrays) = "--resume", saved
            runs.require_same("--resume", [state["settings"], own], "base")
            for agent in agents:
                agent.learner.load_state(arrays, state["learners"])
    except (ValueError, OSError, RuntimeError, AssertionError, LookupError) as error:
        raise InputError("--model" if isinstance(error, ModelError) else asked, error) from error
    if args.until:
        payoffs = envs.payoff_matrix(first.game)
        players = [agent.player(first) for agent in agents]
        players += [opponent(first)] if opponent else []
        judged = judge(args.reward[-1], players, (payoffs, envs.other_side(payoffs)), args.xi)
        if np.isnan(judged[: len(agents)]).all():
            raise InputError("--until", "no action is better by this reward in this game: give 1")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    return agents, opponent, own | {"versions": versions}


def judge(reward, players, views, xi):
    """`moral_accuracy` of two players, each with its view of the payoffs; NaN: none is better."""
    both = zip(players, views, [envs.replies(player) for player in players[::-1]])
    return [rewards.moral_accuracy(reward, p, view, xi, facing) for p, view, facing in both]


def train(args, agents, opponent, folder, state, stop):
    """The training loop: one row of metrics.csv per update.

    agents, opponent: as from `setup`;  folder: the RunFolder;  state: what it saved, {} if new
    stop: an Event: save the state and raise KeyboardInterrupt
    Returns what the agents play before and after, in the first condition of training.
    Raises FloatingPointError where training cannot go on; the last saved state is good.
    """
    rng, first = np.random.default_rng(args.seed), envs.first_condition(*choices(args))
    rng.bit_generator.state = state.get("rng", rng.bit_generator.state)
    before = state.get("before") or [agent.player(first).tolist() for agent in agents]

    def save(updates):
        # What is saved is good: not while numbers that are not finite make updates be skipped.
        if runs.is_first() and not any(agent.learner.skipped_in_a_row for agent in agents):
            learners = [agent.learner.state() for agent in agents]
            folder.save(learners, updates=updates, rng=rng.bit_generator.state, before=before)

    who, xi, illegal = envs.parse_opponent(args.opponent), args.xi, args.illegal
    opponent_opening = envs.opening(who) if isinstance(who, tuple) else 0.5
    done, (*starts, total) = state.get("updates", 0), phases(args)
    hidden = not runs.is_first() or None  # None: only where stderr is no terminal
    progress = tqdm(range(done, total), "update", total, initial=done, disable=hidden)
    for update in progress:
        if update % args.save_every == 0:
            save(update)
        reward = args.reward[sum(update >= start for start in starts) - 1]
        episodes = min(args.batch, args.episodes - update * args.batch)

        # Smaller and smaller steps where conditions vary: else a late one undoes what was learned.
        for agent in agents if envs.varied(*choices(args)) and not args.paper else ():
            agent.learner.optimizer.param_groups[0]["lr"] = args.lr * (1 - update / total)

        # Draw what is played in this update: the game, the action names, their layout and wording.
        condition = envs.draw_condition(rng, *choices(args))
        payoffs = envs.payoff_matrix(condition.game)
        views = payoffs, envs.other_side(payoffs)  # each player's own points first

        # Act: one forward pass gives an agent's answers to all prompts. Of the second agent no
        # graph is kept: it would double the memory.
        tries = [agent.trie(condition) for agent in agents]
        tables = [agent.policy(t, graph=not agent.second) for agent, t in zip(agents, tries)]
        players = [as_player(np.exp(table[0].detach().double().numpy())) for table in tables]
        players += [opponent(condition)] if opponent else []

        # How good are they by now? Exact, from the probabilities, not from what is played.
        accuracies = judge(reward, players, views, xi)[: len(agents)]
        if args.until and update > starts[-1] and np.nanmin(accuracies) > args.until:
            progress.close()
            print(f"Learned after {update} of {total} updates.")
            break

        # Play all episodes at once by indexing these probabilities.
        seen = envs.play(rng, *players, episodes, args.rounds, opponent_opening)

        # Learn: look up what each round was worth, by the moral formula; then PPO on these rounds.
        row = {"episodes": update * args.batch + episodes, "phase": reward, "condition": condition}
        for i, agent in enumerate(agents):
            mine, theirs, view = seen[i], seen[1 - i], views[i]
            played = mine.state, mine.action, theirs.move
            points = rewards.reward_array(reward, view, xi, illegal)[played]
            log = {"reward": points.mean(), "accuracy": accuracies[i]}
            log |= agent.learner.update(tries[i], tables[i], mine.prompt, mine.action, points)
            log |= envs.action_counts(mine) | rewards.moral_regrets(*played, view, xi, illegal)
            log |= {f"P(C|{state})": p for state, p in by_state(players[i], C).items()}
            row |= {f"opponent {key}" if i else key: value for key, value in log.items()}
        tables.clear()  # their graphs hold memory that the next pass needs
        folder.log(row)
        progress.set_postfix_str(PROGRESS.format_map(row), refresh=False)
        if stop.is_set():
            save(update + 1)
            raise KeyboardInterrupt
    return [np.array(player) for player in before], [agent.player(first) for agent in agents]


def print_policies(before, after):
    """Print the players [state, order, outcome] before and after training."""
    for title, *players in zip(("P(C | own last, their last)", "The opponent's"), before, after):
        print(f"\n{title:30}{'before':>7} {'after':>7}")
        cooperation, illegal = ([by_state(p, outcome) for p in players] for outcome in (C, ILLEGAL))
        for state in STATES:
            print(f"  P(C | {state}){cooperation[0][state]:25.3f} {cooperation[1][state]:7.3f}")
        means = [np.mean(list(p.values())) for p in illegal]
        print(f"  P(illegal), mean{means[0]:19.3f} {means[1]:7.3f}")
        print("In a word: " + " -> ".join(map(envs.describe, players)))


def run(args, saved, path):
    """From the settings (and the saved state, of `parse`) to the finished run folder at `path`."""
    from policy import ModelError

    agents, opponent, own = setup(args, saved)
    folder, state = runs.RunFolder(path, vars(args) | own), saved[0] if saved else {}
    resume = f"python train.py --resume {path}"
    try:
        folder.resume(args.resume, state) if saved else folder.create()
        with runs.stop_signals() as stop:
            before, after = train(args, agents, opponent, folder, state, stop)
        for agent, place in zip(agents, (path, path / "opponent")):
            place.mkdir(exist_ok=True)
            agent.policy.save(place)
            if agent.second:  # to be read by evaluate.py like any other
                runs.write_json(place / "config.json", {**folder.settings, "side": "opponent"})
        result = {"reward": args.reward, "opponent": " ".join(args.opponent), "seed": args.seed}
        for side, untuned, trained in zip(("", "opponent_"), before, after):
            for kind, outcome in (("policy", C), ("illegal", ILLEGAL)):
                result[f"{side}{kind}_before"] = by_state(untuned, outcome)
                result[f"{side}{kind}_after"] = by_state(trained, outcome)
        seconds = folder.finish(result)
    except KeyboardInterrupt:
        if runs.is_first():
            print(f"Stopped; to continue:  {resume}", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        kept = f"; what was saved is kept: {resume}" if (path / runs.STATE).exists() else ""
        raise InputError("--out", f"{error}{kept}") from None
    except ModelError as error:  # of a condition that was drawn later
        raise InputError("--model", error) from None
    except FloatingPointError as error:
        raise InputError("--lr", f"{error}: lower it and start again, with --overwrite") from None
    except (MemoryError, RuntimeError) as error:
        if "memory" not in f"{type(error)}{error}".lower():
            raise
        raise InputError("--batch", f"{error}: lower it, or give --checkpointing") from None
    print_policies(before, after)
    first = envs.first_condition(*choices(args))  # did it learn a word?
    swapped = agents[0].player(first._replace(names=first.names[::-1]))
    print("With the two action names in each other's role: " + envs.describe(swapped))
    more = f" --layout {first.layout} --prompt {first.wording}"
    more = more.replace(" --layout original", "").replace(" --prompt structured", "")
    print(f"Saved in {path} after {seconds} s.  To evaluate it:  python evaluate.py {path}{more}")


def main(argv=None):
    try:
        args, saved = parse(argv)
        with runs.processes(args.device or "", args.out) as path:
            run(args, saved, path)
    except InputError as error:
        runs.stop(error)


if __name__ == "__main__":
    main()
