"""Model folders of kinds that need care: experts, routers, towers, dropout, several hidden states.

Small, with random weights.
"""

import time

import huggingface_hub
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import conftest
import lora
import policy as policies
from conftest import FULL, GROUPED, ROOT, SMALL, plain_passes
from envs import Condition, build_prompts
from errors import InputError
from lora import active_adapter, add_adapter
from nf4 import NF4Linear, is_linear, quantise_layers
from policy import Policy, check_causal, check_runs, checkpoint_layers, load_model
from trie import Trie

TEXTS, ANSWERS = conftest.shared_prefix_texts()
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
LAYERS = {**FULL, **WINDOW, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8}
TOWER = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "max_position_embeddings")}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
LLAMA4 = {
    "intermediate_size_mlp": 48,
    "no_rope_layers": [1, 1],
    "layer_types": ["full_attention"] * 2,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPT = {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5}

KINDS = {
    "mixtral": lambda: transformers.MixtralConfig(**FULL, **EXPERTS, router_jitter_noise=0.5),
    "gpt_oss": lambda: transformers.GptOssConfig(**FULL, **EXPERTS, sliding_window=7),
    "phimoe": lambda: transformers.PhimoeConfig(**GROUPED, **EXPERTS),
    "llama4": lambda: transformers.Llama4TextConfig(
        **FULL, **LLAMA4, **TOKENS, num_local_experts=4
    ),
    "opt": lambda: transformers.OPTConfig(**OPT),
    "falcon": lambda: transformers.FalconConfig(**SMALL, alibi=False),
    # Two layers of the four take keys and values of others.
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **{**LAYERS, "num_hidden_layers": 4, "layer_types": 2 * WINDOW["layer_types"]},
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0],
    ),
    "gemma3 with a tower": lambda: transformers.Gemma3Config(
        text_config={**FULL, **WINDOW, "query_pre_attn_scalar": 8},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
    ),
    "gemma4 with towers": lambda: transformers.Gemma4Config(
        text_config={**LAYERS, "global_head_dim": 8, "num_kv_shared_layers": 0},
        vision_config={
            **TOWER,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "use_clipped_linears": True,
        },
        audio_config=None,
    ),
}


def random_model(config):
    """Weights that are large enough for answers to differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def adapted_policy(model, free=True):
    """A Policy whose adapter and value head do something."""
    add_adapter(model, "player", 4, 8)
    torch.manual_seed(1)
    for parameter in lora.adapter_parameters(model, "player")[1::2]:
        torch.nn.init.normal_(parameter, std=0.1)
    policy = Policy(model, None, "player", free)
    torch.nn.init.normal_(policy.value_head.weight, std=0.3)
    return policy


def gradients(policy, table):
    """Of a table's log-probabilities and values, for each parameter: all of them have one."""
    generator = torch.Generator().manual_seed(0)
    loss = sum((torch.randn(x.shape, generator=generator) * x).sum() for x in table)
    with active_adapter(policy.model, policy.name):  # checkpointed layers run again
        return torch.autograd.grad(loss, policy.parameters())


def model_folder(folder, config, change=lambda folder: None):
    """A folder of the embedded model's tokenizer and random weights, after change(folder)."""

    def write(folder):
        config.vocab_size = len(AutoTokenizer.from_pretrained(ROOT / "tiny"))
        random_model(config).save_pretrained(folder)
        change(folder)

    return conftest.damaged_model(folder, write)


