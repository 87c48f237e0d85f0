"""The trie against plain passes, forward and backward; where an answer starts; free sampling."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import CONFIGS, adapted_policy, plain_passes, random_model, shared_prefix_texts
from lora import add_adapter
from models import checkpoint_layers, encode
from policy import Policy, log_illegal
from ppo import Learner, act
from prompts import Condition, build_prompts
from trie import Trie


def largest_difference(a, b):
    return max((x - y).abs().max() for x, y in zip(a, b))


# -------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_and_backward_equal_plain_passes(kind, free):
    texts, answers = shared_prefix_texts()
    policy = adapted_policy(kind, free)
    expected = plain_passes(policy, texts, answers)
    table = policy.forward()
    assert largest_difference(table[:2], expected) < 1e-4
    assert table.log_probs.std() > 0.1 and table.values.std() > 0.1  # no comparison of constants
    with torch.no_grad():
        reference, _ = plain_passes(policy, texts, answers, reference=True)
    assert np.abs(policy.reference - reference.numpy()).max() < 1e-4

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator) for x in expected]
    loss = sum((weight * x).sum() for weight, x in zip(weights, expected))
    gradients = torch.autograd.grad(loss, policy.parameters())
    for keep_graph in (True, False):
        for parameter in policy.parameters():
            parameter.grad = None
        policy.backward(policy.forward(keep_graph=keep_graph), weights)
        for parameter, gradient in zip(policy.parameters(), gradients):
            error = (parameter.grad - gradient).abs().max()
            assert error / (1 + gradient.abs().max()) < 1e-4


def test_a_layer_that_does_not_run_has_a_gradient_of_zero():
    model = random_model("llama")
    model.unused = torch.nn.Linear(4, 4)
    add_adapter(model, "player", 4, 8)
    policy = Policy(model, "player", *shared_prefix_texts())
    table = policy.forward()
    policy.backward(table, [torch.ones_like(x) for x in table[:2]])
    for name in "AB":
        assert (getattr(model.unused, name)["player"].grad == 0).all()


@pytest.mark.parametrize("free", [False, True])
def test_forward_equals_plain_passes_on_the_embedded_model(free, tiny):
    model, tokenizer = tiny
    names = ("moon7", "moonlit")  # several tokens each, and the first one in common
    texts, answers = encode(tokenizer, build_prompts(Condition(names=names)), names)
    policy = Policy(model, "player", texts, answers, free)
    with torch.no_grad():
        expected = plain_passes(policy, texts, answers)
    assert largest_difference(policy.forward()[:2], expected) < 1e-4


# ---------------------------------------------------------------------------------------- the trie


def test_trie_shares_prefixes():
    trie = Trie([[1, 2, 3], [1, 2, 4]], [[5, 6], [5, 7]])
    # 1, 2, then 3 and 4, then 5 under each; the answers' last tokens need no node.
    assert trie.tokens.tolist() == [[1, 2, 3, 5, 4, 5]]
    assert trie.depth.tolist() == [[0, 1, 2, 3, 2, 3]]
    assert trie.keep.tolist() == [2, 3, 4, 5]
    assert trie.branches.tolist() == [[0, 1], [2, 3]]
    assert trie.ancestors[0, 5].tolist() == [True, True, False, False, True, True]
    assert trie.paths == [[(0, [5]), (1, [6])], [(0, [5]), (1, [7])]]
    assert trie.children == [[5], [6, 7]]


def test_prompts_with_little_in_common_are_packed_apart():
    trie = Trie([[1, 9, 9, 9], [1, 2, 3, 4], [1, 2, 3]], [[5]])
    # [1, 2, 3] is on the way to [1, 2, 3, 4].
    assert trie.tokens.tolist() == [[1, 2, 3, 4], [1, 9, 9, 9]]
    assert trie.keep.tolist() == [2, 3]
    assert trie.branches.tolist() == [[3], [1], [0]]
    seen = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert trie.ancestors[1].int().tolist() == seen


def test_trie_with_endings():
    """After the whole answer comes one of two tokens: one more step, at a node of its own."""
    trie = Trie([[1, 2]], [[5], [6]], endings=(8, 9))
    assert trie.tokens.tolist() == [[1, 2, 5, 6]]
    assert trie.paths == [[(0, [5]), (1, [8, 9])], [(0, [6]), (2, [8, 9])]]


def test_gradient_of_the_illegal_answer():
    """d log P(illegal) is the mean of d log P(token) over the illegal tokens, by their chances."""
    model = random_model("llama")
    policy = Policy(model, "none", [[3, 4, 5]], [[6], [7]], free=True)
    parameter = model.get_input_embeddings().weight
    log_probs, _ = policy.forward_shard(policy.shards[0].trie, policy.shards[0].inputs)
    [gradient] = torch.autograd.grad(log_probs[0, 2], parameter)
    every = model(torch.tensor([[3, 4, 5]])).logits[0, -1].log_softmax(-1)
    illegal = [token for token in range(320) if token not in (6, 7)]
    chances = every[illegal].exp().detach()
    mean = (every[illegal] * chances / chances.sum()).sum()
    [expected] = torch.autograd.grad(mean, parameter)
    assert gradient.abs().max() > 1e-3
    assert (gradient - expected).abs().max() < 1e-4 * (1 + expected.abs().max())


# ------------------------------------------------------------------------- where the answer starts


def test_boundary_of_the_embedded_model(tiny):
    _, tokenizer = tiny
    texts, answers = encode(tokenizer, ["Hi."], ("moon7", "K"))
    chat = [{"role": "user", "content": "Hi."}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert texts[0] == asked
    assert tokenizer.convert_ids_to_tokens(answers[0]) == ["moon", "##7"]


def byte_level_tokenizer(template=None):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>"])
    core.train_from_iterator(["Your answer: red or blue, action1 action2"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>", chat_template=template)


def test_without_a_template_the_space_belongs_to_the_answer():
    tokenizer = byte_level_tokenizer()
    texts, answers = encode(tokenizer, ["Your answer:"], ("red", "blue"))
    assert tokenizer.decode(texts[0]) == "Your answer:"
    assert [tokenizer.decode(answer) for answer in answers] == [" red", " blue"]


SPACED_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %} {{ m['content'] }}<s>{% endif %}"
    "{% endfor %}"
)


def test_template_that_writes_a_space_before_the_answer():
    tokenizer = byte_level_tokenizer(SPACED_TEMPLATE)
    texts, answers = encode(tokenizer, ["Your answer:"], ("red", "blue"))
    assert tokenizer.decode(texts[0]) == "[Your answer:]"
    assert tokenizer.decode(answers[0]) == " red"


@pytest.mark.parametrize("names", [("moon", "moon7"), ("moon7", "moon")])
def test_a_name_that_is_how_another_starts_is_refused(names, tiny):
    with pytest.raises(ValueError, match="told apart"):
        encode(tiny[1], ["Hi."], names)


# ----------------------------------------------------------------------------------- free sampling


@pytest.mark.parametrize("legal", [1e-30, 1e-7, 0.3, 0.9, 1 - 1e-6, 1 - 1e-7, 1.0, 1 + 1e-7])
def test_log_illegal_is_stable(legal):
    probabilities = torch.tensor([[legal * 0.75, legal * 0.25]], dtype=torch.float64)
    log_probs = torch.log(probabilities).float().requires_grad_()
    result = log_illegal(log_probs)
    result.backward()
    assert torch.isfinite(result).all() and torch.isfinite(log_probs.grad).all()
    if legal < 1 - 1e-5:
        assert result.item() == pytest.approx(math.log1p(-legal), rel=1e-5, abs=1e-6)
    else:
        assert result.item() < math.log(2e-6)


# ------------------------------------------------------------ prompts dealt out, layers recomputed


def one_update(policy):
    """(Acted, stats) of one update, always of the same rounds.

    lr is so small that every pass sees the same weights. The gradients are left in the parameters.
    """
    learner = Learner(policy.parameters(), lr=1e-12, epochs=2, kl_coef=0.3)
    acted = act(policy)
    rng = np.random.default_rng(0)
    prompt = rng.integers(policy.n_prompts, size=(40, 5))
    action = rng.integers(policy.n_outcomes, size=(40, 5))
    return acted, learner.update(acted, prompt, action, rng.normal(size=(40, 5)))


def gradients(policy):
    return [parameter.grad for parameter in policy.parameters()]


@pytest.mark.parametrize("free", [False, True])
def test_a_node_budget_changes_nothing_but_the_passes(free):
    texts, answers = shared_prefix_texts()
    budget = max(Trie([text], answers).tokens.numel() for text in texts) + 2
    whole, cut = adapted_policy("gemma3", free), adapted_policy("gemma3", free, nodes=budget)
    assert len(whole.shards) == 1 and len(cut.shards) > 1
    rows = [row for shard in cut.shards for row in shard.rows]
    assert sorted(rows) == list(range(len(texts)))
    assert all(shard.trie.tokens.numel() <= budget for shard in cut.shards)

    acted, stats = one_update(whole)
    cut_acted, cut_stats = one_update(cut)
    assert largest_difference(acted.table[:2], cut_acted.table[:2]) < 1e-5
    assert stats == pytest.approx(cut_stats, rel=1e-3, abs=1e-5)
    assert largest_difference(gradients(whole), gradients(cut)) < 1e-5


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_checkpointing_changes_nothing_but_the_memory(kind):
    plain, checkpointed = adapted_policy(kind), adapted_policy(kind)
    checkpoint_layers(checkpointed.model)
    acted, _ = one_update(plain)
    checkpointed_acted, _ = one_update(checkpointed)
    for ours, theirs in zip(acted.table[:2], checkpointed_acted.table[:2]):
        assert torch.equal(ours, theirs)
    assert largest_difference(gradients(plain), gradients(checkpointed)) < 1e-6
