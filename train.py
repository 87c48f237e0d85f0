"""Fine-tune a language model with PPO on an intrinsic moral reward while it plays a game in text.

    python train.py --reward utilitarian                         # the embedded model, a laptop
    python train.py --reward deontological --opponent 1 0.3 1 0.3       # P(C | CC CD DC DD)
    python train.py --reward utilitarian --opponent learner      # two that learn from each other
    python train.py --reward game --then utilitarian             # unlearn selfishness half-way
    python train.py --reward utilitarian --model google/gemma-2-2b-it   # any causal language model
    torchrun --nproc-per-node 4 train.py --reward utilitarian --model ...   # prompts dealt out
    python train.py --resume runs/utilitarian-vs-tit-for-tat-seed1      # continue a stopped run

Writes a run folder: config.json, metrics.csv (a row per update), result.json (the policy before and
after), value_head.safetensors, and the adapter in PEFT's layout; with a learning opponent also
opponent/, the same for its side. While it runs, state.safetensors is all that --resume needs.
Method: Tennant, Hailes & Musolesi, Moral Alignment for LLM Agents (ICLR 2025).
"""

import sys

import numpy as np

from envs import (
    C,
    action_counts,
    as_player,
    by_state,
    opening,
    other_side,
    payoff_matrix,
    play,
    replies,
)
from options import choices, opponent_strategy, parse_train, run_settings
from program import is_first, processes, stop_signals, user_error
from prompts import draw_condition, first_condition
from report import describe, print_policies
from rewards import moral_accuracy, moral_regrets, reward_array
from runs import RunFolder

PROGRESS = "reward {reward:+.2f}  accuracy {accuracy:.2f}  KL {kl:.3f}  skipped {skipped}"

# torch, transformers and what needs them are imported where they are used: --help and a bad option
# answer at once.


def train(args, agents, opponent, folder, state, stop):
    """The training loop: one row of metrics.csv per update.

    agents:   those that learn: the player, then its opponent if that learns, too
    opponent: None where it learns; else a function: Condition -> its probabilities [state, order,
              outcome]
    folder:   the runs.RunFolder;  state: what its `load_state` returns, {} for a new run
    stop:     an Event: save the state and raise KeyboardInterrupt
    Returns the agents' probabilities [state, order, outcome] before and after, in the first
    condition of training.
    Raises FloatingPointError where training cannot go on; the last saved state is good.
    """
    from tqdm import tqdm

    from ppo import act

    first = first_condition(*choices(args))

    def players_now():
        acted = [act(agent.policy(first), keep_graph=False) for agent in agents]
        return [as_player(agent_acted.probabilities) for agent_acted in acted]

    def save(updates):
        # What is saved is good: not while numbers that are not finite make updates be skipped.
        if not any(agent.learner.skipped_in_a_row for agent in agents):
            folder.save_state(before, rng, updates)

    rng = np.random.default_rng(args.seed)
    rng.bit_generator.state = state.get("rng", rng.bit_generator.state)
    strategy = opponent_strategy(args.opponent)
    opponent_opening = opening(strategy) if strategy else 0.5
    before = [np.array(player) for player in state.get("before") or players_now()]
    starts = range(0, args.episodes, args.batch)
    done = state.get("updates", 0)
    quiet = None if is_first() else True  # None: only where stderr is a terminal
    progress = tqdm(starts[done:], initial=done, total=len(starts), unit="update", disable=quiet)
    for update, start in enumerate(progress, done):
        if update % args.save_every == 0:
            save(update)
        episodes = min(args.batch, args.episodes - start)
        reward = phase_reward(args, start)

        # Draw what is played in this update: the game, the action names, their layout and wording.
        condition = draw_condition(rng, *choices(args))
        payoffs = payoff_matrix(condition.game)
        views = payoffs, other_side(payoffs)  # each player's own points first

        # Act: one forward pass gives an agent's answers to all prompts. Of the second agent no
        # graph is kept: it would double the memory.
        acted = []
        for agent in agents:
            acted.append(act(agent.policy(condition), keep_graph=agent is agents[0]))
        players = [as_player(agent_acted.probabilities) for agent_acted in acted]
        if opponent:
            players.append(opponent(condition))

        # How good are they by now? Exact, from the probabilities, not from what is played.
        accuracies = []
        for i in range(len(agents)):
            settings = args.xi, replies(players[1 - i]), args.moral_weight
            accuracies.append(moral_accuracy(reward, players[i], views[i], *settings))
        last_phase_began = max(args.switch, default=0) <= start - args.batch
        if args.until and last_phase_began and min(accuracies) > args.until:
            progress.close()
            print(f"Learned after {update} of {len(starts)} updates.")
            break

        # Play all episodes at once by indexing these probabilities.
        seen = play(rng, *players, episodes, args.rounds, opponent_opening)

        row = {"episodes": start + episodes, "phase": reward, "condition": str(condition)}
        shown = []
        for i, agent in enumerate(agents):
            mine, theirs, view = seen[i], seen[1 - i], views[i]

            # Reward: look up what each round was worth, by the moral formula.
            possible = reward_array(reward, view, args.xi, args.illegal, args.moral_weight)
            played = mine.state, mine.action, theirs.move
            points = possible[played]

            # Update: PPO on these rounds, --epochs steps.
            log = {"reward": points.mean(), "accuracy": accuracies[i]}
            log |= agent.learner.update(acted[i], mine.prompt, mine.action, points)
            log |= action_counts(mine) | moral_regrets(*played, view, args.xi, args.illegal)
            log |= {f"P(C|{state})": p for state, p in by_state(players[i], C).items()}
            row |= {f"opponent {key}" if i else key: value for key, value in log.items()}
            shown.append(PROGRESS.format_map(log))

        # Log.
        folder.log(row)
        progress.set_postfix_str("  |  ".join(shown), refresh=False)
        if stop.is_set():
            save(update + 1)
            raise KeyboardInterrupt
    return before, players_now()


