"""Who plays: the model with adapters of its own, on either side of the game.

Agent      an adapter and a value head; its Policy on the prompts of any condition
setup      train.py's settings -> the agents that learn, and whom they meet
Evaluator  the base model of finished runs, which plays as the agent of any of them
"""

import math
import sys
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch

from envs import ILLEGAL, as_player, memory_one
from lora import adapter, add_adapter, load_adapter
from models import check_device, checkpoint_layers, encode, load_model
from options import choices, opponent_strategy
from policy import Policy, zero_value_head
from ppo import Learner
from prompts import Condition, build_prompts, first_condition
from runs import config_on, load_value_head, user_error

# Prose that has nothing to do with games, and how much of it is read.
PROSE, PROSE_TOKENS = Path(__file__).resolve().parent / "studies" / "prose.txt", 1024
UNRELATED = ("choice", "game", "game_state")  # wordings that do not tell the game
UNHEARD = 1e-3  # an action with less probability than that is too rare to be learned from


class Agent:
    """The model with an adapter and a value head of its own, whatever the prompts are.

    name:   of the adapter;  free: its sampling;  nodes: as in Policy
    second: it plays the other side of the game
    """

    def __init__(self, model, tokenizer, name, free, nodes=None, second=False):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.free, self.nodes, self.second = free, nodes, second
        self.value_head = zero_value_head(model)
        self.learner = None  # of an agent that stays as it is
        # A condition that comes again has its tries and its reference table at hand.
        self.policy = lru_cache(maxsize=64)(self.build_policy)

    def build_policy(self, condition):
        """The agent's Policy on the prompts of a Condition."""
        with user_error("--actions"):
            texts = build_prompts(condition, self.second)
            prompts, answers = encode(self.tokenizer, texts, condition.names)
        with user_error("--model"):
            settings = self.free, self.nodes, self.value_head
            return Policy(self.model, self.name, prompts, answers, *settings)

    def probabilities(self, condition):
        """What it plays in a Condition: [state, order, outcome]."""
        return as_player(self.policy(condition).probabilities())


def setup(args):
    """Load the model and put everyone in place.

    What can be wrong with the input goes wrong here, before anything is written.
    Returns (agents, opponent) as in `train.train`.
    """
    torch.manual_seed(args.seed)
    with user_error("--device"):
        check_device(args.device)
    with user_error("--model"):
        model, tokenizer = load_model(args.model, args.device, args.dtype)
        adapt(model, "player", args)
        if args.checkpointing:
            checkpoint_layers(model)
    free = args.sampling == "free"
    agents = [Agent(model, tokenizer, "player", free, args.nodes)]
    if args.init and not args.resume:  # a saved state has all of it
        with user_error("--init", ValueError, OSError):
            start_from(args.init, agents[0], args)

    opponent = None
    strategy = opponent_strategy(args.opponent)
    if args.opponent == ["learner"]:
        adapt(model, "opponent", args)
        agents.append(Agent(model, tokenizer, "opponent", free, args.nodes, second=True))
    elif strategy is not None:
        fixed = memory_one(strategy)

        def opponent(condition):
            return fixed

    else:
        with user_error("--opponent", ValueError, OSError):
            run = Path(args.opponent[0])
            its_free = config_on(args.model, run)["sampling"] == "free"
            frozen = Agent(model, tokenizer, "opponent", its_free, args.nodes, second=True)
            load_adapter(model, "opponent", run)
        opponent = lru_cache(maxsize=64)(frozen.probabilities)

    check_prompts(agents[0], args)
    own = first_condition(*choices(args))
    for agent in agents:
        agent.learner = Learner(
            agent.policy(own).parameters(),  # those of all its policies
            lr=args.lr,
            epochs=args.epochs,
            clip=args.clip,
            kl_coef=args.kl_coef,
            kl_target=None if args.kl_fixed else args.kl_target,
            vf_coef=args.vf_coef,
            gamma=args.gamma,
        )
    return agents, opponent


def adapt(model, name, args):
    """Put a new adapter on the layers of --targets, or on all."""
    with user_error("--targets" if args.targets else "--model"):
        add_adapter(model, name, args.rank, args.alpha, args.targets)


