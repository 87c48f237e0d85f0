"""Prompts and answers as a token trie: a model reads each distinct beginning once.  [knows no game]

A causal model that is given positions and an attention mask returns at each node of the trie what
it would return at the end of the plain text. So one forward pass over one packed sequence replaces
a pass per prompt and answer, without padding.
"""

import math

import numpy as np
import torch
from torch import distributed

from errors import InputError


class Trie:
    """P prompts, each followed by A answers, packed so that every distinct prefix is one node.

    The prompts [1 2 3] and [1 2 4] with the answers [5 6] and [5 7] are six nodes. The last token
    of an answer needs none: nothing is asked after it.

        token   1 ── 2 ─┬─ 3 ── 5           node        0  1  2  3  4  5
                        └─ 4 ── 5           tokens      1  2  3  5  4  5
                                            depth       0  1  2  3  2  3
        node    0 ── 1 ─┬─ 2 ── 3           keep              2  3  4  5
                        └─ 4 ── 5           branches    [[0 1] [2 3]], indices into keep
                                            ancestors   node 5 sees 0, 1, 4 and itself

    A causal model run on it with these positions and this mask gives at each node what it gives at
    the end of the plain text. Prompts that have less than half of their tokens in common are packed
    into sequences of their own, R in all: what they could share is not worth a wider mask.

    The axes are R sequences of N nodes; M of the nodes need the output head, in any sequence.

    rows       the numbers of the prompts that are packed: of several processes each has its share
    prefixes   the Q beginnings of answers; the first one is empty: the bare prompt
    paths      per answer, a list of (q, token): after prefix q comes this token
    children   per answer prefix q, the tokens that may follow
    tokens     int64 [R, N]     token of each node; shorter sequences are padded at their end
    depth      int64 [R, N]     its position in its text
    ancestors  bool [R, N, N]   node i sees node j: j is a prefix of i, or i itself
    keep       int64 [M]        the nodes at which any sequence needs the output head
    branches   int64 [len(rows), Q]  index into [R, M], flattened: the node of prompt and prefix q
    """

    def __init__(self, prompts, answers):
        self.prompts = prompts
        self.answers = answers
        self.rows = share_of_process(prompts)
        self.read_answers()
        sequences, ends = self.pack()
        self.make_tensors(sequences, ends)

    def read_answers(self):
        """Set prefixes, paths and children."""
        self.prefixes = []
        self.paths = []
        children = []
        for answer in self.answers:
            path = []
            for n, token in enumerate(answer):
                prefix = answer[:n]
                if prefix not in self.prefixes:
                    self.prefixes.append(prefix)
                    children.append(set())
                q = self.prefixes.index(prefix)
                path.append((q, token))
                children[q].add(token)
            self.paths.append(path)
        self.children = [sorted(tokens) for tokens in children]

    def pack(self):
        """Lay out the nodes: (sequences, ends).

        sequences: a dict each, prefix -> (node, its parent). Its order is the order of the nodes,
                   so a parent stands before its children
        ends:      (row, q) -> (sequence, node): where prompt and answer prefix q end
        """
        sequences = []
        ends = {}
        previous = []
        in_order = sorted(self.rows, key=self.prompts.__getitem__)
        for row in in_order:  # neighbours have most in common
            prompt = self.prompts[row]
            half = (len(prompt) + 1) // 2
            if previous[:half] != prompt[:half]:
                sequences.append({})
            previous = prompt
            for q, prefix in enumerate(self.prefixes):
                node = add_text(sequences[-1], (*prompt, *prefix))
                ends[row, q] = (len(sequences) - 1, node)
        return sequences, ends

    def make_tensors(self, sequences, ends):
        """Set tokens, depth, ancestors, keep and branches."""
        size = max(len(nodes) for nodes in sequences)
        # A token of the prompts pads. The embedding of a padding token may be all zeros, and a
        # norm has no finite gradient there.
        self.tokens = torch.full((len(sequences), size), self.prompts[0][0])
        self.depth = torch.zeros(len(sequences), size, dtype=torch.long)
        self.ancestors = torch.eye(size, dtype=torch.bool).repeat(len(sequences), 1, 1)
        for r, nodes in enumerate(sequences):
            for text, (node, parent) in nodes.items():
                self.tokens[r, node] = text[-1]
                self.depth[r, node] = len(text) - 1
                if parent is not None:
                    self.ancestors[r, node] |= self.ancestors[r, parent]
        keep = sorted({node for _, node in ends.values()})
        self.keep = torch.tensor(keep)
        self.branches = torch.zeros(len(self.rows), len(self.prefixes), dtype=torch.long)
        for (row, q), (r, node) in ends.items():
            self.branches[self.rows.index(row), q] = r * len(keep) + keep.index(node)

    def inputs(self, model):
        """What the model is called with, a dict. Raises InputError if it cannot take this trie."""
        config = model.config.get_text_config()
        longest = int(self.depth.max()) + 1
        limit = getattr(config, "max_position_embeddings", math.inf)
        if longest > limit:
            raise InputError(f"the model takes {limit} tokens, the prompt has {longest}")
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if self.tokens.max() >= vocabulary:
            raise InputError(f"the model knows {vocabulary} tokens: the tokenizer is another's")
        masks = {}
        for kind in attention_kinds(config):
            masks[kind] = additive(self.visible(kind, config), model)
        return {
            "input_ids": self.tokens.to(model.device),
            "position_ids": self.depth.to(model.device),
            # A model with both kinds of layers takes a mask of each by its name, any other the one.
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            "logits_to_keep": self.keep.to(model.device),
            "use_cache": False,
        }

    def visible(self, kind, config):
        """Which nodes a layer of this kind sees: bool [R, N, N]."""
        if kind == "full_attention":
            return self.ancestors
        distance = self.depth[:, :, None] - self.depth[:, None, :]
        return self.ancestors & (distance < config.sliding_window)


def add_text(nodes, text):
    """Add the nodes of a text to a sequence's dict, prefix -> (node, parent); returns the last."""
    node = None
    for end in range(1, len(text) + 1):
        prefix = text[:end]
        if prefix not in nodes:
            nodes[prefix] = (len(nodes), node)
        node, _ = nodes[prefix]
    return node


def attention_kinds(config):
    """The kinds of attention layers, a set. Raises InputError if there are any others."""
    default = ["full_attention"]
    if getattr(config, "sliding_window", None):
        default = ["sliding_attention"]
    kinds = set(getattr(config, "layer_types", None) or default)
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown:
        rule = "not plain or sliding-window attention"
        raise InputError(f"the model has layers of {unknown[0]}, {rule}")
    return kinds


def additive(visible, model):
    """A mask that is added to attention scores, [R, 1, N, N]: 0, or the least number there is."""
    least = torch.finfo(model.dtype).min
    mask = torch.full(visible.shape, least, dtype=model.dtype)
    return mask.masked_fill(visible, 0)[:, None].to(model.device)


def share_of_process(prompts):
    """The rows of the prompts that this process packs: all where it is the only one."""
    if not distributed.is_initialized():
        return list(range(len(prompts)))
    if distributed.get_world_size() > len(prompts):
        reason = f"there are more processes than the {len(prompts)} prompts to share"
        raise InputError(reason, "torchrun")
    order = sorted(range(len(prompts)), key=prompts.__getitem__)  # neighbours have most in common
    share = np.array_split(order, distributed.get_world_size())[distributed.get_rank()]
    return sorted(share.tolist())