def phase_reward(args, episode):
    """The reward of the phase in which an episode is played."""
    phase = sum(episode >= switch for switch in args.switch)
    return [args.reward, *args.then][phase]


def run(args, path):
    """From the command line's settings to the finished run folder at `path`."""
    from agents import setup
    from lora import base_fingerprint
    from models import ModelError

    agents, opponent = setup(args)
    settings = run_settings(args, base_fingerprint(agents[0].model))
    folder = RunFolder(path, settings, [agent.learner for agent in agents])
    resume = f"python train.py --resume {path}"
    with (
        user_error("--out", OSError, hint=folder.hint),
        user_error("--model", ModelError),  # it may fail in what is drawn later
        user_error("--lr", FloatingPointError, hint="lower it and start again, with --overwrite"),
        folder.locked(),
        stop_signals() as stop,
    ):
        if args.resume:
            with user_error("--resume"):
                state = folder.load_state(args.resume)
        else:
            state = folder.create()
        try:
            before, after = train(args, agents, opponent, folder, state, stop)
        except KeyboardInterrupt:
            print(f"Stopped; to continue:  {resume}", file=sys.stderr)
            raise SystemExit(130) from None
        # Did it learn a word? Asked before --merge unwraps the model.
        own = first_condition(*choices(args))
        swapped = agents[0].probabilities(own._replace(names=own.names[::-1]))
        seconds = folder.finish(agents, before, after, args.merge)
    print_policies(before, after)
    print("With the two action names in each other's role: " + describe(swapped))
    game = " ".join(["", "--payoffs", *map(str, args.payoffs)]) if args.payoffs else ""
    print(f"Saved in {path} after {seconds} s.  To evaluate it:  python evaluate.py {path}{game}")


def main(argv=None):
    args = parse_train(__doc__, argv)
    import torch

    memory = "take --checkpointing, --nodes, --dtype bfloat16 or a lower --rank"
    with (
        processes(args.device, args.out) as path,
        user_error("--batch", MemoryError, hint="lower it or --rounds"),
        user_error("--device", torch.OutOfMemoryError, hint=memory),
    ):
        run(args, path)


if __name__ == "__main__":
    main()
