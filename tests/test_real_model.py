"""Exactness on a real language model: runs where REAL_MODEL names a model folder.

REAL_MODEL=FOLDER python -m pytest -q tests/test_real_model.py
"""

import os

import numpy as np
import pytest
import torch

from conftest import plain_passes, run_training
from lora import adapter, adapter_parameters, add_adapter, load_adapter
from models import encode, load_model
from policy import Policy
from prompts import Condition, build_prompts

FOLDER = os.environ.get("REAL_MODEL")
pytestmark = pytest.mark.skipif(not FOLDER, reason="REAL_MODEL names no model folder")


@pytest.fixture(scope="module")
def real():
    """(model, prompts, answers): with an adapter "player" that does something."""
    model, tokenizer = load_model(FOLDER, "cpu")
    add_adapter(model, "player", 16, 32)
    torch.manual_seed(1)
    for parameter in adapter_parameters(model, "player")[1::2]:
        torch.nn.init.normal_(parameter, std=0.003)
    condition = Condition()
    return model, *encode(tokenizer, build_prompts(condition), condition.names)


@pytest.mark.parametrize("free", [False, True])
def test_the_trie_equals_plain_passes(real, free):
    """All 16 prompts, with the adapter and without, values included."""
    model, prompts, answers = real
    policy = Policy(model, "player", prompts, answers, free)
    torch.nn.init.normal_(policy.value_head.weight, std=0.1)
    for reference in (False, True):
        with torch.no_grad():
            log_probs, values = plain_passes(policy, prompts, answers, reference)
        table = policy.forward(reference, keep_graph=False)
        assert (table.log_probs - log_probs).abs().max() < 1e-3
        assert (table.values - values).abs().max() < 1e-3
    tuned, untuned = policy.probabilities(), policy.probabilities(reference=True)
    assert np.abs(tuned - untuned).max() > 0.01  # no comparison of the base with itself


def test_peft_and_merge_give_the_same(real, tmp_path):
    """A run of two updates, read by PEFT and as the standalone model of --merge."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, prompts, answers = real
    options = "--reward utilitarian --episodes 128 --batch 64 --merge --model".split()
    run_training(tmp_path / "run", *options, FOLDER)
    load_adapter(model, "trained", tmp_path / "run")
    ids = torch.tensor([prompts[0] + answers[0]])
    with torch.no_grad(), adapter(model, "trained"):
        ours = model(ids).logits
    with torch.no_grad(), adapter(model, None):
        base = model(ids).logits
    assert (ours - base).abs().max() > 0.1

    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "run").eval()
    with torch.no_grad():
        assert (theirs(ids).logits - ours).abs().max() < 1e-3
    del theirs

    merged, _ = load_model(tmp_path / "run" / "merged", "cpu")
    tables = []
    for network, name in ((model, "trained"), (merged, None)):
        tables.append(Policy(network, name, prompts, answers, True).probabilities())
    assert np.abs(tables[0] - tables[1]).max() < 1e-3
