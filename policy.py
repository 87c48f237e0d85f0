"""How a language model becomes a table of probabilities: token trie, constrained or free sampling, value head.  [torch; knows no game]

A policy maps P distinct prompts to log-probabilities over K answers: a table [prompt, answer]. Where a task has few distinct
prompts, one forward pass gives the whole table; then any number of samples is drawn by indexing it. No sampling loop over tokens, no padding.

    load_model  a folder or a name -> model, tokenizer
    encode      texts -> token ids, with the answers as the model itself would write them after the prompt
    Trie        the prompts and answers as sequences of distinct prefixes with an ancestor mask
    Policy      model + adapter + value head: () -> log-probabilities [P, K], values [P]

The prompts may be dealt out: over several passes, where one would not fit into memory, and over several processes (torchrun).
"""

from functools import cached_property
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from lora import adapter, adapter_parameters

EMBEDDED = Path(__file__).resolve().parent / "tiny"


# ---------------------------------------------------------------------------------------------------------------- model and text

def load_model(path, device, dtype):
    """(model, tokenizer) of a causal language model: 'tiny' (the embedded one), a folder, or a name on the Hugging Face hub.

    Only safetensors weights and the classes that transformers ships are loaded.
    Raises ValueError with a one-line reason where that cannot be done.
    """
    path = EMBEDDED if path == "tiny" else path
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # its retries without a network; the error below tells the outcome
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # The fused attention kernels know no soft-capping of the attention logits (Gemma 2) and would leave it out.
        soft_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager" if soft_capped else "sdpa", use_safetensors=True)
    except Exception as error:  # transformers, tokenizers, safetensors and the hub each raise kinds of their own
        if str(path).startswith(("/", ".", "~")) and not Path(path).exists():
            raise ValueError(f"cannot load a model from {path}: there is no such folder") from None
        found = "" if Path(path).exists() else "there is no such folder, and as a name on the hub: "
        raise ValueError(f"cannot load a model from {path}: {found}{' '.join(str(error).split())[:300]}") from error
    return model.to(device).eval(), tokenizer


