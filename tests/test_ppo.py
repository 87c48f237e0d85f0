"""PPO against a per-sample implementation written from the formulas, and its parts by hand."""

import numpy as np
import pytest
import torch

from conftest import adapted_policy, plain_passes, shared_prefix_texts
from ppo import Learner, RunningMoments, act, adapt_kl_coef, gae

TEXTS, ANSWERS = shared_prefix_texts()


def drawn_rounds(shape=(8, 5)):
    """prompt, action and reward of some rounds [episode, round]."""
    rng = np.random.default_rng(0)
    prompt, action = rng.integers(len(TEXTS), size=shape), rng.integers(len(ANSWERS), size=shape)
    return prompt, action, rng.normal(2, 3, size=shape)


def equal_rounds(episodes=4):
    """The same prompt and action in all rounds, with different rewards."""
    zeros = np.zeros((episodes, 5), int)
    return zeros, zeros, np.arange(5.0 * episodes).reshape(episodes, 5)


def perturbed(acted):
    """As if the rounds had been played with weights that are not quite those of now."""
    rng = np.random.default_rng(1)
    return acted._replace(
        log_probs=acted.log_probs + 0.3 * rng.normal(size=acted.log_probs.shape),
        values=acted.values + 0.3 * rng.normal(size=acted.values.shape),
    )


def advantages_by_hand(rewards, values, gamma):
    """Of one episode, by the sum that defines them: over k of (gamma lambda)^k delta_(t + k)."""
    rounds = len(rewards)
    following = [*values[1:], 0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(rounds)]
    advantages = []
    for t in range(rounds):
        terms = [(gamma * 0.95) ** k * delta for k, delta in enumerate(deltas[t:])]
        advantages.append(sum(terms))
    return advantages


def samples_by_hand(acted, rounds, reference, kl_coef, gamma):
    """What the loss needs of each round of a first update, which has seen no other rewards.

    A list of (prompt, action, old log-probability, old value, whitened advantage, target).
    """
    mean, deviation = rounds[2].mean(), rounds[2].std()
    samples = []
    for episode in zip(*rounds):
        penalised, values = [], []
        for p, a, reward in zip(*episode):
            penalty = acted.log_probs[p, a] - reference[p, a].item()
            penalised.append((reward - mean) / deviation - kl_coef * penalty)
            values.append(acted.values[p])
        advantages = advantages_by_hand(penalised, values, gamma)
        for p, a, value, advantage in zip(*episode[:2], values, advantages):
            samples.append((p, a, acted.log_probs[p, a], value, advantage, advantage + value))
    raw = np.array([sample[4] for sample in samples])
    white = (raw - raw.mean()) / raw.std()
    return [(*sample[:4], w, sample[5]) for sample, w in zip(samples, white)]


def losses_by_hand(policy, samples, clip):
    """Policy loss, value loss and mean ratio, sample by sample, from plain passes with a graph.

    Also (how often the policy's clip decides, how often the value's).
    """
    log_probs, values = plain_passes(policy, TEXTS, ANSWERS)
    policy_terms, value_terms, ratios = [], [], []
    decided = np.zeros(2, int)
    for p, a, old_log_prob, old_value, advantage, target in samples:
        ratio, value = torch.exp(log_probs[p, a] - old_log_prob), values[p]
        limited = min(max(ratio, torch.tensor(1 - clip)), torch.tensor(1 + clip))
        near = min(max(value, torch.tensor(old_value - clip)), torch.tensor(old_value + clip))
        policy_terms.append(-min(ratio * advantage, limited * advantage))
        value_terms.append(max((value - target) ** 2, (near - target) ** 2) / 2)
        ratios.append(ratio)
        decided += (
            (limited * advantage < ratio * advantage).item(),
            ((near - target) ** 2 > (value - target) ** 2).item(),
        )
    n = len(samples)
    return (sum(policy_terms) / n, sum(value_terms) / n, sum(ratios) / n), decided


def check_losses(stats, expected):
    for key, loss in zip(("policy_loss", "value_loss", "ratio"), expected):
        assert stats[key] == pytest.approx(loss.item(), abs=1e-5), key