@pytest.mark.parametrize("kind", KINDS)
def test_trie_adapter_checkpointing_peft_and_merge(kind, tmp_path):
    """Equal to plain passes, forward and backward; each adapted layer is one that runs."""
    policy = adapted_policy(random_model(KINDS[kind]()))
    model = policy.model
    trie = Trie(TEXTS, ANSWERS)
    check_causal(policy, trie)
    table = policy(trie)
    expected = plain_passes(policy, TEXTS, ANSWERS)
    for ours, theirs in zip(table, expected):
        assert (ours - theirs).abs().max() < 1e-4 and ours.std() > 0.1
    kept = gradients(policy, table)
    for ours, theirs in zip(kept, gradients(policy, expected)):
        assert (ours - theirs).abs().max() < 1e-4 * (1 + theirs.abs().max())

    checkpoint_layers(model)
    again = policy(trie)
    assert all(map(torch.equal, again, table))
    assert all(map(torch.equal, gradients(policy, again), kept))

    ids = torch.tensor(TEXTS[:1])
    with torch.no_grad(), active_adapter(model, "player"):
        tuned = model(input_ids=ids).logits
    lora.save_adapter(model, "player", tmp_path)
    theirs = PeftModel.from_pretrained(random_model(KINDS[kind]()), tmp_path).eval()
    lora.merge_adapter(model, "player")
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - tuned).abs().max() < 1e-4
        assert (model(input_ids=ids).logits - tuned).abs().max() < 1e-4 * tuned.abs().max()


@pytest.mark.parametrize("kind", ["gemma3 with a tower", "gemma4 with towers"])
def test_towers_are_not_adapted(kind):
    model = random_model(KINDS[kind]())
    towers = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    add_adapter(model, "player", 4, 8)
    adapted = lora.lora_layers(model)
    assert any("vision" in path for path in towers) and not any("vision" in p for p in adapted)
    assert all(path.startswith("model.language_model.") for path in adapted)


def test_towers_in_4_bits_are_merged_into_a_plain_model():
    """quantise_layers replaces their layers, too; transformers reads no codes."""
    plain = random_model(KINDS["gemma3 with a tower"]())
    model = random_model(KINDS["gemma3 with a tower"]())
    quantise_layers(model, torch.float32)
    assert any("vision" in path and path.endswith("codes") for path in model.state_dict())
    add_adapter(model, "player", 4, 8)
    lora.merge_adapter(model, "player")
    assert {*model.state_dict()} == {*plain.state_dict()}


def test_a_head_by_the_name_of_decoder():
    config = transformers.ModernBertDecoderConfig(**SMALL, **TOKENS, global_attn_every_n_layers=2)
    model = random_model(config)
    add_adapter(model, "player", 4, 8)
    assert lora.coverage(model) == ""
    assert not isinstance(model.get_output_embeddings(), lora.LoRALinear)


def test_how_much_is_adapted_is_said(capsys, tmp_path):
    """Mixtral: a layer has four matrices of attention; four experts and a router are no layers."""
    attention = 2 * 32 * 32 + 2 * 32 * 16
    experts = 4 * 3 * 32 * 48
    router = 4 * 32
    share = attention / (attention + experts + router)
    names = [f"layers.*.mlp.{name}" for name in ("experts.gate_up_proj", "experts.down_proj")]
    said = f"{share:.0%} of the layers' weights, not {', '.join(names)}, layers.*.mlp.gate.weight\n"
    folder = model_folder(tmp_path / "model", KINDS["mixtral"]())
    for dtype in ("float32", "nf4"):
        model, _ = load_model(folder, "cpu", dtype)
        add_adapter(model, "player", 4, 8)
        assert lora.coverage(model).endswith(said) and "nf4" in lora.coverage(model)
        # What is not covered by the one is not covered by the other.
        in_float = [path for path, t in model.named_parameters() if t.ndim == 3]
        assert len(in_float) == 4
    for kind in ("opt", "falcon", "gemma3n", "gemma3 with a tower", "gemma4 with towers"):
        model = random_model(KINDS[kind]())
        add_adapter(model, "player", 4, 8)
        assert lora.coverage(model) == ""

    options = "--reward game --episodes 8 --batch 8 --prompt brief --device cpu --model"
    conftest.run_training(tmp_path / "run", *options.split(), folder)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["phimoe", "llama4"])
def test_a_router_is_no_plain_layer(kind):
    """It is a subclass of nn.Linear that returns several tensors: neither LoRA nor NF4 fit."""
    model = random_model(KINDS[kind]())
    routers = [m for path, m in model.named_modules() if path.endswith("router")]
    assert len(routers) == 2 and all(isinstance(router, torch.nn.Linear) for router in routers)
    assert not any(map(is_linear, routers))
    quantise_layers(model, torch.float32)
    policy = adapted_policy(model)
    kept = {path.rpartition(".")[2] for path in lora.lora_layers(model)}
    assert {"q_proj", "o_proj"} <= kept and "router" not in kept
    assert all(isinstance(layer.base, NF4Linear) for layer in lora.lora_layers(model).values())
    check_causal(policy, Trie(TEXTS, ANSWERS))


