"""Exactness on a real language model: runs where REAL_MODEL names a model folder.

REAL_MODEL=FOLDER python -m pytest -q tests/test_real_model.py
"""

import os

import numpy as np
import pytest
import torch

from conftest import plain_passes, run_training
from envs import Condition, build_prompts
from lora import active_adapter, adapter_parameters, add_adapter, lora_layers, merge_adapter
from policy import Policy, check_causal, load_model

FOLDER = os.environ.get("REAL_MODEL")
pytestmark = pytest.mark.skipif(not FOLDER, reason="REAL_MODEL names no model folder")


@pytest.fixture
def real():
    """A function: free -> (Policy with an adapter that does something, Trie)."""
    model, tokenizer = load_model(FOLDER, "cpu")
    add_adapter(model, "player", 16, 32)
    torch.manual_seed(1)
    for parameter in adapter_parameters(model, "player")[1::2]:
        torch.nn.init.normal_(parameter, std=0.003)
    texts = build_prompts(Condition())
    names = Condition().actions

    def policy(free):
        policy = Policy(model, tokenizer, "player", free)
        torch.nn.init.normal_(policy.value_head.weight, std=0.1)
        return policy, policy.trie(texts, names)

    return policy


@torch.no_grad()
@pytest.mark.parametrize("free", [False, True])
def test_the_trie_equals_plain_passes(real, free):
    """All 16 prompts, with the adapter and without, values included."""
    policy, trie = real(free)
    check_causal(policy, trie)
    for reference in (False, True):
        expected = plain_passes(policy, trie.prompts, trie.answers, reference)
        for ours, theirs in zip(policy(trie, False, reference), expected):
            assert (ours - theirs).abs().max() < 1e-3
    moved = policy.probabilities(trie) - policy.reference(trie).exp().numpy()
    assert np.abs(moved).max() > 0.01  # no comparison of the base with itself


@torch.no_grad()
def test_peft_and_a_merged_model_give_the_same(real, tmp_path):
    """A run of two updates, read by PEFT and as a standalone model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = "--reward utilitarian --episodes 128 --batch 64 --device cpu --model".split()
    with torch.enable_grad():
        run_training(tmp_path / "run", *options, FOLDER)
    policy, trie = real(True)
    policy.load(tmp_path / "run")
    ids = torch.tensor([trie.prompts[0] + trie.answers[0]])
    with active_adapter(policy.model, "player"):
        ours, tuned = policy.model(ids).logits, policy.probabilities(trie)
    assert (ours - policy.model(ids).logits).abs().max() > 0.1

    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "run").eval()
    assert (theirs(ids).logits - ours).abs().max() < 1e-3
    merge_adapter(policy.model, "player")
    assert not lora_layers(policy.model)
    merged = Policy(policy.model, policy.tokenizer, None, policy.free)
    assert np.abs(merged.probabilities(trie) - tuned).max() < 1e-3