@pytest.mark.parametrize("gamma", [0, 0.9])
def test_ppo_oracle(gamma):
    """Loss and gradient of one update = a loop over its rounds, in the formulas' own words."""
    policy, rounds = adapted_policy("llama"), drawn_rounds()
    learner = Learner(policy.parameters(), lr=1e-12, epochs=1, clip=0.2, kl_coef=0.3, gamma=gamma)
    acted = perturbed(act(policy))

    with torch.no_grad():
        reference, _ = plain_passes(policy, TEXTS, ANSWERS, reference=True)
    samples = samples_by_hand(acted, rounds, reference, 0.3, gamma)
    expected, decided = losses_by_hand(policy, samples, 0.2)
    gradients = torch.autograd.grad(expected[0] + 0.1 * expected[1], policy.parameters())

    stats = learner.update(acted, *rounds)
    assert (decided > 5).all() and (decided < len(samples) - 5).all()  # the clips: some samples
    check_losses(stats, expected)
    for parameter, gradient in zip(policy.parameters(), gradients):
        assert (parameter.grad - gradient).abs().max() < 1e-5


def test_beta_adapts_to_the_kl_of_what_was_answered():
    policy, (prompt, action, reward) = adapted_policy("llama"), drawn_rounds()
    acted = act(policy)
    kl = (acted.log_probs - acted.reference)[prompt, action].mean()
    # A target so near to it that the controller's own clip does not act.
    learner = Learner(policy.parameters(), lr=1e-12, kl_coef=0.3, kl_target=kl / 1.1)
    stats = learner.update(acted, prompt, action, reward)
    assert stats["kl_coef"] == 0.3
    assert learner.kl_coef == pytest.approx(0.3 * (1 + 0.1 * 40 / 10_000), rel=1e-9)


@pytest.mark.parametrize("epochs", [1, 2])
def test_update_oracle(epochs):
    """An update = so many Adam steps, each from plain passes with the weights of that moment."""
    policy, rounds = adapted_policy("llama"), drawn_rounds()
    settings = {"lr": 1e-2, "epochs": epochs, "clip": 0.2, "kl_coef": 0.3, "vf_coef": 0.1}
    learner = Learner(policy.parameters(), **settings)
    acted = act(policy)
    stats = learner.update(acted, *rounds)

    theirs = adapted_policy("llama")
    with torch.no_grad():
        log_probs, _ = plain_passes(theirs, TEXTS, ANSWERS)
        reference, _ = plain_passes(theirs, TEXTS, ANSWERS, reference=True)
    samples = samples_by_hand(acted, rounds, reference, 0.3, 0)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2, eps=1e-5)
    clear = [torch.ones_like(parameter, dtype=bool) for parameter in theirs.parameters()]
    for _ in range(epochs):
        expected, _ = losses_by_hand(theirs, samples, 0.2)
        optimizer.zero_grad()
        (expected[0] + 0.1 * expected[1]).backward()
        optimizer.step()
        # Adam's first steps are about lr * sign(gradient): compare where the gradient is not
        # rounding noise.
        for mask, parameter in zip(clear, theirs.parameters()):
            mask &= parameter.grad.abs() > 1e-5
    compared = 0
    for ours, other, mask in zip(policy.parameters(), theirs.parameters(), clear):
        compared += mask.sum()
        if mask.any():
            assert (ours - other)[mask].abs().max() < 1e-4
    assert compared > 1000
    check_losses(stats, expected)
    assert (abs(stats["ratio"] - 1) > 1e-3) == (epochs > 1)  # only the first pass is on-policy
    kl = (log_probs.exp() * (log_probs - reference)).sum(1).numpy()
    assert stats["kl"] == pytest.approx(kl[rounds[0].ravel()].mean(), rel=1e-4)


def test_act_says_what_the_policy_says():
    policy = adapted_policy("llama", free=True)
    acted, table = act(policy), policy.forward()
    assert np.array_equal(acted.log_probs, table.log_probs.double().numpy())
    assert np.array_equal(acted.values, table.values.double().numpy())
    assert np.array_equal(acted.probabilities, np.exp(acted.log_probs))
    assert acted.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-6)
    torch.nn.init.constant_(policy.value_head.bias, float("nan"))
    with pytest.raises(FloatingPointError):
        act(policy)


def test_ratio_threshold_drops_the_update():
    policy = adapted_policy("llama")
    learner = Learner(policy.parameters(), lr=1e-2, epochs=3)
    acted = act(policy)
    # As if the policy had moved by a factor of e^5 since.
    acted = acted._replace(log_probs=acted.log_probs - 5)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    stats = learner.update(acted, *equal_rounds())
    assert stats["ratio"] > 10
    assert all(map(torch.equal, before, policy.parameters()))


