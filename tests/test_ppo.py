"""The trie against plain forward passes, and PPO against a per-sample implementation written from the formulas."""

import math

import numpy as np
import pytest
import torch

from conftest import CONFIGS, random_model
from envs import payoff_array, prompts
from lora import adapter, adapter_parameters, add_adapter
from policy import Policy, Trie, checkpoint_layers, encode, log_illegal
from ppo import Batch, Learner, RunningMoments, adapt_kl_coef, gae, ppo_loss

NAMES = ("action1", "action2")


def shared_prefix_texts(count=6, seed=0):
    """Prompts that branch early and late, of different lengths, and three answers that share their first token."""
    rng = np.random.default_rng(seed)
    stem = rng.integers(3, 300, size=12).tolist()
    texts = [stem[:4 + 2 * (i % 3)] + rng.integers(3, 300, size=5 + i).tolist() for i in range(count // 2)]
    texts += [text[:-2] + rng.integers(3, 300, size=4).tolist() for text in texts]
    return texts, [[5, 6], [5, 7, 9], [8]]


def separate(model, name, texts, answers, free):
    """What the trie must give, one plain forward pass per prompt and answer: log-probabilities [P, A] (without illegal)."""
    rows = []
    for text in texts:
        row = []
        for answer in answers:
            with adapter(model, name):
                logits = model(torch.tensor([text + answer])).logits[0].float()
            total = 0
            for n, token in enumerate(answer):
                scores = logits[len(text) + n - 1]
                allowed = sorted({other[n] for other in answers if other[:n] == answer[:n]})
                total = total + scores[token] - torch.logsumexp(scores if free else scores[allowed], 0)
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def build(kind, free, texts, answers):
    model = random_model(kind)
    add_adapter(model, "player", 4, 8)
    torch.manual_seed(2)
    for parameter in adapter_parameters(model, "player")[1::2]:
        torch.nn.init.normal_(parameter, std=0.1)
    return model, Policy(model, "player", texts, answers, free)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_trie_equals_separate_passes(kind, free):
    texts, answers = shared_prefix_texts()
    model, policy = build(kind, free, texts, answers)
    weights = torch.randn(len(texts), len(answers), generator=torch.Generator().manual_seed(0))
    parameters = adapter_parameters(model, "player")

    table = policy()[0][:, :len(answers)]
    expected = separate(model, "player", texts, answers, free)
    assert (table - expected).abs().max() < 1e-4
    assert table.std() > 0.1                                                    # not a comparison of constants
    gradients = torch.autograd.grad((table * weights).sum(), parameters)
    references = torch.autograd.grad((expected * weights).sum(), parameters)
    assert max((a - b).abs().max() / (1 + b.abs().max()) for a, b in zip(gradients, references)) < 1e-4
    with torch.no_grad():
        assert (policy(reference=True)[0][:, :len(answers)] - separate(model, None, texts, answers, free)).abs().max() < 1e-4


def test_trie_equals_separate_passes_on_the_embedded_model(tiny):
    model, tokenizer = tiny
    names = ("moon7", "moonlit")  # several tokens each, and the first one in common
    texts, answers = encode(tokenizer, prompts(payoff_array("ipd"), names), names)
    for free in (False, True):
        with torch.no_grad():
            table = Policy(model, "player", texts, answers, free)()[0][:, :2]
            assert (table - separate(model, None, texts, answers, free)).abs().max() < 1e-4


def test_trie_shares_prefixes():
    trie = Trie([[1, 2, 3], [1, 2, 4]], [[5, 6], [5, 7]])
    # 1, 2, then 3 and 4, then 5 under each; the answers' last tokens need no node
    assert trie.tokens.tolist() == [[1, 2, 3, 5, 4, 5]] and trie.depth.tolist() == [[0, 1, 2, 3, 2, 3]]
    assert trie.keep.tolist() == [2, 3, 4, 5] and trie.branches.tolist() == [[0, 1], [2, 3]]
    assert trie.ancestors[0, 5].tolist() == [True, True, False, False, True, True]


def test_prompts_with_little_in_common_are_packed_apart():
    trie = Trie([[1, 9, 9, 9], [1, 2, 3, 4], [1, 2, 3]], [[5]])
    assert trie.tokens.tolist() == [[1, 2, 3, 4], [1, 9, 9, 9]]  # [1, 2, 3] is on the way to [1, 2, 3, 4]
    assert trie.keep.tolist() == [2, 3] and trie.branches.tolist() == [[3], [1], [0]]
    assert trie.ancestors[1].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_values_read_the_prompt_alone():
    texts, answers = shared_prefix_texts()
    model, policy = build("llama", False, texts, answers)
    torch.nn.init.normal_(policy.value_head.weight)
    torch.nn.init.normal_(policy.value_head.bias)
    with torch.no_grad(), adapter(model, "player"):
        hidden = torch.stack([model.model(torch.tensor([text])).last_hidden_state[0, -1] for text in texts])
    expected = hidden @ policy.value_head.weight[0] + policy.value_head.bias
    assert (policy()[1] - expected).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------------------ the boundary

def test_boundary_of_the_embedded_model(tiny):
    model, tokenizer = tiny
    texts, answers = encode(tokenizer, ["Hi."], ("moon7", "K"))
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi."}], add_generation_prompt=True)["input_ids"]
    assert texts[0] == asked and tokenizer.convert_ids_to_tokens(answers[0]) == ["moon", "##7"]


def byte_level_tokenizer(template=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(["Your answer: red or blue, action1 action2"] * 9, trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>", chat_template=template)


def test_without_a_template_the_space_belongs_to_the_answer():
    tokenizer = byte_level_tokenizer()
    texts, answers = encode(tokenizer, ["Your answer:"], ("red", "blue"))
    assert tokenizer.decode(texts[0]) == "Your answer:" and [tokenizer.decode(a) for a in answers] == [" red", " blue"]


def test_template_that_writes_a_space_before_the_answer():
    template = "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %} {{ m['content'] }}<s>{% endif %}{% endfor %}"
    tokenizer = byte_level_tokenizer(template)
    texts, answers = encode(tokenizer, ["Your answer:"], ("red", "blue"))
    assert tokenizer.decode(texts[0]) == "[Your answer:]" and tokenizer.decode(answers[0]) == " red"


@pytest.mark.parametrize("names", [("moon", "moon7"), ("moon7", "moon")])
def test_a_name_that_begins_another_is_refused(names, tiny):
    with pytest.raises(ValueError, match="told apart"):
        encode(tiny[1], ["Hi."], names)


# ----------------------------------------------------------------------------------------------------------- free sampling's rest

@pytest.mark.parametrize("legal", [1e-30, 1e-7, 0.3, 0.9, 1 - 1e-6, 1 - 1e-7, 1.0, 1 + 1e-7])
def test_log_illegal_is_stable(legal):
    log_probs = torch.log(torch.tensor([[legal * 0.75, legal * 0.25]], dtype=torch.float64)).float().requires_grad_()
    result = log_illegal(log_probs)
    result.backward()
    assert torch.isfinite(result).all() and torch.isfinite(log_probs.grad).all()
    if legal < 1 - 1e-5:
        assert result.item() == pytest.approx(math.log1p(-legal), rel=1e-5, abs=1e-6)
    else:
        assert result.item() < math.log(2e-6)


# --------------------------------------------------------------------------------------------------------------------------- PPO

def test_ppo_oracle():
    """Loss and gradient of the table form = a loop over samples, each with its own forward pass, in the formulas' own words."""
    texts, answers = shared_prefix_texts()
    model, policy = build("llama", False, texts, answers)
    torch.manual_seed(3)
    torch.nn.init.normal_(policy.value_head.weight, std=0.3)
    n, clip, vf_coef = 40, 0.2, 0.1
    prompt, action = torch.randint(len(texts), (n,)), torch.randint(len(answers), (n,))
    log_probs, values = (t.detach() for t in policy())
    batch = Batch(prompt, action, log_probs[prompt, action] + 0.3 * torch.randn(n), values[prompt] + 0.3 * torch.randn(n),
                  torch.randn(n), torch.randn(n))
    loss = ppo_loss(*policy(), batch, clip, vf_coef)[0]

    policy_terms, value_terms, clipped = [], [], 0
    for p, a, old_log_prob, old_value, advantage, target in zip(*(column.tolist() for column in batch)):
        log_prob = separate(model, "player", [texts[p]], answers, False)[0, a]
        with adapter(model, "player"):
            hidden = model.model(torch.tensor([texts[p]])).last_hidden_state[0, -1]
        value = hidden @ policy.value_head.weight[0] + policy.value_head.bias[0]
        ratio = torch.exp(log_prob - old_log_prob)
        limited = min(max(ratio, torch.tensor(1 - clip)), torch.tensor(1 + clip))
        policy_terms.append(-min(ratio * advantage, limited * advantage))
        near = min(max(value, torch.tensor(old_value - clip)), torch.tensor(old_value + clip))
        value_terms.append(max((value - target) ** 2, (near - target) ** 2) / 2)
        clipped += abs(ratio.item() - 1) > clip
    expected = sum(policy_terms) / n + vf_coef * sum(value_terms) / n

    assert 5 < clipped < n - 5                                              # the clip acts on some samples and not on others
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = torch.autograd.grad(loss, policy.parameters())
    references = torch.autograd.grad(expected, policy.parameters())
    assert max((a - b).abs().max() for a, b in zip(gradients, references)) < 1e-5


def test_update_oracle():
    """One `Learner.update` = reward normalisation, KL penalty, whitening and an Adam step, written out sample by sample."""
    texts, answers = shared_prefix_texts()
    rng = np.random.default_rng(0)
    prompt, action = rng.integers(len(texts), size=(8, 5)), rng.integers(len(answers), size=(8, 5))
    reward = rng.normal(2, 3, size=(8, 5))

    def learner():
        model, policy = build("llama", False, texts, answers)
        return Learner(policy, lr=1e-2, epochs=1, clip=0.2, kl_coef=0.3, kl_target=6.0, vf_coef=0.1, gamma=0.0)

    ours = learner()
    ours.act()
    stats = ours.update(prompt, action, reward)

    theirs = learner().policy
    log_probs, values = theirs()
    with torch.no_grad():
        reference = theirs(reference=True)[0]
    samples = [(p, a, (r - reward.mean()) / reward.std() - 0.3 * (log_probs[p, a] - reference[p, a]).item() - values[p].item())
               for p, a, r in zip(prompt.ravel(), action.ravel(), reward.ravel())]
    raw = np.array([advantage for _, _, advantage in samples])
    white = (raw - raw.mean()) / raw.std()
    loss = sum(-w * torch.exp(log_probs[p, a] - log_probs[p, a].item()) for (p, a, _), w in zip(samples, white)) / len(samples)
    loss = loss + 0.1 * sum((values[p] - values[p].item() - r) ** 2 / 2 for (p, _, _), r in zip(samples, raw)) / len(samples)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    loss.backward()
    optimizer.step()
    # Adam's first step is lr * sign(gradient): compare where the gradient is not rounding noise.
    for a, b in zip(ours.policy.parameters(), theirs.parameters()):
        clear = b.grad.abs() > 1e-5
        assert (a - b)[clear].abs().max() < 1e-4 if clear.any() else True
    kl = (log_probs.exp() * (log_probs - reference)).sum(1).detach().numpy()
    assert stats["kl"] == pytest.approx(kl[prompt.ravel()].mean(), rel=1e-4) and stats["ratio"] == pytest.approx(1)


def test_ratio_threshold_drops_the_update():
    texts, answers = shared_prefix_texts()
    _, policy = build("llama", False, texts, answers)
    learner = Learner(policy, 1e-2, 3, 0.2, 0.1, 6.0, 0.1, 0.0)
    learner.act()
    learner.log_probs = learner.log_probs - 5                       # as if the policy had moved by a factor of e^5 since
    before = [p.clone() for p in policy.parameters()]
    stats = learner.update(np.zeros((4, 5), int), np.zeros((4, 5), int), np.arange(20.0).reshape(4, 5))
    assert stats["ratio"] > 10 and all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_one_forward_pass_an_epoch():
    texts, answers = shared_prefix_texts()
    model, policy = build("llama", False, texts, answers)
    learner = Learner(policy, 1e-3, 2, 0.2, 0.1, 6.0, 0.1, 0.0)
    policy.reference  # one pass, once
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(3):
        learner.act()
        learner.update(np.zeros((1000, 5), int), np.zeros((1000, 5), int), np.ones((1000, 5)))
    assert len(passes) == 3 * 2


def test_gae_by_hand():
    rewards, values = np.array([[1.0, 2.0, 3.0]]), np.array([[0.5, 1.0, -1.0]])
    assert np.allclose(gae(rewards, values, 0), rewards - values)
    last = 3 + 1
    middle = 2 + 0.9 * -1 - 1 + 0.9 * 0.95 * last
    first = 1 + 0.9 * 1 - 0.5 + 0.9 * 0.95 * middle
    assert np.allclose(gae(rewards, values, 0.9), [[first, middle, last]])


def test_running_moments_equal_those_of_all_numbers():
    chunks = [np.random.default_rng(i).normal(i, 1 + i, size=(3, 7 + i)) for i in range(5)]
    moments = RunningMoments()
    for chunk in chunks:
        moments.update(chunk)
    everything = np.concatenate([chunk.ravel() for chunk in chunks])
    assert moments.mean == pytest.approx(everything.mean()) and moments.variance == pytest.approx(everything.var())


@pytest.mark.parametrize("kl, samples, expected", [(6, 80, 0.2), (0, 80, 0.2 * (1 - 0.2 * 0.008)), (60, 80, 0.2 * (1 + 0.2 * 0.008)),
                                                   (6.6, 100, 0.2 * 1.001), (0, 10**6, 0.2 * 0.8), (60, 10**6, 0.2 * 1.2)])
def test_kl_controller(kl, samples, expected):
    assert adapt_kl_coef(0.2, kl, 6, samples) == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------- prompts dealt out, layers recomputed

def one_update(kind, free, texts, answers, nodes=None, checkpointing=False):
    """The table, and all gradients of one update of the same rounds; lr is so small that every pass sees the same weights."""
    model, _ = build(kind, free, texts, answers)
    if checkpointing:
        checkpoint_layers(model)
    policy = Policy(model, "player", texts, answers, free, nodes)
    learner = Learner(policy, lr=1e-12, epochs=2, clip=0.2, kl_coef=0.3, kl_target=6.0, vf_coef=0.1, gamma=0.0)
    table = learner.act()
    rng = np.random.default_rng(0)
    shape = (40, 5)
    stats = learner.update(rng.integers(len(texts), size=shape), rng.integers(policy.outcomes, size=shape), rng.normal(size=shape))
    return policy, table, [parameter.grad for parameter in policy.parameters()], stats


@pytest.mark.parametrize("free", [False, True])
def test_a_node_budget_changes_nothing_but_the_passes(free):
    texts, answers = shared_prefix_texts()
    whole, table, gradients, stats = one_update("gemma3", free, texts, answers)
    budget = max(Trie([text], answers).tokens.numel() for text in texts) + 2
    cut, cut_table, cut_gradients, cut_stats = one_update("gemma3", free, texts, answers, nodes=budget)
    assert len(whole.shards) == 1 and len(cut.shards) > 1
    assert sorted(sum((rows for rows, *_ in cut.shards), [])) == list(range(len(texts)))
    assert all(trie.tokens.numel() <= budget for _, trie, _ in cut.shards)
    assert np.abs(table - cut_table).max() < 1e-5 and stats == pytest.approx(cut_stats, rel=1e-3, abs=1e-5)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(gradients, cut_gradients))


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_checkpointing_changes_nothing_but_the_memory(kind):
    texts, answers = shared_prefix_texts()
    _, table, gradients, _ = one_update(kind, False, texts, answers)
    _, other_table, other_gradients, _ = one_update(kind, False, texts, answers, checkpointing=True)
    assert np.array_equal(table, other_table)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(gradients, other_gradients))


def test_not_finite_gradients_are_skipped_and_counted():
    texts, answers = shared_prefix_texts()
    model, policy = build("llama", False, texts, answers)
    learner = Learner(policy, lr=1e-2, epochs=2, clip=0.2, kl_coef=0.1, kl_target=6.0, vf_coef=0.1, gamma=0.0)
    rounds = np.zeros((4, 5), int), np.zeros((4, 5), int), np.arange(20.0).reshape(4, 5)
    parameters = policy.parameters()
    handle = parameters[0].register_hook(lambda gradient: gradient * float("nan"))
    before = [parameter.detach().clone() for parameter in parameters]
    for count in range(1, 10):
        learner.act()
        assert learner.update(*rounds)["skipped"] == count
    assert all(torch.equal(a, b) for a, b in zip(before, parameters)) and learner.kl_coef == 0.1
    learner.act()
    with pytest.raises(FloatingPointError):  # the tenth in a row
        learner.update(*rounds)
    handle.remove()
    learner.act()
    assert learner.update(*rounds)["skipped"] == 10 and learner.skipped_in_a_row == 0
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters))
