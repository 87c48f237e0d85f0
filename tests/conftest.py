"""Shared by the tests: the project root on the path, and small random models of the real architectures."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # a hub name must fail at once here, not after the retries of a machine without a network

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import (Gemma2Config, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config,
                          Qwen3Config)

SMALL = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=512)
CONFIGS = {
    "gemma2": lambda: Gemma2Config(**SMALL, query_pre_attn_scalar=8),
    "gemma2-window": lambda: Gemma2Config(**SMALL, query_pre_attn_scalar=8, sliding_window=7),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, query_pre_attn_scalar=8, sliding_window=7),
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=7),
    "gpt2": lambda: GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}),
}


def random_model(kind, seed=0):
    """A small model of a real architecture; weights large enough that its answers differ, unlike a fresh initialisation's."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    attention = "eager" if kind.startswith("gemma2") else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the embedded model, never adapted: do not add an adapter to it."""
    return (AutoModelForCausalLM.from_pretrained(ROOT / "tiny", attn_implementation="sdpa").eval(),
            AutoTokenizer.from_pretrained(ROOT / "tiny"))


@contextmanager
def refused(capsys, *words):
    """What is done in this block ends with code 2 and one line on stderr, the progress bar apart, that has all `words` in it."""
    with pytest.raises(SystemExit) as stop:
        yield
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "%|" not in line and line.strip()]
    assert stop.value.code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), lines
