"""A language model as a table: constrained or free sampling, value head.  [torch; knows no game]

A policy maps P distinct prompts to log-probabilities of K outcomes: a table [prompt, outcome].
Where a task has few distinct prompts, one forward pass gives the whole table; then any number of
samples is drawn by indexing it. There is no sampling loop over tokens (trie.py).

    Policy  model + adapter + value head: `forward` gives a Table, `backward` carries a gradient
            of that table to the weights
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed

from lora import adapter, adapter_parameters
from models import ModelError
from trie import Trie


def log_illegal(log_probs):
    """log(1 - sum of the legal probabilities): [..., A] -> [...].

    Finite, with finite gradients, also where rounding makes the sum 1.
    """
    log_legal = torch.logsumexp(log_probs, dim=-1).clamp(max=-1e-7)
    return torch.log(-torch.expm1(log_legal))


def zero_value_head(model):
    """A float32 Linear(width, 1) on the model's hidden states that gives 0 for all of them."""
    width = model.get_output_embeddings().weight.shape[1]
    layer = torch.nn.Linear(width, 1, device=model.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


class Table(NamedTuple):
    """What a policy says to all of its prompts, float32."""

    log_probs: torch.Tensor  # [P, K], on the CPU, without a graph
    values: torch.Tensor  # [P], the same
    graph: tuple | None  # this process' rows of both as the pass gave them, for Policy.backward


class Shard(NamedTuple):
    """Some of the prompts, as many as one pass takes."""

    rows: list  # of the table
    trie: Trie
    inputs: dict  # of the model


class Policy:
    """A language model with one of its adapters and a value head, on fixed prompts and answers.

    prompts, answers: token ids from `models.encode`
    free:       False: one of the answers is always given, K = A (at each token only what continues
                an answer is allowed, renormalised)
                True: any text may be given, K = A + 1; the last outcome is every other text
    nodes:      several prompts with more tokens than that are cut into several passes
    value_head: by default a new one (`zero_value_head`);  endings: as in Trie

    Of several processes (torch.distributed) each has its own share of the prompts. Whoever uses a
    Policy sees neither that nor how many passes there are.
    """

    def __init__(
        self, model, name, prompts, answers, free=False, nodes=None, value_head=None, endings=()
    ):
        self.model, self.name, self.free = model, name, free
        self.n_prompts, self.n_outcomes = len(prompts), len(answers) + free
        self.value_head = value_head or zero_value_head(model)
        self.shards = []
        for rows in deal(prompts, answers, nodes):
            trie = Trie([prompts[row] for row in rows], answers, endings)
            self.shards.append(Shard(rows, trie, trie.inputs(model)))

    def parameters(self):
        """The trained tensors: the adapter's, the value head's weight [1, width] and bias [1]."""
        return adapter_parameters(self.model, self.name) + list(self.value_head.parameters())

    def forward(self, reference=False, keep_graph=True):
        """The Table of all prompts; `reference`: of the base model, without the adapter.

        keep_graph: `backward` then needs no pass of its own; of several shards none is kept, it
                    would not fit into memory
        """
        keep_graph = keep_graph and len(self.shards) == 1
        both = torch.zeros(self.n_prompts, self.n_outcomes + 1, device=self.model.device)
        for rows, trie, inputs in self.shards:
            with torch.set_grad_enabled(keep_graph):
                log_probs, values = self.forward_shard(trie, inputs, reference)
            both[rows] = torch.cat([log_probs, values[:, None]], dim=1).detach()
        if distributed.is_initialized():
            distributed.all_reduce(both)  # every row is 0 but in the process that has it
        both = both.cpu()
        return Table(both[:, :-1], both[:, -1], (log_probs, values) if keep_graph else None)

    def backward(self, table, gradients):
        """Add a gradient of the table to that of the parameters.

        table:     from `forward`, with the weights as they are
        gradients: of a loss, with respect to table.log_probs [P, K] and table.values [P]
        """
        with adapter(self.model, self.name):  # checkpointed layers run again in here
            for rows, trie, inputs in self.shards:
                outputs = table.graph or self.forward_shard(trie, inputs)
                upstream = [gradient[rows].to(self.model.device) for gradient in gradients]
                torch.autograd.backward(outputs, upstream)
        for parameter in self.parameters():
            if parameter.grad is None:  # of a layer that did not run
                parameter.grad = torch.zeros_like(parameter)
        if distributed.is_initialized():
            shares = [parameter.grad for parameter in self.parameters()]
            vector = torch.nn.utils.parameters_to_vector(shares)
            distributed.all_reduce(vector)
            torch.nn.utils.vector_to_parameters(vector, shares)

    def forward_shard(self, trie, inputs, reference=False):
        """One pass over a shard: (log-probabilities [rows, K], values [rows]), float32."""
        hidden = []
        # The value head needs just what the output head reads: hidden states at the kept nodes.
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        try:
            with adapter(self.model, None if reference else self.name):
                logits = self.model(**inputs).logits
        finally:
            hook.remove()
        branches = trie.branches.to(self.model.device)
        logits = logits.flatten(0, 1)[branches].float()  # [rows, Q, vocabulary]
        hidden = hidden[0].flatten(0, 1)[branches].float()  # [rows, Q, width]
        values = self.value_head(hidden[:, 0])[:, 0]

        # Constrained, the tokens that continue an answer share the mass; free, all tokens do.
        total = []
        for q, children in enumerate(trie.children):
            shared = logits[:, q] if self.free else logits[:, q, children]
            total.append(torch.logsumexp(shared, dim=-1))
        log_probs = []
        for path in trie.paths:
            steps = [torch.logsumexp(logits[:, q, tokens], -1) - total[q] for q, tokens in path]
            log_probs.append(sum(steps))
        log_probs = torch.stack(log_probs, dim=-1)
        if self.free:
            log_probs = torch.cat([log_probs, log_illegal(log_probs)[:, None]], dim=-1)
        return log_probs, values

    @cached_property
    def reference(self):
        """Log-probabilities of the base model, float64 numpy [P, K].

        Raises ModelError where they are not finite.
        """
        log_probs = self.forward(reference=True, keep_graph=False).log_probs.double().numpy()
        if not np.isfinite(log_probs).all():
            reason = "its weights are damaged, or try --dtype float32"
            raise ModelError(f"the model's own probabilities are not finite: {reason}")
        return log_probs

    def probabilities(self, reference=False):
        """Float64 numpy [P, K]; `reference`: of the base model, without the adapter."""
        return self.forward(reference, keep_graph=False).log_probs.double().exp().numpy()


def deal(prompts, answers, nodes):
    """This process' prompts, cut up so that no trie has more than `nodes` tokens: lists of rows.

    Raises ValueError where there are more processes than prompts.
    """
    ranks, rank = 1, 0
    if distributed.is_initialized():
        ranks, rank = distributed.get_world_size(), distributed.get_rank()
    if ranks > len(prompts):
        raise ValueError(f"{ranks} processes are more than the {len(prompts)} prompts to share")
    order = sorted(range(len(prompts)), key=prompts.__getitem__)  # neighbours have most in common
    shards = [[]]
    for row in np.array_split(order, ranks)[rank].tolist():
        longer = [prompts[r] for r in [*shards[-1], row]]
        if shards[-1] and nodes and Trie(longer, answers).tokens.numel() > nodes:
            shards.append([])
        shards[-1].append(row)
    return [sorted(rows) for rows in shards]
