"""PPO with a KL penalty on a small table of answers, by hand.  [torch; knows no game]

A policy's table (policy.py) has a row for each distinct prompt, so the loss indexes it: one forward
and one backward pass an epoch, whatever the number of samples. `Learner.update` is the whole
algorithm, from rewards to an optimizer step, in one block.

Where this differs from the TRL recipe of the paper: an answer is one action, however many tokens it
has. So the KL penalty is on its whole log-probability, the value is one per prompt, and gamma and
lambda run over the rounds of an episode instead of over tokens.
"""

import math

import torch
from torch import distributed

from errors import InputError
from lora import active_adapter

# The paper's values, or where it names none the defaults of TRL.
CLIP = 0.2  # of the ratio and of the value
VF_COEF = 0.1  # weight of the value loss
GAE_LAMBDA = 0.95  # Schulman et al. (2016)
KL_HORIZON = 10_000  # samples over which the KL coefficient adapts
RATIO_THRESHOLD = 10  # a mean ratio above it ends the update
# Ours.
ADAM_EPS = 1e-5  # as in CleanRL; with torch's 1e-8 a rare gradient becomes a large step


def constants():
    """The numbers above by their names: a fork that changes one has runs of another kind."""
    return {name: value for name, value in globals().items() if name.isupper()}


class RunningMoments:
    """Mean and standard deviation of all numbers seen so far."""

    def __init__(self):
        self.count = 0
        self.total = 0.0
        self.squares = 0.0

    def normalise(self, x):
        """Add x to the statistics; return it scaled by the mean and deviation of all so far."""
        self.count += x.numel()
        self.total += x.sum().item()
        self.squares += (x**2).sum().item()
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean**2, 0)
        return (x - mean) / (variance**0.5 + 1e-8)


def adapt_kl_coef(coef, kl, target, samples):
    """The next KL coefficient (Ziegler et al., 2019, section 2.2):

        beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) min(samples / horizon, 1))

    The min is ours: a batch of more than five horizons would carry beta below 0.
    """
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * min(samples / KL_HORIZON, 1))


