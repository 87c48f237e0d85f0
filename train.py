"""Fine-tune a language model with PPO on an intrinsic moral reward while it plays a game in text.

    python train.py --reward utilitarian                         # the embedded model, a laptop
    python train.py --reward utilitarian --recipe moral          # one that carries over: 20 minutes
    python train.py --reward deontological --opponent 1 0.3 1 0.3       # P(C | CC CD DC DD)
    python train.py --reward utilitarian --opponent learner      # two that learn from each other
    python train.py --reward game utilitarian                    # unlearn selfishness half-way
    python train.py --reward utilitarian --model google/gemma-2-2b-it --out gemma   # any causal LM
    torchrun --nproc-per-node 4 train.py --reward utilitarian --model ...   # prompts dealt out
    python train.py --resume runs/utilitarian-vs-tit-for-tat-seed1      # continue a stopped run

Writes a run folder, see runs.py. Method: Tennant et al., Moral Alignment for LLM Agents, ICLR 2025.
"""

import math
import shlex
import sys
from bisect import bisect_right
from itertools import product

import numpy as np
from tqdm import tqdm

import envs
import rewards
import runs
from envs import ILLEGAL, STATES, C, D, as_player, by_state
from errors import InputError, about, stop
from options import parse, parse_opponent, phases, read_choices

# torch and what needs it are imported in functions: --help and a bad option answer at once.

PROGRESS = "reward {reward:+.2f}  right {right:.2f}  KL {kl:.3f}"


class Agent:
    """A language model on one side of the game.

    policy:  policy.Policy
    side:    0: the player; 1: its opponent
    learner: ppo.Learner; None: it does not learn, so what it plays is computed once a Condition
    """

    opening = 0.5  # as an opponent: P(C) of its move before round 0

    def __init__(self, policy, side, learner=None):
        self.policy = policy
        self.side = side
        self.learner = learner
        self.known = {}  # Condition -> what it plays, if it does not learn

    def trie(self, condition):
        """The packed prompts of a Condition, as this side reads them. Raises InputError."""
        with about("--actions, --prompt"):
            return self.policy.trie(envs.build_prompts(condition, self.side), condition.actions)

    def player(self, condition):
        """What it plays in a Condition: [state, order, outcome]."""
        if condition in self.known:
            return self.known[condition]
        player = as_player(self.policy.probabilities(self.trie(condition)))
        if self.learner is None:
            self.known[condition] = player
        return player


def setup(args, saved=None):
    """Load the model and put everyone in place.

    saved: (state, arrays) of an interrupted run
    What can be wrong with the input is found here, before anything is written: InputError.
    Returns (agents: those that learn, the player first;
             opponent: whom the player meets, an object with `player(condition)` and `opening`; it
             is one of the agents if it learns;
             fixed: what config.json holds of the model, PPO's constants and the versions)
    """
    import torch
    import transformers

    from lora import base_fingerprint
    from policy import load_model
    from ppo import constants

    torch.manual_seed(args.seed)
    args.device, args.dtype = runs.choose_device(args.device, args.dtype)
    with about("--model"):
        model, tokenizer = load_model(args.model, args.device, args.dtype, args.checkpointing)
    identity = {"model": args.model, "dtype": args.dtype, "base": base_fingerprint(model)}

    agents = [new_agent(args, model, tokenizer, "player", side=0)]
    check_prompts(args, agents[0])
    if args.init and not args.resume:  # a saved state has all of it
        with about("--init"):
            same = {**identity, "rank": args.rank, "alpha": args.alpha}
            runs.require_same([same, runs.read_config(args.init)], *same)
            agents[0].policy.load(args.init, value_head=True)
    with about("--opponent"):
        opponent = parse_opponent(args.opponent)
    if opponent.learns:
        opponent = new_agent(args, model, tokenizer, "opponent", side=1)
        agents.append(opponent)
    elif opponent.run:
        opponent = load_opponent(opponent.run, identity, model, tokenizer)
    for agent in agents:
        agent.learner = new_learner(args, agent.policy)
    fixed = {**identity, **constants()}
    if saved:
        state, arrays = saved
        with about("--resume"):
            runs.require_same([{**fixed, **state["settings"]}, fixed], *fixed)
            for agent in agents:
                agent.learner.load_state(arrays, state["learners"])
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    return agents, opponent, {**fixed, "versions": versions}


