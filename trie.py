"""A trie of tokens: texts that begin alike, packed so that a model reads each beginning once.

    Trie    prompts and answers as sequences of distinct prefixes with an ancestor mask

The 16 prompts of a game are 2,224 tokens of Gemma 3, and 648 nodes.  [torch; knows no game]
"""

import math

import torch


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
    the end of the plain text.

    Prompts that have less than half of their tokens in common are packed into sequences of their
    own, R in all: what they could share is not worth a mask of twice the width.

    tokens     int64 [R, N]     token of each node; shorter sequences are padded at their end
    depth      int64 [R, N]     its position in its own text
    ancestors  bool [R, N, N]   row sees column: the column is the row's prefix, or itself
    keep       int64 [M]        the positions at which the output head is needed
    branches   int64 [P, Q]     index into [R, M], flattened: prompt p, answer prefix q; the first
                                prefix is empty: the bare prompt
    paths      per answer, a list of (q, tokens): after prefix q comes one of these tokens
    children   per answer prefix q, the tokens that may follow
    endings    where given, each answer must be followed by one of these tokens
    """

    def __init__(self, prompts, answers, endings=()):
        prefixes, self.paths, self.children = [], [], []
        for answer in answers:
            self.paths.append([])
            steps = [[token] for token in answer] + ([list(endings)] if endings else [])
            for n, tokens in enumerate(steps):
                if answer[:n] not in prefixes:
                    prefixes.append(answer[:n])
                    self.children.append(set())
                q = prefixes.index(answer[:n])
                self.paths[-1].append((q, tokens))
                self.children[q].update(tokens)
        self.children = [sorted(tokens) for tokens in self.children]

        # One dict a sequence: prefix -> (node, its parent). Its order is the order of the nodes, so
        # a parent stands before its children. Sorted, neighbours have the most in common.
        sequences, previous = [], []
        ends = {}  # (p, q) -> (sequence, node)
        for p in sorted(range(len(prompts)), key=prompts.__getitem__):
            if common_tokens(previous, prompts[p]) < len(prompts[p]) / 2:
                sequences.append({})
            previous, nodes = prompts[p], sequences[-1]
            for q, prefix in enumerate(prefixes):
                text, node = (*prompts[p], *prefix), -1
                for end in range(1, len(text) + 1):
                    if text[:end] not in nodes:
                        nodes[text[:end]] = len(nodes), node
                    node = nodes[text[:end]][0]
                ends[p, q] = len(sequences) - 1, node

        self.tokens, self.depth = torch.zeros(2, len(sequences), max(map(len, sequences))).long()
        self.ancestors = torch.eye(self.tokens.shape[1]).bool().repeat(len(sequences), 1, 1)
        for r, nodes in enumerate(sequences):
            for text, (node, parent) in nodes.items():
                self.tokens[r, node], self.depth[r, node] = text[-1], len(text) - 1
                if parent >= 0:
                    self.ancestors[r, node] |= self.ancestors[r, parent]

        keep = sorted({node for _, node in ends.values()})
        self.keep = torch.tensor(keep)
        self.branches = torch.zeros(len(prompts), len(prefixes)).long()
        for (p, q), (r, node) in ends.items():
            self.branches[p, q] = r * len(keep) + keep.index(node)

    def inputs(self, model):
        """What the model is called with. Raises ValueError where it cannot take a trie."""
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        default = ["sliding_attention" if window else "full_attention"]
        kinds = set(getattr(config, "layer_types", None) or default)
        if kinds - {"full_attention", "sliding_attention"}:
            found = ", ".join(sorted(kinds))
            raise ValueError(f"layers of {found}: the trie needs plain or sliding-window attention")
        if self.depth.max() >= getattr(config, "max_position_embeddings", math.inf):
            count, most = int(self.depth.max()) + 1, config.max_position_embeddings
            raise ValueError(f"the prompt has {count} tokens, the model takes {most}")
        known = model.get_input_embeddings().weight.shape[0]
        if self.tokens.max() >= known:
            raise ValueError(f"the tokenizer is of another model: this one knows {known} tokens")
        distance = self.depth[:, :, None] - self.depth[:, None, :]
        near = distance < (window or self.tokens.shape[1])
        # A model with both kinds of layers takes a mask of each by its name, any other the one.
        masks = {
            "full_attention": additive_mask(self.ancestors, model),
            "sliding_attention": additive_mask(self.ancestors & near, model),
        }
        return {
            "input_ids": self.tokens.to(model.device),
            "position_ids": self.depth.to(model.device),
            "attention_mask": masks if len(kinds) > 1 else masks[kinds.pop()],
            "logits_to_keep": self.keep.to(model.device),
            "use_cache": False,
        }


def common_tokens(a, b):
    """How many of their first tokens two texts have in common."""
    different = (i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    return next(different, min(len(a), len(b)))


def additive_mask(allowed, model):
    """bool [R, N, N] -> what is added to attention scores [R, 1, N, N]: 0 or the least number."""
    mask = torch.zeros(allowed.shape, dtype=model.dtype)
    return mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None].to(model.device)
