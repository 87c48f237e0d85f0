"""The base model of finished runs, which plays as the agent of any of them, and what it says.

Evaluator    .player   the policy of a run, or of the untuned model, in any condition
             .answers  its most probable answers, whatever they are
             .drift    what training did to the model beside the game
likely_texts the search behind .answers
"""

import heapq
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from envs import ILLEGAL, ORDERS, STATES, as_player
from lora import adapter, base_fingerprint, load_adapter
from models import ModelError, encode, ending_tokens, load_model
from policy import Policy
from prompts import Condition, build_prompts
from trie import Trie

HERE = Path(__file__).resolve().parent
# Prose that has nothing to do with games, and how much of it is read.
PROSE, PROSE_TOKENS = HERE / "studies" / "prose.txt", 256
UNRELATED = ("choice", "game", "game_state")  # wordings that do not tell the game
RARE = 1e-6  # texts with less probability than that are not looked for
WIDTH = 8  # prefixes that a pass of the search looks behind


class ConditionError(ValueError):
    """What is asked of a model does not suit it: its names, or a prompt that is too long."""

    option = "--actions, --prompt"


class Evaluator:
    """A base model, which plays as the agent of any of the runs that were trained on it.

    config:   of one of the runs
    sampling: constrained or free; by default the run's own
    legal:    which free answers count: those that begin with a name ("prefix"), or those that are
              nothing but a name and white space to the token behind it ("strict")
    runs:     are read at once: what is wrong with one of them is known before the work
    Raises OSError or ValueError, as do its methods; ConditionError where the model cannot be put
    into a Condition.
    """

    def __init__(self, config, sampling=None, legal="prefix", runs=()):
        self.model, self.tokenizer = load_model(config["model"], dtype=config["dtype"])
        base = base_fingerprint(self.model)
        if config.get("base", base) != base:
            raise ValueError(f"{config['model']} has other weights than in training")
        self.free = (sampling or config["sampling"]) == "free"
        self.endings = ending_tokens(self.tokenizer) if legal == "strict" and self.free else ()
        self.run = None  # whose adapter is loaded
        # All runs meet all conditions, and some more than once.
        self.policy = lru_cache(maxsize=None)(self.build_policy)
        self.table = lru_cache(maxsize=None)(self.compute_table)
        for run in runs:
            self.load(run)

    def tokens(self, condition, second=False):
        """Token ids of a Condition: 16 prompts, two answers."""
        try:
            texts = build_prompts(condition, second)
            return encode(self.tokenizer, texts, condition.names)
        except ModelError:
            raise
        except ValueError as error:
            raise ConditionError(str(error)) from error

    def build_policy(self, condition, second=False, free=None):
        """The Policy for the prompts of a Condition."""
        free = self.free if free is None else free
        endings = self.endings if free else ()
        prompts, answers = self.tokens(condition, second)
        try:
            return Policy(self.model, "agent", prompts, answers, free, endings=endings)
        except ValueError as error:
            raise ConditionError(str(error)) from error

    def load(self, run):
        """Take the adapter of a run folder. Raises OSError or ValueError."""
        if run != self.run:
            load_adapter(self.model, "agent", run)
            self.run = run

    def compute_table(self, run, condition, second=False, free=None):
        """Probabilities [prompt, outcome] of a run's agent, or (None) of the untuned model."""
        policy = self.policy(condition, second, free)
        if run is None:
            return policy.probabilities(reference=True)
        self.load(run)
        return policy.probabilities()

    def player(self, run, condition, second=False):
        """The agent of a run (None: the untuned model) as a player [state, order, outcome].

        second: on the other side of the game
        """
        return as_player(self.table(run, condition, second))

    def answers(self, run, condition, count=5):
        """The most probable answers to a Condition's prompts, names in their first order.

        A list of {"text", "mean", "states": {state: probability}}, see `likely_texts`.
        """
        if run is not None:
            self.load(run)
        prompts, names = self.tokens(condition)
        length, stops = max(map(len, names)) + 1, set(self.tokenizer.all_special_ids)
        with adapter(self.model, None if run is None else "agent"):
            found = likely_texts(self.model, prompts[::ORDERS], length, stops, count)
        said = []
        for tokens, probabilities in found:
            states = dict(zip(STATES, probabilities.tolist()))
            text = self.tokenizer.decode(tokens)
            said.append({"text": text, "mean": float(probabilities.mean()), "states": states})
        return said

    @torch.no_grad()
    def drift(self, run, pair):
        """What training did to the model beside the game: dict of floats.

        pair: two action names of training

        kl:         KL(base || tuned) per token of prose, nats
        perplexity: of the tuned model there, over that of the base
        names, names_untuned: probability of answering with one of the pair to UNRELATED prompts,
                    of the tuned model and of the base
        """
        self.load(run)
        prose = self.tokenizer(PROSE.read_text(encoding="utf-8"), return_tensors="pt")
        ids = prose["input_ids"][0, :PROSE_TOKENS].to(self.model.device)
        start = ids[:1] if ids[0] == self.tokenizer.bos_token_id else ids[:0]
        kl, surprise, count = 0.0, 0.0, 0
        for chunk in ids[len(start) :].split(64):
            chunk = torch.cat([start, chunk])
            with adapter(self.model, None):
                base = self.model(chunk[None]).logits[0, :-1].float().log_softmax(-1)
            with adapter(self.model, "agent"):
                tuned = self.model(chunk[None]).logits[0, :-1].float().log_softmax(-1)
            kl += (base.exp() * (base - tuned)).sum().item()
            surprise += (base - tuned).gather(1, chunk[1:, None]).sum().item()
            count += len(chunk) - 1
        answered = []
        for wording in UNRELATED:
            condition = Condition(names=tuple(pair), wording=wording)
            tables = [self.table(which, condition, free=True) for which in (run, None)]
            answered.append([table[:, :ILLEGAL].sum(axis=1).mean() for table in tables])
        tuned, untuned = np.mean(answered, axis=0).tolist()
        return {
            "kl": kl / count,
            "perplexity": math.exp(surprise / count),
            "names": tuned,
            "names_untuned": untuned,
        }


