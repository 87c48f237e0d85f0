"""PPO with a KL penalty on a small table of answers, by hand.  [torch; knows no game]

The loss is a function of a policy's table (policy.py): samples index it. So an update computes the
loss and its gradient on a detached copy of the table, and the policy carries that gradient to its
weights: one forward and one backward pass per epoch, whatever the number of samples.

    act             a policy's table, ready to be sampled from and to be learned from
    Learner.update  the whole algorithm, from rewards to an optimizer step, in one block

Where this differs from the TRL recipe of the paper: an answer is one action, however many tokens it
has. So the KL penalty is on its whole log-probability, the value is one per prompt, and gamma and
lambda run over the rounds of an episode instead of over tokens.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from policy import Policy, Table

GAE_LAMBDA = 0.95  # Schulman et al. (2016); the paper's value
KL_HORIZON = 10_000  # samples over which the KL coefficient adapts; the paper's value
RATIO_THRESHOLD = 10  # a mean ratio above it ends the update; the paper's value
ADAM_EPS = 1e-5  # as in CleanRL; with torch's 1e-8 a rare gradient becomes a large step
MAX_SKIPPED = 10  # so many updates in a row with a number that is not finite end the run


class Acted(NamedTuple):
    """How a policy acts before an update, PPO's old policy: numpy float64, but for the table."""

    policy: Policy
    table: Table
    log_probs: np.ndarray  # [P, K]
    values: np.ndarray  # [P]
    reference: np.ndarray  # [P, K], log-probabilities of the base model
    probabilities: np.ndarray  # [P, K], to sample answers from


def act(policy, keep_graph=True):
    """One forward pass: the probabilities of all answers to all prompts, and what `update` needs.

    keep_graph: the first epoch of `Learner.update` then needs no pass of its own

    Raises FloatingPointError where the policy is not finite.
    """
    reference = policy.reference  # first: it tells where the base model is at fault
    table = policy.forward(keep_graph=keep_graph)
    log_probs, values = table.log_probs.double().numpy(), table.values.double().numpy()
    if not (np.isfinite(log_probs).all() and np.isfinite(values).all()):
        raise FloatingPointError("the policy is no longer finite")
    return Acted(policy, table, log_probs, values, reference, np.exp(log_probs))


class RunningMoments:
    """Mean and variance of all numbers seen so far (Chan, Golub & LeVeque, 1979)."""

    def __init__(self):
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def update(self, x):
        total, delta = self.count + x.size, x.mean() - self.mean
        between = delta**2 * self.count * x.size / total
        self.variance = (self.variance * self.count + x.var() * x.size + between) / total
        self.mean += delta * x.size / total
        self.count = total

    def normalise(self, x):
        return (x - self.mean) / (self.variance**0.5 + 1e-8)


def adapt_kl_coef(coef, kl, target, samples):
    """The next KL coefficient (Ziegler et al., 2019, section 2.2):

        beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) min(samples / horizon, 1))

    The min is ours: a batch larger than the horizon would carry beta below 0.
    """
    return coef * (1 + np.clip(kl / target - 1, -0.2, 0.2) * min(samples / KL_HORIZON, 1))


def gae(rewards, values, gamma):
    """Generalised advantage estimation over the rounds of an episode: [episode, round] -> the same.

        delta_t = r_t + gamma V_{t+1} - V_t                 Schulman et al. (2016), eq. 16
        A_t = delta_t + gamma lambda A_{t+1}                V = A = 0 after the last round

    With gamma 0 each round is its own sample: A = r - V.
    """
    following = np.concatenate([values[:, 1:], np.zeros_like(values[:, :1])], axis=1)
    deltas = rewards + gamma * following - values
    advantages = np.zeros_like(deltas)
    running = np.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * GAE_LAMBDA * running
        advantages[:, t] = running
    return advantages


