"""PPO against a per-sample implementation written from the formulas, and its parts by hand."""

import json

import numpy as np
import pytest
import torch

from conftest import adapted_policy, plain_passes, shared_prefix_texts
from errors import InputError
from lora import add_adapter
from ppo import Learner, RunningMoments, adapt_kl_coef, gae

TEXTS, ANSWERS = shared_prefix_texts()
REFERENCE = plain_passes(adapted_policy("llama")[0], TEXTS, ANSWERS, reference=True)[0].detach()


def drawn_rounds(shape=(8, 5)):
    """prompt, action and reward of some rounds [episode, round]."""
    rng = np.random.default_rng(0)
    prompt, action = rng.integers(len(TEXTS), size=shape), rng.integers(len(ANSWERS), size=shape)
    return prompt, action, rng.normal(2, 3, size=shape)


def equal_rounds(episodes=4):
    """The same prompt and action in all rounds, with different rewards."""
    zeros = np.zeros((episodes, 5), int)
    return zeros, zeros, np.arange(5.0 * episodes).reshape(episodes, 5)


def without_graph(table, noise=0.0):
    """A table as if from weights that are not quite those of now."""
    rng = np.random.default_rng(1)
    return [x.detach() + torch.from_numpy(noise * rng.normal(size=x.shape)).float() for x in table]


def learning(**settings):
    """(Learner of a policy that says something, its trie)."""
    policy, trie = adapted_policy("llama")
    return Learner(policy, **settings), trie


def weights(learner):
    return [parameter.detach().clone() for parameter in learner.parameters]


def advantages_by_hand(rewards, values, gamma):
    """Of one episode, by the sum that defines them: over k of (gamma lambda)^k delta_(t + k)."""
    deltas = rewards + gamma * np.array([*values[1:], 0]) - values
    discounts = (gamma * 0.95) ** np.arange(len(deltas))
    return [(discounts[: len(deltas) - t] * deltas[t:]).sum() for t in range(len(deltas))]


def samples_by_hand(table, rounds, kl_coef, gamma):
    """What the loss needs of each round of a first update, which has seen no other rewards.

    A list of (prompt, action, old log-probability, old value, whitened advantage, target).
    """
    log_probs, values = (x.tolist() for x in table)
    mean, deviation = rounds[2].mean(), rounds[2].std()
    samples = []
    for episode in zip(*rounds):
        penalised, seen = [], []
        for p, a, reward in zip(*episode):
            penalty = log_probs[p][a] - REFERENCE[p, a].item()
            penalised.append((reward - mean) / deviation - kl_coef * penalty)
            seen.append(values[p])
        advantages = advantages_by_hand(np.array(penalised), seen, gamma)
        for p, a, value, advantage in zip(*episode[:2], seen, advantages):
            samples.append((p, a, log_probs[p][a], value, advantage, advantage + value))
    raw = np.array([sample[4] for sample in samples])
    white = (raw - raw.mean()) / raw.std()
    return [(*sample[:4], w, sample[5]) for sample, w in zip(samples, white)]


def losses_by_hand(policy, samples):
    """Policy loss, value loss and mean ratio, sample by sample, from plain passes with a graph.

    Also (how often the policy's clip decides, how often the value's).
    """
    log_probs, values = plain_passes(policy, TEXTS, ANSWERS)
    terms, decided = [], np.zeros(2, int)
    for p, a, old_log_prob, old_value, advantage, target in samples:
        ratio, value = torch.exp(log_probs[p, a] - old_log_prob), values[p]
        limited = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
        near = min(max(value, torch.tensor(old_value - 0.2)), torch.tensor(old_value + 0.2))
        gains = ratio * advantage, limited * advantage
        errors = (value - target) ** 2, (near - target) ** 2
        terms.append((-min(gains), max(errors) / 2, ratio))
        decided += [(gains[1] < gains[0]).item(), (errors[1] > errors[0]).item()]
    return [sum(column) / len(terms) for column in zip(*terms)], decided


def check_losses(stats, expected):
    for key, loss in zip(("policy_loss", "value_loss", "ratio"), expected):
        assert stats[key] == pytest.approx(loss.item(), abs=1e-5), key


