"""PPO with a KL penalty on a small table of answers: token trie, log-probabilities, values, update.  [torch; knows no game]

A policy maps P distinct prompts to log-probabilities over K answers: a table [prompt, answer]. Where a task has few distinct
prompts, one forward pass gives the whole table; then any number of samples is drawn by indexing it, the PPO loss indexes the
same table, still attached to the graph, and one backward pass finishes the update. No sampling loop over tokens, no padding.

    encode    texts -> token ids, with the answers as the model itself would write them after the prompt
    Trie      the prompts and answers as one sequence of distinct prefixes with an ancestor mask
    Policy    model + adapter + value head: () -> log-probabilities [P, K], values [P]
    ppo_loss  clipped surrogate and clipped value loss on samples of the table
    Learner   a policy in training: rewards in, one PPO update out

Where this differs from the TRL recipe of the paper: an answer is one action, however many tokens it has, so the KL penalty is on its
whole log-probability, the value is one per prompt, and gamma and lambda run over the rounds of an episode instead of over tokens.
"""

from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
import transformers
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora import adapter, adapter_parameters

GAE_LAMBDA = 0.95      # Schulman et al. (2016); the paper's value
KL_HORIZON = 10_000    # samples over which the KL coefficient adapts; the paper's value
RATIO_THRESHOLD = 10   # an update whose mean ratio exceeds this is dropped; the paper's value


# ---------------------------------------------------------------------------------------------------------------- model and text

def load_model(path, device, dtype):
    """(model, tokenizer) of a causal language model: a folder, or the name of one on the Hugging Face hub.

    Only safetensors weights and the classes that transformers ships are loaded.
    Raises ValueError with a one-line reason where that cannot be done.
    """
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
        found = "" if Path(path).exists() else "there is no such folder, and as a name on the hub: "
        raise ValueError(f"cannot load a model from {path}: {found}{' '.join(str(error).split())[:300]}") from error
    return model.to(device).eval(), tokenizer


