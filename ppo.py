"""PPO with a KL penalty on a small table of answers, by hand.  [torch; knows no game]

Samples of a policy's table (policy.py) index it, and so does the loss, while the table is still attached to the graph: one forward and
one backward pass make an update, whatever the number of samples.

    RunningMoments, adapt_kl_coef, gae    what happens to rewards before they become advantages
    ppo_loss                              clipped surrogate and clipped value loss on samples of the table
    Learner                               a policy in training: rewards in, one PPO update out

Where this differs from the TRL recipe of the paper: an answer is one action, however many tokens it has, so the KL penalty is on its
whole log-probability, the value is one per prompt, and gamma and lambda run over the rounds of an episode instead of over tokens.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import distributed

from lora import adapter

GAE_LAMBDA = 0.95      # Schulman et al. (2016); the paper's value
KL_HORIZON = 10_000    # samples over which the KL coefficient adapts; the paper's value
MAX_SKIPPED = 10       # updates in a row that may be skipped for a number that is not finite
RATIO_THRESHOLD = 10   # once the mean ratio exceeds this the epochs that remain are dropped; the paper's value


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
    """The next KL coefficient: beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) min(samples / horizon, 1)).

    Ziegler et al. (2019), section 2.2, for batches below the horizon; a larger one would carry beta below 0.
    """
    return coef * (1 + np.clip(kl / target - 1, -0.2, 0.2) * min(samples / KL_HORIZON, 1))


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


def sum_over_processes(parameters, figures):
    """Of several processes, each with the prompts of its own: add their gradients and figures up, in place."""
    if distributed.is_initialized():
        for parameter in parameters:
            if parameter.grad is None:  # no round was played with this process' prompts
                parameter.grad = torch.zeros_like(parameter)
        vector = torch.cat([figures, *(parameter.grad.flatten() for parameter in parameters)])
        distributed.all_reduce(vector)
        figures.copy_(vector[:len(figures)])
        torch.nn.utils.vector_to_parameters(vector[len(figures):], [parameter.grad for parameter in parameters])


class Learner:
    """A policy in training: `act` gives its table, `update` learns from what was played with it.

    lr: Adam's learning rate;  epochs: optimizer steps per update;  clip: of the ratio and of the value;  kl_coef: beta at the start;
    kl_target: of the adaptive controller, in nats per sample;  vf_coef: weight of the value loss;  gamma: discount per round
    """

    def __init__(self, policy, lr, epochs, clip, kl_coef, kl_target, vf_coef, gamma):
        self.policy, self.epochs, self.clip, self.vf_coef, self.gamma = policy, epochs, clip, vf_coef, gamma
        self.kl_coef, self.kl_target = kl_coef, kl_target
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=lr, fused=True)
        self.moments = RunningMoments()
        self.skipped = self.skipped_in_a_row = 0  # updates with a number that is not finite

    def act(self, policy=None, keep_graph=True):
        """Forward pass, which also serves the first epoch of `update` if its graph is kept. Returns probabilities, float64 numpy [P, K].

        policy: the one to act with from now on, where it is not the one of before: the same adapter and value head on other prompts

        Raises FloatingPointError where they are not finite.
        """
        self.policy = policy or self.policy
        with torch.set_grad_enabled(keep_graph):
            self.tables = self.policy()
        table = torch.cat([self.tables[0], self.tables[1][:, None]], dim=1).detach().cpu().double().numpy()
        if not np.isfinite(table).all():
            raise FloatingPointError("the policy is no longer finite")
        self.log_probs, self.values = table[:, :-1], table[:, -1]
        return np.exp(self.log_probs)

    def update(self, prompt, action, reward):
        """One PPO update from rounds played with the last `act`: int, int and float arrays [episode, round]; reward in points.

        A loss or gradient that is not finite never reaches the weights: the rest of the update is skipped and counted.
        Returns a dict of floats: kl (exact, in nats, mean over the rounds played), kl_coef (the one used), policy_loss, value_loss, ratio,
        skipped (so far). Raises FloatingPointError after MAX_SKIPPED skipped updates in a row.
        """
        log_prob, value = self.log_probs[prompt, action], self.values[prompt]
        self.moments.update(reward)
        penalty = log_prob - self.policy.reference[prompt, action]  # an estimate of KL(pi || pi_ref), one a sample
        rewards = self.moments.normalise(reward) - self.kl_coef * penalty
        advantage = gae(rewards, value, self.gamma)
        target = advantage + value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)

        *figures, finite = self.optimise(prompt, action, log_prob, value, advantage, target)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise FloatingPointError(f"{MAX_SKIPPED} updates in a row had a loss or gradient that is not finite")
        kl = (np.exp(self.log_probs) * (self.log_probs - self.policy.reference)).sum(axis=1)[prompt].mean()
        stats = dict(kl=kl, kl_coef=self.kl_coef, **dict(zip(("policy_loss", "value_loss", "ratio"), figures)), skipped=self.skipped)
        if finite:
            self.kl_coef = adapt_kl_coef(self.kl_coef, penalty.mean(), self.kl_target, penalty.size)
        return stats

    def optimise(self, prompt, action, *columns):
        """The epochs of one update, with one synchronisation of the device at their end. `columns`: the other fields of Batch, in numpy.

        Returns (policy loss, value loss, mean ratio of the last epoch, whether all was finite).
        """
        batches = []  # per shard: its part of the samples, and its share in the mean
        for rows, *_ in self.policy.shards:
            own = np.isin(prompt, rows)
            place = np.zeros(self.policy.prompts, dtype=int)
            place[rows] = range(len(rows))
            fields = [place[prompt[own]], action[own], *(column[own].astype(np.float32) for column in columns)]
            batches.append((Batch(*(torch.from_numpy(field).to(self.policy.model.device) for field in fields)), own.mean()))
        parameters = self.policy.parameters()
        whole = self.tables[1].requires_grad  # `act` has kept its graph
        stop, all_finite = torch.tensor([0.0, 1.0], device=self.policy.model.device)
        with adapter(self.policy.model, self.policy.name):  # checkpointed layers run again in the backward pass
            for epoch in range(self.epochs):
                self.optimizer.zero_grad()
                figures = torch.zeros(3, device=self.policy.model.device)
                for shard, (batch, share) in zip(self.policy.shards, batches):
                    if share:
                        log_probs, values = self.tables if whole and epoch == 0 else self.policy.forward(shard)
                        loss, *found = ppo_loss(log_probs, values, batch, self.clip, self.vf_coef)
                        (loss * share).backward()
                        figures += share * torch.stack(found).detach()
                sum_over_processes(parameters, figures)
                size = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                finite = torch.isfinite(figures.sum() + size).float()
                all_finite = all_finite * finite
                # The decision stays on the device: an optimizer step whose `found_inf` is 1 changes nothing (as in mixed precision).
                stop = torch.maximum(stop, torch.maximum(1 - finite, (figures[2] > RATIO_THRESHOLD).float()))
                self.optimizer.found_inf = stop
                self.optimizer.step()
        return torch.cat([figures, all_finite[None]]).tolist()

    def state(self):
        """All that changes in training: (dict of tensors, dict of numbers that JSON keeps exactly)."""
        tensors = {}
        for i, parameter in enumerate(self.policy.parameters()):
            tensors[f"{i}.parameter"] = parameter.detach()
            tensors.update({f"{i}.{key}": value for key, value in self.optimizer.state[parameter].items()})  # Adam's moments and step
        numbers = {"kl_coef": float(self.kl_coef), "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
                   "moments": {key: float(value) for key, value in vars(self.moments).items()}}
        return tensors, numbers

    def load_state(self, tensors, numbers):
        """Continue from `state()`. Raises KeyError or ValueError where it is of another policy."""
        for i, parameter in enumerate(self.policy.parameters()):
            found = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{i}.")}
            saved = found.pop("parameter")
            if saved.shape != parameter.shape:
                raise ValueError(f"parameter {i} has the shape {list(saved.shape)}, not {list(parameter.shape)}")
            parameter.data.copy_(saved)
            self.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in found.items()}
        self.kl_coef, self.skipped, self.skipped_in_a_row = numbers["kl_coef"], numbers["skipped"], numbers["skipped_in_a_row"]
        vars(self.moments).update(numbers["moments"])