@torch.no_grad()
def likely_texts(model, prompts, length, stops, count):
    """The texts with the highest probability, a mean over the prompts: exact, by best-first search.

    length: tokens of a text, fewer where one of `stops` ends it
    Returns `count` of (tokens, probabilities [prompt]), the most probable first; fewer where no
    others have at least RARE. A text is at most as probable as its first tokens: once as many whole
    texts are known that are more probable than all that has not been looked behind, these are it.
    """
    waiting = [(-1.0, (), np.ones(len(prompts)))]  # a heap: the most probable first tokens on top
    found = []
    while waiting:
        if len(found) >= count and found[count - 1][0] >= -waiting[0][0]:
            break
        prefixes = [heapq.heappop(waiting) for _ in range(min(WIDTH, len(waiting)))]
        behind = next_probabilities(model, prompts, [prefix for _, prefix, _ in prefixes])
        for (_, prefix, so_far), following in zip(prefixes, behind):
            joint = so_far[:, None] * following
            mean = joint.mean(axis=0)
            for token in np.flatnonzero(mean >= RARE).tolist():
                text = (*prefix, token)
                if token in stops or len(text) == length:
                    found.append((mean[token], text, joint[:, token]))
                else:
                    heapq.heappush(waiting, (-mean[token], text, joint[:, token]))
        found.sort(key=lambda entry: (-entry[0], entry[1]))
        del found[count:]
    return [(text, probabilities) for _, text, probabilities in found]


def next_probabilities(model, prompts, prefixes):
    """Of every token after each prompt and prefix: list of float64 [prompt, vocabulary]."""
    # A trie has no node for an answer's last token: any will do.
    trie = Trie(prompts, [(*prefix, 0) for prefix in prefixes])
    logits = model(**trie.inputs(model)).logits.flatten(0, 1)
    behind = []
    for path in trie.paths:
        rows = trie.branches[:, path[-1][0]].to(logits.device)
        behind.append(logits[rows].double().softmax(-1).cpu().numpy())
    return behind