def encode(tokenizer, texts, answers):
    """Token ids of prompts and of answers: (list of P lists, list of A lists).

    The boundary is the one the model itself would write: with a chat template, the prompt ends where the assistant's text begins; without
    one, the answer follows after a space. Tokenizers glue a space to the word behind it, so a space at the boundary goes to the answer.
    Raises ValueError where the answers' tokens depend on the prompt or one answer is a token-prefix of another.
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
    for i, tail in enumerate(tails):
        for j, other in enumerate(tails):
            if i != j and (not tail or other[:len(tail)] == tail):
                raise ValueError(f"the tokens of {answers[i]!r} are how {answers[j]!r} begins: choose names that can be told apart")
    return prompts, tails


class Trie:
    """P prompts, each followed by A answers, packed as one sequence in which every distinct prefix is a single node.

    tokens     int64 [N]      token of each node
    depth      int64 [N]      its position in its own text
    ancestors  bool [N, N]    row sees column: the column is the row's prefix, or itself
    branches   int64 [P, Q]   node of prompt p followed by answer prefix q; q = 0 is the bare prompt
    paths      per answer, a list of (q, token): after prefix q comes this token

    A causal model run on it with these positions and this mask gives at each node what it gives at the end of the plain text.
    """

    def __init__(self, prompts, answers):
        nodes, parents = {}, []

        def add(ids):  # dict order is node order: a parent always stands before its children
            node = -1
            for end in range(1, len(ids) + 1):
                key = tuple(ids[:end])
                if key not in nodes:
                    nodes[key] = len(nodes)
                    parents.append(node)
                node = nodes[key]
            return node

        prefixes = list(dict.fromkeys(tuple(answer[:n]) for answer in answers for n in range(len(answer))))
        self.branches = torch.tensor([[add([*prompt, *prefix]) for prefix in prefixes] for prompt in prompts])
        self.paths = [[(prefixes.index(tuple(answer[:n])), token) for n, token in enumerate(answer)] for answer in answers]
        self.tokens = torch.tensor([key[-1] for key in nodes])
        self.depth = torch.tensor([len(key) - 1 for key in nodes])
        self.ancestors = torch.eye(len(nodes), dtype=torch.bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                self.ancestors[node] |= self.ancestors[parent]


# --------------------------------------------------------------------------------------------------------------------- the policy

def log_illegal(log_probs):
    """log(1 - sum of the legal probabilities): [..., A] -> [...]. Finite, with finite gradients, also where rounding makes the sum 1."""
    log_legal = torch.logsumexp(log_probs, dim=-1).clamp(max=-1e-7)
    return torch.log(-torch.expm1(log_legal))


class Policy:
    """A language model with one of its adapters and a value head, on fixed prompts and answers.

    free: False gives the answers constrained, K = A (at each token only what continues an answer is allowed, renormalised);
          True gives K = A + 1, the last one being every other text.
    """

    def __init__(self, model, name, prompts, answers, free):
        self.model, self.name, self.free = model, name, free
        self.trie = Trie(prompts, answers)
        device, dtype = model.device, model.dtype
        width = model.get_output_embeddings().weight.shape[1]
        self.value_weight = torch.zeros(1, width, device=device, requires_grad=True)  # float32: the value of every prompt starts at 0
        self.value_bias = torch.zeros(1, device=device, requires_grad=True)
        trie = self.trie

        def additive(mask):
            return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[None, None].to(device)

        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
        if kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(f"the model's layers are {', '.join(sorted(kinds))}; the trie needs plain or sliding-window attention")
        near = trie.depth[:, None] - trie.depth[None, :] < (window or len(trie.tokens))
        masks = {"full_attention": additive(trie.ancestors), "sliding_attention": additive(trie.ancestors & near)}
        self.inputs = {
            "input_ids": trie.tokens[None].to(device), "position_ids": trie.depth[None].to(device),
            "attention_mask": masks if len(kinds) > 1 else masks[min(kinds)],
            "logits_to_keep": trie.branches.flatten().to(device), "use_cache": False,
        }
        if trie.depth.max() >= getattr(config, "max_position_embeddings", np.inf):
            raise ValueError(f"the prompt has {int(trie.depth.max()) + 1} tokens, the model takes {config.max_position_embeddings}")

    def parameters(self):
        """The trained tensors: those of the adapter, then the value head's weight [1, width] and bias [1]."""
        return adapter_parameters(self.model, self.name) + [self.value_weight, self.value_bias]

    def __call__(self, reference=False):
        """One forward pass: (log-probabilities [P, K], values [P]), float32. `reference`: of the base model, without the adapter."""
        features = []
        # What the output head reads is just what the value head needs: final hidden states, at the kept nodes only.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: features.append(args[0]))
        try:
            with adapter(self.model, None if reference else self.name):
                logits = self.model(**self.inputs).logits.float()
        finally:
            hook.remove()
        shape = (*self.trie.branches.shape, -1)
        logits, features = logits.view(shape), features[0].reshape(shape)
        values = linear(features[:, 0].float(), self.value_weight, self.value_bias)[:, 0]

        total = []  # log of the mass that is shared out after each answer prefix q
        for q in range(logits.shape[1]):
            allowed = sorted({token for path in self.trie.paths for at, token in path if at == q})
            total.append(torch.logsumexp(logits[:, q] if self.free else logits[:, q, allowed], dim=-1))
        log_probs = torch.stack([sum(logits[:, q, token] - total[q] for q, token in path) for path in self.trie.paths], dim=-1)
        if self.free:
            log_probs = torch.cat([log_probs, log_illegal(log_probs)[:, None]], dim=-1)
        return log_probs, values


# --------------------------------------------------------------------------------------------------------------------------- PPO

class RunningMoments:
    """Mean and standard deviation of all numbers seen so far (Chan, Golub & LeVeque, 1979)."""

    def __init__(self):
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def update(self, x):
        total, delta = self.count + x.size, x.mean() - self.mean
        self.variance = (self.variance * self.count + x.var() * x.size + delta**2 * self.count * x.size / total) / total
        self.mean += delta * x.size / total
        self.count = total

    def normalise(self, x):
        return (x - self.mean) / (self.variance**0.5 + 1e-8)


def adapt_kl_coef(coef, kl, target, samples):
    """The next KL coefficient: beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) samples / horizon).  Ziegler et al. (2019), 2.2"""
    return coef * (1 + np.clip(kl / target - 1, -0.2, 0.2) * samples / KL_HORIZON)


def gae(rewards, values, gamma):
    """Generalised advantage estimation over the rounds of an episode: [episode, round] -> the same.  Schulman et al. (2016), eq. 16

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1};   V = A = 0 after the last round.
    With gamma 0 each round is its own sample: A = r - V.
    """
    following = np.concatenate([values[:, 1:], np.zeros_like(values[:, :1])], axis=1)
    deltas = rewards + gamma * following - values
    advantages = np.zeros_like(deltas)
    running = np.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        advantages[:, t] = running = deltas[:, t] + gamma * GAE_LAMBDA * running
    return advantages