def gae(rewards, values, gamma):
    """Generalised advantage estimation over the rounds of an episode: [episode, round] -> the same.

        delta_t = r_t + gamma V_{t+1} - V_t                 Schulman et al. (2016), eq. 16
        A_t = delta_t + gamma lambda A_{t+1}                V = A = 0 after the last round

    With gamma 0 each round is its own sample: A = r - V.
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(deltas)
    running = 0.0
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * GAE_LAMBDA * running
        advantages[:, t] = running
    return advantages


def whiten(x):
    """x with mean 0 and standard deviation 1."""
    return (x - x.mean()) / (x.std(unbiased=False) + 1e-8)


def sum_gradients(parameters):
    """Sum the gradients of all processes, each of its own rows. Returns them, a list of tensors."""
    for parameter in parameters:
        if parameter.grad is None:  # of a layer that did not run
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    if distributed.is_initialized():
        vector = torch.nn.utils.parameters_to_vector(gradients)
        distributed.all_reduce(vector)
        torch.nn.utils.vector_to_parameters(vector, gradients)
    return gradients


class Learner:
    """A policy that learns, and what changes in training besides its weights.

    lr:        Adam's learning rate;  epochs: optimizer steps per update
    kl_coef:   beta at the start;  kl_target: to which it adapts, in nats per sample; 0: fixed
    gamma:     discount per round
    The policy's adapter is in place already: one that is loaded later would not be trained.
    kl_coef and kl_target are the paper's by default; gamma is 0: each round is its own sample.
    """

    def __init__(self, policy, *, lr, epochs, kl_coef=0.2, kl_target=6.0, gamma=0.0):
        self.policy = policy
        self.parameters = policy.parameters()
        self.epochs = epochs
        self.kl_coef = kl_coef
        self.kl_target = kl_target
        self.gamma = gamma
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, eps=ADAM_EPS, fused=True)
        self.moments = RunningMoments()

    def check_adapter(self):
        """Raise RuntimeError if the policy has got another adapter meanwhile."""
        if self.policy.parameters()[0] is not self.parameters[0]:
            raise RuntimeError("the policy's adapter was replaced: make a new Learner of it")

    def set_lr(self, lr):
        """Change Adam's learning rate."""
        self.optimizer.param_groups[0]["lr"] = lr

    def update(self, trie, table, row, action, reward):
        """One PPO update (Schulman et al., 2017). Returns the dict of `report`.

        trie:   what the old policy read
        table:  (log-probabilities [P, K], values [P]), what it answered; if they carry their graph
                the first epoch needs no pass of its own
        row, action, reward: arrays [episode, round]: rows of the table, answers to them, points
        Raises InputError, before the step, if a loss or a gradient is not finite.
        """
        self.check_adapter()
        row = torch.from_numpy(row)
        action = torch.from_numpy(action)
        reward = torch.from_numpy(reward.astype(float))
        old_log_probs = table[0].detach()
        old_log_prob = old_log_probs[row, action]
        old_value = table[1].detach()[row]

        # Reward: scaled by the mean and standard deviation of all so far, earlier phases included.
        # KL penalty: log pi - log pi_ref of what was answered, a sample of KL(pi || pi_ref).
        kl_sample = old_log_prob - self.policy.reference(trie)[row, action]
        penalised = self.moments.normalise(reward) - self.kl_coef * kl_sample

        # Advantage: how much better the return was than predicted. The value learns the return, the
        # policy the advantage, whitened; from here on all is float32, as the table is.
        advantage = gae(penalised, old_value, self.gamma)
        target = (advantage + old_value).float()
        whitened = whiten(advantage).float()

        for epoch in range(self.epochs):
            if epoch > 0 or not table[0].requires_grad:
                table = self.policy(trie)
            log_probs, values = table

            # Policy loss (Schulman, eq. 7): beyond the clip there is no reason to move further. In
            # the first epoch the ratio is 1, so the clip acts from the second one on.
            ratio = torch.exp(log_probs[row, action] - old_log_prob)
            clipped_ratio = ratio.clamp(1 - CLIP, 1 + CLIP)
            policy_loss = torch.max(-whitened * ratio, -whitened * clipped_ratio).mean()

            # Value loss (Schulman, eq. 9), clipped around the old value, as in TRL.
            value = values[row]
            clipped_value = value.clamp(old_value - CLIP, old_value + CLIP)
            errors = torch.max((value - target) ** 2, (clipped_value - target) ** 2)
            value_loss = 0.5 * errors.mean()

            # Gradient, with the adapter active: checkpointed layers run again in the backward pass.
            self.optimizer.zero_grad()
            with active_adapter(self.policy.model, self.policy.name):
                (policy_loss + VF_COEF * value_loss).backward()
            norm = torch.nn.utils.get_total_norm(sum_gradients(self.parameters)).item()

            # Step, but not far from the policy that played.
            if not math.isfinite(policy_loss.item() + value_loss.item() + norm):
                raise InputError("the update is not finite: lower --lr, or take --dtype float32")
            if ratio.mean() > RATIO_THRESHOLD:
                break
            self.optimizer.step()

        stats = self.report(trie, old_log_probs, row, ratio, policy_loss, value_loss)
        stats["explained_variance"] = (1 - (target - old_value).var() / target.var()).item()
        if self.kl_target:
            kl = kl_sample.mean().item()
            self.kl_coef = adapt_kl_coef(self.kl_coef, kl, self.kl_target, kl_sample.numel())
        return stats

    def report(self, trie, log_probs, row, ratio, policy_loss, value_loss):
        """What is logged of an update: dict of floats; `update` adds the last one.

        kl, entropy: of the table that was played, so before this update; exact, in nats, a mean
                 over the rounds
        kl_coef: the one that was used
        policy_loss, value_loss, ratio: means of the last epoch
        clipped: share of its ratios that the clip changes; with one epoch the ratio is always 1
        explained_variance: how much of the targets the old values knew (1: all)
        """
        log_probs = log_probs.double()
        exact_kl = (log_probs.exp() * (log_probs - self.policy.reference(trie))).sum(dim=1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=1)
        return {
            "kl": exact_kl[row].mean().item(),
            "entropy": entropy[row].mean().item(),
            "kl_coef": self.kl_coef,
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "ratio": ratio.mean().item(),
            "clipped": ((ratio - 1).abs() > CLIP).double().mean().item(),
        }

    def state(self):
        """What changes in training: (tensors by name, numpy arrays; numbers by name, for JSON).

        The names start with the policy's, so that two learners go into one file.
        """
        arrays = {}
        for i, parameter in enumerate(self.parameters):
            changing = {"parameter": parameter.detach(), **self.optimizer.state[parameter]}
            for key, value in changing.items():
                arrays[f"{self.policy.name}.{i}.{key}"] = value.cpu().numpy()
        numbers = {"kl_coef": self.kl_coef, "moments": dict(vars(self.moments))}
        return arrays, {self.policy.name: numbers}

    def load_state(self, arrays, numbers):
        """Continue from what `state` has returned. Raises InputError if it is another policy's."""
        for i, parameter in enumerate(self.parameters):
            start = f"{self.policy.name}.{i}."
            saved = {}
            for key, array in arrays.items():
                if key.startswith(start):
                    saved[key.removeprefix(start)] = torch.tensor(array, device=parameter.device)
            if "parameter" not in saved or saved["parameter"].shape != parameter.shape:
                raise InputError(f"{start}parameter has not the shape {[*parameter.shape]}")
            parameter.data.copy_(saved.pop("parameter"))
            self.optimizer.state[parameter] = saved
        own_numbers = numbers[self.policy.name]
        self.kl_coef = own_numbers["kl_coef"]
        vars(self.moments).update(own_numbers["moments"])