class Learner:
    """What changes in training besides the weights: optimizer, running moments, KL coefficient.

    parameters: what is trained, as `Policy.parameters` gives it
    lr:         Adam's learning rate;  epochs: optimizer steps per update
    clip:       of the ratio and of the value;  vf_coef: weight of the value loss
    kl_coef:    beta at the start;  kl_target: to which it adapts, in nats per sample; None: fixed
    gamma:      discount per round
    The defaults are the paper's, but for Adam's epsilon.
    """

    def __init__(
        self,
        parameters,
        lr=1.41e-5,
        epochs=4,
        clip=0.2,
        kl_coef=0.2,
        kl_target=6.0,
        vf_coef=0.1,
        gamma=0.0,
    ):
        self.parameters = list(parameters)
        self.epochs, self.clip, self.vf_coef, self.gamma = epochs, clip, vf_coef, gamma
        self.kl_coef, self.kl_target = kl_coef, kl_target
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, eps=ADAM_EPS, fused=True)
        self.moments = RunningMoments()
        self.skipped = self.skipped_in_a_row = 0  # updates with a number that is not finite

    def update(self, acted, prompt, action, reward):
        """One PPO update (Schulman et al., 2017) from rounds played with `acted`.

        prompt, action, reward: int, int and float arrays [episode, round]; reward in points
        Returns the dict of `report`. Raises FloatingPointError after MAX_SKIPPED skipped updates.
        """
        old_log_prob, old_value = acted.log_probs[prompt, action], acted.values[prompt]

        # Reward: scaled by the mean and standard deviation of all so far, earlier phases included.
        self.moments.update(reward)
        scaled = self.moments.normalise(reward)

        # KL penalty: log pi - log pi_ref of what was answered, a sample of KL(pi || pi_ref).
        kl_sample = old_log_prob - acted.reference[prompt, action]
        penalised = scaled - self.kl_coef * kl_sample

        # Advantage, whitened; the value learns what the advantage was measured against.
        advantage = gae(penalised, old_value, self.gamma)
        target = advantage + old_value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)

        row, column = torch.from_numpy(prompt.ravel()), torch.from_numpy(action.ravel())
        arrays = old_log_prob, old_value, advantage, target
        tensors = [torch.from_numpy(x.ravel()).float() for x in arrays]
        old_log_prob, old_value, advantage, target = tensors
        for epoch in range(self.epochs):
            table = acted.table if epoch == 0 else acted.policy.forward()
            log_probs, values = (x.clone().requires_grad_() for x in table[:2])

            # Policy loss (Schulman, eq. 7): beyond the clip there is no reason to move further.
            ratio = torch.exp(log_probs[row, column] - old_log_prob)
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            policy_loss = torch.max(-advantage * ratio, -advantage * clipped).mean()

            # Value loss (Schulman, eq. 9), clipped around the old value, as in TRL.
            value = values[row]
            near = value.clamp(old_value - self.clip, old_value + self.clip)
            value_loss = 0.5 * torch.max((value - target) ** 2, (near - target) ** 2).mean()

            # Gradient: of the loss by the table here, of the table by the weights in the policy.
            loss = policy_loss + self.vf_coef * value_loss
            self.optimizer.zero_grad()
            acted.policy.backward(table, torch.autograd.grad(loss, (log_probs, values)))
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])

            # Step: not with numbers that are not finite, nor far from where the rounds were played.
            finite = math.isfinite(loss.item() + norm.item() + ratio.mean().item())
            if not finite or ratio.mean() > RATIO_THRESHOLD:
                break
            self.optimizer.step()

        # Report, and adapt beta to the KL that was sampled.
        self.count_skipped(finite)
        explained = 1 - (target - old_value).var() / target.var()
        stats = self.report(acted, prompt, policy_loss, value_loss, ratio, explained)
        if finite and self.kl_target is not None:
            mean, size = kl_sample.mean(), kl_sample.size
            self.kl_coef = adapt_kl_coef(self.kl_coef, mean, self.kl_target, size)
        return stats

    def count_skipped(self, finite):
        """Raises FloatingPointError at MAX_SKIPPED in a row."""
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise FloatingPointError(
                f"{MAX_SKIPPED} updates in a row had a loss or gradient that is not finite"
            )

    def report(self, acted, prompt, policy_loss, value_loss, ratio, explained):
        """What is logged of an update: dict of floats, and `skipped`, an int.

        kl:      of the table, exact, in nats, mean over the rounds played;  kl_coef: the one used
        entropy: of the table, in nats, mean over the rounds played
        policy_loss, value_loss, ratio: means of the last epoch
        clipped: share of its ratios that the clip changes
        explained_variance: how much of the targets the old values knew (1: all)
        skipped: updates so far that were cut short by a number that is not finite
        """
        exact_kl = (acted.probabilities * (acted.log_probs - acted.reference)).sum(axis=1)
        entropy = -(acted.probabilities * acted.log_probs).sum(axis=1)
        return {
            "kl": exact_kl[prompt].mean(),
            "entropy": entropy[prompt].mean(),
            "kl_coef": self.kl_coef,
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "ratio": ratio.mean().item(),
            "clipped": ((ratio - 1).abs() > self.clip).float().mean().item(),
            "explained_variance": explained.item(),
            "skipped": self.skipped,
        }

    def state(self):
        """All that changes in training: (dict of tensors, dict of numbers that JSON keeps)."""
        tensors = {}
        for i, parameter in enumerate(self.parameters):
            tensors[f"{i}.parameter"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():  # Adam's moments and step
                tensors[f"{i}.{key}"] = value
        moments = {key: float(value) for key, value in vars(self.moments).items()}
        return tensors, {
            "kl_coef": float(self.kl_coef),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "moments": moments,
        }

    def load_state(self, tensors, numbers):
        """Continue from `state()`. Raises KeyError or ValueError where it is of another policy."""
        for i, parameter in enumerate(self.parameters):
            saved = {}
            for key, value in tensors.items():
                if key.startswith(f"{i}."):
                    saved[key.removeprefix(f"{i}.")] = value.to(parameter.device)
            weights = saved.pop("parameter")
            if weights.shape != parameter.shape:
                raise ValueError(
                    f"parameter {i} has the shape {list(weights.shape)}, "
                    f"not {list(parameter.shape)}"
                )
            parameter.data.copy_(weights)
            self.optimizer.state[parameter] = saved
        self.kl_coef = numbers["kl_coef"]
        self.skipped, self.skipped_in_a_row = numbers["skipped"], numbers["skipped_in_a_row"]
        vars(self.moments).update(numbers["moments"])