@pytest.mark.parametrize("gamma", [0, 0.9])
def test_ppo_oracle(gamma):
    """Loss and gradient of one update = a loop over its rounds, in the formulas' own words."""
    learner, trie = learning(lr=1e-12, epochs=1, kl_coef=0.3, gamma=gamma)
    policy, rounds = learner.policy, drawn_rounds()
    table = without_graph(policy(trie), noise=0.3)
    samples = samples_by_hand(table, rounds, 0.3, gamma)
    expected, decided = losses_by_hand(policy, samples)
    gradients = torch.autograd.grad(expected[0] + 0.1 * expected[1], policy.parameters())

    stats = learner.update(trie, table, *rounds)
    assert (decided > 5).all() and (decided < len(samples) - 5).all()  # the clips: some samples
    check_losses(stats, expected)
    for parameter, gradient in zip(policy.parameters(), gradients):
        assert (parameter.grad - gradient).abs().max() < 1e-5


@pytest.mark.parametrize("epochs", [1, 2])
def test_update_oracle(epochs):
    """An update = so many Adam steps, each from plain passes with the weights of that moment."""
    learner, trie = learning(lr=1e-2, epochs=epochs, kl_coef=0.3)
    rounds, table = drawn_rounds(), learner.policy(trie)
    old, (theirs, _) = without_graph(table), adapted_policy("llama")
    stats = learner.update(trie, table, *rounds)

    samples = samples_by_hand(old, rounds, 0.3, 0)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2, eps=1e-5)
    clear = [torch.ones_like(parameter, dtype=bool) for parameter in theirs.parameters()]
    for _ in range(epochs):
        expected, _ = losses_by_hand(theirs, samples)
        optimizer.zero_grad()
        (expected[0] + 0.1 * expected[1]).backward()
        optimizer.step()
        # Adam's first steps are about lr * sign(gradient): compare where the gradient is not
        # rounding noise.
        for mask, parameter in zip(clear, theirs.parameters()):
            mask &= parameter.grad.abs() > 1e-5
    compared = 0
    for ours, other, mask in zip(learner.parameters, theirs.parameters(), clear):
        compared += mask.sum()
        if mask.any():
            assert (ours - other)[mask].abs().max() < 1e-4
    assert compared > 1000
    check_losses(stats, expected)
    assert (abs(stats["ratio"] - 1) > 1e-3) == (epochs > 1)  # only the first pass is on-policy
    kl = (old[0].exp() * (old[0] - REFERENCE)).sum(1).numpy()
    assert stats["kl"] == pytest.approx(kl[rounds[0].ravel()].mean(), rel=1e-4)


def test_beta_adapts_to_the_kl_of_what_was_answered():
    policy, trie = adapted_policy("llama")
    table, (prompt, action, _) = policy(trie), drawn_rounds()
    kl = (table[0].detach() - policy.reference(trie))[prompt, action].mean().item()
    # A target so near to it that the controller's own clip does not act; 0: beta is fixed.
    for target, factor in ((kl / 1.1, 1 + 0.1 * 40 / 10_000), (0, 1)):
        learner = Learner(policy, lr=1e-12, epochs=4, kl_coef=0.3, kl_target=target)
        assert learner.update(trie, without_graph(table), *drawn_rounds())["kl_coef"] == 0.3
        assert learner.kl_coef == pytest.approx(0.3 * factor, rel=1e-6)


def test_ratio_threshold_drops_the_update():
    learner, trie = learning(lr=1e-2, epochs=3)
    before, (log_probs, values) = weights(learner), without_graph(learner.policy(trie))
    # As if the policy had moved by a factor of e^5 since.
    assert learner.update(trie, (log_probs - 5, values), *equal_rounds())["ratio"] > 10
    assert all(map(torch.equal, before, learner.parameters))


def test_a_forward_pass_per_epoch():
    learner, trie = learning(lr=1e-3, epochs=2)
    learner.policy.reference(trie)  # one pass, once
    passes = []
    learner.policy.model.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(3):
        learner.update(trie, learner.policy(trie), *equal_rounds(1000))
    assert len(passes) == 3 * 2


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 1.0, -1.0]])
    assert torch.equal(gae(rewards, values, 0), rewards - values)
    last = 3 + 1
    middle = 2 + 0.9 * -1 - 1 + 0.9 * 0.95 * last
    first = 1 + 0.9 * 1 - 0.5 + 0.9 * 0.95 * middle
    assert gae(rewards, values, 0.9).numpy() == pytest.approx(np.array([[first, middle, last]]))