def start_from(run, agent, args):
    """Give an agent the adapter and value head of a run folder. Raises OSError or ValueError."""
    config = config_on(args.model, run)
    if (config["rank"], config["alpha"]) != (args.rank, args.alpha):
        raise ValueError(
            f"its adapter has --rank {config['rank']} --alpha {config['alpha']}: give these"
        )
    load_adapter(agent.model, agent.name, run)
    load_value_head(agent.value_head, run)


def check_prompts(agent, args):
    """Refuse names, wordings and layouts with which training would fail later."""
    _, names, layouts, wordings = choices(args)
    own = first_condition(*choices(args))
    with user_error("--actions"):  # all names at once: any two of them differ
        encode(agent.tokenizer, build_prompts(own), names)
    hint = "its kind of attention may be one that the token trie cannot run"
    for layout, wording in product(layouts, wordings):
        policy = agent.policy(own._replace(layout=layout, wording=wording))
        with user_error("--model", ValueError, RuntimeError, hint=hint):
            policy.reference  # noqa: B018 - a forward pass
    warn_of_unheard(names, np.exp(agent.policy(own).reference).mean(axis=0))


def warn_of_unheard(names, probabilities):
    """Say so where nothing can be learned: an action that the untuned model hardly ever takes.

    probabilities: of the first two names, a mean over the prompts
    """
    for name, p in zip(names, probabilities):
        if p < UNHEARD:
            print(
                f"warning: --actions: the untuned model answers {name!r} with probability {p:.1e}: "
                "what is hardly ever tried is hardly ever rewarded; choose another name, or a "
                "larger --batch",
                file=sys.stderr,
            )


class Evaluator:
    """The base model of some runs, which plays as the agent of any of them, or untuned.

    config: of one of the runs;  sampling: by default its own;  names: of the command line
    """

    def __init__(self, config, sampling=None, names=None):
        self.model, self.tokenizer = load_model(config["model"], dtype=config["dtype"])
        self.free = (sampling or config["sampling"]) == "free"
        self.names = names
        self.run = None  # whose adapter is loaded
        self.policy = lru_cache(maxsize=None)(self.build_policy)  # all runs meet all conditions

    def build_policy(self, condition, second, free):
        own = self.names is None or list(condition.names) == self.names
        with user_error("--actions" if own else "--axes"):
            texts = build_prompts(condition, second)
            prompts, answers = encode(self.tokenizer, texts, condition.names)
        return Policy(self.model, "agent", prompts, answers, free)

    def load(self, run):
        """Take the adapter of a run folder. Raises OSError or ValueError."""
        if run != self.run:
            load_adapter(self.model, "agent", run)
            self.run = run

    @torch.no_grad()
    def drift(self, run):
        """What training did to the model beside the game: dict of floats.

        kl:         KL(base || tuned) per token of prose, nats
        perplexity: of the tuned model there, over that of the base
        names, names_untuned: probability of answering with an action name to UNRELATED prompts,
                    of the tuned model and of the base
        """
        self.load(run)
        ids = self.tokenizer(PROSE.read_text(), return_tensors="pt")["input_ids"][0]
        kl, surprise, count = 0.0, 0.0, 0
        for chunk in ids[:PROSE_TOKENS].to(self.model.device).split(64):
            with adapter(self.model, None):
                base = self.model(chunk[None]).logits[0, :-1].float().log_softmax(-1)
            with adapter(self.model, "agent"):
                tuned = self.model(chunk[None]).logits[0, :-1].float().log_softmax(-1)
            kl += (base.exp() * (base - tuned)).sum().item()
            surprise += (base - tuned).gather(1, chunk[1:, None]).sum().item()
            count += len(chunk) - 1
        answered = []
        for wording in UNRELATED:
            policy = self.policy(Condition(wording=wording), False, True)
            legal = [policy.probabilities(reference)[:, :ILLEGAL] for reference in (False, True)]
            answered.append([p.sum(axis=1).mean() for p in legal])
        names, names_untuned = np.mean(answered, axis=0).tolist()
        return {
            "kl": kl / count,
            "perplexity": math.exp(surprise / count),
            "names": names,
            "names_untuned": names_untuned,
        }

    def player(self, run, condition, second=False):
        """The agent of a run folder (None: the untuned model) as a player [state, order, outcome].

        second: on the other side of the game
        """
        if run is not None:
            self.load(run)
        policy = self.policy(condition, second, self.free)
        return as_player(policy.probabilities(reference=run is None))