def checkpoint_layers(model):
    """Gradient checkpointing: each layer keeps only its input and runs again in the backward pass. Less memory, half as much work again."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # it acts only in training mode; what is inside stays in eval mode, without dropout


def encode(tokenizer, texts, answers):
    """Token ids of prompts and of answers: (list of P lists, list of A lists).

    The boundary is the one the model itself would write: with a chat template, the prompt ends where the assistant's text begins; without
    one, the answer follows after a space. Tokenizers glue a space to the word behind it, so a space at the boundary goes to the answer.
    Raises ValueError where the answers' tokens depend on the prompt, the tokenizer does not know an answer, or one answer is a token-prefix
    of another.
    """
    if tokenizer.chat_template:
        mark = "ANSWER-STARTS-HERE"
        turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": mark}] for text in texts]
        heads = [text[:text.rindex(mark)] for text in tokenizer.apply_chat_template(turns, tokenize=False)]
    else:
        heads = [text + " " for text in texts]
    space = " " if heads[0].endswith(" ") else ""
    heads = [head.removesuffix(space) if space else head for head in heads]
    special = not tokenizer.chat_template  # a template writes its own special tokens
    prompts = tokenizer(heads, add_special_tokens=special)["input_ids"]
    tails = []
    for answer in answers:
        whole = tokenizer([head + space + answer for head in heads], add_special_tokens=special)["input_ids"]
        found = {tuple(ids[len(prompt):]) for ids, prompt in zip(whole, prompts) if ids[:len(prompt)] == prompt}
        if len(found) != 1 or any(ids[:len(prompt)] != prompt for ids, prompt in zip(whole, prompts)):
            raise ValueError(f"the tokens of the answer {answer!r} are not the same after every prompt: choose another name")
        tails.append(list(found.pop()))
        if set(tails[-1]) & set(tokenizer.all_special_ids):
            raise ValueError(f"the answer {answer!r} has an unknown or special token in it: choose another name")
    for i, tail in enumerate(tails):
        for j, other in enumerate(tails):
            if i != j and (not tail or other[:len(tail)] == tail):
                raise ValueError(f"the tokens of {answers[i]!r} are how {answers[j]!r} begins: choose names that can be told apart")
    return prompts, tails


class Trie:
    """P prompts, each followed by A answers, packed so that every distinct prefix is a single node.

    Prompts that have less than half of their tokens in common are packed into sequences of their own, R in all: what they could share
    is not worth a mask of twice the width.

    tokens     int64 [R, N]     token of each node; shorter sequences are padded at their end
    depth      int64 [R, N]     its position in its own text
    ancestors  bool [R, N, N]   row sees column: the column is the row's prefix, or itself
    keep       int64 [K]        the positions at which the output head is needed
    branches   int64 [P, Q]     index into [R, K], flattened: prompt p followed by answer prefix q; q = 0 is the bare prompt
    paths      per answer, a list of (q, token): after prefix q comes this token

    A causal model run on it with these positions and this mask gives at each node what it gives at the end of the plain text.
    """

    def __init__(self, prompts, answers):
        prefixes = list(dict.fromkeys(tuple(answer[:n]) for answer in answers for n in range(len(answer))))
        self.paths = [[(prefixes.index(tuple(answer[:n])), token) for n, token in enumerate(answer)] for answer in answers]
        sequences, before, at = [], (), {}  # at: (prompt, prefix) -> (sequence, node)
        for p in sorted(range(len(prompts)), key=lambda p: prompts[p]):  # neighbours have the most in common
            if common_tokens(before, prompts[p]) < len(prompts[p]) / 2:
                sequences.append({})  # prefix -> (node, parent); dict order is node order: a parent always stands before its children
            before, nodes = prompts[p], sequences[-1]
            for q, prefix in enumerate(prefixes):
                ids, parent = (*prompts[p], *prefix), -1
                for end in range(1, len(ids) + 1):
                    parent, _ = nodes.setdefault(ids[:end], (len(nodes), parent))
                at[p, q] = len(sequences) - 1, parent
        self.tokens, self.depth = torch.zeros(2, len(sequences), max(map(len, sequences)), dtype=torch.int64)
        self.ancestors = torch.eye(self.tokens.shape[1], dtype=torch.bool).repeat(len(sequences), 1, 1)
        for r, nodes in enumerate(sequences):
            for ids, (node, parent) in nodes.items():
                self.tokens[r, node], self.depth[r, node] = ids[-1], len(ids) - 1
                if parent >= 0:
                    self.ancestors[r, node] |= self.ancestors[r, parent]
        keep = sorted({node for _, node in at.values()})
        self.keep = torch.tensor(keep)
        self.branches = torch.tensor([[at[p, q][0] * len(keep) + keep.index(at[p, q][1]) for q in range(len(prefixes))]
                                      for p in range(len(prompts))])


def common_tokens(a, b):
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# --------------------------------------------------------------------------------------------------------------------- the policy

def log_illegal(log_probs):
    """log(1 - sum of the legal probabilities): [..., A] -> [...]. Finite, with finite gradients, also where rounding makes the sum 1."""
    log_legal = torch.logsumexp(log_probs, dim=-1).clamp(max=-1e-7)
    return torch.log(-torch.expm1(log_legal))


def zero_value_head(model):
    """A Linear(width, 1) on the model's hidden states, in float32, that gives 0 for all of them."""
    layer = torch.nn.Linear(model.get_output_embeddings().weight.shape[1], 1, device=model.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


class Policy:
    """A language model with one of its adapters and a value head, on fixed prompts and answers.

    free:  False gives the answers constrained, K = A (at each token only what continues an answer is allowed, renormalised);
           True gives K = A + 1, the last one being every other text.
    nodes: at most so many tokens in one pass: more prompts are cut into several tries, the `shards`
    value_head: by default a new one (`zero_value_head`)
    Of several processes (torch.distributed) each has its own share of the prompts; each shard is (rows of the table, Trie, model inputs).
    """

    def __init__(self, model, name, prompts, answers, free, nodes=None, value_head=None):
        self.model, self.name, self.free = model, name, free
        self.outcomes = len(answers) + free
        self.prompts = len(prompts)
        self.value_head = value_head or zero_value_head(model)
        ranks, rank = (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)
        if ranks > self.prompts:
            raise ValueError(f"{ranks} processes are more than the {self.prompts} prompts that they could share")
        self.shards, rows = [], []
        order = sorted(range(self.prompts), key=lambda p: prompts[p])
        for row in np.array_split(order, ranks)[rank].tolist():  # neighbours have the most in common
            if rows and nodes and Trie([prompts[r] for r in [*rows, row]], answers).tokens.numel() > nodes:
                self.shards.append(self.shard(sorted(rows), prompts, answers))
                rows = []
            rows.append(row)
        self.shards.append(self.shard(sorted(rows), prompts, answers))

    def shard(self, rows, prompts, answers):
        """(rows, Trie, inputs of the model) of some of the prompts."""
        trie = Trie([prompts[row] for row in rows], answers)
        device, dtype = self.model.device, self.model.dtype
        trie.branches = trie.branches.to(device)

        def additive(mask):
            return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[:, None].to(device)

        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
        if kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(f"the model's layers are {', '.join(sorted(kinds))}; the trie needs plain or sliding-window attention")
        if trie.depth.max() >= getattr(config, "max_position_embeddings", np.inf):
            raise ValueError(f"the prompt has {int(trie.depth.max()) + 1} tokens, the model takes {config.max_position_embeddings}")
        near = trie.depth[:, :, None] - trie.depth[:, None, :] < (window or len(trie.tokens[0]))
        masks = {"full_attention": additive(trie.ancestors), "sliding_attention": additive(trie.ancestors & near)}
        return rows, trie, {
            "input_ids": trie.tokens.to(device), "position_ids": trie.depth.to(device),
            "attention_mask": masks if len(kinds) > 1 else masks[min(kinds)],
            "logits_to_keep": trie.keep.to(device), "use_cache": False,
        }

    def parameters(self):
        """The trained tensors: those of the adapter, then the value head's weight [1, width] and bias [1]."""
        return adapter_parameters(self.model, self.name) + list(self.value_head.parameters())

    def save_value_head(self, folder):
        save_file(self.value_head.state_dict(), folder / "value_head.safetensors")

    def load_value_head(self, folder):
        """Raises OSError or ValueError where the file is missing, damaged or of another width."""
        try:
            self.value_head.load_state_dict(load_file(folder / "value_head.safetensors"))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"cannot read the value head in {folder}: {error}") from None

    @torch.no_grad()
    def table(self, reference=False):
        """Probabilities, float64 numpy [P, K]; `reference`: of the base model, without the adapter."""
        return self(reference)[0].cpu().double().exp().numpy()

    @cached_property
    def reference(self):
        """Log-probabilities of the base model, float64 numpy [P, K]. Raises ValueError where they are not finite."""
        with torch.no_grad():
            log_probs = self(reference=True)[0].cpu().double().numpy()
        if not np.isfinite(log_probs).all():
            raise ValueError("the model's own probabilities are not finite: try --dtype float32")
        return log_probs

    def __call__(self, reference=False):
        """All shards: (log-probabilities [P, K], values [P]), float32. `reference`: of the base model, without the adapter.

        With several shards or processes the tables are put together without a graph.
        """
        if len(self.shards) == 1 and len(self.shards[0][0]) == self.prompts:
            return self.forward(self.shards[0], reference)
        table = torch.zeros(self.prompts, self.outcomes + 1, device=self.model.device)
        with torch.no_grad():
            for shard in self.shards:
                log_probs, values = self.forward(shard, reference)
                table[shard[0]] = torch.cat([log_probs, values[:, None]], dim=1)
        if distributed.is_initialized():
            distributed.all_reduce(table)  # every row is 0 but in the process that has it
        return table[:, :-1], table[:, -1]

    def forward(self, shard, reference=False):
        """One forward pass: (log-probabilities [rows of the shard, K], values [rows])."""
        _, trie, inputs = shard
        features = []
        # What the output head reads is just what the value head needs: final hidden states, at the kept nodes only.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: features.append(args[0]))
        try:
            with adapter(self.model, None if reference else self.name):
                logits = self.model(**inputs).logits
        finally:
            hook.remove()
        logits, features = (x.flatten(0, 1)[trie.branches].float() for x in (logits, features[0]))  # [rows, Q, vocabulary or width]
        values = self.value_head(features[:, 0])[:, 0]

        total = []  # log of the mass that is shared out after each answer prefix q
        for q in range(logits.shape[1]):
            allowed = sorted({token for path in trie.paths for at, token in path if at == q})
            total.append(torch.logsumexp(logits[:, q] if self.free else logits[:, q, allowed], dim=-1))
        log_probs = torch.stack([sum(logits[:, q, token] - total[q] for q, token in path) for path in trie.paths], dim=-1)
        if self.free:
            log_probs = torch.cat([log_probs, log_illegal(log_probs)[:, None]], dim=-1)
        return log_probs, values