def check_prompts(args, agent):
    """Raise InputError unless the agent can read the first game in all layouts and wordings.

    All names can be told apart, too.
    """
    from policy import check_causal, check_runs, encode

    choices = read_choices(args)
    first = choices.first()
    with about("--actions, --prompt"):  # any two of them differ
        encode(agent.policy.tokenizer, envs.build_prompts(first), choices.actions)
    with about("--model"):
        check_runs(agent.policy.model, agent.trie(first))
    for layout, wording in product(choices.layout, choices.prompt):
        trie = agent.trie(first._replace(layout=layout, prompt=wording))
        with about("--model"):
            check_causal(agent.policy, trie)
            agent.policy.reference(trie)  # raises if it is not finite


def new_agent(args, model, tokenizer, name, side):
    """An Agent with a new adapter of this name. Raises InputError."""
    from lora import add_adapter
    from policy import Policy

    with about("--model"):
        add_adapter(model, name, args.rank, args.alpha)
    return Agent(Policy(model, tokenizer, name, free=args.sampling == "free"), side)


def new_learner(args, policy):
    """The PPO of an agent whose adapter is in place: a loaded one has parameters of its own."""
    from ppo import Learner

    return Learner(
        policy,
        lr=args.lr,
        epochs=args.epochs,
        kl_coef=args.kl_coef,
        kl_target=args.kl_target,
        gamma=args.gamma,
    )


def load_opponent(run, identity, model, tokenizer):
    """The agent of another run of the same base model. Raises InputError.

    identity: the base model's own settings of config.json
    """
    from policy import Policy

    with about("--opponent"):
        config = runs.read_config(run)
        runs.require_same([identity, config], *identity)
        policy = Policy(model, tokenizer, "opponent", free=config["sampling"] == "free")
        policy.load(run)
    return Agent(policy, side=1)


def judge(reward, agents, players, game, settings):
    """How often each agent does what the reward asks for; NaN where no action is better.

    players: both sides, [state, order, outcome] each
    """
    right = []
    for agent in agents:
        player = players[agent.side]
        payoffs = envs.payoff_matrix(game, agent.side)
        replies = envs.replies(players[1 - agent.side])
        right.append(rewards.share_right(reward, player, payoffs, settings, replies))
    return right


def train(args, agents, opponent, folder, state):
    """The training loop: one row of metrics.csv per update.

    agents, opponent: as `setup` returns them
    folder:           the RunFolder;  state: what it saved, {} of a new run
    Returns what the agents play before and after, in the first Condition of training.
    Raises InputError where training cannot go on; the last saved state is good.
    """
    rng = np.random.default_rng(args.seed)
    if "rng" in state:
        rng.bit_generator.state = state["rng"]
    choices = read_choices(args)
    before = state.get("before") or [agent.player(choices.first()).tolist() for agent in agents]
    starts, total = phases(args)
    progress = progress_bar(state.get("updates", 0), total)
    for update in progress:
        phase = bisect_right(starts, update) - 1
        reward = args.reward[phase]
        episodes = min(args.batch, args.episodes - update * args.batch)
        anneal(args, agents, choices, update, total)

        # Draw what is played in this update: the game, the action names, their layout and wording.
        condition = choices.draw(rng)

        # Act: one forward pass gives an agent's answers to all prompts.
        tries, tables = act(agents, condition)
        players = [as_player(np.exp(table[0].detach().double().numpy())) for table in tables]
        if opponent not in agents:
            players.append(opponent.player(condition))

        # How good are they by now? Exact, from the probabilities, not from what is played. Training
        # stops early only in the last phase, after one update of it.
        right = judge(reward, agents, players, condition.game, vars(args))
        known = [share for share in right if not math.isnan(share)]
        if known and min(known) > args.until and update > starts[-1]:
            progress.close()
            print(f"Learned after {update} of {total} updates.")
            break

        # Play all episodes at once by indexing these probabilities.
        opening = opponent.opening
        seen = envs.play(rng, *players, episodes, args.rounds, opponent_opening=opening)

        # Learn: look up what each round was worth, by the moral formula; then PPO on these rounds.
        record = describe_update(update, update * args.batch + episodes, reward, condition)
        for agent in agents:
            log = learn(agent, tries, tables, seen, reward, condition.game, vars(args))
            log["right"] = right[agent.side]
            add_columns(record, log, players[agent.side], agent.side)
        tables.clear()  # their graphs hold memory that the next pass needs
        progress.set_postfix_str(PROGRESS.format_map(record), refresh=False)
        with about("--out"):
            folder.log(record)
            save(args, agents, folder, updates=update + 1, rng=rng, before=before)
    after = [agent.player(choices.first()) for agent in agents]
    return [np.array(player) for player in before], after