def test_rewards_are_scaled_by_all_so_far():
    moments, seen = RunningMoments(), []
    for i in range(5):
        seen.append(np.random.default_rng(i).normal(i, 1 + i, size=20 + i))
        expected = (seen[-1] - np.concatenate(seen).mean()) / np.concatenate(seen).std()
        assert moments.normalise(torch.from_numpy(seen[-1])).numpy() == pytest.approx(expected)


def test_kl_controller():
    few = 0.2 * 80 / 10_000
    for kl, samples, factor in ((6, 80, 1), (0, 80, 1 - few), (60, 80, 1 + few), (6.6, 100, 1.001)):
        assert adapt_kl_coef(0.2, kl, 6, samples) == pytest.approx(0.2 * factor)
    for kl, factor in ((0, 0.8), (60, 1.2)):  # more samples than the horizon
        assert adapt_kl_coef(0.2, kl, 6, 10**6) == pytest.approx(0.2 * factor)


def test_what_is_not_finite_is_no_step():
    learner, trie = learning(lr=1e-2, epochs=2)
    policy, rounds, before = learner.policy, equal_rounds(), weights(learner)
    handle = learner.parameters[0].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(InputError, match=r"not finite.* --lr"):
        learner.update(trie, policy(trie), *rounds)
    assert all(map(torch.equal, before, learner.parameters))
    handle.remove()
    learner.update(trie, policy(trie), *rounds)
    assert not all(map(torch.equal, before, learner.parameters))
    # Where the policy itself has come to say what is no number, nothing can follow.
    torch.nn.init.constant_(policy.value_head.bias, float("nan"))
    with pytest.raises(InputError, match="no longer finite"):
        learner.update(trie, policy(trie), *rounds)


def test_diagnostics_by_hand():
    """After a step: entropy and KL of the table that was sampled, the clip and the old values."""
    learner, trie = learning(lr=1e-12, epochs=1)
    now = without_graph(learner.policy(trie))[0]
    log_probs, values = without_graph(learner.policy(trie), noise=0.3)
    prompt, action, reward = drawn_rounds()
    stats = learner.update(trie, (log_probs, values), prompt, action, reward)
    entropies, ratios = [], []
    for p, a in zip(prompt.ravel(), action.ravel()):
        entropies.append(-sum(log_probs[p].exp() * log_probs[p]).item())
        ratios.append((now[p, a] - log_probs[p, a]).exp().item())
    assert stats["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    clipped = np.mean([abs(ratio - 1) > 0.2 for ratio in ratios])
    assert 0 < clipped < 1 and stats["clipped"] == pytest.approx(clipped)
    scaled = (reward - reward.mean()) / reward.std()
    target = scaled - 0.2 * (log_probs - REFERENCE)[prompt, action].numpy()
    left = np.var(target - values[prompt].numpy()) / np.var(target)
    assert stats["explained_variance"] == pytest.approx(1 - left, rel=1e-3)


def test_an_adapter_that_is_loaded_later_would_not_be_trained():
    learner, trie = learning(lr=1e-2, epochs=1)
    add_adapter(learner.policy.model, learner.policy.name, rank=2, alpha=4)
    with pytest.raises(RuntimeError, match="new Learner"):
        learner.update(trie, learner.policy(trie), *drawn_rounds())


def test_a_saved_learner_goes_on_as_if_nothing_had_been():
    first, trie = learning(lr=1e-2, epochs=2)
    second, _ = learning(lr=1e-2, epochs=2)
    first.update(trie, first.policy(trie), *drawn_rounds())
    arrays, numbers = first.state()
    second.load_state(arrays, json.loads(json.dumps(numbers)))
    rounds = equal_rounds()
    stats = [each.update(trie, each.policy(trie), *rounds) for each in (first, second)]
    assert stats[0] == stats[1] and all(map(torch.equal, first.parameters, second.parameters))
    with pytest.raises(InputError):  # of another policy
        Learner(adapted_policy("gpt2")[0], lr=1.0, epochs=1).load_state(arrays, numbers)