def test_only_the_same_product_is_a_plain_layer():
    class Same(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Clipped(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.clamp(-1, 1))

    class Normalised(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x / x.square().mean().sqrt())

    for dtype in (torch.float32, torch.bfloat16):
        assert is_linear(Same(64, 4, dtype=dtype))
        assert not is_linear(Clipped(64, 4, dtype=dtype))
        assert not is_linear(Normalised(64, 4, dtype=dtype))


def test_the_adapter_runs_before_anything_is_written():
    """A fault of LoRALinear comes out as it is."""
    policy = adapted_policy(random_model(KINDS["opt"]()))
    for layer in lora.lora_layers(policy.model).values():
        layer.B["player"] = torch.nn.Parameter(layer.B["player"].detach()[:-1])
    with pytest.raises(RuntimeError, match=r"must match|expanded size"):
        check_causal(policy, Trie(TEXTS, ANSWERS))


def test_router_logits_are_not_asked_for(tmp_path):
    """With them transformers computes a loss, which fails for a mask of its own."""

    def change(folder):
        conftest.change_json(folder / "config.json", output_router_logits=True)

    model, tokenizer = load_model(model_folder(tmp_path / "m", KINDS["mixtral"](), change), "cpu")
    policy = Policy(model, tokenizer, None, free=True)
    trie = policy.trie(build_prompts(Condition())[:2], ("action1", "action2"))
    check_runs(model, trie)
    check_causal(policy, trie)


def test_a_name_without_a_network_is_refused_at_once(monkeypatch, capfd):
    """Not after the hub library's retries, between which it sleeps, and in no lines of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(InputError, match="no such folder"):
        load_model("nobody/no-model-of-this-name")
    assert slept == []
    assert capfd.readouterr().err == ""


def test_bfloat16_on_a_cpu(tiny):
    """Its own numbers, within what 8 bits hold; the adapter and the table stay float32."""
    model, tokenizer = load_model("tiny", "cpu", "bfloat16")
    add_adapter(model, "player", 4, 8)
    policy = Policy(model, tokenizer, "player", free=True)
    trie = policy.trie(build_prompts(Condition()), ("action1", "action2"))
    check_causal(policy, trie)
    log_probs, values = policy(trie)
    exact = Policy(*tiny, None, free=True).probabilities(trie)
    assert log_probs.dtype == values.dtype == torch.float32
    assert abs(policy.probabilities(trie) - exact).max() < 0.05
    (log_probs.sum() + values.sum()).backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters() if p.grad is not None)


def test_a_template_with_a_system_turn(tiny):
    """What the template writes of its own accord stands before every prompt."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    tokenizer.chat_template = "moon sun " + tiny[1].chat_template
    prompts, answers = policies.encode(tokenizer, ["Hi.", "Your move:"], ("moon", "sun"))
    plain, expected = policies.encode(tiny[1], ["Hi.", "Your move:"], ("moon", "sun"))
    assert answers == expected
    before = [prompt[: len(prompt) - len(other)] for prompt, other in zip(prompts, plain)]
    assert before[0] == before[1] and len(before[0]) == 2
    assert [prompt[2:] for prompt in prompts] == plain


def test_a_head_of_its_own_beside_a_config_that_ties_it(tmp_path):
    """The weights are right, in a pass and in what is saved of it."""
    config = transformers.LlamaConfig(**FULL, tie_word_embeddings=False)
    plain = model_folder(tmp_path / "plain", config)

    def tie(folder):
        conftest.change_json(folder / "config.json", tie_word_embeddings=True)

    folder = model_folder(tmp_path / "tied", config, tie)
    model, _ = load_model(folder, "cpu")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.tensor(TEXTS[:1])
    with torch.no_grad():
        expected = load_model(plain, "cpu")[0](ids).logits
        assert torch.equal(model(ids).logits, expected) and torch.equal(again(ids).logits, expected)
