"""Who plays: the model with adapters of its own, on either side of the game.

Agent   an adapter and a value head; its Policy on the prompts of any condition
setup   train.py's settings -> the agents that learn, and whom they meet
"""

import sys
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch

from envs import as_player, memory_one
from lora import adapter, add_adapter, load_adapter
from models import ModelError, check_device, checkpoint_layers, encode, load_model
from options import choices, opponent_strategy
from policy import Policy, zero_value_head
from ppo import Learner
from program import user_error
from prompts import build_prompts, first_condition
from runs import config_on, load_value_head

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
        with user_error("--actions"), user_error("--model", ModelError):
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
    if args.opponent == ["learner"]:
        adapt(model, "opponent", args)
        agents.append(Agent(model, tokenizer, "opponent", free, args.nodes, second=True))
    else:
        with user_error("--opponent", ValueError, OSError):
            opponent = opponent_of(args, model, tokenizer)
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


def opponent_of(args, model, tokenizer):
    """Whom the agent meets, a function: Condition -> probabilities [state, order, outcome].

    Raises OSError or ValueError.
    """
    strategy = opponent_strategy(args.opponent)
    if strategy is not None:
        player = memory_one(strategy)
        return lambda condition: player
    run = Path(args.opponent[0])
    free = config_on(args.model, run)["sampling"] == "free"
    frozen = Agent(model, tokenizer, "opponent", free, args.nodes, second=True)
    load_adapter(model, "opponent", run)
    return lru_cache(maxsize=64)(frozen.probabilities)


def adapt(model, name, args):
    """Put a new adapter on the layers of --targets, or on all."""
    with user_error("--targets" if args.targets else "--model"):
        add_adapter(model, name, args.rank, args.alpha, args.targets)


def start_from(run, agent, args):
    """Give an agent the adapter and value head of a run folder. Raises OSError or ValueError."""
    config = config_on(args.model, run)
    own = {key: config[key] for key in ("rank", "alpha", "targets")}
    if own != {key: getattr(args, key) for key in own}:
        targets = f" --targets {' '.join(own['targets'])}" if own["targets"] else ""
        raise ValueError(
            f"its adapter has --rank {own['rank']} --alpha {own['alpha']}{targets}: give just these"
        )
    load_adapter(agent.model, agent.name, run)
    load_value_head(agent.value_head, run)


def check_prompts(agent, args):
    """Refuse names, wordings and layouts with which training would fail later."""
    _, names, layouts, wordings = choices(args)
    own = first_condition(*choices(args))
    texts = build_prompts(own)
    with user_error("--actions"), user_error("--model", ModelError):
        encode(agent.tokenizer, texts, names)  # all names at once: any two of them differ
        prompts, answers = encode(agent.tokenizer, texts, own.names)
    hint = "its kind of attention may be one that the token trie cannot run"
    for layout, wording in product(layouts, wordings):
        policy = agent.policy(own._replace(layout=layout, wording=wording))
        with user_error("--model"), user_error("--model", RuntimeError, hint=hint):
            policy.reference  # noqa: B018 - a forward pass
    with user_error("--model"):
        check_causal(agent.policy(own), prompts, answers)
    warn_of_unheard(names, np.exp(agent.policy(own).reference).mean(axis=0))


@torch.no_grad()
def check_causal(policy, prompts, answers):
    """Compare one row of the untuned model with plain passes over that prompt and each answer.

    prompts, answers: token ids
    Raises ValueError where they differ: the model is no causal decoder, or takes its positions from
    something else than what it is given.
    """
    # The last one in the trie: what it shares with the others stands far from the rest of it.
    row = max(range(len(prompts)), key=prompts.__getitem__)
    prompt, trie, difference = prompts[row], policy.shards[0].trie, 0.0
    for column, (answer, path) in enumerate(zip(answers, trie.paths)):
        ids = torch.tensor([[*prompt, *answer[:-1]]], device=policy.model.device)
        with adapter(policy.model, None):
            logits = policy.model(input_ids=ids, use_cache=False).logits[0].float()
        expected = 0.0
        for scores, (q, [token]) in zip(logits[len(prompt) - 1 :], path):
            shared = scores if policy.free else scores[trie.children[q]]
            expected += (scores[token] - torch.logsumexp(shared, dim=-1)).item()
        difference = max(difference, abs(policy.reference[row, column] - expected))
    if difference > (0.01 if policy.model.dtype == torch.float32 else 0.5):
        raise ValueError(
            f"the model's answers differ by {difference:.2g} nats from those to the plain text: it "
            "must be a causal decoder that takes the positions and the mask that it is given"
        )


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