class Batch(NamedTuple):
    """N samples of the table; every tensor is [N]."""

    prompt: torch.Tensor         # row of the table
    action: torch.Tensor         # column of the table
    old_log_prob: torch.Tensor   # when it was sampled
    old_value: torch.Tensor
    advantage: torch.Tensor      # whitened
    target: torch.Tensor         # of the value: advantage before whitening + old value


def ppo_loss(log_probs, values, batch, clip, vf_coef):
    """PPO's loss on a batch (Schulman et al., 2017, eq. 7 and 9), from the table [P, K] and the values [P].

        ratio  = exp(log pi - log pi_old)
        policy = mean max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps))
        value  = mean max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2
        loss   = policy + vf_coef value

    Returns (loss, policy loss, value loss, mean ratio), scalar tensors.
    """
    ratio = torch.exp(log_probs[batch.prompt, batch.action] - batch.old_log_prob)
    policy_loss = torch.max(-batch.advantage * ratio, -batch.advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
    value = values[batch.prompt]
    clipped = torch.max(torch.min(value, batch.old_value + clip), batch.old_value - clip)
    value_loss = 0.5 * torch.max((value - batch.target) ** 2, (clipped - batch.target) ** 2).mean()
    return policy_loss + vf_coef * value_loss, policy_loss, value_loss, ratio.mean()


class Learner:
    """A policy in training. `act` gives its table, `update` learns from what was played with it.

    lr: Adam's learning rate;  epochs: optimizer steps per update;  clip: of the ratio and of the value;  kl_coef: beta at the start;
    kl_target: of the adaptive controller, in nats per sample;  vf_coef: weight of the value loss;  gamma: discount per round
    """

    def __init__(self, policy, lr, epochs, clip, kl_coef, kl_target, vf_coef, gamma):
        self.policy, self.epochs, self.clip, self.vf_coef, self.gamma = policy, epochs, clip, vf_coef, gamma
        self.kl_coef, self.kl_target = kl_coef, kl_target
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
        self.moments = RunningMoments()
        with torch.no_grad():
            self.reference = policy(reference=True)[0].double().cpu().numpy()  # log-probabilities [P, K] of the base model

    def act(self):
        """Forward pass; keeps its graph for the first epoch of `update`. Returns the probabilities, float64 numpy [P, K]."""
        self.tables = self.policy()
        log_probs, values = (table.detach().double().cpu().numpy() for table in self.tables)
        self.log_probs, self.values = log_probs, values
        return np.exp(log_probs)

    def update(self, prompt, action, reward):
        """One PPO update from rounds played with the last `act`: int, int and float arrays [episode, round]; reward in points.

        Returns a dict of floats: kl (exact, in nats, mean over the rounds played), kl_coef (the one used), policy_loss, value_loss, ratio.
        """
        log_prob, value = self.log_probs[prompt, action], self.values[prompt]
        self.moments.update(reward)
        penalty = log_prob - self.reference[prompt, action]  # an estimate of KL(pi || pi_ref), one a sample
        rewards = self.moments.normalise(reward) - self.kl_coef * penalty
        advantage = gae(rewards, value, self.gamma)
        target = advantage + value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)

        device = self.tables[1].device
        batch = Batch(*(torch.as_tensor(x.ravel(), device=device) for x in (prompt, action)),
                      *(torch.as_tensor(x.ravel(), device=device, dtype=torch.float32) for x in (log_prob, value, advantage, target)))
        for epoch in range(self.epochs):
            log_probs, values = self.tables if epoch == 0 else self.policy()
            loss, policy_loss, value_loss, ratio = ppo_loss(log_probs, values, batch, self.clip, self.vf_coef)
            if ratio > RATIO_THRESHOLD:
                break
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        kl = (np.exp(self.log_probs) * (self.log_probs - self.reference)).sum(axis=1)[prompt].mean()
        stats = {"kl": kl, "kl_coef": self.kl_coef, "policy_loss": policy_loss.item(), "value_loss": value_loss.item(),
                 "ratio": ratio.item()}
        self.kl_coef = adapt_kl_coef(self.kl_coef, penalty.mean(), self.kl_target, penalty.size)
        return stats