def progress_bar(done, total):
    """The numbers of the updates that are left, shown by the first process on a terminal."""
    hidden = None if runs.is_first() else True  # None: hidden only where stderr is no terminal
    return tqdm(range(done, total), "update", total, initial=done, disable=hidden)


def anneal(args, agents, choices, update, total):
    """Set the learning rate and beta for an update."""
    for agent in agents:
        # Where conditions vary the rate decays linearly; else a late noisy step can undo what was
        # learned.
        if choices.varies():
            agent.learner.set_lr(args.lr * (1 - update / total))
        # A penalty that keeps an agent undecided while it learns may fall, so that it ends up sure.
        if args.kl_final is not None:
            change = (args.kl_final - args.kl_coef) * update / total
            agent.learner.kl_coef = args.kl_coef + change


def act(agents, condition):
    """Tries of the agents, and their tables (log-probabilities, values): two lists.

    Only the player's table keeps its graph: two graphs would take twice the memory.
    """
    tries = [agent.trie(condition) for agent in agents]
    tables = [agent.policy(tries[agent.side], graph=agent.side == 0) for agent in agents]
    return tries, tables


def learn(agent, tries, tables, seen, reward, game, settings):
    """One PPO update of an agent on what was played. Returns what is logged of it, a dict.

    tries, tables: as `act` returns them;  seen: both sides' Trajectories
    """
    mine = seen[agent.side]
    theirs = seen[1 - agent.side]
    payoffs = envs.payoff_matrix(game, agent.side)
    worth = rewards.reward_array(reward, payoffs, settings)
    points = worth[mine.state, mine.action, theirs.move]
    log = {"reward": points.mean()}
    trie = tries[agent.side]
    table = tables[agent.side]
    stats = agent.learner.update(trie, table, row=mine.row, action=mine.action, reward=points)
    log.update(stats)
    for kind, count in envs.action_counts(mine).items():
        log[envs.count_column(kind)] = count
    log.update(rewards.moral_regrets(mine, theirs.move, payoffs, settings))
    return log


def describe_update(update, episodes, reward, condition):
    """The first columns of an update's record: dict."""
    return {
        "update": update + 1,
        "episodes": episodes,
        "phase": reward,
        "game": envs.game_name(condition.game),
        "actions": shlex.join(condition.actions),
        "layout": condition.layout,
        "prompt": condition.prompt,
    }


def add_columns(record, log, player, side):
    """Add an agent's log, and its P(C) in each state, to the record of an update."""
    prefix = "opponent_" if side == 1 else ""
    for key, value in log.items():
        record[f"{prefix}{key}"] = value
    for state, p in by_state(player, C).items():
        record[f"{prefix}p_C_after_{state}"] = p


def save(args, agents, folder, updates, rng, before):
    """Save all that --resume needs, in the first process, if --save-every seconds are over."""
    if runs.is_first() and folder.is_due(args.save_every):
        state = {"updates": updates, "rng": rng.bit_generator.state, "before": before}
        folder.save([agent.learner for agent in agents], state)


