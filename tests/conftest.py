"""Shared by the tests: small random models and their oracle, runs and processes, bad input."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "tiny")]
# A hub name must fail at once here, not after the retries of a machine without a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# The tests run in two processes: one thread each, also in the processes that they start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import shutil
import subprocess
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from envs import as_player, build_prompts
from lora import active_adapter, adapter_parameters, add_adapter
from policy import Policy
from trie import Trie

torch.set_num_threads(1)

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
FULL = {**GROUPED, "head_dim": 8}
GPT2 = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
CONFIGS = {
    "gemma2": lambda: transformers.Gemma2Config(**FULL, query_pre_attn_scalar=8),
    "gemma2-window": lambda: transformers.Gemma2Config(
        **FULL, query_pre_attn_scalar=8, sliding_window=7
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **FULL, query_pre_attn_scalar=8, sliding_window=7
    ),
    "llama": lambda: transformers.LlamaConfig(**FULL),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**FULL),
    "mistral": lambda: transformers.MistralConfig(**FULL, sliding_window=7),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
}


def random_model(kind, seed=0):
    """A small model of a real architecture.

    Its weights are large enough that its answers differ, unlike those of a fresh initialisation.
    """
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the embedded model, never adapted: do not add an adapter to it."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny", attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(ROOT / "tiny")


def adapted_model(kind, rank, alpha):
    """A random model with an adapter "player" whose B is not zero."""
    model = random_model(kind)
    add_adapter(model, "player", rank, alpha)
    torch.manual_seed(1)
    for parameter in adapter_parameters(model, "player")[1::2]:
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def player_of(model, tokenizer, condition, free=False, name=None, side=0):
    """What a model with adapter `name` plays in a Condition: [state, order, outcome]."""
    policy = Policy(model, tokenizer, name, free)
    trie = policy.trie(build_prompts(condition, side), condition.actions)
    return as_player(policy.probabilities(trie))


def shared_prefix_texts():
    """Six prompts that branch early and late, and three answers, two with the same first token.

    Token ids; of several lengths.
    """
    rng = np.random.default_rng(0)
    stem = rng.integers(3, 300, size=12).tolist()
    texts = [stem[: 4 + 2 * i] + rng.integers(3, 300, size=5 + i).tolist() for i in range(3)]
    texts += [text[:-2] + rng.integers(3, 300, size=4).tolist() for text in texts]
    return texts, [[5, 6], [5, 7, 9], [8]]


def adapted_policy(kind, free=False):
    """(the Policy of an adapted model, its value head not zero; the Trie of `shared_prefix_texts`).

    It has no tokenizer.
    """
    policy = Policy(adapted_model(kind, 4, 8), None, "player", free)
    torch.nn.init.normal_(policy.value_head.weight, std=0.3)
    torch.nn.init.normal_(policy.value_head.bias, std=0.3)
    return policy, Trie(*shared_prefix_texts())


def plain_passes(policy, texts, answers, reference=False):
    """What a policy must say, from one plain forward pass per prompt and one per answer.

    Returns log-probabilities [P, K] and values [P], with their graph.
    """
    model = policy.model
    body = model.base_model if model.base_model is not model else model.model
    log_probs, values = [], []
    with active_adapter(model, None if reference else policy.name):
        for text in texts:
            row = []
            for answer in answers:
                logits = model(torch.tensor([text + answer])).logits[0]
                log_prob = 0
                for n, token in enumerate(answer):
                    scores = logits[len(text) + n - 1]
                    shared = scores
                    if not policy.free:
                        rivals = [other for other in answers if other[:n] == answer[:n]]
                        shared = scores[sorted({other[n] for other in rivals})]
                    log_prob = log_prob + scores[token] - torch.logsumexp(shared, 0)
                row.append(log_prob)
            if policy.free:
                row.append(torch.log1p(-torch.stack(row).exp().sum()))
            log_probs.append(torch.stack(row))
            hidden = body(torch.tensor([text])).last_hidden_state[0, -1]
            values.append(hidden @ policy.value_head.weight[0] + policy.value_head.bias[0])
    return torch.stack(log_probs), torch.stack(values)


def run_training(out, *options):
    """A run in this process; its result.json."""
    train.main(["--out", str(out), *options])
    return read_json(out / "result.json")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of one update that several files share: read it, copy it, do not change it."""
    out = tmp_path_factory.mktemp("shared") / "run"
    run_training(out, "--reward", "utilitarian", "--episodes", "256")
    return out


def start_training(*options, processes=None):
    """train.py in a process of its own, or by torchrun in so many `processes`."""
    command = [sys.executable]
    if processes:  # --standalone: on a port that is free
        command += "-m torch.distributed.run --standalone --local-addr 127.0.0.1".split()
        command += ["--nproc-per-node", str(processes)]
    command += ["train.py", *options]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


def wait_for(path, process):
    """Until the process has written this file."""
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@contextmanager
def refused(capsys, *words):
    """What is done in this block ends with code 2 and one line on stderr that has all `words`.

    The progress bar does not count.
    """
    with pytest.raises(SystemExit) as stop:
        yield
    written = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in written if "%|" not in line and line.strip()]
    assert stop.value.code == 2 and len(lines) == 1, lines
    for word in words:
        assert word in lines[0]


def read_json(path):
    return json.loads(path.read_text())


def change_json(path, **changes):
    """Give the object in a JSON file other values."""
    path.write_text(json.dumps({**read_json(path), **changes}))


def copy_run(run, folder, **settings):
    """A run folder, copied, with other settings in its config.json. Returns the copy."""
    shutil.copytree(run, folder)
    change_json(folder / "config.json", **settings)
    return folder


def cut_file(path, size):
    """Leave the first `size` bytes of a file."""
    path.write_bytes(path.read_bytes()[:size])


def change_tensors(path, change):
    """Replace the dict of tensors in a safetensors file by change(dict); its metadata stays."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), path, metadata=metadata)


def narrow_matrices(path):
    """Take the last column of every matrix in a safetensors file away."""

    def narrow(tensors):
        return {k: t[:, :-1].contiguous() if t.ndim == 2 else t for k, t in tensors.items()}

    change_tensors(path, narrow)


def damaged_model(folder, change):
    """The embedded model, copied to `folder`, after change(folder). Returns the folder as a str."""
    shutil.copytree(ROOT / "tiny", folder, ignore=shutil.ignore_patterns("*.py", "*.md", "__*"))
    change(folder)
    return str(folder)
