"""A language model as a table: model folder, tokens, trie, sampling, value head.  [knows no game]

A policy maps P distinct prompts to log-probabilities of K outcomes: a table [prompt, outcome].
Where a task has few distinct prompts, one forward pass gives the whole table; then any number of
samples is drawn by indexing it. There is no sampling loop over tokens.

    load_model   a folder or a hub name -> model, tokenizer; what is wrong with it is refused here
    encode       texts -> token ids, with the answers as the model itself would write them
    Trie         prompts and answers, packed so that a model reads each beginning once
    Policy       model + adapter + value head; called on a trie it gives the table
"""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
from transformers.modeling_layers import GradientCheckpointingLayer

import lora
from lora import adapter

EMBEDDED = Path(__file__).resolve().parent / "tiny"
# "Today" in a chat template that writes the date: a prompt must not change from day to day. It is a
# macro, because transformers passes no function on to a template.
TODAY = "{% macro strftime_now(format) %}1 January 2025{% endmacro +%}"
MARK, PROBE = "ANSWER-STARTS-HERE", 'A & B <c>, "d"\nor | E?'


class ModelError(ValueError):
    """The model folder is at fault, not what is asked of it."""


def load_model(path, device=None, dtype="float32", checkpointing=False):
    """(model, tokenizer) of a causal language model.

    path:   'tiny' (the embedded one), a folder, or a name on the Hugging Face hub
    device: by default a GPU where there is one;  dtype: the name of a torch type, or nf4
    checkpointing: less memory, more time, see `checkpoint_layers`
    Raises ModelError where weights are missing (transformers would fill them with random numbers),
    are no safetensors, or need code of their own.
    """
    path = EMBEDDED if path == "tiny" else path
    if checkpointing:
        lora.give_back_at_once()
    if (Path(path) / "adapter_config.json").exists():
        raise ModelError(f"{path} holds an adapter: name the model that it was made for")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise ValueError("it is quantised: name the model that it was made from")
        # The fused attention kernels know no soft-capping of attention logits (Gemma 2).
        soft_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        stored = "auto" if dtype == "nf4" else getattr(torch, dtype)  # NF4 is made of this
        settings = {"dtype": stored, "attn_implementation": "eager" if soft_capped else None}
        settings |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # they are reported
        model, report = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=False, output_loading_info=True, **settings
        )
        heads = prompt_heads(tokenizer, [PROBE])  # a chat template may raise anything, too
    except Exception as error:  # of transformers, tokenizers, safetensors, Jinja, the hub
        reason = error if Path(path).exists() else f"no such folder, and on the hub: {error}"
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, and none but that of transformers is run here"
        raise ModelError(f"cannot load a model from {path}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    ids = tokenizer(heads, add_special_tokens=not tokenizer.chat_template)["input_ids"][0]
    faults = [f"the weights lack {key} as config.json describes it" for key in lacking]
    faults += [f"config.json has no place for {key}" for key in report["unexpected_keys"]]
    if PROBE not in heads[0]:
        faults.append("the chat template leaves a turn out, or changes its text")
    if not ids or (not tokenizer.chat_template and ids[-1] in tokenizer.all_special_ids):
        faults.append("the tokenizer knows no text, or appends a token: nothing can follow it")
    if faults:
        raise ModelError(f"{path}: {faults[0]}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "nf4":
        lora.quantise_layers(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if checkpointing:
        checkpoint_layers(model)
    return model.to(device), tokenizer


def checkpoint_layers(model):
    """Gradient checkpointing: a layer keeps only its input and runs again in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # It acts only in training mode. What is inside stays in eval mode, without dropout.
            module.training = True


def write_chats(tokenizer, chats, **settings):
    """Chats as the tokenizer's template writes them, on a fixed date: list of str."""
    settings |= {"tokenize": False, "chat_template": TODAY + tokenizer.get_chat_template()}
    return tokenizer.apply_chat_template(chats, **settings)


def prompt_heads(tokenizer, texts):
    """What stands before the answers, as text: list of str."""
    if not tokenizer.chat_template:
        return [text + " " for text in texts]
    reply = {"role": "assistant", "content": MARK}
    written = write_chats(tokenizer, [[{"role": "user", "content": t}, reply] for t in texts])
    return [chat.rpartition(MARK)[0] for chat in written]  # "" where the turn is left out


def encode(tokenizer, texts, answers):
    """Token ids of prompts and of answers: (list of P lists, list of A lists).

    The boundary is the one the model itself would write: where a chat template starts the answer;
    without one, after a space. Tokenizers glue a space to the word behind it, so a space at the
    boundary goes to the answer.
    Raises ValueError where the answers cannot be told apart by their tokens.
    """
    heads = prompt_heads(tokenizer, texts)
    space = " " if heads[0].endswith(" ") else ""
    heads = [head.removesuffix(space) for head in heads]
    special = not tokenizer.chat_template  # a template writes its own special tokens
    prompts = tokenizer(heads, add_special_tokens=special)["input_ids"]
    tails = []
    for answer in answers:
        answered = [head + space + answer for head in heads]
        wholes = tokenizer(answered, add_special_tokens=special)["input_ids"]
        endings = {
            tuple(whole[len(prompt) :]) if whole[: len(prompt)] == prompt else None
            for prompt, whole in zip(prompts, wholes)
        }
        tails.append(endings.pop() or ())
        fault = "are not the same after every prompt" if endings or not tails[-1] else ""
        if set(tails[-1]) & set(tokenizer.all_special_ids):
            fault = "have an unknown or special one among them"
        for other, tail in zip(answers, tails[:-1]):
            shorter = min(len(tail), len(tails[-1]))
            if tail[:shorter] == tails[-1][:shorter]:
                fault = f"cannot be told apart from those of {other!r}"
        if fault:
            raise ValueError(f"the tokens of the answer {answer!r} {fault}: choose another name")
    return prompts, [list(tail) for tail in tails]


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

    rows       the prompts that are packed: of several processes each has its own share
    tokens     int64 [R, N]     token of each node; shorter sequences are padded at their end
    depth      int64 [R, N]     its position in its own text
    ancestors  bool [R, N, N]   row sees column: the column is the row's prefix, or itself
    keep       int64 [M]        the positions at which the output head is needed
    branches   int64 [rows, Q]  index into [R, M], flattened: own prompt, answer prefix q; the first
                                prefix is empty: the bare prompt
    paths      per answer, a list of (q, token): after prefix q comes this token
    children   per answer prefix q, the tokens that may follow
    """

    def __init__(self, prompts, answers):
        self.prompts, self.answers, self.rows = prompts, answers, own_rows(prompts)
        prefixes, self.paths, self.children = [], [], []
        for answer in answers:
            self.paths.append([])
            for n, token in enumerate(answer):
                if answer[:n] not in prefixes:
                    prefixes.append(answer[:n])
                    self.children.append(set())
                q = prefixes.index(answer[:n])
                self.paths[-1].append((q, token))
                self.children[q].add(token)
        self.children = [sorted(tokens) for tokens in self.children]

        # One dict a sequence: prefix -> (node, its parent). Its order is the order of the nodes, so
        # a parent stands before its children. Sorted, neighbours have the most in common.
        sequences, previous = [], []
        ends = {}  # (row, q) -> (sequence, node)
        for row in sorted(self.rows, key=prompts.__getitem__):
            half = (len(prompts[row]) + 1) // 2
            if previous[:half] != prompts[row][:half]:
                sequences.append({})
            previous, nodes = prompts[row], sequences[-1]
            for q, prefix in enumerate(prefixes):
                text, node = (*prompts[row], *prefix), -1
                for end in range(1, len(text) + 1):
                    if text[:end] not in nodes:
                        nodes[text[:end]] = len(nodes), node
                    node = nodes[text[:end]][0]
                ends[row, q] = len(sequences) - 1, node

        self.tokens, self.depth = torch.zeros(2, len(sequences), max(map(len, sequences))).long()
        self.ancestors = torch.eye(self.tokens.shape[1]).bool().repeat(len(sequences), 1, 1)
        for r, nodes in enumerate(sequences):
            for text, (node, parent) in nodes.items():
                self.tokens[r, node], self.depth[r, node] = text[-1], len(text) - 1
                if parent >= 0:
                    self.ancestors[r, node] |= self.ancestors[r, parent]

        keep = sorted({node for _, node in ends.values()})
        self.keep = torch.tensor(keep)
        self.branches = torch.zeros(len(self.rows), len(prefixes)).long()
        for (row, q), (r, node) in ends.items():
            self.branches[self.rows.index(row), q] = r * len(keep) + keep.index(node)

    def inputs(self, model):
        """What the model is called with. Raises ValueError where it cannot take a trie."""
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        default = ["sliding_attention" if window else "full_attention"]
        kinds = set(getattr(config, "layer_types", None) or default)
        near = self.depth[:, :, None] - self.depth[:, None, :] < (window or self.tokens.shape[1])
        masks = {"full_attention": self.ancestors, "sliding_attention": self.ancestors & near}
        for kind, seen in masks.items():  # what is added to attention scores [R, 1, N, N]
            least = torch.full(seen.shape, torch.finfo(model.dtype).min, dtype=model.dtype)
            masks[kind] = least.masked_fill(seen, 0)[:, None].to(model.device)
        fault = ""
        longest, known = int(self.depth.max()) + 1, model.get_input_embeddings().weight.shape[0]
        if not kinds <= {*masks}:
            fault = f"has layers of {max(kinds - {*masks})}, not plain or sliding-window attention"
        if longest > getattr(config, "max_position_embeddings", math.inf):
            fault = f"takes {config.max_position_embeddings} tokens, the prompt has {longest}"
        if self.tokens.max() >= known:
            fault = f"knows {known} tokens: the tokenizer is of another one"
        if fault:
            raise ValueError(f"the model {fault}")
        return {
            "input_ids": self.tokens.to(model.device),
            "position_ids": self.depth.to(model.device),
            # A model with both kinds of layers takes a mask of each by its name, any other the one.
            "attention_mask": masks if len(kinds) > 1 else masks[kinds.pop()],
            "logits_to_keep": self.keep.to(model.device),
            "use_cache": False,
        }


def own_rows(prompts):
    """This process' share of the prompts, as rows: all of them where it is the only one."""
    if not distributed.is_initialized():
        return list(range(len(prompts)))
    if distributed.get_world_size() > len(prompts):
        raise ValueError(f"there are more processes than the {len(prompts)} prompts to share")
    order = sorted(range(len(prompts)), key=prompts.__getitem__)  # neighbours have most in common
    share = np.array_split(order, distributed.get_world_size())[distributed.get_rank()]
    return sorted(share.tolist())


def log_illegal(log_probs):
    """log(1 - sum of the legal probabilities), [..., A] -> [...]: finite, as are its gradients."""
    # Rounding can make the sum 1.
    return torch.log(-torch.expm1(torch.logsumexp(log_probs, dim=-1).clamp(max=-1e-7)))


class Policy:
    """A language model with the adapter of this name, and a value head of its own.

    free: False: one of the answers is always given, K = A (at each token only what continues an
          answer is allowed, renormalised)
          True: any text may be given, K = A + 1; the last is what begins with no answer
    """

    def __init__(self, model, tokenizer, name, free=False):
        self.model, self.tokenizer, self.name, self.free = model, tokenizer, name, free
        width = model.get_output_embeddings().weight.shape[1]
        self.value_head = torch.nn.Linear(width, 1, device=model.device)  # float32, at first 0
        for parameter in self.value_head.parameters():
            torch.nn.init.zeros_(parameter)

    def parameters(self):
        """The trained tensors: the adapter's, the value head's weight [1, width] and bias [1]."""
        return lora.adapter_parameters(self.model, self.name) + list(self.value_head.parameters())

    @lru_cache(maxsize=128)  # noqa: B019 - prompts come again, and a policy lives to the end
    def trie(self, texts, answers):
        """The Trie of prompts and answers, tuples of str. Errors as in `encode`."""
        return Trie(*encode(self.tokenizer, texts, answers))

    @lru_cache(maxsize=128)  # noqa: B019
    def reference(self, trie):
        """Log-probabilities of the base model, float64 [P, K]. Raises ModelError if not finite."""
        log_probs = self(trie, graph=False, reference=True)[0].double()
        if not log_probs.isfinite().all():
            raise ModelError("the model's own probabilities are not finite: give --dtype float32")
        return log_probs

    def __call__(self, trie, graph=True, reference=False):
        """Log-probabilities [P, K] and values [P], float32 on the CPU; reference: of the base.

        Raises FloatingPointError where the policy, ModelError where the base is not finite.
        """
        with adapter(self.model, None if reference else self.name), torch.set_grad_enabled(graph):
            out = self.model(**trie.inputs(self.model), output_hidden_states=True)
            keep, branches = trie.keep.to(self.model.device), trie.branches.to(self.model.device)
            logits = out.logits.flatten(0, 1)[branches].float()  # [rows, Q, vocabulary]
            hidden = out.hidden_states[-1][:, keep].flatten(0, 1)[branches[:, 0]].float()
            del out

            # Constrained, the tokens that continue an answer share the mass; free, all tokens do.
            allowed = [slice(None)] * len(trie.children) if self.free else trie.children
            total = [logits[:, q, tokens].logsumexp(dim=-1) for q, tokens in enumerate(allowed)]

            # An answer's log-probability is the sum along its path.
            steps = [[logits[:, q, token] - total[q] for q, token in path] for path in trie.paths]
            log_probs = torch.stack([sum(path) for path in steps], dim=-1)
            if self.free:
                log_probs = torch.cat([log_probs, log_illegal(log_probs)[:, None]], dim=-1)
            own = torch.cat([log_probs, self.value_head(hidden)], dim=1)
            table = shared_table(trie, own).cpu()
        if not (reference or table.isfinite().all()):
            self.reference(trie)  # it tells where the base is at fault
            raise FloatingPointError("the policy is no longer finite")
        return table[:, :-1], table[:, -1]

    def probabilities(self, trie):
        """What it answers: float64 numpy [P, K]."""
        return self(trie, graph=False)[0].double().exp().numpy()

    def sum_gradients(self):
        """Sum the gradients of all processes, each of its own rows. Returns the norm, a float."""
        for parameter in self.parameters():
            if parameter.grad is None:  # of a layer that did not run
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters()]
        if distributed.is_initialized():
            vector = torch.nn.utils.parameters_to_vector(gradients)
            distributed.all_reduce(vector)
            torch.nn.utils.vector_to_parameters(vector, gradients)
        return torch.nn.utils.get_total_norm(gradients).item()

    def save(self, folder):
        """Write the adapter, in PEFT's layout, and value_head.safetensors."""
        lora.save_adapter(self.model, self.name, folder)
        lora.write_tensors(folder / "value_head.safetensors", self.value_head.state_dict())

    def load(self, folder, value_head=False):
        """Take a folder's adapter, and if asked its value head. Errors as in `load_adapter`."""
        lora.load_adapter(self.model, self.name, folder)
        if value_head:
            self.value_head.load_state_dict(lora.read(folder / "value_head.safetensors"))


def shared_table(trie, own):
    """The table [P, K + 1] of this process' rows, with their graph, and the others', constants."""
    table = torch.zeros(len(trie.prompts), own.shape[1], device=own.device)
    table[trie.rows] = own
    if distributed.is_initialized():
        others = table.detach().clone()
        distributed.all_reduce(others)  # a row is 0 but in the process that has it
        others[trie.rows] = 0
        table = table + others
    return table


@torch.no_grad()
def check_causal(policy, trie):
    """Raise ModelError where a plain pass over prompt and answer gives not what the table has."""
    # The last one in the trie: what it shares with the others stands far from the rest of it.
    row = max(trie.rows, key=trie.prompts.__getitem__)
    prompt, answer = trie.prompts[row], trie.answers[-1]
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=policy.model.device)
    with adapter(policy.model, None):
        logits = policy.model(input_ids=ids, use_cache=False).logits[0].float()
    expected = 0.0
    for scores, (q, token) in zip(logits[len(prompt) - 1 :], trie.paths[-1]):
        shared = scores if policy.free else scores[trie.children[q]]
        expected += (scores[token] - torch.logsumexp(shared, dim=-1)).item()
    difference = abs(policy.reference(trie)[row, len(trie.paths) - 1].item() - expected)
    if difference > (0.01 if policy.model.dtype == torch.float32 else 0.5):
        rule = "it must be a causal decoder that takes the positions and the mask that it is given"
        raise ModelError(f"its answers differ by {difference:.2g} nats from plain ones: {rule}")