def print_policies(condition, before, after, right_before, right_after):
    """Print the players [state, order, outcome] before and after training.

    condition: in which they play so
    right_before, right_after: what `judge` returns of them
    """
    names = condition.actions
    game = envs.game_name(condition.game)
    print(f"\nIn {game}, with {names[C]} for C and {names[D]} for D:")
    titles = ("P(C | own last, their last)", "The opponent's")
    for i, (title, first, last) in enumerate(zip(titles, before, after)):
        if i > 0:
            print()
        print(f"{title:30}{'before':>7} {'after':>7}")
        p_before = by_state(first, C)
        p_after = by_state(last, C)
        for state in STATES:
            print(f"  P(C | {state}){p_before[state]:25.3f} {p_after[state]:7.3f}")
        illegal = [np.mean(list(by_state(player, ILLEGAL).values())) for player in (first, last)]
        print(f"  P(illegal), mean{illegal[0]:19.3f} {illegal[1]:7.3f}")
        print(f"Strategy: {envs.describe(first)} -> {envs.describe(last)}")
        if not math.isnan(right_after[i]):  # there is a better action
            shares = f"{right_before[i]:.2f} -> {right_after[i]:.2f}"
            print(f"How often it does what its reward asks for: {shares}")


def write_agents(agents, folder):
    """Write what training made: adapters and value heads, of a learning opponent in opponent/."""
    for agent in agents:
        place = folder.path if agent.side == 0 else folder.path / "opponent"
        with runs.writing(place):
            place.mkdir(exist_ok=True)
            agent.policy.save(place)
        if agent.side == 1:  # evaluate.py reads it like any other run
            runs.write_json(place / "config.json", {**folder.settings, "side": "opponent"})


def summarise(args, before, after):
    """What result.json holds: the settings that tell runs apart, and the policies by state."""
    result = {"reward": args.reward, "opponent": " ".join(args.opponent), "seed": args.seed}
    for side, first, last in zip(("", "opponent_"), before, after):
        result[f"{side}policy_before"] = by_state(first, C)
        result[f"{side}policy_after"] = by_state(last, C)
        result[f"{side}illegal_before"] = by_state(first, ILLEGAL)
        result[f"{side}illegal_after"] = by_state(last, ILLEGAL)
    return result


def run(args, saved=None, path=None):
    """Train with the settings (and the saved state) of `parse`, and write the run folder.

    path: the folder to write to, by default --out
    Returns the agents that have learned, a list: the player, and its opponent if it learned, too.
    """
    import torch

    from lora import coverage

    path = path or args.out
    folder = None
    try:
        agents, opponent, fixed = setup(args, saved)
        print(coverage(agents[0].policy.model), end="")
        folder = runs.RunFolder(path, {**vars(args), **fixed})
        state = {}
        if saved:
            state, _ = saved
            with about("--resume"):
                folder.resume(args.resume, state)
        before, after = train(args, agents, opponent, folder, state)
    except KeyboardInterrupt:
        of_this_run = args.resume or (folder and folder.columns)
        if of_this_run and (path / runs.STATE).exists():
            print(f"Stopped; to continue:  python train.py --resume {path}", file=sys.stderr)
        raise SystemExit(130) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        error.add_note("--checkpointing takes less memory, --dtype nf4 less again")
        raise
    with about("--out"):
        write_agents(agents, folder)
        seconds = folder.finish(summarise(args, before, after))
    first = read_choices(args).first()
    right = []
    for players in (before, after):
        if opponent not in agents:
            players = [*players, opponent.player(first)]
        right.append(judge(args.reward[-1], agents, players, first.game, vars(args)))
    print_policies(first, before, after, *right)
    # Did it learn a word?
    swapped = agents[0].player(first._replace(actions=first.actions[::-1]))
    print("With the two action names in each other's role: " + envs.describe(swapped))
    print(f"Saved in {path} after {seconds} s.  To evaluate it:  python evaluate.py {path}")
    return agents


def main(argv=None):
    try:
        args, saved = parse(argv, __doc__)
        with runs.processes(args.device, args.out) as path:
            run(args, saved, path)
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