def test_a_forward_pass_per_epoch():
    policy = adapted_policy("llama")
    learner = Learner(policy.parameters(), lr=1e-3, epochs=2)
    policy.reference  # noqa: B018 - one pass, once
    passes = []
    policy.model.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(3):
        learner.update(act(policy), *equal_rounds(1000))
    assert len(passes) == 3 * 2


def test_gae_by_hand():
    rewards, values = np.array([[1.0, 2.0, 3.0]]), np.array([[0.5, 1.0, -1.0]])
    assert np.allclose(gae(rewards, values, 0), rewards - values)
    last = 3 + 1
    middle = 2 + 0.9 * -1 - 1 + 0.9 * 0.95 * last
    first = 1 + 0.9 * 1 - 0.5 + 0.9 * 0.95 * middle
    assert np.allclose(gae(rewards, values, 0.9), [[first, middle, last]])


def test_running_moments_equal_those_of_all_numbers():
    moments, chunks = RunningMoments(), []
    for i in range(5):
        chunks.append(np.random.default_rng(i).normal(i, 1 + i, size=(3, 7 + i)))
        moments.update(chunks[-1])
    everything = np.concatenate([chunk.ravel() for chunk in chunks])
    assert moments.mean == pytest.approx(everything.mean())
    assert moments.variance == pytest.approx(everything.var())


@pytest.mark.parametrize(
    "kl, samples, factor",
    [
        (6, 80, 1),
        (0, 80, 1 - 0.2 * 0.008),
        (60, 80, 1 + 0.2 * 0.008),
        (6.6, 100, 1.001),
        (0, 10**6, 0.8),
        (60, 10**6, 1.2),
    ],
)
def test_kl_controller(kl, samples, factor):
    assert adapt_kl_coef(0.2, kl, 6, samples) == pytest.approx(0.2 * factor)


def test_not_finite_gradients_are_skipped_and_counted():
    policy, rounds = adapted_policy("llama"), equal_rounds()
    learner = Learner(policy.parameters(), lr=1e-2, epochs=2, kl_coef=0.1)
    parameters = policy.parameters()
    handle = parameters[0].register_hook(lambda gradient: gradient * float("nan"))
    before = [parameter.detach().clone() for parameter in parameters]
    for count in range(1, 10):
        assert learner.update(act(policy), *rounds)["skipped"] == count
    assert all(map(torch.equal, before, parameters)) and learner.kl_coef == 0.1
    with pytest.raises(FloatingPointError):  # the tenth in a row
        learner.update(act(policy), *rounds)
    handle.remove()
    assert learner.update(act(policy), *rounds)["skipped"] == 10
    assert learner.skipped_in_a_row == 0
    assert not all(map(torch.equal, before, parameters))


def test_diagnostics_by_hand():
    """After a step: entropy and KL of the table that was sampled, the clip and the old values."""
    learner = Learner((policy := adapted_policy("llama")).parameters(), lr=1e-12, epochs=1)
    acted = perturbed(act(policy))
    prompt, action, reward = drawn_rounds()
    stats = learner.update(acted, prompt, action, reward)
    entropies, ratios = [], []
    for p, a in zip(prompt.ravel(), action.ravel()):
        row = acted.probabilities[p]
        entropies.append(-sum(row * acted.log_probs[p]))
        ratios.append(np.exp(act(policy).log_probs[p, a] - acted.log_probs[p, a]))
    assert stats["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    clipped = np.mean([abs(ratio - 1) > 0.2 for ratio in ratios])
    assert 0 < clipped < 1 and stats["clipped"] == pytest.approx(clipped)
    scaled = (reward - reward.mean()) / reward.std()
    target = scaled - 0.2 * (acted.log_probs - acted.reference)[prompt, action]
    left = np.var(target - acted.values[prompt]) / np.var(target)
    assert stats["explained_variance"] == pytest.approx(1 - left, rel=1e-3)


def test_a_fixed_beta():
    policy = adapted_policy("llama")
    learner = Learner(policy.parameters(), lr=1e-3, kl_coef=0.3, kl_target=None)
    learner.update(act(policy), *drawn_rounds())
    assert learner.kl_coef == 0.3
